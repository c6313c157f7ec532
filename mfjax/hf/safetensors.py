"""The safetensors format: read by row ranges, written in any order of blocks.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape and
byte range), and the tensors' bytes without gaps. All offsets are known before the first byte of
data, so files are written by threads as blocks come. Files are read with pread, not memory-mapped:
mapped pages would count as this process's memory.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # As the format's own library has it.
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a file; `start` is counted from the beginning of the file."""

  dtype: np.dtype
  shape: tuple[int, ...]
  start: int

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class Reader:
  """Reads one file; safe to use from several threads."""

  def __init__(self, path: pathlib.Path) -> None:
    """Open the file and check all of its header.

    Raises:
      ValueError: the file is truncated or damaged; the message names it, and every problem.
    """
    self.path = path
    self._file = path.open("rb")
    try:
      self.entries: Mapping[str, Entry] = _read_header(path, self._file.fileno())
    except BaseException:
      self._file.close()
      raise

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return rows [start, stop) of the first axis of a tensor, or all of a scalar."""
    entry = self.entries[name]
    row = entry.nbytes // entry.shape[0] if entry.shape and entry.shape[0] else entry.nbytes
    rows = entry.shape[0] if entry.shape else 1
    stop = rows if stop is None else min(stop, rows)
    start = min(start, stop)
    data = np.empty((stop - start) * row, np.uint8)
    read_exactly(self._file.fileno(), data, entry.start + start * row, self.path)
    shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
    return data.view(entry.dtype).reshape(shape)

  def close(self) -> None:
    self._file.close()


def read_exactly(descriptor: int, out: np.ndarray, offset: int, path: pathlib.Path) -> None:
  """Fill `out`, bytes, from `offset` of a file."""
  view, done = memoryview(out.data), 0
  while done < len(view):
    count = os.preadv(descriptor, [view[done:]], offset + done)
    if count == 0:
      raise ValueError(f"{path} ended while it was read: it is being changed")
    done += count


def _read_header(path: pathlib.Path, descriptor: int) -> dict[str, Entry]:
  size = os.fstat(descriptor).st_size
  length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
  if size < 8 or 8 + length > size:
    what = "its header is cut off" if size >= 8 and length <= _MAX_HEADER_BYTES else "no header"
    raise ValueError(f"{path} is truncated or no safetensors file: {what} ({size:,} bytes)")
  if length > _MAX_HEADER_BYTES:
    raise ValueError(f"{path} is no safetensors file: its header would have {length:,} bytes")
  data = np.empty(length, np.uint8)
  read_exactly(descriptor, data, 8, path)
  try:
    header = json.loads(data.tobytes(), object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
      raise TypeError("no object")
  except (ValueError, TypeError, RecursionError) as error:
    raise ValueError(f"{path} is damaged: its header is no JSON object ({error})") from error
  header.pop("__metadata__", None)
  problems: list[str] = []
  entries: dict[str, Entry] = {}
  ranges = []
  for name, fields in header.items():
    problem = _check_fields(fields)
    if problem:
      problems.append(f"{name}: {problem}")
      continue
    begin, end = fields["data_offsets"]
    entries[name] = Entry(DTYPES[fields["dtype"]], tuple(fields["shape"]), 8 + length + begin)
    ranges.append((begin, end, name))
  problems += _check_ranges(ranges, size - 8 - length)
  if problems:
    raise ValueError(f"{path} is damaged: {'; '.join(problems)}")
  return entries


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  made = dict(pairs)
  if len(made) != len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
  return made


def _check_fields(fields: Any) -> str:
  """Return what is wrong with one tensor's description, or nothing."""
  if not isinstance(fields, Mapping):
    return "no description"
  dtype, shape = fields.get("dtype"), fields.get("shape")
  offsets: Any = fields.get("data_offsets")
  if dtype not in DTYPES:
    return f"unknown dtype {dtype!r}"
  if not _are_counts(shape):
    return f"shape {shape!r} is no list of sizes"
  if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    return f"data_offsets {offsets!r} are no range"
  wanted = math.prod(shape) * DTYPES[dtype].itemsize
  if wanted != offsets[1] - offsets[0]:
    return f"{dtype}{shape} takes {wanted:,} bytes, its range has {offsets[1] - offsets[0]:,}"
  return ""


def _are_counts(values: Any) -> TypeGuard[list[int]]:
  return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_ranges(ranges: list[tuple[int, int, str]], size: int) -> list[str]:
  """Return one phrase per gap, overlap or missing end of the data."""
  problems, expected = [], 0
  for begin, end, name in sorted(ranges):
    if begin != expected:
      what = "leaves a gap before it" if begin > expected else "overlaps the one before"
      problems.append(f"{name} {what}")
    expected = max(expected, end)
  if expected > size:
    problems.append(f"truncated: {size:,} of {expected:,} bytes of data")
  if expected < size:
    problems.append(f"{size - expected:,} bytes after the last tensor")
  return problems


class Writer:
  """Writes one file whose tensors are known; blocks come from any thread, in any order."""

  def __init__(self, path: pathlib.Path, tensors: Mapping[str, tuple[np.dtype, Sequence[int]]]):
    """Create the file at its final size and write the header; data of `tensors` in their order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, self.entries = 0, {}
    for name, (dtype, shape) in tensors.items():
      entry = Entry(dtype, tuple(shape), position)
      end = position + entry.nbytes
      fields = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
      header[name], self.entries[name], position = fields, entry, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    self._begin = 8 + len(text)
    self._file = path.open("xb")
    self._write(len(text).to_bytes(8, "little") + text, 0)
    os.truncate(self._file.fileno(), self._begin + position)

  def write(self, name: str, start: int, rows: np.ndarray) -> None:
    """Write rows of a tensor from row `start` on."""
    entry = self.entries[name]
    assert rows.dtype == entry.dtype and rows.shape[1:] == entry.shape[1:], name
    row = entry.nbytes // entry.shape[0] if entry.shape and entry.shape[0] else 0
    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    self._write(data, self._begin + entry.start + start * row)

  def sync(self) -> None:
    """Wait until all that was written is on the disk."""
    os.fsync(self._file.fileno())

  def _write(self, data: Any, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
      done += os.pwrite(self._file.fileno(), view[done:], offset + done)

  def close(self) -> None:
    """Close the file."""
    self._file.close()
