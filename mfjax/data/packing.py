"""From documents' lengths to rows: which piece of which document stands where.

A document of n tokens is n + 1 predictions: inputs E t1 .. tn, targets t1 .. tn E, E being
end-of-text. Everything here is arithmetic on lengths; no token is read.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pieces:
  """Parts of documents, as parallel int64 arrays [P]; `start` and `length` count predictions."""

  document: np.ndarray
  domain: np.ndarray
  start: np.ndarray
  length: np.ndarray

  def __getitem__(self, picked: np.ndarray | slice) -> "Pieces":
    return Pieces(*(getattr(self, f.name)[picked] for f in dataclasses.fields(Pieces)))


@dataclasses.dataclass(frozen=True)
class Layout:
  """Pieces with their places, ordered by row and column; int64 arrays [P]."""

  pieces: Pieces
  row: np.ndarray
  column: np.ndarray
  segment: np.ndarray
  num_rows: int

  def __getitem__(self, picked: np.ndarray | slice) -> "Layout":
    places = self.row[picked], self.column[picked], self.segment[picked]
    return Layout(self.pieces[picked], *places, self.num_rows)


def join(parts: list[Pieces]) -> Pieces:
  """Return the pieces of all parts, in order."""
  columns = ([getattr(part, f.name) for part in parts] for f in dataclasses.fields(Pieces))
  return Pieces(*(np.concatenate([np.zeros(0, np.int64), *arrays]) for arrays in columns))


def _cut(pieces: Pieces, position: np.ndarray, sequence_length: int) -> tuple[Pieces, np.ndarray]:
  """Cut pieces that begin at `position` of a stream at the multiples of `sequence_length`.

  Returns:
    The parts, and where in the stream each begins.
  """
  first_row = position // sequence_length
  num_parts = (position + pieces.length - 1) // sequence_length - first_row + 1
  ends = np.cumsum(num_parts)
  owner = np.repeat(np.arange(num_parts.size), num_parts)
  part = np.arange(owner.size) - (ends - num_parts)[owner]
  row_start = (first_row[owner] + part) * sequence_length
  begin = np.maximum(position[owner], row_start)
  stop = np.minimum((position + pieces.length)[owner], row_start + sequence_length)
  start = pieces.start[owner] + begin - position[owner]
  return Pieces(pieces.document[owner], pieces.domain[owner], start, stop - begin), begin


def pack(pieces: Pieces, sequence_length: int) -> Layout:
  """Pack pieces into rows of `sequence_length` predictions, each its own segment.

  A longer piece is cut; the parts go where they fit best, the longest first.
  """
  parts, _ = _cut(pieces, np.zeros_like(pieces.start), sequence_length)
  row, column = best_fit(parts.length, sequence_length)
  order = np.lexsort((column, row))
  row = row[order]
  segment = np.arange(row.size) - np.searchsorted(row, row) + 1
  num_rows = int(row[-1]) + 1 if row.size else 0
  return Layout(parts[order], row, column[order], segment, num_rows)


def concatenate(pieces: Pieces, sequence_length: int) -> Layout:
  """Lay each domain's pieces end to end and cut them into rows; a row is one segment.

  Only a domain's last row may be short.
  """
  parts, rows, columns, num_rows = [], [], [], 0
  for domain in np.unique(pieces.domain):
    own = pieces[pieces.domain == domain]
    part, begin = _cut(own, np.cumsum(own.length) - own.length, sequence_length)
    parts.append(part)
    rows.append(num_rows + begin // sequence_length)
    columns.append(begin % sequence_length)
    num_rows = int(rows[-1][-1]) + 1
  empty = [np.zeros(0, np.int64)]
  row, column = np.concatenate(empty + rows), np.concatenate(empty + columns)
  return Layout(join(parts), row, column, np.ones_like(row), num_rows)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
  """Return row and column of each piece: best-fit decreasing bin packing.

  Bit s of `spaces` says that some row has s free, so that the tightest row is the lowest bit at or
  above the length, at any number of open rows (measured: 1 million pieces/s).

  Args:
    lengths: int64 [P], each from 1 to `capacity`.
  """
  row, column = np.zeros_like(lengths), np.zeros_like(lengths)
  full = lengths == capacity
  num_rows = int(full.sum())
  row[full] = np.arange(num_rows)
  rest = np.flatnonzero(~full)
  rest = rest[np.argsort(-lengths[rest], kind="stable")]
  rows: list[int] = []
  columns: list[int] = []
  open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
  spaces = 0
  for length in lengths[rest].tolist():
    if fitting := spaces >> length:
      space = length + (fitting & -fitting).bit_length() - 1
      place = open_rows[space].pop()
      if not open_rows[space]:
        spaces ^= 1 << space
    else:
      space, place = capacity, num_rows
      num_rows += 1
    rows.append(place)
    columns.append(capacity - space)
    if left := space - length:
      open_rows[left].append(place)
      spaces |= 1 << left
  row[rest], column[rest] = rows, columns
  return row, column


def shuffle_rows(layout: Layout, new_row: np.ndarray) -> Layout:
  """Return the layout with row r moved to row new_row[r]."""
  row = new_row[layout.row]
  return dataclasses.replace(layout, row=row)[np.argsort(row, kind="stable")]
