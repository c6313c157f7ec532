"""Small models of every kind, as workdirs and as directories in the published format."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import ml_dtypes
import numpy as np

from mfjax import model, sharding, workdir
from mfjax.checkpoint import Checkpointer
from mfjax.config import DType, Gate, MeshConfig, ModelConfig, RunConfig

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
GOLDEN_CASES = ("linear_gate", "molm_like", "multihead")

IDENTITY = ModelConfig(
  vocab_size=150,
  d_model=32,
  num_layers=2,
  d_attention=32,
  d_ff=48,
  num_attention_experts=4,
  num_ff_experts=8,
  attention_top_k=2,
  ff_top_k=3,
  d_gate=16,
  compute_dtype=DType.FLOAT32,
)
HEADS = dataclasses.replace(IDENTITY, num_heads=2, d_attention=16)
VARIANTS = {
  f"{kv} {gate.value}": dataclasses.replace(config, gate=gate)
  for kv, config in {"identity": IDENTITY, "separate": HEADS}.items()
  for gate in Gate
}


def draw_params(config: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> Any:
  """Return random parameters without a zero or a one among them; only padding is zero."""
  rng = np.random.default_rng(seed)

  def draw(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
    scale = 1 if len(shape.shape) < 3 else 0.3
    values = (rng.normal(size=shape.shape) * scale).astype(dtype)
    if path[0].key in ("embedding", "lm_head"):
      values[config.vocab_size :] = 0
    return values

  return jax.tree.map_with_path(draw, model.abstract_params(config))


def make_workdir(
  path: pathlib.Path,
  config: ModelConfig,
  *,
  params: Any = None,
  steps: tuple[int, ...] = (7,),
  mesh: MeshConfig | None = None,
  **sections: Any,
) -> Any:
  """Write parameters as checkpoints on a mesh; return them."""
  mesh = MeshConfig(data=1) if mesh is None else mesh
  run_config = RunConfig(model=config, mesh=mesh, **sections)
  params = draw_params(config) if params is None else params
  num_devices = int(np.prod(list(mesh.axis_sizes.values())))
  devices = sharding.make_mesh(mesh, jax.devices()[:num_devices])
  shardings = sharding.shardings(devices, model.param_specs(config, mesh))
  placed = jax.tree.map(_place, params, shardings)
  if jax.process_index() == 0:
    workdir.write_config(path, run_config)
  checkpointer = Checkpointer(path, run_config.checkpoint, run_config)
  for step in steps:
    state = {"params": placed, "step": np.int32(step), "skipped": np.int32(0)}
    checkpointer.save(step, state, {}, force=True)
  checkpointer.close()
  return params


def _place(value: Any, to: jax.sharding.Sharding) -> jax.Array:
  # `device_put` would compare the value over all hosts, in a compiled program per shape.
  return jax.make_array_from_callback(value.shape, to, lambda index: value[index])


def read_params(path: pathlib.Path) -> Any:
  """Return the parameters of a workdir's newest step as NumPy arrays."""
  run_config = workdir.read_config(path)
  checkpointer = Checkpointer(path, run_config.checkpoint, run_config)
  opened = checkpointer.open_step(checkpointer.latest_steps()[0])
  tree: dict[str, Any] = {}
  for keys, array in opened.arrays.items():
    node = tree
    for key in keys[:-1]:
      node = node.setdefault(key, {})
    node[keys[-1]] = array.read()
  checkpointer.close()
  return tree


def assert_same(a: Any, b: Any) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for path, left in jax.tree.leaves_with_path(a):
    right = b
    for key in path:
      right = right[key.key]
    assert left.dtype == right.dtype, path
    assert left.shape == right.shape, path
    assert left.tobytes() == right.tobytes(), path


def copy_golden(name: str, out: pathlib.Path) -> pathlib.Path:
  out.mkdir()
  for file in ("config.json", "model.safetensors"):
    shutil.copyfile(GOLDEN / name / file, out / file)
  return out


def edit_config(directory: pathlib.Path, **values: Any) -> None:
  """Set keys of config.json; None deletes one."""
  path = directory / "config.json"
  config = json.loads(path.read_text()) | values
  path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
