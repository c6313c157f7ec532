"""What the TPU kernels of stick-breaking attention share: blocks, their walk, the broken stick.

Rows are query slots: row r of [r, d] is slot r % s of query r // s. Scores are transposed, [key,
row], and in every block of keys
    physical key 8 g + t  is  logical key (block_k / 8) t + g
so that a sublane t owns a run of neighbouring keys: sums along the keys are additions of whole
registers and three rotations, exact in float32. Keys and values share the order, so that the output
does not know it. Scores are in log2: with s = q.k scale log2(e), the weight is
    log2 A_ij = s_ij - sum_{j<=l<=i} log2(1 + 2^s_il)
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOG2_E = math.log2(math.e)
SUBLANES = 8
HIDDEN = -1e30  # Score of a key that is not seen: 2^HIDDEN is 0, and no infinity is subtracted.
BROKEN = 1e30  # Sum of a row of padding: nothing of its stick is left, so that it never goes on.
_MAX_SCORE = 28.0  # A product of four (1 + 2^s) stays finite; beta is 1 to within 2^-28.
_GROUP = 4  # Terms of one logarithm.

NT = (((1,), (1,)), ((), ()))  # [m, k] [n, k]
NN = (((1,), (0,)), ((), ()))  # [m, k] [k, n]
TN = (((0,), (0,)), ((), ()))  # [k, m] [k, n]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
  """Static sizes of a padded problem; hashable.

  Attributes:
    block_q, block_k: rows and keys of a tile.
    num_slots: s. history: keys before the first query.
    factor: of q.k in the logits.
  """

  block_q: int
  block_k: int
  num_slots: int
  history: int
  factor: float

  def num_full(self, tile: jax.Array) -> jax.Array:
    """Return how many leading key blocks every row of a query tile may see."""
    first_query = jax.lax.div(tile * self.block_q, self.num_slots)
    return jax.lax.div(first_query + self.history + 1, self.block_k)


class Schedule(NamedTuple):
  """Which key blocks the query tiles need: int32, flat, read as scalars.

  Attributes:
    first, last: [b * tiles], leftmost and rightmost block that a row of the tile may see; last is
      below first where there is none.
    row_segment: [b * tiles], the segment of all rows of a tile, or -1 where they differ.
    key_segment: [b * blocks], the segment of all keys of a block, or -2 where they differ.
  """

  first: jax.Array
  last: jax.Array
  row_segment: jax.Array
  key_segment: jax.Array


def make_schedule(rows: jax.Array, key_segments: jax.Array, geometry: Geometry) -> Schedule:
  """Return the schedule of rows int32 [b, 2, r] and key_segments int32 [b, t]; both padded."""
  b = rows.shape[0]
  tiles = rows.reshape(b, 2, -1, geometry.block_q)
  segments, last_position = tiles[:, 0], tiles[:, 1].max(axis=2)
  row_low, row_high, row_segment = _segment_range(segments, -1)
  key_low, key_high, key_segment = _segment_range(key_segments.reshape(b, -1, geometry.block_k), -2)
  num_blocks = key_low.shape[1]
  start = jnp.arange(num_blocks, dtype=jnp.int32) * geometry.block_k
  live = start <= last_position[:, :, None]
  live &= key_low[:, None] <= row_high[:, :, None]
  live &= row_low[:, :, None] <= key_high[:, None]
  first = jnp.argmax(live, axis=2)
  last = jnp.where(live.any(axis=2), num_blocks - 1 - jnp.argmax(live[:, :, ::-1], axis=2), -1)
  return Schedule(
    *(x.astype(jnp.int32).reshape(-1) for x in (first, last, row_segment, key_segment))
  )


def _segment_range(segments: jax.Array, otherwise: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return the lowest and highest positive segment over the last axis, and the only one."""
  high = segments.max(axis=-1)
  real = segments > 0
  low = jnp.where(real, segments, jnp.iinfo(jnp.int32).max).min(axis=-1)
  return low, jnp.maximum(high, 0), jnp.where(real.all(axis=-1) & (low == high), low, otherwise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
  """Key blocks of one query tile: first, first + step, ... (`count` of them)."""

  first: jax.Array
  count: jax.Array
  step: int

  def block(self, n: jax.Array) -> jax.Array:
    return self.first + self.step * n


def walk_blocks(
  walk: Walk,
  following: Walk,
  *,
  is_first: jax.Array,
  is_last: jax.Array,
  fetch: Callable[[jax.Array, jax.Array], list[Any]],
  slot_ref: Any,
  visit: Callable[[jax.Array, jax.Array], jax.Array | None],
) -> jax.Array:
  """Visit the blocks of a query tile while the next one is copied; return how many were visited.

  The last block's successor is the first one of the following tile, so that only the first tile of
  a sequence waits for memory.

  Args:
    walk, following: of this tile and of the tile of the next grid step.
    is_first, is_last: whether this tile is the first or last of its sequence.
    fetch: (block, slot) -> copies into one of two slots.
    slot_ref: int32 [1] in SMEM, kept between tiles: where this tile's first block is.
    visit: (block, slot) -> None, or whether to go on.
  """
  has_following = jnp.logical_and(jnp.logical_not(is_last), following.count > 0)

  @pl.when(is_first)
  def _begin() -> None:
    slot_ref[0] = 0

  @pl.when(jnp.logical_and(is_first, walk.count > 0))
  def _fetch_first() -> None:
    _start(fetch(walk.first, jnp.int32(0)))

  start_slot = slot_ref[0]

  def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    n, _ = state
    slot = (start_slot + n) % 2
    is_own = n + 1 < walk.count
    successor = jnp.where(is_own, walk.block(n + 1), following.first)

    @pl.when(jnp.logical_or(is_own, has_following))
    def _fetch_successor() -> None:
      _start(fetch(successor, 1 - slot))

    _wait(fetch(walk.block(n), slot))
    proceed = visit(walk.block(n), slot)
    return n + 1, jnp.bool_(True) if proceed is None else proceed

  num_visited, _ = jax.lax.while_loop(
    lambda state: jnp.logical_and(state[0] < walk.count, state[1]),
    step,
    (jnp.int32(0), jnp.bool_(True)),
  )
  slot = (start_slot + num_visited) % 2
  slot_ref[0] = slot
  stopped_early = num_visited < walk.count

  @pl.when(stopped_early)
  def _drain() -> None:
    _wait(fetch(walk.block(num_visited), slot))

  @pl.when(jnp.logical_and(has_following, jnp.logical_or(stopped_early, walk.count <= 0)))
  def _fetch_following() -> None:
    _start(fetch(following.first, slot))

  return num_visited


def _start(copies: list[Any]) -> None:
  for copy in copies:
    copy.start()


def _wait(copies: list[Any]) -> None:
  for copy in copies:
    copy.wait()


def fetch_block(
  kv_hbm: Sequence[Any],
  kv_ref: Any,
  semaphores: Any,
  block_k: int,
  block: jax.Array,
  slot: jax.Array,
) -> list[Any]:
  """Return the copies of a block of keys [t, d], and of values, to kv_ref[slot, kind]."""
  keys = pl.ds(pl.multiple_of(block * block_k, block_k), block_k)
  return [
    pltpu.make_async_copy(x.at[keys], kv_ref.at[slot, kind], semaphores.at[slot, kind])
    for kind, x in enumerate(kv_hbm)
  ]


def hide(
  scores: jax.Array,
  rows: jax.Array,
  key_segments: jax.Array,
  block: jax.Array,
  geometry: Geometry,
) -> jax.Array:
  """Replace the scores of keys that a row may not see.

  Args:
    scores: [block_k / 8, 8, n].
    rows: int32 [2, n]: segment and position of every row.
    key_segments: int32 [8, block_k / 8], in logical order.
    block: index of the key block.
  """
  run, _, n = scores.shape
  segments = jnp.broadcast_to(rows[0:1], (SUBLANES, n))
  start = block * geometry.block_k + run * _sublane(n)
  positions = rows[1:2] - start
  hidden = []
  for g in range(run):
    same = key_segments[:, g : g + 1] == segments
    hidden.append(jnp.where(same & (positions >= g), scores[g], HIDDEN))
  return jnp.stack(hidden)


def to_runs(x: jax.Array) -> jax.Array:
  """Return [block_k / 8, 8, n] of [block_k, n]: sublane t of all holds a run of logical keys."""
  return x.reshape(-1, SUBLANES, x.shape[1])


def from_runs(x: jax.Array) -> jax.Array:
  """Return [block_k, n] of [block_k / 8, 8, n]."""
  return x.reshape(-1, x.shape[2])


def _sublane(n: int) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, n), 0)


def exclusive_sum(totals: jax.Array, *, reverse: bool) -> tuple[jax.Array, jax.Array]:
  """Return sums over the sublanes before (after, if reversed) each one, and over all; [8, n]."""
  sublane = _sublane(totals.shape[1])
  inclusive = totals
  for shift in (1, 2, 4):
    rotated = pltpu.roll(inclusive, SUBLANES - shift if reverse else shift, 0)
    inside = sublane < SUBLANES - shift if reverse else sublane >= shift
    inclusive = inclusive + jnp.where(inside, rotated, 0.0)
  edge = 0 if reverse else SUBLANES - 1
  total = jnp.broadcast_to(inclusive[edge : edge + 1], totals.shape)
  return inclusive - totals, total


def log_keep(scores: jax.Array) -> jax.Array:
  """Return log2(1 + 2^s) to full precision."""
  return jnp.maximum(scores, 0.0) + jnp.log1p(jnp.exp2(-jnp.abs(scores))) * LOG2_E


def break_stick(
  scores: jax.Array, after: jax.Array, *, exact: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return weights and beta [block_k / 8, 8, n], and `after` for the block to the left.

  Args:
    scores: float32 [block_k / 8, 8, n], log2, keys permuted.
    after: float32 [8, n], all sublanes equal: sum of log2(1 + 2^s) over the keys to the right.
    exact: whether every logarithm is taken by itself, which keeps tiny odds to full precision.
  """
  if exact:
    keep = log_keep(scores)
    sums, after = _sums_from_right(keep, after)
    return jnp.exp2(scores - sums), jnp.exp2(scores - keep), after
  run, _, n = scores.shape
  odds = jnp.exp2(jnp.minimum(scores, _MAX_SCORE))
  sticks = 1.0 + odds
  grouped = sticks.reshape(run // _GROUP, _GROUP, SUBLANES, n)
  product = (grouped[:, 0] * grouped[:, 1]) * (grouped[:, 2] * grouped[:, 3])
  sums, after = _sums_from_right(jnp.log2(product), after)
  left = jnp.exp2(-sums)
  lefts = [left]
  for i in range(_GROUP - 1):
    lefts.append(lefts[-1] * grouped[:, i])
  weights = odds * jnp.stack(lefts, axis=1).reshape(scores.shape)
  return weights, odds / sticks, after


def _sums_from_right(terms: jax.Array, after: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return inclusive sums [g, 8, n] of the terms from the right, and `after` for the left."""
  beyond, total = exclusive_sum(jnp.sum(terms, axis=0), reverse=True)
  sums = [after + beyond]
  for g in reversed(range(terms.shape[0])):
    sums.append(sums[-1] + terms[g])
  return jnp.stack(sums[:0:-1]), after + total
