"""Batches for training and evaluation: plan, read, assemble; sharded by process, resumable.

A batch is a dict of int32 [rows, sequence_length] arrays: `tokens`, `targets`, `segment_ids` (0 is
padding, documents count from 1 in each row) and `domain_ids` (0 at padding). A document's first
token is predicted from end-of-text, and end-of-text from its last.
"""

import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from mfjax.config import DataConfig
from mfjax.data import packing
from mfjax.data.index import TRAIN, VALIDATION, DataIndex
from mfjax.data.permutation import permute
from mfjax.data.plan import Planner, Position
from mfjax.data.shards import DocumentReader

Batch = dict[str, np.ndarray]
_KEYS = ("tokens", "targets", "segment_ids", "domain_ids")


def empty_batch(rows: int, sequence_length: int) -> Batch:
  """Return a batch of padding."""
  return {key: np.zeros((rows, sequence_length), np.int32) for key in _KEYS}


@dataclasses.dataclass(frozen=True)
class _Loaded:
  """Placed pieces with the text they point into: prediction i of a piece reads text[source + i]."""

  layout: packing.Layout
  source: np.ndarray
  text: np.ndarray

  def fill(self, batch: Batch, first: int, last: int) -> None:
    """Copy the pieces first to last - 1 to their places in the batch."""
    pieces, part = self.layout.pieces, slice(first, last)
    lengths = pieces.length[part]
    before = np.cumsum(lengths) - lengths
    count = np.arange(int(lengths.sum()))
    place = self.layout.row[part] * batch["tokens"].shape[1] + self.layout.column[part]
    place = count + np.repeat(place - before, lengths)
    source = count + np.repeat(self.source[part] - before, lengths)
    batch["tokens"].reshape(-1)[place] = self.text[source]
    batch["targets"].reshape(-1)[place] = self.text[source + 1]
    batch["segment_ids"].reshape(-1)[place] = np.repeat(self.layout.segment[part], lengths)
    batch["domain_ids"].reshape(-1)[place] = np.repeat(pieces.domain[part], lengths)


def load(reader: DocumentReader, layout: packing.Layout) -> _Loaded:
  """Read the documents of a layout, each once."""
  documents, which = np.unique(layout.pieces.document, return_inverse=True)
  text, first = reader.read(documents)
  return _Loaded(layout, first[which] + layout.pieces.start, text)


class _OwnRows:
  """The rows of each global batch of `batch_rows` that this process assembles, in their order."""

  def __init__(self, batch_rows: int, own_rows: Sequence[int] | np.ndarray | None):
    """Take all rows, or `own_rows`: ascending places in the global batch.

    Raises:
      ValueError: one of them lies outside the batch.
    """
    own = np.arange(batch_rows) if own_rows is None else np.asarray(own_rows)
    if own.size and not 0 <= own.min() <= own.max() < batch_rows:
      raise ValueError(f"own rows {own.min()} to {own.max()} lie outside batch_rows={batch_rows}")
    self.batch_rows, self.num_own = batch_rows, own.size
    self._place = np.full(batch_rows, -1)  # Of a global row among the own ones.
    self._place[own] = np.arange(own.size)

  def select(self, layout: packing.Layout, phase: int) -> tuple[packing.Layout, np.ndarray]:
    """Return the own pieces of rows that continue a batch of `phase` rows, and their batch.

    Rows before the first batch (negative phase) belong to no one.
    """
    number, row = np.divmod(layout.row + phase, self.batch_rows)
    place = self._place[row]
    own = (number >= 0) & (place >= 0)
    return dataclasses.replace(layout, row=place)[own], number[own]


class _BatchIterator(grain.DatasetIterator):  # type: ignore[misc]  # Grain has no types.
  """Goes through windows and cuts them into batches; its state names the next batch's first row."""

  def __init__(
    self, planner: Planner, reader: DocumentReader, own_rows: _OwnRows, length: int, start: Position
  ):
    super().__init__()
    self._planner, self._reader, self._length = planner, reader, length
    self._own_rows = own_rows
    self._enter(start)

  def _enter(self, position: Position) -> None:
    self._position = self._end = position
    self._num_rows = 0

  def _load_window(self, filled: int) -> None:
    """Load the window after the present one, whose first rows follow `filled` rows of a batch."""
    # The first window may be entered in its middle: that row is the batch's first.
    row = self._position.row if self._num_rows == 0 else 0
    self._position = self._end
    window = self._planner.next_window(self._position)
    if window is None:
      raise StopIteration
    layout, self._end = window
    self._num_rows, self._row, self._phase = layout.num_rows, row, filled - row
    own, self._batch_of_piece = self._own_rows.select(layout, self._phase)
    self._loaded = load(self._reader, own)

  def __next__(self) -> tuple[Batch, dict[str, Any]]:
    batch, filled = empty_batch(self._own_rows.num_own, self._length), 0
    batch_rows = self._own_rows.batch_rows
    while filled < batch_rows:
      if self._num_rows == 0 or self._row == self._num_rows:
        self._load_window(filled)
      number = (self._phase + self._row) // batch_rows
      first, last = np.searchsorted(self._batch_of_piece, [number, number + 1])
      self._loaded.fill(batch, int(first), int(last))
      rows = min(batch_rows - filled, self._num_rows - self._row)
      self._row += rows
      filled += rows
    return batch, self.get_state()

  def get_state(self) -> dict[str, Any]:
    if self._num_rows and self._row == self._num_rows:
      return self._planner.to_state(self._end)
    row = self._row if self._num_rows else self._position.row
    return self._planner.to_state(dataclasses.replace(self._position, row=row))

  def set_state(self, state: Mapping[str, Any]) -> None:
    self._enter(self._planner.from_state(state))


class _Batches(grain.IterDataset):  # type: ignore[misc]  # Grain has no types.
  """The batches of one process as a Grain dataset."""

  def __init__(self, *arguments: Any):
    super().__init__()
    self._arguments = arguments

  def __iter__(self) -> _BatchIterator:
    return _BatchIterator(*self._arguments)


class TrainStream:
  """Iterates over (batch, state): this process's rows, and what resumes after them.

  Rows of the global batch n are rows n * batch_rows and following of one endless (or, with
  on_end=STOP, finite) stream; a process owns the rows that its devices hold
  (`sharding.process_rows`). Every process plans all rows and reads only its own. With STOP every
  process ends at the same batch; rows that fill no whole batch are left out.
  """

  def __init__(
    self,
    index: DataIndex,
    config: DataConfig,
    *,
    seed: int,
    own_rows: Sequence[int] | np.ndarray | None = None,
    state: Mapping[str, Any] | None = None,
  ):
    """Start at the beginning, or after the batch whose state is given.

    Args:
      own_rows: this process's rows of a batch, ascending; default: all of them.

    Raises:
      ValueError: the mixture names an unknown domain, own rows lie outside the batch, or the state
        belongs to other data or options.
    """
    planner = Planner(index, config, seed)
    own = _OwnRows(config.batch_rows, own_rows)
    reader = DocumentReader(index, TRAIN, planner.domains)
    start = planner.start() if state is None else planner.from_state(state)
    batches = _Batches(planner, reader, own, config.sequence_length, start)
    prefetched = ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.prefetch_batches)
    self._open = [iter(prefetched)]
    # Grain's iterator closes itself when it is dropped, but fails to once Python has shut down.
    weakref.finalize(self, self._open.clear)

  def __iter__(self) -> "TrainStream":
    return self

  def __next__(self) -> tuple[Batch, dict[str, Any]]:
    if not self._open:
      raise ValueError("the stream is closed")
    return next(self._open[0])

  def close(self) -> None:
    """Stop reading ahead."""
    self._open.clear()


def _evaluated_documents(index: DataIndex, domain: str, split: str, max_tokens: int) -> np.ndarray:
  """Return the documents of an evaluation, in a fixed shuffled order; at least one."""
  num_documents = index.split(domain, split).documents
  if not num_documents:
    raise ValueError(
      f"{index.path}: domain {domain!r} has no {split} documents: "
      "prepare it with a larger --validation_fraction"
    )
  documents = permute(np.arange(num_documents), num_documents, ("evaluation", domain))
  if not max_tokens:
    return documents
  ends = np.cumsum(index.lengths(domain, split)[documents, 0].astype(np.int64) + 1)
  return documents[: max(int(np.searchsorted(ends, max_tokens, side="right")), 1)]


def evaluation_batches(
  index: DataIndex,
  domain: str,
  *,
  split: str = VALIDATION,
  rows: int,
  sequence_length: int,
  max_tokens: int = 0,
  own_rows: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
  """Yield `own_rows` (default: all) of packed batches of `rows` rows; the last ends in padding.

  The documents are always the same: whole ones, of at most `max_tokens` predictions in all (0: all
  documents).

  Raises:
    ValueError: the domain is unknown or has nothing in this split, or own rows lie outside.
  """
  process = _OwnRows(rows, own_rows)
  documents = _evaluated_documents(index, domain, split, max_tokens)
  lengths = index.lengths(domain, split)[documents, 0].astype(np.int64) + 1
  number = np.full_like(documents, index.domain_names.index(domain))
  pieces = packing.Pieces(documents, number, np.zeros_like(documents), lengths)
  layout = packing.pack(pieces, sequence_length)
  own, batch_of_piece = process.select(layout, 0)
  reader = DocumentReader(index, split, [domain])
  for batch_number in range(-(-layout.num_rows // rows)):
    first, last = np.searchsorted(batch_of_piece, [batch_number, batch_number + 1])
    batch = empty_batch(process.num_own, sequence_length)
    load(reader, own[first:last]).fill(batch, 0, int(last - first))
    yield batch


def evaluation_bytes(
  index: DataIndex, domain: str, *, split: str = VALIDATION, max_tokens: int = 0
) -> int:
  """Return the UTF-8 bytes of the documents that `evaluation_batches` takes."""
  documents = _evaluated_documents(index, domain, split, max_tokens)
  return int(index.lengths(domain, split)[documents, 1].astype(np.int64).sum())
