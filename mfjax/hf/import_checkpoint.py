"""A directory in the published PyTorch format as step 0 of a workdir, streamed block by block."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mfjax import model, sharding, workdir
from mfjax.checkpoint import Checkpointer, CheckpointSaveError, Opened
from mfjax.config import RunConfig
from mfjax.hf import layout, tokenizer_files
from mfjax.hf.directory import CONFIG_FILE, Directory, open_directory
from mfjax.hf.export import DTYPES, IMPORTED
from mfjax.hf.progress import Report, Stage, silent, until
from mfjax.hf.source import Checkpoint, cast, narrower
from mfjax.hf.staging import check_absent, staged
from mfjax.hf.verify import Comparison, DifferenceError, Verdict
from mfjax.stored_arrays import BlockArray, Index, StoredArray, chunk_shape

_ROOM = 64 * 2**20  # For what is not tensors.
# What a run may choose for itself; the rest of the model is what was imported.
_OWN = {"compute_dtype", "init", "sample_top_k", "init_std"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
  """What an import made."""

  config: RunConfig
  num_bytes: int
  verdict: Verdict


def import_checkpoint(
  path: pathlib.Path,
  out: pathlib.Path,
  *,
  run_config: RunConfig | None = None,
  num_devices: int | None = None,
  dtype: str = "float32",
  report: Report = silent,
) -> Imported:
  """Write the tensors in `path` as step 0 of the new workdir `out`.

  Args:
    run_config: of the run to begin from them; its model must be the imported one. By default the
      defaults, around the imported model.
    num_devices: of the mesh that the chunks on disk are cut for; any mesh can read them.
    dtype: `float32` is what training reads.

  Raises:
    ValueError: `path` is damaged, no such model or not that of `run_config`; `out` exists; the disk
      is full.
    DifferenceError: `out` read back differs from `path`.
  """
  check_absent(out)
  source = open_directory(path)
  try:
    run_config = _agreed(source, run_config)
    shapes = model.abstract_params(run_config.model)
    num_bytes = sum(x.size for x in jax.tree.leaves(shapes)) * DTYPES[dtype].itemsize
    stop = threading.Event()
    report = until(stop, report)
    compared = sum(
      tensor.size * narrower(source.dtype(name), DTYPES[dtype]).itemsize
      for name, tensor in source.tensors.items()
    )
    stage = Stage("writing and comparing", num_bytes + compared, report)
    by_leaf = {(tensor.parts[0], tensor.layer): tensor for tensor in source.tensors.values()}
    read = functools.partial(_read, source, by_leaf, DTYPES[dtype], stage)
    tree = block_arrays(run_config, num_devices, DTYPES[dtype], read)
    with staged(out, num_bytes + _ROOM) as pending:
      workdir.write_config(pending, run_config)
      _keep(source, pending / IMPORTED)
      proof = _Proof(source, pending, run_config, stage)
      with contextlib.closing(Checkpointer(pending, run_config.checkpoint, run_config)) as writer:
        _save(writer, tree, out, stop, proof)
    return Imported(config=run_config, num_bytes=num_bytes, verdict=proof.verdict)
  finally:
    source.close()


def _agreed(source: Directory, run_config: RunConfig | None) -> RunConfig:
  if run_config is None:
    return RunConfig(model=source.config)
  wanted, found = run_config.model, source.config
  own = _OWN | {field for field in vars(wanted) if field.endswith("_dropout")}
  differences = [
    f"model.{name}={value!r} and the tensors {getattr(found, name)!r}"
    for name, value in vars(wanted).items()
    if name not in own and value != getattr(found, name)
  ]
  if differences:
    raise ValueError(
      f"--config and {source.path} are different models: config says {'; '.join(differences)}"
    )
  return run_config


def block_arrays(
  run_config: RunConfig,
  num_devices: int | None,
  dtype: np.dtype,
  read: Callable[[layout.Keys, Index], np.ndarray],
) -> Any:
  """Return the tree of parameters as arrays whose blocks `read` computes as they are written.

  Raises:
    ValueError: the mesh does not divide an array.
  """
  sizes = _axis_sizes(run_config, num_devices)
  specs = model.param_specs(run_config.model, run_config.mesh)

  def array(path: Any, shape: jax.ShapeDtypeStruct) -> BlockArray:
    keys = tuple(key.key for key in path)
    shard = _shard_shape(shape.shape, _at(specs, keys), sizes)
    stacked = keys[0] == layout.STACKED
    return BlockArray(
      shape=shape.shape,
      dtype=dtype,
      chunk=chunk_shape(shape.shape, shard, dtype.itemsize, stacked=stacked),
      stacked=stacked,
      read=functools.partial(read, keys),
    )

  return jax.tree.map_with_path(array, model.abstract_params(run_config.model))


def _axis_sizes(run_config: RunConfig, num_devices: int | None) -> dict[str, int]:
  sizes = run_config.mesh.axis_sizes
  fixed = math.prod(size for size in sizes.values() if size != -1)
  return sharding.resolve_axis_sizes(run_config.mesh, num_devices or fixed)


def _at(tree: Any, keys: layout.Keys) -> Any:
  return functools.reduce(lambda node, key: node[key], keys, tree)


def _shard_shape(shape: layout.Shape, spec: Any, sizes: dict[str, int]) -> layout.Shape:
  """Return the part of an array that one device of a mesh with these axes holds."""
  parts = list(shape)
  for axis, names in enumerate(spec):
    names = () if names is None else (names,) if isinstance(names, str) else names
    count = math.prod(sizes[name] for name in names)
    if parts[axis] % count:
      raise ValueError(
        f"a size of {parts[axis]} is not divisible by the mesh's {'*'.join(names)}={count}: "
        "choose a mesh that divides d_model and the numbers of experts"
      )
    parts[axis] //= count
  return tuple(parts)


def _read(
  source: Directory,
  by_leaf: Mapping[tuple[layout.Keys, int | None], layout.Tensor],
  dtype: np.dtype,
  stage: Stage,
  keys: layout.Keys,
  index: Index,
) -> np.ndarray:
  """Return a block of one of our leaves from the published tensors."""
  stacked = keys[0] == layout.STACKED
  layer = index[0] if stacked else None
  tensor = by_leaf[keys, layer]  # type: ignore[index]
  (rows,) = index[1:] if stacked else index
  assert isinstance(rows, slice)
  if tensor.transposed:
    values = source.read(tensor.name, 0, tensor.shape[0]).T[rows]
  else:
    size = tensor.shape[0]
    values = source.read(tensor.name, min(rows.start, size), min(rows.stop, size))
    missing = rows.stop - max(rows.start, size)
    if missing > 0:  # Rows that pad the vocabulary.
      values = np.pad(values, ((0, missing), *((0, 0),) * (values.ndim - 1)))
  values = cast(values, dtype, tensor.name)
  stage.add(values.nbytes)
  return values


def _keep(source: Directory, folder: pathlib.Path) -> None:
  """Keep what an export of this workdir will need: special ids and tokenizer files."""
  folder.mkdir()
  shutil.copyfile(source.path / CONFIG_FILE, folder / CONFIG_FILE)
  tokenizer_files.copy(source.path, folder)


def _save(
  checkpointer: Checkpointer, tree: Any, out: pathlib.Path, stop: threading.Event, proof: "_Proof"
) -> None:
  """Write `tree` as step 0; `proof` judges it."""
  state = {"params": tree, "step": np.int32(0), "skipped": np.int32(0)}
  try:
    checkpointer.save(0, state, {}, force=True, proof=proof)
    checkpointer.wait()
  except CheckpointSaveError as error:
    if isinstance(error.__cause__, ValueError | DifferenceError) and not error.is_of_system:
      raise error.__cause__ from error
    raise ValueError(f"{out} could not be written: {error.reason}") from error
  except BaseException:  # Ctrl-C: or else the writing would go on to its end first.
    stop.set()
    checkpointer.abandon()
    raise


class _Proof:
  """Compares each published tensor with what was written of it, as soon as that is all of it.

  So both are still in memory. The committed checkpoint is put together from the same data by other
  metadata: of each chunk its first values are compared.
  """

  def __init__(
    self, source: Directory, path: pathlib.Path, run_config: RunConfig, stage: Stage
  ) -> None:
    self._source, self._path, self._run_config, self._stage = source, path, run_config, stage
    self._lock = threading.Lock()

  def begin(self, arrays: Mapping[layout.Keys, StoredArray]) -> None:
    run = {"config": self._run_config.to_dict()}
    opened = Opened(step=0, directory=workdir.absolute(self._path), arrays=arrays, run=run)
    self._arrays = arrays
    self._comparison = Comparison(self._source, Checkpoint(path=opened.directory, opened=opened))
    tensors = (self._source.tensors[name] for name in self._comparison.names)
    self._names = {(tensor.parts[0], tensor.layer): tensor.name for tensor in tensors}
    self._missing = {place: arrays[place[0]].shape[place[1] is not None] for place in self._names}
    self._corners: dict[tuple[layout.Keys, tuple[int, ...]], dict[tuple[int, ...], bytes]] = {}

  def written(self, keys: layout.Keys, index: Index) -> None:
    lead = tuple(i for i in index if isinstance(i, int))  # The layer, if layers are stacked.
    rows = index[-1]
    assert isinstance(rows, slice)
    place = keys, lead[0] if lead else None
    with self._lock:
      self._missing[place] -= rows.stop - rows.start
      is_whole = self._missing[place] == 0
    if is_whole:
      self._comparison.run_here(self._names[place], self._stage)
      self._corners[keys, lead] = self._arrays[keys].chunk_corners(lead)

  def finish(self, arrays: Mapping[layout.Keys, StoredArray]) -> None:
    self.verdict = self._comparison.verdict().require_equal()
    for (keys, lead), corners in self._corners.items():
      if arrays[keys].chunk_corners(lead) != corners:
        raise DifferenceError(f"{'.'.join(keys)} was not committed as it was written, at {lead}")
