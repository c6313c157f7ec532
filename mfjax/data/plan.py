"""The order of the training data: a pure function of (seed, data, options), window by window.

A window is about `window_tokens` predictions: each domain gives its share of them, in the shuffled
order of its epoch; they become rows, and the rows are shuffled. A few integers per domain say where
the next window begins. No process, worker or device enters here.
"""

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from mfjax.config import DataConfig, DataEnd, RowFormat
from mfjax.data import packing
from mfjax.data.index import TRAIN, DataIndex
from mfjax.data.permutation import permute
from mfjax.schema import unknown_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cursor:
  """Where a domain stands: the next document, and the next prediction in it.

  `drawn` counts the predictions taken in this epoch, `credit` those that the domain may still
  take by its share (negative: it took a long document).
  """

  epoch: int = 0
  position: int = 0
  offset: int = 0
  drawn: int = 0
  credit: int = 0


@dataclasses.dataclass(frozen=True)
class Position:
  """A place in the stream of rows: row `row` of window `window`, which begins at the cursors."""

  window: int
  row: int
  cursors: tuple[Cursor, ...]


def shares_of(index: DataIndex, mixture: Mapping[str, float]) -> dict[str, Fraction]:
  """Return each domain's share of the predictions; an empty mixture gives the natural shares.

  Raises:
    ValueError: the mixture names a domain that is unknown or has nothing to train on.
  """
  trainable = {name: splits[TRAIN] for name, splits in index.domains.items()}
  trainable = {name: split for name, split in trainable.items() if split.documents}
  for name in mixture:
    if name not in trainable:
      raise ValueError(f"data.mixture: {unknown_name(name, trainable, 'domain')}")
  weights = {name: Fraction(weight) for name, weight in mixture.items()} or {
    name: Fraction(split.tokens + split.documents) for name, split in trainable.items()
  }
  total = sum(weights.values())
  return {name: weights[name] / total for name in sorted(weights)}


class Planner:
  """Lays out window after window; holds the documents' lengths, and no state."""

  def __init__(self, index: DataIndex, config: DataConfig, seed: int):
    self._config, self._seed = config, seed
    self._shares = shares_of(index, dict(config.mixture))
    self.domains = tuple(self._shares)
    self._ids = [index.domain_names.index(name) for name in self.domains]
    self._lengths = [index.lengths(name, TRAIN) for name in self.domains]
    splits = [index.split(name, TRAIN) for name in self.domains]
    self._totals = [split.tokens + split.documents for split in splits]
    self._first = np.cumsum([0] + [split.documents for split in splits])
    # Small data: a window is at most one epoch of the domain that ends first.
    shares = self._shares.values()
    epoch = min(int(total / share) for total, share in zip(self._totals, shares, strict=True))
    self._window_tokens = max(min(config.window_tokens, epoch), config.sequence_length)
    self._identity = {
      "data": index.digest,
      "seed": seed,
      "sequence_length": config.sequence_length,
      "row_format": config.row_format.value,
      "on_end": config.on_end.value,
      "window_tokens": config.window_tokens,
      "mixture": dict(sorted(config.mixture)),
    }

  def start(self) -> Position:
    """Return the position before the first row."""
    return Position(0, 0, tuple(Cursor() for _ in self.domains))

  def to_state(self, position: Position) -> dict[str, Any]:
    """Return a small JSON-able dict that `from_state` turns back."""
    cursors = zip(self.domains, position.cursors, strict=True)
    return {
      "plan": self._identity,
      "window": position.window,
      "row": position.row,
      "domains": {name: dataclasses.asdict(cursor) for name, cursor in cursors},
    }

  def from_state(self, state: Mapping[str, Any]) -> Position:
    """Return the position that a state names.

    Raises:
      ValueError: the state belongs to other data, another seed or other options; names which.
    """
    try:
      identity = dict(state["plan"])
      cursors = {name: Cursor(**fields) for name, fields in state["domains"].items()}
      window, row = int(state["window"]), int(state["row"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise ValueError(f"this is no data state: {state!r}") from error
    for name, mine in self._identity.items():
      if identity.get(name) != mine:
        raise ValueError(
          f"the data state was saved with {name}={identity.get(name)!r}, this run has {mine!r}: "
          "resume with what the run was started with"
        )
    return Position(window, row, tuple(cursors[name] for name in self.domains))

  def next_window(self, position: Position) -> tuple[packing.Layout, Position] | None:
    """Return the rows of the window that begins at `position`, and where the next one begins.

    None: the data ends here. `position.row` is not looked at. Documents are numbered across
    `domains`, piece domains by the index's order.
    """
    cursors, window = list(position.cursors), position.window
    length, packs = self._config.sequence_length, self._config.row_format is RowFormat.PACK
    while quotas := self._quotas(cursors):
      parts = []
      for number, quota in enumerate(quotas):
        credit = cursors[number].credit + quota
        wanted = credit if packs else math.ceil(credit / length) * length
        pieces, cursor = self._take(number, cursors[number], max(wanted, 0))
        parts.append(pieces)
        cursors[number] = dataclasses.replace(cursor, credit=credit - int(pieces.length.sum()))
      pieces = packing.join(parts)
      window += 1
      if pieces.length.size:  # Else a long document took the window's share beforehand.
        layout = packing.pack(pieces, length) if packs else packing.concatenate(pieces, length)
        rows = np.arange(layout.num_rows)
        new_row = permute(rows, layout.num_rows, ("rows", self._seed, window))
        return packing.shuffle_rows(layout, new_row), Position(window, 0, tuple(cursors))
    return None

  def _quotas(self, cursors: list[Cursor]) -> list[int]:
    """Return how many predictions each domain gains in the next window; empty: the data ends."""
    size = Fraction(self._window_tokens)
    shares = list(self._shares.values())
    if self._config.on_end is DataEnd.STOP:
      left = [total - c.drawn for total, c in zip(self._totals, cursors, strict=True)]
      # Natural shares see every document; a mixture ends with its first domain.
      natural = not self._config.mixture
      if not (any(left) if natural else all(left)):
        return []
      needed = [
        (n - c.credit) / share for n, c, share in zip(left, cursors, shares, strict=True) if n
      ]
      size = min(size, max(needed) if natural else min(needed))
    return [math.ceil(share * size) for share in shares]

  def _take(self, number: int, cursor: Cursor, tokens: int) -> tuple[packing.Pieces, Cursor]:
    """Return the domain's next pieces: whole documents of at least `tokens` predictions.

    Concatenated rows take exactly `tokens`; the last piece may then end inside its document.
    """
    parts, num_documents = [], len(self._lengths[number])
    while tokens > 0:
      if cursor.position == num_documents:
        if self._config.on_end is DataEnd.STOP:
          break
        cursor = Cursor(epoch=cursor.epoch + 1)
      ahead = tokens * num_documents // self._totals[number] + 16
      count = min(num_documents - cursor.position, ahead)
      key = (self._seed, cursor.epoch, self.domains[number])
      positions = np.arange(cursor.position, cursor.position + count)
      documents = permute(positions, num_documents, key)
      lengths = self._lengths[number][documents, 0].astype(np.int64) + 1
      starts = np.zeros_like(lengths)
      starts[0] = cursor.offset
      lengths[0] -= cursor.offset
      ends = np.cumsum(lengths)
      used = min(count, int(np.searchsorted(ends, tokens)) + 1)
      offset, taken = 0, int(ends[used - 1])
      if taken > tokens and self._config.row_format is RowFormat.CONCATENATE:
        lengths[used - 1] -= taken - tokens
        offset, taken = int(starts[used - 1] + lengths[used - 1]), tokens
      cursor = Cursor(
        epoch=cursor.epoch,
        position=cursor.position + used - (offset > 0),
        offset=offset,
        drawn=cursor.drawn + taken,
      )
      tokens -= taken
      domain = np.full(used, self._ids[number])
      global_number = self._first[number] + documents[:used]
      parts.append(packing.Pieces(global_number, domain, starts[:used], lengths[:used]))
    return packing.join(parts), cursor
