"""The table of measured tile sizes: what is found, and that a file is never half written."""

import dataclasses
import json

import jax
import pytest
from jax.sharding import Mesh

from pallas_kernels import tuning

SHAPE = (65536, 1024, 2048, 32)
FIELDS = {"tile_m": 128, "tile_n": 256}


@pytest.fixture
def mesh():
  return Mesh(jax.devices()[:1], ("x",))


@pytest.fixture
def table(tmp_path, monkeypatch):
  """A table with one entry for this device in place of the packaged one."""
  kind = jax.devices()[0].device_kind
  made = tuning.updated({}, kind, "grouped_matmul.matmul", "bfloat16", SHAPE, FIELDS)
  tuning.write(tmp_path / "tuned.json", made)
  monkeypatch.setattr(tuning, "PACKAGED", tmp_path / "tuned.json")
  tuning._packaged.cache_clear()
  yield made
  tuning._packaged.cache_clear()


def test_lookup_needs_the_same_device_operation_dtype_and_widths(mesh, table):
  lookup = tuning.lookup
  assert lookup("grouped_matmul.matmul", "bfloat16", SHAPE) is None, "no device in context"
  with jax.set_mesh(mesh):
    assert lookup("grouped_matmul.matmul", "bfloat16", SHAPE) == FIELDS
    assert lookup("grouped_matmul.transposed", "bfloat16", SHAPE) is None
    assert lookup("grouped_matmul.matmul", "float32", SHAPE) is None
    assert lookup("grouped_matmul.matmul", "bfloat16", (65536, 1024, 2047, 32)) is None


def test_lookup_inside_jit_and_shard_map(mesh, table):
  found = []

  def function(x):
    found.append(tuning.lookup("grouped_matmul.matmul", x.dtype, SHAPE))
    return x

  spec = jax.sharding.PartitionSpec()
  with jax.set_mesh(mesh):
    mapped = jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)
    jax.jit(mapped).lower(jax.ShapeDtypeStruct((), "bfloat16"))
  assert found[-1] == FIELDS


def test_what_varies_from_run_to_run_is_looked_up_by_powers_of_two(mesh, table):
  with jax.set_mesh(mesh):
    for rows, groups in ((65535, 32), (32769, 17)):
      shape = (rows, 1024, 2048, groups)
      assert tuning.lookup("grouped_matmul.matmul", "bfloat16", shape) == FIELDS
    for rows, groups in ((65537, 32), (32768, 32), (65536, 33)):
      shape = (rows, 1024, 2048, groups)
      assert tuning.lookup("grouped_matmul.matmul", "bfloat16", shape) is None
  assert tuning.shape_key("stick_breaking.forward", (1000, 1025, 3, 96)) == "1024x2048x3x96"
  assert tuning.shape_key("grouped_matmul.outer", (1, 1, 1, 1)) == "1x1x1x1"


def test_what_is_found_cannot_change_the_table(mesh, table):
  with jax.set_mesh(mesh):
    tuning.lookup("grouped_matmul.matmul", "bfloat16", SHAPE)["tile_m"] = 1
    assert tuning.lookup("grouped_matmul.matmul", "bfloat16", SHAPE) == FIELDS


def test_updating_keeps_the_rest_and_the_original():
  one = tuning.updated({}, "a", "grouped_matmul.outer", "bfloat16", SHAPE, FIELDS)
  two = tuning.updated(one, "b", "stick_breaking.backward", "float32", (8, 8, 1, 64), {"x": 1})
  assert set(one) == {"a"}
  assert two["a"] == one["a"]
  gone = tuning.updated(two, "b", "stick_breaking.backward", "float32", (8, 8, 1, 64), None)
  assert gone["b"] == {"stick_breaking.backward": {"float32": {}}}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "t.json"
  tuning.write(path, {"old": {}})

  def full(*_):
    raise OSError(28, "No space left")

  monkeypatch.setattr(tuning.os, "replace", full)
  with pytest.raises(OSError, match="No space"):
    tuning.write(path, {"new": {}})
  assert tuning.read(path) == {"old": {}}
  assert [file.name for file in tmp_path.iterdir()] == ["t.json"]


@pytest.mark.parametrize(
  "text",
  [
    "{",
    "[]",
    '{"gpu": {"no_such.operation": {}}}',
    '{"gpu": {"grouped_matmul.outer": {"bfloat16": {"1x1x1x1": {"tile": "wide"}}}}}',
    '{"gpu": {"grouped_matmul.outer": 3}}',
  ],
)
def test_another_file_is_refused_by_name(tmp_path, text):
  (tmp_path / "t.json").write_text(text)
  with pytest.raises(ValueError, match="t.json is not a table of tilings"):
    tuning.read(tmp_path / "t.json")


def test_no_file_is_an_empty_table(tmp_path):
  assert tuning.read(tmp_path / "t.json") == {}


def _tiling(kind: str, operation: str, width: int):
  """Return the class that an entry's fields are for."""
  if operation.startswith("grouped_matmul"):
    from pallas_kernels.grouped_matmul import gpu, tpu

    return (gpu if kind.startswith("NVIDIA") else tpu).Tiling
  from pallas_kernels.stick_breaking import gpu, gpu_wide, tpu

  if not kind.startswith("NVIDIA"):
    return tpu.Tiling
  if width not in gpu.HEAD_DIMS:
    return gpu_wide.Tiling
  return gpu.Tiling if operation.endswith("forward") else gpu.BackwardTiling


def test_packaged_entries_fit_their_kernels():
  entries = [
    (kind, operation, shape, fields)
    for kind, operations in tuning.read(tuning.PACKAGED).items()
    for operation, dtypes in operations.items()
    for shapes in dtypes.values()
    for shape, fields in shapes.items()
  ]
  for kind, operation, shape, fields in entries:
    tiling = _tiling(kind, operation, int(shape.split("x")[-1]))(**fields)
    assert json.loads(json.dumps(dataclasses.asdict(tiling))) == fields
