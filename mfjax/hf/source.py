"""Parameters under their published names: of a workdir's checkpoint or a PyTorch directory."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from etils import epath

from mfjax import checkpoint, workdir
from mfjax.config import CheckpointConfig, ModelConfig, RunConfig
from mfjax.hf import directory, layout
from mfjax.stored_arrays import Index

BLOCK_BYTES = 64 * 2**20  # What one thread holds of a tensor at a time.

Confirm = Callable[[], None]  # Raises if what was read is not what was once written.
_Result = TypeVar("_Result")


class Source(Protocol):
  """Parameters by their published names; `read` may be called from several threads."""

  @property
  def label(self) -> str: ...

  @property
  def config(self) -> ModelConfig: ...

  @property
  def tensors(self) -> Mapping[str, layout.Tensor]: ...

  def dtype(self, name: str) -> np.dtype:
    """Return the dtype that a tensor is stored in."""
    ...

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    """Return rows [start, stop) of the first axis of a tensor."""
    ...

  def rows_per_block(self, name: str) -> int:
    """Return how many rows to read at a time."""
    ...


def use_source(
  path: epath.PathLike, step: int | None, use: Callable[[Source, Confirm], _Result]
) -> _Result:
  """Return what `use(source, confirm)` makes of a workdir's step or a directory of PyTorch tensors.

  Of a workdir it is the newest good step, or `step`, as `use_checkpoint` does it.

  Raises:
    ValueError: `path` is neither, or it is damaged; names all that is wrong.
  """
  if (workdir.absolute(path) / "checkpoints").exists():
    return use_checkpoint(path, step, use)
  if step is not None:
    raise ValueError(f"{path} is no workdir, so it has no step {step}")
  with contextlib.closing(directory.open_directory(pathlib.Path(path))) as opened:
    return use(opened, lambda: None)


def use_checkpoint(
  path: epath.PathLike, step: int | None, use: Callable[["Checkpoint", Confirm], _Result]
) -> _Result:
  """Return what `use(checkpoint, confirm)` makes of a workdir's newest good step, or of `step`.

  It begins before the step's files were held against their digests, and must call `confirm` before
  its result can be seen: see `Checkpointer.use_params`.

  Raises:
    ValueError: `path` is no workdir, or has no such step, or none that is good.
  """
  run_config = workdir.read_config(path)
  opener = checkpoint.Checkpointer(path, CheckpointConfig(), run_config)
  with contextlib.closing(opener):
    made = opener.use_params(
      lambda opened, confirm: use(Checkpoint(path=workdir.absolute(path), opened=opened), confirm),
      step,
    )
  if made is None:
    raise ValueError(f"{path} has no checkpoint yet: train first, or give another workdir")
  return made


@dataclasses.dataclass(kw_only=True)
class Checkpoint:
  """The parameters of one step of a workdir, under their published names."""

  path: epath.Path
  opened: checkpoint.Opened

  def __post_init__(self) -> None:
    self.run_config = RunConfig.from_dict(self.opened.run["config"])
    self.config = self.run_config.model
    self.label = f"{self.path}, step {self.opened.step}"
    self.tensors = layout.tensors(self.config, layout.banks(self.opened.arrays))
    self._check()

  def _check(self) -> None:
    named = {keys for tensor in self.tensors.values() for keys in tensor.parts}
    if named != self.opened.arrays.keys():
      odd = sorted(".".join(keys) for keys in named ^ self.opened.arrays.keys())
      raise ValueError(f"{self.label} is not a ModuleFormer of its config: see {', '.join(odd)}")

  @property
  def run(self) -> Mapping[str, Any]:
    return self.opened.run

  def dtype(self, name: str) -> np.dtype:
    return self.opened.arrays[self.tensors[name].parts[0]].dtype

  def rows_per_block(self, name: str) -> int:
    tensor = self.tensors[name]
    if tensor.transposed or len(tensor.shape) == 1:
      return tensor.shape[0]
    store = self.opened.arrays[tensor.parts[0]].store
    chunk = store.chunk_layout.read_chunk.shape[0 if tensor.layer is None else 1]
    row_bytes = tensor.size // tensor.shape[0] * self.dtype(name).itemsize
    # Whole chunks: a chunk is read as a whole for any part of it.
    return max(chunk, BLOCK_BYTES // max(row_bytes, 1) // chunk * chunk)

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    tensor = self.tensors[name]
    lead: Index = () if tensor.layer is None else (tensor.layer,)
    if tensor.transposed:
      return self.opened.arrays[tensor.parts[0]].read(lead).T[start:stop]
    pieces, begin = [], 0
    for keys in tensor.parts:
      array = self.opened.arrays[keys]
      size = array.shape[len(lead)]
      first, last = max(start, begin), min(stop, begin + size)
      if first < last:
        pieces.append(array.read((*lead, slice(first - begin, last - begin))))
      begin += size
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def row_blocks(tensor: layout.Tensor, rows: int) -> Iterator[tuple[int, int]]:
  """Yield (start, stop) over a tensor's first axis."""
  for start in range(0, tensor.shape[0], rows):
    yield start, min(start + rows, tensor.shape[0])


def narrower(a: np.dtype, b: np.dtype) -> np.dtype:
  """Return the dtype of fewer bits; of bfloat16 and float16, float16."""
  order = ("float16", "bfloat16", "float32", "float64")
  return min(a, b, key=lambda dtype: order.index(dtype.name))


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  """Round to `dtype`, to nearest even.

  Raises:
    ValueError: a finite value lies beyond the largest of `dtype`.
  """
  if values.dtype == dtype:
    return values
  try:
    with np.errstate(over="raise", invalid="ignore"):
      return values.astype(dtype)
  except FloatingPointError as error:
    raise ValueError(
      f"{name} has values beyond the range of {dtype.name}: choose bfloat16 or float32"
    ) from error
