"""The exported PyTorch model as a user of transformers has it: numbers, generation, saving."""

import functools
import importlib
import json
import pathlib
import shutil
import socket

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra")
transformers = pytest.importorskip("transformers", reason="needs the hf extra")

load_file = importlib.import_module("safetensors.torch").load_file
configuration_moduleformer = importlib.import_module("mfjax.hf.configuration_moduleformer")
modeling_moduleformer = importlib.import_module("mfjax.hf.modeling_moduleformer")
AutoModelForCausalLM = transformers.AutoModelForCausalLM
ModuleFormerForCausalLM = modeling_moduleformer.ModuleFormerForCausalLM

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
CASES = ["linear_gate", "molm_like", "multihead"]
AUTO_MAP = {
  "AutoConfig": "configuration_moduleformer.ModuleFormerConfig",
  "AutoModelForCausalLM": "modeling_moduleformer.ModuleFormerForCausalLM",
}
# Recorded configs name an end-of-text token beyond their small vocabularies.
TOKENS = {"bos_token_id": 0, "eos_token_id": None}

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def no_network():
  with pytest.MonkeyPatch.context() as patch:

    def connect(*args):
      raise AssertionError(f"a connection to {args[1:]}")

    patch.setattr(socket.socket, "connect", connect)
    yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """Return {case: a directory as `mfjax export` writes it}."""
  directories = {}
  for case in CASES:
    directories[case] = directory = tmp_path_factory.mktemp(case)
    for module in (configuration_moduleformer, modeling_moduleformer):
      shutil.copy(module.__file__, directory)
    shutil.copy(GOLDEN / case / "model.safetensors", directory)
    config = json.loads((GOLDEN / case / "config.json").read_text())
    config |= {"auto_map": AUTO_MAP, **TOKENS}
    (directory / "config.json").write_text(json.dumps(config))
  return directories


@pytest.fixture(params=CASES)
def case(request, exported):
  """Return the model loaded as a user loads it, and the recorded arrays."""
  model = AutoModelForCausalLM.from_pretrained(exported[request.param], trust_remote_code=True)
  assert type(model).__module__.startswith("transformers_modules")
  return model, recorded(request.param)


@functools.cache
def recorded(name):
  return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / name / "expected.npz").items()}


def load(name):
  config = json.loads((GOLDEN / name / "config.json").read_text()) | TOKENS
  model = ModuleFormerForCausalLM(configuration_moduleformer.ModuleFormerConfig(**config))
  model.load_state_dict(load_file(GOLDEN / name / "model.safetensors"), strict=True)
  return model.eval()


def assert_close(actual, expected, relative=1e-4):
  difference = (actual.detach().double() - expected.double()).abs().max()
  assert difference <= relative * expected.abs().max(), difference


def generate(model, ids, **options):
  new = model.generate(ids, **{"max_new_tokens": 8, "do_sample": False, **options})
  return new[:, ids.shape[1] :]


# Recorded numbers ---------------------------------------------------------------------------------


def test_forward_and_losses(case):
  model, expected = case
  ids = expected["input_ids"]
  out = model(ids, labels=ids, output_router_logits=True, output_hidden_states=True)
  assert_close(out.logits, expected["logits"])
  assert_close(out.hidden_states[-1], expected["hidden"])
  assert_close(out.loss, expected["loss"])
  assert_close(out.aux_loss, expected["aux_loss"])
  config = model.config
  assert len(out.hidden_states) == config.n_layer + 1
  assert len(out.router_logits) == 2 * config.n_layer
  assert out.router_logits[1].shape == (ids.numel(), config.n_mlp_experts)
  assert model(ids).hidden_states is None
  assert model(ids).router_logits is None


def test_padded_logits(case):
  model, expected = case
  mask = expected["attention_mask"]
  logits = model(expected["input_ids"], attention_mask=mask).logits
  assert_close(logits[mask.bool()], expected["padded_logits"][mask.bool()])


def test_greedy_tokens_with_and_without_cache(case):
  model, expected = case
  prompt = expected["input_ids"][:, : expected["prompt_len"]]
  for use_cache in (True, False):
    tokens = generate(model, prompt, use_cache=use_cache)
    assert torch.equal(tokens, expected["greedy_tokens"])


def test_every_gradient(case):
  model, expected = case
  ids = expected["input_ids"]
  out = model(ids, labels=ids, output_router_logits=True)
  (out.loss + 0.1 * out.aux_loss).backward()
  gradients = {f"grad:{name}": value.grad for name, value in model.named_parameters()}
  assert gradients.keys() == {name for name in expected if name.startswith("grad:")}
  for name, gradient in gradients.items():
    assert_close(gradient, expected[name])


# The cache and padding ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(37,), (30, 7), (20, 1, 1, 1, 14)])
@pytest.mark.parametrize("name", ["molm_like", "multihead"])
def test_cached_chunks_equal_the_whole(name, chunks):
  model, expected = load(name), recorded(name)
  cache, logits = transformers.DynamicCache(), []
  for ids in expected["input_ids"].split(chunks, dim=1):
    logits.append(model(ids, past_key_values=cache, use_cache=True).logits)
  assert_close(torch.cat(logits, 1), expected["logits"])


def test_the_cache_has_two_names():
  model, ids = load("multihead"), recorded("multihead")["input_ids"]
  last = []
  for name in ("cache", "past_key_values"):
    cache = transformers.DynamicCache()
    for part in ids.split((30, 7), dim=1):
      out = model(part, **{name: cache}, use_cache=True)
    last.append(out.logits)
  assert torch.equal(*last)
  assert cache.get_seq_length() == 37
  with pytest.raises(ValueError, match="give either cache or past_key_values"):
    model(ids, cache=cache, past_key_values=cache)


def test_identical_keys_and_values_are_cached_once():
  expected = recorded("molm_like")
  layers = load("molm_like")(expected["input_ids"]).past_key_values.layers
  assert {layer.keys.shape for layer in layers} == {(3, 1, 37, 64)}
  assert {layer.values.numel() for layer in layers} == {0}
  layers = load("multihead")(recorded("multihead")["input_ids"]).past_key_values.layers
  assert {layer.values.shape for layer in layers} == {(3, 4, 37, 8)}


@pytest.mark.parametrize("name", CASES)
def test_a_padded_batch_generates_what_each_prompt_does_alone(name):
  model, ids = load(name), recorded(name)["input_ids"]
  lengths = (19, 7, 13)
  batch, mask = torch.zeros(3, 19, dtype=torch.long), torch.zeros(3, 19, dtype=torch.long)
  for row, length in enumerate(lengths):
    batch[row, 19 - length :] = ids[row, :length]
    mask[row, 19 - length :] = 1
  together = generate(model, batch, attention_mask=mask)
  for row, length in enumerate(lengths):
    assert torch.equal(together[row : row + 1], generate(model, ids[row : row + 1, :length]))


@pytest.mark.parametrize("name", CASES)
def test_neither_padding_changes_anything(name):
  model, ids = load(name), recorded(name)["input_ids"][:, :20]
  alone = model(ids).logits
  for left, right in ((5, 0), (0, 6), (3, 4)):
    padded = torch.nn.functional.pad(ids, (left, right), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
    logits = model(padded, attention_mask=mask).logits
    assert_close(logits[:, left : left + 20], alone, 1e-5)


def test_a_row_of_padding_is_finite():
  model, ids = load("multihead"), recorded("multihead")["input_ids"]
  mask = torch.ones_like(ids)
  mask[1] = 0
  out = model(ids, attention_mask=mask)
  assert out.logits.isfinite().all()
  out.logits.square().sum().backward()
  assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_sampled_and_beam_generation():
  model, ids = load("molm_like"), recorded("molm_like")["input_ids"][:, :10]
  torch.manual_seed(0)
  sampled = generate(model, ids, do_sample=True, top_k=20, num_return_sequences=2)
  assert sampled.shape == (6, 8)
  assert ((sampled >= 0) & (sampled < model.config.vocab_size)).all()
  assert not torch.equal(sampled[0], sampled[1])
  one, beams = generate(model, ids), generate(model, ids, num_beams=4)

  def log_likelihood(new):
    labels = torch.cat([torch.full_like(ids, -100), new], 1)
    whole = torch.cat([ids, new], 1)
    pairs = zip(whole, labels, strict=True)
    return -sum(float(model(a[None], labels=b[None]).loss.detach()) for a, b in pairs)

  assert log_likelihood(beams) >= log_likelihood(one) - 1e-4


def test_logits_only_where_asked():
  model, expected = load("multihead"), recorded("multihead")
  logits = model(expected["input_ids"], logits_to_keep=3).logits
  assert_close(logits, expected["logits"][:, -3:])
  embedded = model.get_input_embeddings()(expected["input_ids"])
  assert_close(model(inputs_embeds=embedded, return_dict=False)[0], expected["logits"])


def test_a_vocabulary_can_grow():
  model, ids = load("multihead"), recorded("multihead")["input_ids"]
  model.resize_token_embeddings(104, mean_resizing=False)
  logits = model(ids).logits
  assert logits.shape[-1] == model.config.vocab_size == 104
  assert_close(logits[..., :101], recorded("multihead")["logits"])


# Files --------------------------------------------------------------------------------------------


def test_saved_files_are_the_published_format(case, tmp_path):
  model, expected = case
  model.save_pretrained(tmp_path)
  name = next(n for n in CASES if torch.equal(recorded(n)["logits"], expected["logits"]))
  saved, original = (load_file(d / "model.safetensors") for d in (tmp_path, GOLDEN / name))
  assert saved.keys() == original.keys()
  for key, tensor in original.items():
    assert saved[key].dtype == tensor.dtype
    assert torch.equal(saved[key], tensor)
  again, report = AutoModelForCausalLM.from_pretrained(
    tmp_path, trust_remote_code=True, output_loading_info=True
  )
  assert not any(report.values()), report
  assert torch.equal(again(expected["input_ids"]).logits, model(expected["input_ids"]).logits)


def test_sharded_bfloat16_files(tmp_path):
  model = load("molm_like").to(torch.bfloat16)
  model.save_pretrained(tmp_path, max_shard_size="200KB")
  assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
  again = ModuleFormerForCausalLM.from_pretrained(tmp_path, dtype="auto")
  assert again.dtype is torch.bfloat16
  state = again.state_dict()
  assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
  tensors = {k: v for f in tmp_path.glob("*.safetensors") for k, v in load_file(f).items()}
  assert tensors["transformer.h.3.attn.cum_weight"].dtype is torch.bfloat16
  assert tensors["transformer.h.3.attn.mask"].dtype is torch.int8


def test_a_strict_load_misses_nothing_silently():
  model = load("molm_like")
  state = load_file(GOLDEN / "molm_like" / "model.safetensors")
  del state["transformer.h.1.mlpf.gate.w_gate.3.weight"]
  state["transformer.h.1.attn.k_proj.weight"] = torch.zeros(1)
  with pytest.raises(RuntimeError, match=r"(?s)Missing.*w_gate\.3\.weight.*Unexpected.*k_proj"):
    model.load_state_dict(state)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"k_att": 17}, "k_att=17 must be from 1 to n_att_experts=16"),
    ({"k_mlp": 0}, "k_mlp=0 must be from 1"),
    ({"sample_topk": 3}, "sample_topk=3 must be from 0 to k_att=2"),
    ({"gate_type": "top1"}, "gate_type='top1' is none of mlp, linear, gmm"),
    ({"aux_loss_type": "none"}, "aux_loss_type='none' is none of mi, switch"),
    ({"n_head": 3}, "att_hidden=1024 is not divisible by n_head=3"),
    ({"activation_function": "relu"}, "activation_function='relu'"),
    ({"attn_pdrop": 0.1}, "attn_pdrop=0.1 is not supported"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
  ],
)
def test_config_errors(changed, message):
  with pytest.raises(ValueError, match=message):
    configuration_moduleformer.ModuleFormerConfig(**changed)


def test_forward_errors():
  model, ids = load("linear_gate"), recorded("linear_gate")["input_ids"]
  for options, message in (
    ({"output_attentions": True}, "output_attentions=True"),
    ({"attention_mask": torch.ones(3, 5)}, r"shape \(3, 5\): it must be \[batch, 29\]"),
    ({"inputs_embeds": torch.zeros(3, 29, 32)}, "either input_ids or inputs_embeds"),
    ({"past_key_values": transformers.StaticCache(model.config, max_cache_len=64)}, "StaticCache"),
  ):
    with pytest.raises(ValueError, match=message):
      model(ids, **options)
