"""Training the exported PyTorch model: checkpointing, accumulation, autocast, Trainer, sampling."""

import collections
import importlib

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra")
transformers = pytest.importorskip("transformers", reason="needs the hf extra")

modeling_moduleformer = importlib.import_module("mfjax.hf.modeling_moduleformer")
reference = importlib.import_module("tests.hf.test_modeling_reference")
ModuleFormerConfig = modeling_moduleformer.ModuleFormerConfig
ModuleFormerForCausalLM = modeling_moduleformer.ModuleFormerForCausalLM
SMALL, build, token_ids = reference.SMALL, reference.build, reference.token_ids


def gradients(model, **inputs):
  model.zero_grad()
  model(**inputs).loss.backward()
  return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal(actual, expected, tolerance):
  for name, gradient in expected.items():
    scale = float(gradient.abs().max()) + 1e-6
    torch.testing.assert_close(
      actual[name], gradient, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
  model, ids = (
    build(n_head=2, aux_loss_weight=0.1, resid_pdrop=0.1, sample_topk=1).train(),
    token_ids(),
  )

  def run():
    torch.manual_seed(5)
    return gradients(model, input_ids=ids, labels=ids)

  expected = run()
  calls = collections.Counter()
  model.transformer.h[0].attn.register_forward_hook(lambda *_: calls.update(forward=1))
  model.activation_checkpointing_enable({"use_reentrant": reentrant})
  if reentrant:
    model.enable_input_require_grads()
  assert_equal(run(), expected, 1e-6)
  assert calls["forward"] == 2


def test_labels_of_minus_100_are_left_out():
  model, ids = build(), token_ids()
  labels = ids.clone()
  labels[:, :6] = -100
  logits = model(ids).logits[:, 5:-1]
  expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 6:].flatten())
  torch.testing.assert_close(model(ids, labels=labels).loss, expected)


@pytest.mark.parametrize("kind", ["mi", "switch"])
def test_aux_loss_enters_the_loss_with_its_weight(kind):
  model, ids = build(aux_loss_type=kind), token_ids()
  plain = model(ids, labels=ids)
  assert plain.aux_loss is None
  model.config.aux_loss_weight = 0.3
  out = model(ids, labels=ids)
  torch.testing.assert_close(out.loss, plain.loss + 0.3 * out.aux_loss)


def test_accumulated_losses_are_weighted_by_items():
  model, ids = build(aux_loss_weight=0.3), token_ids(batch=4)
  labels = ids.clone()
  labels[0, :7] = -100
  items = (labels[:, 1:] != -100).sum()
  parts, aux = 0, 0
  for rows in (slice(0, 1), slice(1, 4)):
    out = model(ids[rows], labels=labels[rows], num_items_in_batch=items)
    parts += out.loss
    aux += out.aux_loss * (labels[rows, 1:] != -100).sum() / items
  model.config.aux_loss_weight = 0.0
  torch.testing.assert_close(parts, model(ids, labels=labels).loss + 0.3 * aux)


@pytest.mark.parametrize("grouped", [False, True])
def test_autocast_trains_in_bfloat16(monkeypatch, grouped):
  model, ids = build(n_head=2).train(), token_ids()
  expected = gradients(model, input_ids=ids, labels=ids)
  monkeypatch.setattr(modeling_moduleformer, "_has_grouped_mm", lambda rows, weight: grouped)
  dtypes = set()
  for module in model.modules():
    if isinstance(module, modeling_moduleformer.ExpertLinear):
      module.register_forward_hook(lambda _, inputs, out: dtypes.add(out.dtype))
  with torch.autocast("cpu", dtype=torch.bfloat16):
    actual = gradients(model, input_ids=ids, labels=ids)
  assert dtypes == {torch.bfloat16}
  assert all(gradient.dtype is torch.float32 for gradient in actual.values())
  a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (actual, expected))
  assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98


def test_training_keeps_no_cache_unless_asked():
  model, ids = build().train(), token_ids()
  assert model(ids).past_key_values is None
  assert model(ids, use_cache=True).past_key_values is not None
  assert model.eval()(ids).past_key_values is not None


@pytest.mark.parametrize(("top_k", "drawn"), [(3, 1), (2, 2)])
def test_drawn_experts_follow_the_rest_of_the_probabilities(top_k, drawn):
  config = ModuleFormerConfig(**SMALL | {"sample_topk": drawn, "k_att": 3, "k_mlp": 3})
  router = modeling_moduleformer.Router(config, 6, top_k).train()
  probs = torch.tensor([0.4, 0.05, 0.25, 0.15, 0.1, 0.05]).repeat(20_000, 1)
  torch.manual_seed(0)
  ids = router._choose(probs)
  assert all(len(row.unique()) == top_k for row in ids[:50])
  best = {0, 2} if top_k == 3 else set()
  assert all(best <= set(row.tolist()) for row in ids[:50])
  first = ids[:, top_k - drawn].bincount(minlength=6) / len(ids)
  rest = probs[0] * torch.tensor([i not in best for i in range(6)])
  torch.testing.assert_close(first, rest / rest.sum(), rtol=0, atol=0.02)
  assert torch.equal(router.eval()._choose(probs), probs.topk(top_k).indices)


def test_published_initialisation():
  torch.manual_seed(0)
  wide = {"n_embd": 64, "ffd_hidden": 128, "att_hidden": 64, "gating_size": 64, "n_head": 2}
  state = ModuleFormerForCausalLM(ModuleFormerConfig(**SMALL | wide)).state_dict()
  for name, value in state.items():
    if "experts.weight" in name:
      bound = 1 / value.shape[1]
      assert bound * 0.98 < value.abs().max() <= bound
      assert abs(float(value.std()) - bound / 3**0.5) < 0.02 * bound
    elif name.endswith("bias"):
      assert not value.any()
    elif ".ln_" in name:
      assert (value == 1).all()
    else:
      assert abs(float(value.std()) - 0.02) < 0.003, name
  gmm = ModuleFormerForCausalLM(ModuleFormerConfig(**SMALL | wide | {"gate_type": "gmm"}))
  gate = gmm.transformer.h[0].mlpf.gate
  assert 0.8 < gate.expert_centroids.std() < 1.2
  assert not gate.temperature.any()


def test_trainer_accumulation_equals_the_big_batch(tmp_path):
  pytest.importorskip("accelerate", reason="Trainer needs it")
  ids = token_ids(batch=4)
  mask = torch.ones_like(ids)
  mask[0, :5], mask[2, :2] = 0, 0
  labels = torch.where((mask == 0) | (ids % 5 == 0), -100, ids)
  columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
  rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

  def train(batch_size, steps):
    model = build(seed=3, n_head=2)
    arguments = transformers.TrainingArguments(
      output_dir=str(tmp_path),
      per_device_train_batch_size=batch_size,
      gradient_accumulation_steps=steps,
      max_steps=2,
      learning_rate=0.05,
      optim="sgd",
      max_grad_norm=0,
      lr_scheduler_type="constant",
      report_to=[],
      save_strategy="no",
      use_cpu=True,
      disable_tqdm=True,
      dataloader_pin_memory=False,
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    return model.state_dict()

  by_hand = build(seed=3, n_head=2)
  optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
  for _ in range(2):
    optimizer.zero_grad()
    by_hand(**columns).loss.backward()
    optimizer.step()
  for state in (train(4, 1), train(1, 4)):
    for name, value in by_hand.state_dict().items():
      torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
