"""`mfjax export`: bytes, shards, configuration, tokenizer, card; and PyTorch that loads it."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from mfjax import model, sharding
from mfjax.config import DataConfig, KernelConfig, MeshConfig
from mfjax.data.prepare import PrepareOptions, prepare
from mfjax.hf import export as export_module
from mfjax.hf import layout, parity
from mfjax.hf.export import export
from mfjax.hf.import_checkpoint import import_checkpoint
from mfjax.hf.verify import DifferenceError
from mfjax.model import Execution
from mfjax.stored_arrays import StoredArray
from pallas_kernels.implementation import Implementation
from tests.hf import models

has_torch = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
XLA = KernelConfig(grouped_matmul=Implementation.XLA, stick_breaking=Implementation.XLA)
needs_torch = pytest.mark.skipif(not has_torch, reason="needs torch and transformers")


def files(directory: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def load(directory: pathlib.Path) -> dict[str, np.ndarray]:
  tensors = {}
  for path in directory.glob("*.safetensors"):
    tensors |= safetensors.numpy.load_file(path)
  return tensors


def test_a_mesh_of_eight_devices_gives_the_same_bytes(tmp_path):
  written = []
  for name, mesh in {
    "one": MeshConfig(data=1),
    "eight": MeshConfig(data=2, fsdp=2, expert=2),
  }.items():
    models.make_workdir(tmp_path / name / "w", models.HEADS, mesh=mesh)
    export(tmp_path / name / "w", tmp_path / name / "out", num_tokens=0)
    written.append(files(tmp_path / name / "out"))
  assert written[0] == written[1]


@pytest.mark.parametrize("name", models.VARIANTS)
def test_tensors_are_the_checkpoints(name, tmp_path):
  config = models.VARIANTS[name]
  params = models.make_workdir(tmp_path / "w", config)
  exported = export(tmp_path / "w", tmp_path / "out", num_tokens=0)
  assert exported.verdict.is_equal
  tensors = load(tmp_path / "out")
  names = {*layout.tensors(config), *layout.buffer_names(config.num_layers)}
  assert tensors.keys() == names  # As a strict load wants them.
  assert {v.shape for n, v in tensors.items() if layout.is_buffer(n)} == {(1024, 1024)}
  back = layout.to_params(tensors, config)
  models.assert_same(back, params)


def test_what_lies_beside_the_tensors(tmp_path):
  models.make_workdir(tmp_path / "w", models.IDENTITY)
  export(tmp_path / "w", tmp_path / "out", dtype="bfloat16", num_tokens=0)
  assert sorted(files(tmp_path / "out")) == [
    "README.md",
    "config.json",
    "configuration_moduleformer.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_moduleformer.py",
    "parity.json",
  ]
  config = json.loads((tmp_path / "out/config.json").read_text())
  expected = {
    "model_type": "moduleformer",
    "architectures": ["ModuleFormerForCausalLM"],
    "block_size": 512,
    "history_length": 512,
    "n_ctx": 1024,
    "vocab_size": 150,
    "k_mlp": 3,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
  }
  assert expected.items() <= config.items()
  parity = json.loads((tmp_path / "out/parity.json").read_text())
  assert (parity["equal"], parity["step"]) == (True, 7)
  card = (tmp_path / "out/README.md").read_text()
  for fact in ("library_name: transformers", "| steps | 7 |", "| d_ff | 48 |", "bit for bit"):
    assert fact in card
  assert (tmp_path / "out").stat().st_mode & 0o777 == (tmp_path / "w").stat().st_mode & 0o777


def test_the_card_tells_tokens_and_losses(tmp_path):
  models.make_workdir(tmp_path / "w", models.IDENTITY, steps=(4,))
  domain = {"nats_per_token": 3.5, "bits_per_byte": 1.25}
  records = [
    {"step": 2, "loss": 5.0, "cross_entropy": 5.0, "tokens": 1000},
    {"step": 4, "loss": 4.0, "cross_entropy": 4.0, "tokens": 1000},
    {"step": 4, "evaluation": {"web": domain}},
    {"step": 6, "loss": 3.0, "cross_entropy": 3.0, "tokens": 1000},  # After the step exported.
  ]
  text = "".join(json.dumps(record) + "\n" for record in records)
  (tmp_path / "w/metrics.jsonl").write_text(text)
  export(tmp_path / "w", tmp_path / "out", num_tokens=0)
  card = (tmp_path / "out/README.md").read_text()
  assert "| tokens | 2,000 |" in card
  assert "| training cross-entropy at the end | 4.0000 nats/token |" in card
  assert "| held-out web, step 4 | 3.5000 nats/token, 1.2500 bits/byte |" in card


def test_shards_are_bounded_and_indexed(tmp_path, monkeypatch):
  monkeypatch.setattr(export_module, "SHARD_BYTES", 6_000_000)
  models.make_workdir(tmp_path / "w", models.IDENTITY)
  export(tmp_path / "w", tmp_path / "out", num_tokens=0)
  index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
  shards = sorted(set(index["weight_map"].values()))
  assert shards == [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
  held = {}
  for shard in shards:
    tensors = safetensors.numpy.load_file(tmp_path / "out" / shard)
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 6_000_000
    assert all(index["weight_map"][name] == shard for name in tensors)
    held |= tensors
  assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
  assert held.keys() == index["weight_map"].keys()
  monkeypatch.undo()
  export(tmp_path / "w", tmp_path / "whole", num_tokens=0)
  whole = load(tmp_path / "whole")
  assert all(whole[name].tobytes() == held[name].tobytes() for name in whole)


def test_steps_are_chosen_and_corrupt_ones_passed_over(tmp_path):
  params = models.draw_params(models.IDENTITY)
  models.make_workdir(tmp_path / "w", models.IDENTITY, params=params, steps=(1,))
  later = jax.tree.map(lambda x: x + 1, params)
  models.make_workdir(tmp_path / "w", models.IDENTITY, params=later, steps=(2,))
  assert export(tmp_path / "w", tmp_path / "newest", num_tokens=0).step == 2
  assert export(tmp_path / "w", tmp_path / "first", step=1, num_tokens=0).step == 1
  first, newest = load(tmp_path / "first"), load(tmp_path / "newest")
  assert (newest["transformer.ln_f.bias"] == first["transformer.ln_f.bias"] + 1).all()
  data = max((tmp_path / "w/checkpoints/2/params").rglob("*"), key=lambda p: p.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 1
  data.write_bytes(content)
  assert export(tmp_path / "w", tmp_path / "good", num_tokens=0).step == 1
  with pytest.raises(ValueError, match="step 2 .* is corrupt: params/.* differs from its digest"):
    export(tmp_path / "w", tmp_path / "bad", step=2, num_tokens=0)
  assert not (tmp_path / "bad").exists()


def test_values_beyond_float16_are_refused(tmp_path):
  params = models.draw_params(models.IDENTITY)
  params["final_norm"]["bias"][3] = 1e6
  models.make_workdir(tmp_path / "w", models.IDENTITY, params=params)
  with pytest.raises(ValueError, match=r"transformer.ln_f.bias has values beyond .* float16"):
    export(tmp_path / "w", tmp_path / "out", dtype="float16", num_tokens=0)
  assert [path.name for path in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize("train_bpe", [0, 300])
def test_tokenizer_files_are_the_datas(train_bpe, tmp_path):
  (tmp_path / "text.txt").write_text("some text, and some more text\n" * 50)
  options = {"inputs": (("web", str(tmp_path / "text.txt")),), "train_bpe": train_bpe}
  prepare(PrepareOptions(out=str(tmp_path / "data"), num_processes=1, **options), lambda _: None)
  data = DataConfig(path=str(tmp_path / "data"), sequence_length=64)
  models.make_workdir(tmp_path / "w", models.IDENTITY, data=data)
  assert export(tmp_path / "w", tmp_path / "out", num_tokens=0).notes == ()
  config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
  assert config["eos_token"] == config["pad_token"] == "<|endoftext|>"
  tokens = json.loads((tmp_path / "out/tokenizer.json").read_text())["added_tokens"]
  (end_of_text,) = [token["id"] for token in tokens]
  written = [
    json.loads((tmp_path / f"out/{n}").read_text())
    for n in ("config.json", "generation_config.json")
  ]
  assert {w["eos_token_id"] for w in written} == {end_of_text}
  assert end_of_text == (0 if train_bpe else 256)


def test_data_that_is_not_here_is_a_note(tmp_path):
  data = DataConfig(path=str(tmp_path / "elsewhere"))
  models.make_workdir(tmp_path / "w", models.IDENTITY, data=data)
  (note,) = export(tmp_path / "w", tmp_path / "out", num_tokens=0).notes
  assert note.startswith("no tokenizer files: data.path=")


def test_only_blocks_are_held(tmp_path, monkeypatch):
  read, sizes = StoredArray.read, []

  def record(self, index=()):
    values = read(self, index)
    sizes.append(values.nbytes)
    return values

  import_checkpoint(models.GOLDEN / "molm_like", tmp_path / "a")
  monkeypatch.setattr(StoredArray, "read", record)
  export(tmp_path / "a", tmp_path / "out", num_tokens=0)
  assert max(sizes) <= 16 * 64 * 96 * 4  # One layer's experts, of four.


MEASURE = """
import json, sys
from launch import main
def peak():  # Not ru_maxrss: a process begins with that of the one that started it.
  lines = open("/proc/self/status").read().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
try:
  main.main(sys.argv[1:])
except SystemExit as stop:
  print(json.dumps([stop.code, peak()]))
"""


def _peak(*args: str) -> int:
  """Return the bytes that a command held at most."""
  done = subprocess.run(
    [sys.executable, "-c", MEASURE, *args], capture_output=True, text=True, check=True
  )
  code, peak = json.loads(done.stdout.splitlines()[-1])
  assert code == 0, done.stderr
  return peak


@pytest.mark.slow
def test_memory_is_bounded_by_a_part_of_the_largest_tensor(tmp_path):
  small = models.IDENTITY
  models.make_workdir(tmp_path / "small", small)
  base = _peak("export", str(tmp_path / "small"), str(tmp_path / "none"), "--parity_tokens=0")
  config = models.ModelConfig(
    vocab_size=1000, d_model=512, d_attention=512, d_ff=1024, num_layers=24
  )
  params = models.draw_params(config)
  stacked = params["blocks"]["ff"]["experts"]["bank_0"]["w_in"].nbytes
  models.make_workdir(tmp_path / "w", config, params=params)
  assert stacked > 1.5e9
  del params
  for args in (("export", "w", "out"), ("import", "out", "again")):
    command, *paths = args
    extra = ["--parity_tokens=0"] if command == "export" else []
    peak = _peak(command, *(str(tmp_path / path) for path in paths), *extra)
    assert peak - base < 0.75 * stacked, (command, peak, base)


def test_a_wrong_byte_is_a_difference_and_leaves_nothing(mfjax, tmp_path, monkeypatch):
  models.make_workdir(tmp_path / "w", models.IDENTITY)
  write = export_module.safetensors.Writer.write

  def flip(self, name, start, rows):
    if name == "transformer.h.1.ln_2.bias":
      rows = rows + np.float32(1)
    write(self, name, start, rows)

  monkeypatch.setattr(export_module.safetensors.Writer, "write", flip)
  with pytest.raises(DifferenceError, match=r"transformer.h.1.ln_2.bias differs in 32 values, by"):
    export(tmp_path / "w", tmp_path / "out", num_tokens=0)
  done = mfjax("export", "w", "out", "--parity_tokens=0")
  assert done.code == 1
  assert "mfjax export: error: the export differs: " in done.err
  assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_logits_that_differ_are_a_difference_and_leave_nothing(mfjax, tmp_path, monkeypatch):
  models.make_workdir(tmp_path / "w", models.IDENTITY)

  class Wrong(parity._JaxStack):  # As if PyTorch's program were another one.
    def head(self, *args):
      return super().head(*args) * 1.001

  monkeypatch.setattr(parity, "reason_to_skip", lambda a, b: "")
  monkeypatch.setattr(parity, "_TorchStack", lambda config, _: parity._JaxStack(config))
  monkeypatch.setattr(parity, "_WHOLE_MODEL_BYTES", 0)
  assert export(tmp_path / "w", tmp_path / "right").verdict.logits.max_difference == 0
  monkeypatch.setattr(parity, "_TorchStack", lambda config, _: Wrong(config))
  done = mfjax("export", "w", "out")
  assert done.code == 1
  assert "mfjax export: error: the export differs: " in done.err
  assert "BEYOND tolerance: 0.00% of positions are within 0.0001 of the range" in done.err
  assert sorted(path.name for path in tmp_path.iterdir()) == ["right", "w"]


def test_command(mfjax, tmp_path):
  models.make_workdir(tmp_path / "w", models.IDENTITY)
  done = mfjax("export", "w", "out", "--dtype=bfloat16", "--parity_tokens=0")
  assert done.code == 0, done.err
  assert "equal, bit for bit" in done.out
  assert f"exported  step 7 in bfloat16, 0.01 GB, to {tmp_path}/out" in done.out
  again = mfjax("export", "w", "out")
  assert again.code == 2
  assert again.err.startswith(f"mfjax export: error: {tmp_path}/out is there already")
  assert mfjax("export", "w", "b", "--step=3").code == 2
  assert "no checkpoint" in mfjax("export", "w", "b", "--step=3").err
  assert mfjax("export", "nowhere", "b").code == 2
  assert mfjax("export", "w", "b", "--dtype=int8").code == 2
  assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "w"]


# With PyTorch.


@pytest.fixture(scope="module")
def golden_exports(tmp_path_factory) -> dict[str, pathlib.Path]:
  """The golden cases, through an import and an export whose logits are compared as well."""
  made = {}
  for name in models.GOLDEN_CASES:
    folder = tmp_path_factory.mktemp(name)
    import_checkpoint(models.GOLDEN / name, folder / "w")
    exported = export(folder / "w", folder / "out")
    assert exported.verdict.logits.is_within_tolerance
    assert exported.verdict.logits.max_difference < 1e-4 * exported.verdict.logits.logit_range
    made[name] = folder / "out"
  return made


def _load_model(path: pathlib.Path):
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    path, trust_remote_code=True, dtype="float32"
  )
  return model.eval()


@needs_torch
@pytest.mark.parametrize("name", models.GOLDEN_CASES)
def test_golden_numbers_through_import_export_and_pytorch(name, golden_exports):
  import torch

  expected = dict(np.load(models.GOLDEN / name / "expected.npz"))
  model = _load_model(golden_exports[name])
  ids, mask = (torch.from_numpy(expected[key]).long() for key in ("input_ids", "attention_mask"))
  with torch.no_grad():
    logits = model(ids).logits.numpy()
    padded = model(ids, attention_mask=mask).logits.numpy()
    prompt = ids[:, : int(expected["prompt_len"])]
    greedy = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
  span = 1e-4 * np.ptp(expected["logits"])
  assert np.abs(logits - expected["logits"]).max() < span
  kept = expected["attention_mask"] > 0
  assert np.abs(padded - expected["padded_logits"])[kept].max() < span
  np.testing.assert_array_equal(greedy[:, prompt.shape[1] :], expected["greedy_tokens"])


@needs_torch
@pytest.mark.parametrize("name", ["identity mlp", "separate gmm"])
def test_gradients_are_those_of_jax(name, tmp_path):
  import torch

  config = models.VARIANTS[name]
  params = models.make_workdir(tmp_path / "w", config)
  export(tmp_path / "w", tmp_path / "out", num_tokens=0)
  ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 12)).astype(np.int32)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  placed = sharding.shardings(mesh, model.param_specs(config, MeshConfig()))

  def loss(params, tokens, segments):
    hidden, _, _ = model.apply(params, config, Execution(kernels=XLA), tokens, segments)
    log_p = jax.nn.log_softmax(model.logits(params, config, hidden)[:, :-1])
    picked = jax.nn.one_hot(tokens[:, 1:], config.vocab_size) * log_p
    return -picked.sum() / tokens[:, 1:].size

  batch = sharding.device_batch(mesh, {"tokens": ids, "segments": np.ones_like(ids)})
  with jax.set_mesh(mesh):
    ours = jax.jit(jax.grad(loss))(jax.device_put(params, placed), *batch.values())
  loaded = _load_model(tmp_path / "out")
  tokens = torch.from_numpy(ids).long()
  loaded(tokens, labels=tokens).loss.backward()
  theirs = layout.to_params({n: p.grad.numpy() for n, p in loaded.named_parameters()}, config)
  for path, value in jax.tree.leaves_with_path(jax.device_get(ours)):
    expected = theirs
    for key in path:
      expected = expected[key.key]
    error = np.linalg.norm(value - expected)
    assert error <= 1e-3 * np.linalg.norm(expected) + 1e-7, path


@needs_torch
def test_rounding_is_reported_beside_the_verdict(tmp_path):
  models.make_workdir(tmp_path / "w", models.HEADS)
  verdict = export(tmp_path / "w", tmp_path / "out", dtype="bfloat16").verdict
  assert verdict.is_equal
  assert verdict.logits.max_difference < 1e-4 * verdict.logits.logit_range
  assert verdict.rounding.max_difference > 10 * verdict.logits.max_difference


@needs_torch
def test_pytorch_layer_by_layer_is_pytorch_as_a_whole(tmp_path, monkeypatch):
  models.make_workdir(tmp_path / "w", models.HEADS)
  whole = export(tmp_path / "w", tmp_path / "a").verdict.logits
  monkeypatch.setattr("mfjax.hf.parity._WHOLE_MODEL_BYTES", 0)
  layers = export(tmp_path / "w", tmp_path / "b").verdict.logits
  assert layers.is_within_tolerance
  assert abs(layers.mean_difference - whole.mean_difference) < 1e-6 * whole.logit_range


@needs_torch
@pytest.mark.parametrize("train_bpe", [0, 300])
def test_tokenizer_loads_and_agrees(train_bpe, tmp_path):
  import transformers

  from mfjax.data.tokenizer import load_tokenizer

  (tmp_path / "text.txt").write_text("some text, and some more text\n" * 50)
  options = {"inputs": (("web", str(tmp_path / "text.txt")),), "train_bpe": train_bpe}
  prepare(PrepareOptions(out=str(tmp_path / "data"), num_processes=1, **options), lambda _: None)
  data = DataConfig(path=str(tmp_path / "data"), sequence_length=64)
  models.make_workdir(tmp_path / "w", models.IDENTITY, data=data)
  export(tmp_path / "w", tmp_path / "out", num_tokens=0)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  ours = load_tokenizer(tmp_path / "data")
  text = "some more, não \x00 Größe 🙂\n"
  (ids,) = ours.encode_batch([text])
  assert theirs(text)["input_ids"] == ids.tolist()
  assert theirs.decode(ids) == text
  assert theirs.eos_token_id == theirs.pad_token_id == ours.end_of_text
  assert theirs.padding_side == "left"
