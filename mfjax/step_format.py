"""What a step of a checkpoint is on disk: its items, their chunks, and the record of its run.

`mfjax/checkpoint.py` decides which steps exist; here is how Orbax writes and reads one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mfjax import workdir
from mfjax.config import RunConfig
from mfjax.stored_arrays import CHUNK_BYTES, BlockArray, BlockArrayHandler

ARRAY_ITEMS = ("params", "optimizer")
RUN_ITEM = "run"
RUN_FILE = "run.json"
_STACKED = "blocks"  # The sub-tree whose leaves lead with the layers dimension.


def handlers(blocks: BlockArrayHandler) -> ocp.CheckpointHandlerRegistry:
  """Return who writes and reads each item of a step."""
  # Replicas share the writing by slicing on their devices, one compilation per shape and device
  # (2 s for three small arrays on eight devices): worth it for large arrays, on several hosts.
  arrays = ocp.type_handlers.ArrayHandler(
    use_replica_parallel=jax.process_count() > 1,
    min_slice_bytes_for_replica_parallel=CHUNK_BYTES // 2,
  )
  # The last one of equal type names is the one that reads.
  types = ocp.type_handlers.create_type_handler_registry((BlockArray, blocks), (jax.Array, arrays))
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  for name in ARRAY_ITEMS:
    # Trained weights do not compress; trying takes longer than writing them.
    handler = ocp.PyTreeCheckpointHandler(
      use_zarr3=True, use_compression=False, type_handler_registry=types
    )
    registry.add(name, ocp.args.PyTreeSave, handler)
    registry.add(name, ocp.args.PyTreeRestore, handler)
  handler = ocp.JsonCheckpointHandler(RUN_FILE)
  registry.add(RUN_ITEM, ocp.args.JsonSave, handler)
  registry.add(RUN_ITEM, ocp.args.JsonRestore, handler)
  return registry


def storage_args(tree: Any) -> Any:
  """Return how to chunk each leaf: at most 32 MiB, and never two layers in one chunk.

  Orbax's default is one chunk per device and array, so that reading one layer reads them all.
  """

  def chunks(path: Any, _: Any) -> ocp.SaveArgs:
    stacked = any(getattr(key, "key", None) == _STACKED for key in path)
    # `shard_axes` cuts these axes down to 1 before any other is cut.
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())

  return jax.tree.map_with_path(chunks, tree)


def run_record(
  run_config: RunConfig,
  step: int,
  arrays: Mapping[str, Any],
  scalars: Mapping[str, Any],
  data_state: dict[str, Any],
) -> dict[str, Any]:
  """Return what `run.json` says of a step."""
  return {
    "step": step,
    "state": scalars,
    "data_state": data_state,
    "layout": {name: layout_of(tree) for name, tree in arrays.items()},
    # Step n draws from fold_in(key(seed), n): nothing else is needed.
    "rng": {
      "seed": run_config.train.seed,
      "implementation": rng_implementation(),
    },
    "config": run_config.to_dict(),
    "versions": workdir.versions(),
  }


def rng_implementation() -> str:
  """Return what random numbers are drawn from, as JAX's configuration has it now."""
  # Not of `jax.random.key` itself, whose result is cached over a change of the default.
  return str(jax.eval_shape(lambda: jax.random.key(0)).dtype)


def layout_of(tree: Any) -> dict[str, str]:
  """Return {"['blocks']['experts']": "float32[3,8]", ...}."""
  leaves = jax.tree.leaves_with_path(tree)
  return {jax.tree_util.keystr(k): f"{x.dtype}{list(x.shape)}".replace(" ", "") for k, x in leaves}


def check_layout(name: str, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
  """Raise ValueError if arrays differ in name, shape or dtype: Orbax would cast, or fail midway."""
  for key in sorted(saved.keys() | wanted.keys()):
    there, here = saved.get(key, "absent"), wanted.get(key, "absent")
    if there != here:
      raise ValueError(f"{name}{key} is {there} there and {here} here")


def zeros(abstract: jax.ShapeDtypeStruct) -> jax.Array:
  """Return zeros of this shape, dtype and sharding."""
  shard = np.zeros(abstract.sharding.shard_shape(abstract.shape), abstract.dtype)
  return jax.make_array_from_callback(abstract.shape, abstract.sharding, lambda _: shard)


def place(value: Any, abstract: jax.ShapeDtypeStruct) -> jax.Array:
  """Return a value that every process has, with this dtype and sharding."""
  array = np.asarray(value, abstract.dtype)
  return jax.make_array_from_callback(abstract.shape, abstract.sharding, lambda index: array[index])
