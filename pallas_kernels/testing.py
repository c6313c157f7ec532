"""Awkward shapes that every implementation of an operation is tested with."""

import numpy as np

# (rows per group): empty groups, one row, everything in one group, more groups than rows, ragged.
GROUP_SIZES = {
  "balanced": [16, 16, 16, 16],
  "ragged": [3, 17, 0, 40, 1],
  "one_group": [0, 0, 37, 0],
  "more_groups_than_rows": [0, 1, 0, 0, 1, 0, 0, 0],
  "empty": [0, 0, 0],
}

# (queries, keys): blocks of 64 and their edges, and queries at the end of a longer history.
LENGTHS = {"short": (5, 5), "blocks": (128, 128), "ragged": (150, 150), "history": (70, 133)}


def aligned_rows(
  group_sizes: list[int], width: int, alignment: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Return float32 rows [m, width], aligned, NaN where unused, and the mask [m] of used rows."""
  rng = np.random.default_rng(seed)
  starts = np.cumsum([0, *(-(-size // alignment) * alignment for size in group_sizes)])
  rows = np.full((starts[-1] + alignment, width), np.nan, np.float32)
  used = np.zeros(len(rows), bool)
  for start, size in zip(starts, group_sizes, strict=False):
    used[start : start + size] = True
  rows[used] = rng.standard_normal((used.sum(), width))
  return rows, used
