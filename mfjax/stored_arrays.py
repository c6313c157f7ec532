"""Arrays of a checkpoint on disk, read and written block by block.

Orbax reads and writes whole arrays; a stacked layer of a large model is gigabytes. Here they are
opened through TensorStore, which Orbax's files are made of, so that a conversion holds a few blocks
at a time. `BlockArray` is a leaf that Orbax saves without ever holding it whole.

A block is what chunks of one row range of one layer hold: no chunk spans two layers.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from mfjax.digests import Early, sync_tree
from mfjax.parallel import run_all
from mfjax.storage import is_remote

CHUNK_BYTES = 32 * 2**20  # Of a checkpoint's arrays, at most.

# What writes the `params/` of a step on one process; Orbax merges such directories when it commits.
_PROCESS = "ocdbt.process_0"

# Mapped, a file is copied once: with `StoredArray.read`, a quarter of the processor time.
_MAPPED: dict[str, Any] = {"file_io_mode": {"mode": "memmap"}}

Index = tuple[slice | int, ...]
Keys = tuple[str, ...]  # A leaf's place in the tree.


@dataclasses.dataclass(frozen=True)
class StoredArray:
  """An array on disk."""

  store: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.store.shape)

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(self.store.dtype.numpy_dtype)

  def read(self, index: Index = ()) -> np.ndarray:
    """Return a part of the array; data that is missing on disk raises ValueError."""
    part = self.store[index]
    # Into memory of numpy, which has huge pages: TensorStore's own costs a fault every 4 KiB.
    values = np.empty(part.shape, self.dtype)
    tensorstore.array(values, copy=False, write=True).write(part).result()
    return values

  def chunk_corners(self, lead: Sequence[int] = ()) -> dict[tuple[int, ...], bytes]:
    """Return the first value of every chunk at the indices `lead` of the first axes."""
    chunk = self.store.chunk_layout.read_chunk.shape
    steps = list(zip(self.shape, chunk, strict=True))[len(lead) :]
    corners = itertools.product(*(range(0, size, step) for size, step in steps))
    return {(*lead, *corner): self.read((*lead, *corner)).tobytes() for corner in corners}


class Proof(Protocol):
  """Holds arrays that are being written against what they are made of; raises if they differ."""

  def begin(self, arrays: Mapping[Keys, StoredArray]) -> None:
    """Take the arrays, open for reading, before the first block of `BlockArray`s is written."""

  def written(self, keys: Keys, index: Index) -> None:
    """Note that a block can be read back; called from several threads."""

  def finish(self, arrays: Mapping[Keys, StoredArray]) -> None:
    """Judge the arrays of the committed checkpoint."""


def open_array(directory: epath.Path, keys: Sequence[str]) -> StoredArray:
  """Open the leaf at `keys` of the tree that Orbax saved in `directory`.

  Raises:
    ValueError: there is no such array, or its metadata is damaged.
  """
  # TensorStore would take zeros for chunks that are not there.
  spec = {
    "driver": "zarr3",
    "kvstore": _kvstore(directory, keys),
    "fill_missing_data_reads": False,
  }
  context = tensorstore.Context(_MAPPED)
  return StoredArray(tensorstore.open(spec, open=True, read=True, context=context).result())


def _kvstore(directory: epath.Path, keys: Sequence[str]) -> dict[str, Any]:
  base = str(directory)
  base = base if is_remote(base) else f"file://{base}"
  return {"driver": "ocdbt", "base": f"{base}/", "path": f"{'.'.join(keys)}/"}


@dataclasses.dataclass(frozen=True, eq=False)
class BlockArray:
  """An array that is computed block by block while Orbax writes it.

  `read(index)` returns the values of a block: called from several threads. `chunk` is the shape of
  the chunks on disk; a block takes one chunk's rows of every leading index of `stacked` dimensions.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  chunk: tuple[int, ...]
  stacked: bool
  read: Callable[[Index], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def blocks(self) -> Iterator[Index]:
    """Yield the indices of blocks: one layer if stacked, and one chunk's rows of the next axis."""
    layers: Sequence[int | None] = range(self.shape[0]) if self.stacked else [None]
    axis = 1 if self.stacked else 0
    for layer in layers:
      lead = () if layer is None else (layer,)
      if axis == len(self.shape):
        yield lead
        continue
      for start in range(0, self.shape[axis], self.chunk[axis]):
        yield (*lead, slice(start, min(start + self.chunk[axis], self.shape[axis])))


def chunk_shape(
  shape: Sequence[int], shard_shape: Sequence[int], itemsize: int, *, stacked: bool
) -> tuple[int, ...]:
  """Return the shape of chunks of at most 32 MiB that span neither two layers nor two shards."""
  chunk = list(shard_shape)
  if stacked:
    chunk[0] = 1
  for axis in range(len(shape)):
    while math.prod(chunk) * itemsize > CHUNK_BYTES and chunk[axis] > 1:
      divisor = next(n for n in range(2, chunk[axis] + 1) if chunk[axis] % n == 0)
      chunk[axis] //= divisor
  return tuple(chunk)


class BlockArrayHandler(ocp.type_handlers.TypeHandler):  # type: ignore[misc]  # Orbax has no types.
  """Writes `BlockArray` leaves as Orbax writes a jax.Array: what it writes is restored as one."""

  def __init__(self, num_threads: int) -> None:
    self._num_threads = num_threads
    self.error: BaseException | None = None  # Why writing failed; cleared by who begins it.
    self.proof: Proof | None = None  # Set by who begins it.
    self.early = Early()  # Digests of what is written, taken while it is in memory.

  def typestr(self) -> str:
    return "jax.Array"

  async def metadata(self, infos: Any) -> Any:
    raise NotImplementedError("a BlockArray is only written")

  async def deserialize(self, infos: Any, args: Any = None) -> Any:
    raise NotImplementedError("a BlockArray is only written")

  async def serialize(
    self, values: Sequence[BlockArray], infos: Sequence[Any], args: Any = None
  ) -> list[Any]:
    """Return the future of writing all blocks of all `values`."""
    return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(values, infos))]

  async def _write(self, values: Sequence[BlockArray], infos: Sequence[Any]) -> None:
    for info in infos:
      await info.await_path_creation()
    try:
      self._write_all(values, infos)
    except BaseException as error:
      # Orbax prints the traceback of any error but this one; who saved is told all the same.
      self.error = error
      raise concurrent.futures.CancelledError from error

  def _write_all(self, values: Sequence[BlockArray], infos: Sequence[Any]) -> None:
    # TensorStore would wait for the disk after every few blocks: a quarter of the speed.
    context = tensorstore.Context({"file_io_sync": False, **_MAPPED})
    directory = infos[0].parent_dir / _PROCESS
    leaves = {tuple(info.name.split(".")): value for value, info in zip(values, infos, strict=True)}
    stores = {
      keys: _create(value, info, context)
      for (keys, value), info in zip(leaves.items(), infos, strict=True)
    }
    if self.proof is not None:
      self.proof.begin({keys: StoredArray(store) for keys, store in stores.items()})

    def write(keys: Keys, index: Index) -> None:
      _write_block(stores[keys], leaves[keys], index)
      if not is_remote(directory):
        self.early.look(directory)
      if self.proof is not None:
        self.proof.written(keys, index)

    run_all(
      (functools.partial(write, keys, i) for keys, value in leaves.items() for i in value.blocks()),
      self._num_threads,
    )
    if not is_remote(directory):
      sync_tree(directory)


def _write_block(store: Any, value: BlockArray, index: Index) -> None:
  store[index].write(value.read(index), can_reference_source_data_indefinitely=True).result()


def _create(value: BlockArray, info: Any, context: Any) -> Any:
  chunk = list(value.chunk)
  little = {"name": "bytes", "configuration": {"endian": "little"}}
  spec = {
    "driver": "zarr3",
    "kvstore": _kvstore(info.parent_dir / _PROCESS, [info.name]),
    "store_data_equal_to_fill_value": True,  # Zeros are data, and missing chunks an error.
    "fill_missing_data_reads": False,
    "metadata": {
      "shape": list(value.shape),
      "data_type": value.dtype.name,
      "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
      "codecs": [little],
    },
  }
  return tensorstore.open(spec, create=True, open=True, context=context).result()
