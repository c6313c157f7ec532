"""Pickled PyTorch checkpoints (`pytorch_model*.bin`), read with torch's `weights_only`.

torch is imported here alone, when such a file is met.
"""

import importlib
import pathlib
import threading
from typing import Any

import ml_dtypes
import numpy as np

from mfjax.hf.safetensors import Entry

# A mapped file's pages count as this process's memory: map it anew after so many bytes.
_MAPPED_BYTES = 2**30


def import_torch(purpose: str) -> Any:
  """Return torch.

  Raises:
    ValueError: it is not installed; says what for, and how to.
  """
  try:
    return importlib.import_module("torch")
  except ImportError as error:
    raise ValueError(f"{purpose} needs torch: pip install 'mfjax[hf]'") from error


class Reader:
  """Reads one file, as `safetensors.Reader` does; safe to use from several threads."""

  def __init__(self, path: pathlib.Path) -> None:
    """Open the file.

    Raises:
      ValueError: torch is missing, or the file is damaged or holds anything but tensors; names all
        entries that are none.
    """
    self.path = path
    self._torch = import_torch(f"reading {path}, a pickled checkpoint,")
    self._lock = threading.Lock()
    self._tensors = self._load()
    dtypes = {
      self._torch.float64: np.dtype(np.float64),
      self._torch.float32: np.dtype(np.float32),
      self._torch.float16: np.dtype(np.float16),
      self._torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
      self._torch.int64: np.dtype(np.int64),
      self._torch.int32: np.dtype(np.int32),
      self._torch.int8: np.dtype(np.int8),
      self._torch.uint8: np.dtype(np.uint8),
      self._torch.bool: np.dtype(np.bool_),
    }
    odd = [n for n, t in self._tensors.items() if t.dtype not in dtypes or not _is_dense(t)]
    if odd:
      raise ValueError(f"{path}: tensors of a kind that mfjax does not read: {', '.join(odd)}")
    self.entries = {
      name: Entry(dtypes[tensor.dtype], tuple(tensor.shape), 0)
      for name, tensor in self._tensors.items()
    }
    self._mapped = 0

  def _load(self) -> dict[str, Any]:
    try:
      found = self._torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises what its parsers raise.
      reason = str(error).partition("\n")[0]
      if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
        reason = "it holds more than tensors, which could run code: convert it to safetensors"
      raise ValueError(f"{self.path} cannot be read: {reason}") from error
    if not isinstance(found, dict):
      raise ValueError(f"{self.path} holds a {type(found).__name__}, not a dict of tensors")
    others = [repr(k) for k, v in found.items() if not isinstance(v, self._torch.Tensor)]
    if others:
      raise ValueError(f"{self.path} holds more than tensors: {', '.join(others)}")
    return found

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return rows [start, stop) of the first axis of a tensor, or all of a scalar."""
    entry = self.entries[name]
    with self._lock:  # No one may read from a mapping that is about to go.
      tensor = self._tensors[name]
      part = tensor[start:stop] if entry.shape else tensor
      # NumPy has no bfloat16 of torch's: its bytes are taken as they are.
      data = part.contiguous().reshape(-1).view(self._torch.uint8).numpy().copy()
      self._mapped += data.nbytes
      if self._mapped > _MAPPED_BYTES:
        del tensor, part
        self._tensors, self._mapped = {}, 0
        self._tensors = self._load()
    rows = () if not entry.shape else (-1, *entry.shape[1:])
    return data.view(entry.dtype).reshape(rows)

  def close(self) -> None:
    self._tensors = {}


def _is_dense(tensor: Any) -> bool:
  return str(tensor.layout) == "torch.strided" and not tensor.is_quantized
