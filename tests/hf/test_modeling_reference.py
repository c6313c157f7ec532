"""The PyTorch model against a direct transcription of its definition, dense and in float64."""

import importlib
import itertools
import math

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra")
pytest.importorskip("transformers", reason="needs the hf extra")

modeling_moduleformer = importlib.import_module("mfjax.hf.modeling_moduleformer")
ModuleFormerConfig = modeling_moduleformer.ModuleFormerConfig
ModuleFormerForCausalLM = modeling_moduleformer.ModuleFormerForCausalLM
stick_breaking_attention = modeling_moduleformer.stick_breaking_attention
F = torch.nn.functional

torch.set_num_threads(1)

SMALL = {
  "vocab_size": 61,
  "n_embd": 16,
  "n_layer": 2,
  "att_hidden": 16,
  "ffd_hidden": 24,
  "gating_size": 8,
  "n_att_experts": 4,
  "n_mlp_experts": 6,
  "bos_token_id": 0,
  "eos_token_id": None,
}


def build(seed=0, **changed):
  torch.manual_seed(seed)
  model = ModuleFormerForCausalLM(ModuleFormerConfig(**SMALL | changed))
  with torch.no_grad():
    for parameter in model.parameters():  # The published start routes almost uniformly.
      parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim > 1 else 0.2))
  return model.eval()


def token_ids(batch=2, length=11, seed=1):
  return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


# The definition -----------------------------------------------------------------------------------


def attention(q, k, v, is_token):
  """Return [T, d] for one sequence and head, by products of what is left of the stick."""
  out = []
  for i in range(len(q)):
    rest, total = torch.ones(()).to(q), torch.zeros_like(v[0])
    for j in range(i, -1, -1):
      if is_token[j]:
        beta = torch.sigmoid(q[i] @ k[j] / math.sqrt(q.shape[1]))
        total = total + rest * beta * v[j]
        rest = rest * (1 - beta)
    out.append(total)
  return torch.stack(out)


def router_logits(p, x, gate_type):
  if gate_type == "linear":
    return x @ p["w_gate.0.weight"].T
  if gate_type == "gmm":
    z = F.normalize(x @ p["w_gate.weight"].T, dim=-1)
    return z @ F.normalize(p["expert_centroids"], dim=-1).T * p["temperature"].exp()
  z = F.gelu(x @ p["w_gate.0.weight"].T + p["w_gate.0.bias"])
  return z @ p["w_gate.3.weight"].T


def part(parameters, prefix):
  return {k.removeprefix(prefix): v for k, v in parameters.items() if k.startswith(prefix)}


def definition(model, ids, mask):
  """Return logits [B, T, V] and [(logits, expert ids) of every router] with [B, T, *]."""
  config = model.config
  parameters = {k: v.double() for k, v in model.named_parameters()}
  norm = lambda x, p: F.layer_norm(x, x.shape[-1:], p["weight"], p["bias"], 1e-5)  # noqa: E731
  h, routers = parameters["transformer.wte.weight"][ids], []
  for index in range(config.n_layer):
    layer = part(parameters, f"transformer.h.{index}.")
    x = norm(h, part(layer, "ln_1."))
    h = h + attention_experts(x, part(layer, "attn."), config, mask, routers)
    x, p = norm(h, part(layer, "ln_2.")), part(layer, "mlpf.")
    weights = combine_weights(x, part(p, "gate."), config, config.k_mlp, routers)
    hidden = F.gelu(torch.einsum("btd,edf->btef", x, p["experts.weight"]), approximate="tanh")
    h = h + torch.einsum("btef,efd,bte->btd", hidden, p["output_experts.weight"], weights)
  h = norm(h, part(parameters, "transformer.ln_f."))
  return h @ parameters["lm_head.weight"].T, routers


def combine_weights(x, gate, config, top_k, routers):
  logits = router_logits(gate, x, config.gate_type)
  probs = logits.softmax(-1)
  chosen = probs.topk(top_k).indices
  routers.append((logits, chosen))
  return probs * torch.zeros_like(probs).scatter(-1, chosen, 1)


def attention_experts(x, p, config, mask, routers):
  weights = combine_weights(x, part(p, "q_proj.gate."), config, config.k_att, routers)
  heads, width = config.n_head, config.att_hidden // config.n_head
  if "k_proj.weight" in p:
    k = x @ p["k_proj.weight"].T + p["k_proj.bias"]
    v = x @ p["v_proj.weight"].T + p["v_proj.bias"]
  else:
    k = v = x
  q = torch.einsum("btd,eda->btea", x, p["q_proj.experts.weight"])
  y = torch.zeros_like(x)
  for b, e, head in itertools.product(range(len(x)), range(config.n_att_experts), range(heads)):
    at = slice(head * width, (head + 1) * width)
    out = attention(q[b, :, e, at], k[b, :, at], v[b, :, at], mask[b])
    out = out @ p["q_proj.output_experts.weight"][e, at] * weights[b, :, e, None]
    y = y + F.pad(out[None], (0, 0, 0, 0, b, len(x) - 1 - b))
  return y


def aux_loss(routers, mask, kind):
  total, tokens = 0, mask.bool()
  for logits, chosen in routers:
    num_experts, logits, chosen = logits.shape[-1], logits[tokens], chosen[tokens]
    probs = logits.softmax(-1)
    p = probs.mean(0)
    if kind == "switch":
      share = F.one_hot(chosen, num_experts).double().mean((0, 1))
      total += num_experts * (p * share).sum() + 0.1 * logits.logsumexp(-1).square().mean()
    else:
      entropy = -(probs * probs.log()).sum(-1).mean()
      total += (p * (p + 1e-8).log()).sum() + entropy
  return total


# Comparisons --------------------------------------------------------------------------------------

VARIANTS = {
  "identity": {},
  "heads": {"n_head": 2},
  "wide": {"n_head": 2, "att_hidden": 24, "k_att": 3},
  "linear": {"gate_type": "linear", "k_mlp": 1},
  "gmm": {"gate_type": "gmm", "k_mlp": 4},
  "all_experts": {"k_att": 4, "k_mlp": 6},
  "switch": {"aux_loss_type": "switch", "k_att": 1, "k_mlp": 3},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_losses_and_gradients(variant, padded):
  model, ids = build(**VARIANTS[variant]), token_ids()
  mask = torch.ones_like(ids)
  if padded:
    mask[0, :4], mask[1, -3:] = 0, 0
  out = model(ids, attention_mask=mask if padded else None, output_router_logits=True)
  logits, routers = definition(model, ids, mask)
  expected_aux = aux_loss(routers, mask, model.config.aux_loss_type)
  tokens = mask.bool()
  torch.testing.assert_close(out.logits[tokens].double(), logits[tokens], rtol=1e-4, atol=1e-4)
  torch.testing.assert_close(out.aux_loss.double(), expected_aux, rtol=1e-5, atol=1e-5)
  direction = torch.randn_like(logits) * mask[..., None]
  parameters = list(model.parameters())
  actual = torch.autograd.grad((out.logits * direction).sum() + 9 * out.aux_loss, parameters)
  expected = torch.autograd.grad((logits * direction).sum() + 9 * expected_aux, parameters)
  for (name, _), a, b in zip(model.named_parameters(), actual, expected, strict=True):
    scale = float(b.abs().max()) + 1e-6
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("queries_per_block", [1, 3, 128])
@pytest.mark.parametrize("history", [0, 5])
def test_attention_in_blocks_of_queries(monkeypatch, queries_per_block, history):
  batch, length, slots, heads, width = 2, 10, 2, 2, 4
  keys = length + history
  monkeypatch.setattr(
    modeling_moduleformer, "_BLOCK_BYTES", queries_per_block * 4 * batch * heads * slots * keys
  )
  torch.manual_seed(2)
  q = torch.randn(batch, length, slots, heads, width, requires_grad=True)
  k, v = (torch.randn(batch, heads, keys, width, requires_grad=True) for _ in range(2))
  is_token = torch.rand(batch, keys) < 0.8
  out = stick_breaking_attention(q, k, v, is_token)

  def one(b, slot, head):
    fill = q.new_zeros(history, width)
    rows = torch.cat([fill, q[b, :, slot, head]]).double()
    return attention(rows, k[b, head].double(), v[b, head].double(), is_token[b])[history:]

  cells = itertools.product(range(batch), range(slots), range(heads))
  expected = torch.stack([one(*cell) for cell in cells]).unflatten(0, (batch, slots, heads))
  expected = expected.permute(0, 3, 1, 2, 4)
  torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
  direction = torch.randn_like(out)
  actual = torch.autograd.grad((out * direction).sum(), (q, k, v))
  wanted = torch.autograd.grad((expected * direction).sum(), (q, k, v))
  torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_attention_of_large_logits_and_many_keys():
  torch.manual_seed(3)
  q, k = torch.randn(1, 400, 1, 1, 8) * 8, torch.randn(1, 1, 400, 8) * 8
  out = stick_breaking_attention(q, k, k)
  expected = attention(q[0, :, 0, 0].double(), k[0, 0].double(), k[0, 0].double(), [True] * 400)
  torch.testing.assert_close(out[0, :, 0, 0].double(), expected, rtol=1e-4, atol=1e-4)


def test_no_output_depends_on_a_later_token():
  model, ids = build(n_head=2), token_ids(batch=1)
  embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
  out = model(inputs_embeds=embedded).logits
  for position in range(ids.shape[1]):
    (gradient,) = torch.autograd.grad(out[0, position].sum(), embedded, retain_graph=True)
    reached = gradient[0].abs().sum(-1) > 0
    assert reached[: position + 1].all()
    assert not reached[position + 1 :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
  model, ids = build(n_head=2), token_ids()
  expected = model(ids).logits
  actual = model.to(dtype)(ids).logits
  assert actual.dtype is dtype
  # A few tokens may change an expert on a near tie: most positions agree closely.
  error = (actual.float() - expected).abs().amax(-1) / expected.abs().amax()
  assert error.median() < 0.03


def test_the_grouped_product_is_the_loop(monkeypatch):
  model, ids = build(), token_ids(batch=3)
  expected = model(ids).logits
  monkeypatch.setattr(modeling_moduleformer, "_has_grouped_mm", lambda rows, weight: True)
  torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
