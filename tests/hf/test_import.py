"""`mfjax import`: golden cases, round trips, what may be missing, and training from the result."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import tensorstore

from mfjax import model, sharding, stored_arrays, train_step, workdir
from mfjax.checkpoint import Checkpointer
from mfjax.config import DType, KernelConfig, MeshConfig, Placement, RunConfig
from mfjax.hf import layout, pickled
from mfjax.hf import safetensors as own
from mfjax.hf.export import export
from mfjax.hf.import_checkpoint import import_checkpoint
from mfjax.model import Execution
from pallas_kernels.implementation import Implementation
from tests import tiny
from tests.hf import models

needs_torch = pytest.mark.skipif(
  importlib.util.find_spec("torch") is None, reason="reading pickled tensors needs torch"
)
XLA = KernelConfig(grouped_matmul=Implementation.XLA, stick_breaking=Implementation.XLA)


@pytest.mark.parametrize("name", models.GOLDEN_CASES)
def test_golden_logits_through_an_import(name, tmp_path):
  imported = import_checkpoint(models.GOLDEN / name, tmp_path / "w")
  expected = dict(np.load(models.GOLDEN / name / "expected.npz"))
  config = imported.config.model
  assert config.compute_dtype is DType.FLOAT32
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  placed = sharding.shardings(mesh, model.param_specs(config, MeshConfig()))
  params = jax.device_put(models.read_params(tmp_path / "w"), placed)
  ids = expected["input_ids"].astype(np.int32)
  batch = sharding.device_batch(mesh, {"tokens": ids, "segments": np.ones_like(ids)})
  with jax.set_mesh(mesh):
    hidden, _, _ = model.apply(params, config, Execution(kernels=XLA), *batch.values())
    logits = np.asarray(model.logits(params, config, hidden))
  assert np.abs(logits - expected["logits"]).max() < 1e-4 * np.ptp(expected["logits"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", models.VARIANTS)
def test_round_trip_is_bitwise(name, dtype, tmp_path):
  params = models.draw_params(models.VARIANTS[name])
  if dtype == "bfloat16":  # What bfloat16 can hold.
    params = jax.tree.map(lambda x: x.astype(models.BFLOAT16).astype(np.float32), params)
  models.make_workdir(tmp_path / "a", models.VARIANTS[name], params=params)
  export(tmp_path / "a", tmp_path / "out", dtype=dtype, num_tokens=0)
  imported = import_checkpoint(tmp_path / "out", tmp_path / "b")
  models.assert_same(models.read_params(tmp_path / "b"), params)
  expected = dataclasses.replace(
    models.VARIANTS[name], compute_dtype=DType(dtype), init=imported.config.model.init
  )
  assert imported.config.model == expected


def test_a_bfloat16_checkpoint_goes_round_as_it_is(tmp_path):
  params = models.draw_params(models.HEADS, dtype=models.BFLOAT16)
  models.make_workdir(tmp_path / "a", models.HEADS, params=params)
  export(tmp_path / "a", tmp_path / "out", dtype="bfloat16", num_tokens=0)
  import_checkpoint(tmp_path / "out", tmp_path / "b", dtype="bfloat16")
  models.assert_same(models.read_params(tmp_path / "b"), params)


def test_training_goes_on_from_an_import(tmp_path):
  config = tiny.run_config()
  models.make_workdir(tmp_path / "a", config.model)
  export(tmp_path / "a", tmp_path / "out", num_tokens=0)
  import_checkpoint(tmp_path / "out", tmp_path / "w", run_config=config)
  workdir.check_config(tmp_path / "w", config)
  run = tiny.Run(dataclasses.replace(config, mesh=tiny.mesh(fsdp=2, expert=2)))
  checkpointer = Checkpointer(tmp_path / "w", config.checkpoint, run.config)
  restored = checkpointer.restore(train_step.abstract_state(run.config, run.mesh))
  assert (restored.step, restored.data_state) == (0, {})
  fresh = jax.device_get(run.state["optimizer"])
  for ours, theirs in zip(
    jax.tree.leaves(restored.state["optimizer"]), jax.tree.leaves(fresh), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)
  models.assert_same(jax.device_get(restored.state["params"]), models.read_params(tmp_path / "w"))
  run.state = restored.state
  (first,) = run.train(tiny.batches(1))
  assert np.isfinite(first["loss"])
  checkpointer.save(1, run.state, {"seen": 1}, force=True)  # And so it is resumed.
  checkpointer.close()
  checkpointer = Checkpointer(tmp_path / "w", config.checkpoint, run.config)
  restored = checkpointer.restore(train_step.abstract_state(run.config, run.mesh))
  checkpointer.close()
  assert (restored.step, restored.data_state) == (1, {"seen": 1})


@pytest.mark.parametrize("num_devices", [None, 8])
def test_chunks_fit_the_mesh(num_devices, tmp_path):
  config = RunConfig(
    model=models.IDENTITY, mesh=MeshConfig(fsdp=2, expert=2, ff_placement="expert")
  )
  models.make_workdir(tmp_path / "a", models.IDENTITY)
  export(tmp_path / "a", tmp_path / "out", num_tokens=0)
  import_checkpoint(tmp_path / "out", tmp_path / "b", run_config=config, num_devices=num_devices)

  def chunk(name):
    base = {"driver": "file", "path": f"{tmp_path}/b/checkpoints/0/params/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    return store.chunk_layout.read_chunk.shape

  assert chunk("embedding") == (256, 8)
  assert chunk("blocks.ff.experts.bank_0.w_in") == (1, 4, 16, 48)
  assert chunk("blocks.norm1.bias") == (1, 32)
  models.assert_same(models.read_params(tmp_path / "b"), models.read_params(tmp_path / "a"))


def test_a_mesh_that_does_not_divide_is_refused(tmp_path):
  exchanged = {"attention_placement": Placement.EXPERT, "ff_placement": Placement.EXPERT}
  config = RunConfig(model=models.IDENTITY, mesh=MeshConfig(expert=3, **exchanged))
  models.make_workdir(tmp_path / "a", models.IDENTITY)
  export(tmp_path / "a", tmp_path / "out", num_tokens=0)
  with pytest.raises(ValueError, match="a size of 4 is not divisible by the mesh's expert=3"):
    import_checkpoint(tmp_path / "out", tmp_path / "b", run_config=config)
  assert not (tmp_path / "b").exists()


def test_a_config_of_another_model_is_refused(tmp_path):
  directory = models.copy_golden("molm_like", tmp_path / "in")
  with pytest.raises(ValueError, match=r"model.d_model=1024 and the tensors 64; .*num_layers=24"):
    import_checkpoint(directory, tmp_path / "w", run_config=RunConfig())
  assert not (tmp_path / "w").exists()


def test_published_defaults_stand_for_missing_keys(tmp_path):
  directory = models.copy_golden("molm_like", tmp_path / "in")
  config = json.loads((directory / "config.json").read_text())
  shape = ("vocab_size", "n_embd", "n_layer", "att_hidden", "ffd_hidden", "gating_size")
  needed = {key: config[key] for key in (*shape, "n_att_experts", "n_mlp_experts")}
  (directory / "config.json").write_text(json.dumps(needed | {"universal": 0, "world_size": 8}))
  imported = import_checkpoint(directory, tmp_path / "w").config.model
  assert (imported.attention_top_k, imported.ff_top_k, imported.num_heads) == (2, 2, 1)


def test_tensors_without_buffers_and_float64_are_read(tmp_path):
  directory = models.copy_golden("multihead", tmp_path / "in")
  file = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  kept = {k: v.astype(np.float64) for k, v in tensors.items() if not layout.is_buffer(k)}
  safetensors.numpy.save_file(kept, file)
  import_checkpoint(directory, tmp_path / "a")
  import_checkpoint(models.GOLDEN / "multihead", tmp_path / "b")
  models.assert_same(models.read_params(tmp_path / "a"), models.read_params(tmp_path / "b"))


def _shard(directory: pathlib.Path, count: int) -> dict[str, dict[str, np.ndarray]]:
  """Replace model.safetensors by an index for `count` shards; return their tensors."""
  file = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  file.unlink()
  names = [f"model-{number:05d}-of-{count:05d}" for number in range(1, count + 1)]
  shards = {name: {} for name in names}
  for number, (key, value) in enumerate(tensors.items()):
    shards[names[number % count]][key] = value
  return shards


def _write_index(path: pathlib.Path, shards: dict[str, dict[str, np.ndarray]], ending: str) -> None:
  places = {key: name + ending for name, tensors in shards.items() for key in tensors}
  path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def test_shards_with_an_index(tmp_path):
  directory = models.copy_golden("molm_like", tmp_path / "in")
  shards = _shard(directory, 3)
  for name, tensors in shards.items():
    safetensors.numpy.save_file(tensors, directory / f"{name}.safetensors")
  _write_index(directory / "model.safetensors.index.json", shards, ".safetensors")
  import_checkpoint(directory, tmp_path / "a")
  import_checkpoint(models.GOLDEN / "molm_like", tmp_path / "b")
  models.assert_same(models.read_params(tmp_path / "a"), models.read_params(tmp_path / "b"))


@needs_torch
@pytest.mark.parametrize("count", [1, 2])
def test_pickled_shards(count, tmp_path, monkeypatch):
  import torch

  monkeypatch.setattr(pickled, "_MAPPED_BYTES", 100_000)  # Several mappings.
  directory = models.copy_golden("multihead", tmp_path / "in")
  shards = _shard(directory, count)
  for name, tensors in shards.items():
    file = "pytorch_model.bin" if count == 1 else f"{name}.bin"
    half = {k: torch.from_numpy(v).to(torch.bfloat16) for k, v in tensors.items()}
    torch.save(half, directory / file)
  if count > 1:
    _write_index(directory / "pytorch_model.bin.index.json", shards, ".bin")
  imported = import_checkpoint(directory, tmp_path / "a")
  assert imported.config.model.compute_dtype is DType.BFLOAT16
  import_checkpoint(models.GOLDEN / "multihead", tmp_path / "b")
  rounded = jax.tree.map(
    lambda x: x.astype(models.BFLOAT16).astype(np.float32), models.read_params(tmp_path / "b")
  )
  models.assert_same(models.read_params(tmp_path / "a"), rounded)


def test_pickled_tensors_without_torch_say_what_to_install(tmp_path, monkeypatch):
  directory = models.copy_golden("multihead", tmp_path / "in")
  (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ValueError, match=r"needs torch: pip install 'mfjax\[hf\]'"):
    import_checkpoint(directory, tmp_path / "w")
  assert not (tmp_path / "w").exists()


def test_special_ids_and_tokenizer_files_go_round(tmp_path):
  directory = models.copy_golden("multihead", tmp_path / "in")
  for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
    (directory / name).write_text(f'{{"{name}": 1}}')
  (directory / "secret.json").write_text("{}")
  import_checkpoint(directory, tmp_path / "w")
  export(tmp_path / "w", tmp_path / "out", num_tokens=0)
  for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
    assert (tmp_path / "out" / name).read_text() == f'{{"{name}": 1}}'
  assert not (tmp_path / "out/secret.json").exists()
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert (config["bos_token_id"], config["eos_token_id"]) == (50256, 50256)


def test_only_blocks_are_held(tmp_path, monkeypatch):
  read, sizes = own.Reader.read, []

  def record(self, name, start=0, stop=None):
    values = read(self, name, start, stop)
    sizes.append(values.nbytes)
    return values

  monkeypatch.setattr(own.Reader, "read", record)
  monkeypatch.setattr("mfjax.stored_arrays.CHUNK_BYTES", 8192)
  monkeypatch.setattr("mfjax.hf.directory._BLOCK_BYTES", 8192)
  monkeypatch.setattr("mfjax.hf.source.BLOCK_BYTES", 8192)
  import_checkpoint(models.GOLDEN / "molm_like", tmp_path / "w")
  assert max(sizes) <= 64 * 96 * 4  # One expert; a layer has 16 of them.


def test_a_full_disk_is_one_sentence_wherever_it_is_met(tmp_path, monkeypatch):
  def fail(*_):  # As TensorStore says it when it opens an array.
    raise ValueError("RESOURCE_EXHAUSTED: Error opening ... [os_error_code='28'] ...")

  monkeypatch.setattr(stored_arrays, "_create", fail)
  with pytest.raises(ValueError, match=r"w could not be written: No space left on device$"):
    import_checkpoint(models.GOLDEN / "multihead", tmp_path / "w")
  assert list(tmp_path.iterdir()) == []


def test_a_wrong_value_is_a_difference_and_leaves_nothing(mfjax, tmp_path, monkeypatch):
  write = stored_arrays._write_block

  def damage(store, value, index):
    read = value.read

    def wrong(index):
      values = read(index)
      values.flat[0] += 1
      return values

    write(store, dataclasses.replace(value, read=wrong), index)

  monkeypatch.setattr(stored_arrays, "_write_block", damage)
  done = mfjax("import", str(models.GOLDEN / "multihead"), "w")
  assert done.code == 1
  assert "mfjax import: error: the import differs: tensors 58 tensors" in done.err
  assert "lm_head.weight differs in 1 values, by up to 1" in done.err
  assert "Traceback" not in done.err
  assert list(tmp_path.iterdir()) == []


def test_chunks_that_were_committed_otherwise_are_a_difference(mfjax, tmp_path, monkeypatch):
  read_corners = stored_arrays.StoredArray.chunk_corners

  def of_another_layer(self, lead=()):  # Where the committed checkpoint is opened anew.
    is_committed = "process_0" not in str(self.store.spec().to_json()["kvstore"])
    return read_corners(self, ((lead[0] + 1) % self.shape[0],) if lead and is_committed else lead)

  monkeypatch.setattr(stored_arrays.StoredArray, "chunk_corners", of_another_layer)
  done = mfjax("import", str(models.GOLDEN / "multihead"), "w")
  assert done.code == 1
  assert "was not committed as it was written" in done.err
  assert list(tmp_path.iterdir()) == []


def test_command(mfjax, tmp_path):
  done = mfjax("import", str(models.GOLDEN / "multihead"), "w")
  assert done.code == 0, done.err
  assert "58 tensors, 198,480 parameters (float32 and float32): equal, bit for bit" in done.out
  assert "as step 0" in done.out
  assert "MB/s" in done.err
  again = mfjax("import", str(models.GOLDEN / "multihead"), "w")
  assert again.code == 2
  assert again.err.startswith(f"mfjax import: error: {tmp_path}/w is there already")
  assert mfjax("import", "w").code == 2
