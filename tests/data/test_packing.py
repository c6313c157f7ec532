import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfjax.data.packing import Pieces, best_fit, concatenate, pack
from mfjax.data.permutation import permute

lengths_of = st.lists(st.integers(1, 50), max_size=60)


def whole_documents(lengths, domains=None):
  number = np.arange(len(lengths), dtype=np.int64)
  domain = np.zeros_like(number) if domains is None else np.array(domains, np.int64)
  return Pieces(number, domain, np.zeros_like(number), np.array(lengths, np.int64))


def check_layout(layout, lengths, capacity):
  """Check that no two predictions share a place and that each document is there once, whole."""
  places, seen = set(), {}
  pieces = layout.pieces
  for i in range(layout.row.size):
    for k in range(pieces.length[i]):
      place = (int(layout.row[i]), int(layout.column[i] + k))
      assert place not in places
      assert place[1] < capacity
      places.add(place)
      seen.setdefault(int(pieces.document[i]), []).append(int(pieces.start[i] + k))
  assert {d: sorted(p) for d, p in seen.items()} == {
    d: list(range(n)) for d, n in enumerate(lengths)
  }
  assert set(layout.row.tolist()) == set(range(layout.num_rows))


@given(lengths_of, st.integers(1, 20))
def test_packed_rows_hold_everything_once(lengths, capacity):
  layout = pack(whole_documents(lengths), capacity)
  check_layout(layout, lengths, capacity)
  for row in range(layout.num_rows):
    own = layout.row == row
    assert layout.segment[own].tolist() == list(range(1, own.sum() + 1))
    assert np.all(np.diff(layout.column[own]) == layout.pieces.length[own][:-1])


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 2)), max_size=40), st.integers(1, 20))
def test_concatenated_rows_hold_everything_once(documents, capacity):
  lengths, domains = [n for n, _ in documents], [d for _, d in documents]
  layout = concatenate(whole_documents(lengths, domains), capacity)
  check_layout(layout, lengths, capacity)
  short = 0
  for row in range(layout.num_rows):
    own = layout.row == row
    assert len(set(layout.pieces.domain[own].tolist())) == 1
    short += layout.pieces.length[own].sum() < capacity
  assert short <= len(set(domains))


def test_best_fit_takes_the_tightest_row():
  row, column = best_fit(np.array([7, 5, 3, 4, 1]), 10)
  # 7, 5 open rows; 4 fits only beside 5, 3 fills the row of 7, 1 that of 5 and 4.
  assert row.tolist() == [0, 1, 0, 1, 1]
  assert column.tolist() == [0, 0, 7, 5, 9]


def test_fill_is_high_for_realistic_lengths():
  lengths = 1 + np.random.default_rng(0).lognormal(6, 1.1, 5000).astype(np.int64)
  layout = pack(whole_documents(lengths), 2048)
  assert lengths.sum() / (layout.num_rows * 2048) > 0.99


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000, 40_000])
def test_permutation_is_a_bijection_that_depends_on_its_key(size):
  positions = np.arange(size)
  order = permute(positions, size, (0, 0, "a"))
  assert np.array_equal(np.sort(order), positions)
  assert np.array_equal(permute(positions[size // 3 :], size, (0, 0, "a")), order[size // 3 :])
  if size >= 64:
    for key in ((1, 0, "a"), (0, 1, "a"), (0, 0, "b")):
      other = permute(positions, size, key)
      assert np.mean(other == order) < 0.1
    # Uniform: each eighth of the positions lands evenly in the eighths of the range.
    if size > 10_000:
      counts = np.histogram2d(positions, order, bins=8)[0]
      assert np.abs(counts / (size / 64) - 1).max() < 0.2
      assert abs(np.corrcoef(positions, order)[0, 1]) < 0.03
