"""All three gradients of stick-breaking attention in one kernel for Hopper: heads of 64.

Weights and gradients of logits are computed once, not once for dQ and once for dK and dV
(gpu_backward, which says what is computed). A thread block walks all keys of one head, in pairs of
blocks from left to right; each of two warpgroups holds dK and dV of one block of a pair in
registers. For each pair the queries that saw it pass by, in tiles of 64, from right to left:

    left warpgroup:   its g; adds up the tile's prefix;                   adds to the tile's dQ
    right warpgroup:  its g;           takes that prefix, adds its own;       adds to dQ after it

Prefixes and dQ, in float32, stay in shared memory for a window of queries. Where there are more
queries than that, or several query slots, the walk has a pass for each window of each slot, and dK
and dV wait in global memory, in float32, for the next pass. Sums have one order: no atomics.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.stick_breaking import gpu_copy, gpu_registers
from pallas_kernels.stick_breaking.gpu_backward import tile_value
from pallas_kernels.stick_breaking.gpu_blocks import Blocks
from pallas_kernels.stick_breaking.gpu_copy import COLUMNS, TRANSFORMS
from pallas_kernels.stick_breaking.gpu_forward import Saved
from pallas_kernels.stick_breaking.gpu_scan import KEYS, ROWS
from pallas_kernels.stick_breaking.gpu_tiles import (
  ACC,
  CONSUMER_REGISTERS,
  PRODUCER_REGISTERS,
  Ref,
  Sizes,
  compiler_params,
  copy_halves,
  load_rows,
  load_square,
  mask,
  multiply,
  transpose,
)

DIM = 64  # Of a head: dQ of a window of wider ones does not fit into shared memory.
WINDOW = 8  # Tiles of queries of a pass.
_CONSUMERS = 2
_QUERY_SLOTS = 3  # Of the ring of queries: what a warpgroup may be ahead of the other, in steps.
# Steps between two visits of a tile: a warpgroup frees a slot before it has added to the tile's dQ,
# so that the other's step may begin while that of so many before, less one, is not quite over.
_APART = _QUERY_SLOTS + 1
_OUTPUT_SLOTS = 2  # Of the ring of gradients of the output, which are released earlier.
_FLOAT_TRANSFORMS = (plgpu.TilingTransform((8, COLUMNS // 2)), plgpu.SwizzleTransform(128))
_NIBBLE = 4  # Bits of a field of a visit; none holds more than WINDOW + _APART.
_IS_FIRST, _IS_LAST, _IS_VISIT = (1 << (5 * _NIBBLE + i) for i in range(3))


class Walk(NamedTuple):
  """What a thread block visits, computed by XLA from what the forward pass visited.

  tiles: int32 [b, n, tiles, 3]: first and past-the-last block of keys of a tile of queries, at
    least one, and whether the forward pass was there at all.
  pairs: int32 [b, h, passes, 2]: first and past-the-last pair that a pass visits.
  visits: int32 [b, h, passes, pairs], see `Visit`.
  """

  tiles: jax.Array
  pairs: jax.Array
  visits: jax.Array


class Visit(NamedTuple):
  """One pass' tiles of queries that see a pair of blocks of keys, as one integer; 0: none.

  lows, highs: each block's first and past-the-last tile of the window; equal: none.
  idle: steps after the last tile, so that what one warpgroup has added to a tile is there when the
    other meets the tile with the next pair.
  is_first, is_last: whether no pass before, or after, visits the pair.
  """

  lows: tuple[Any, Any]
  highs: tuple[Any, Any]
  idle: Any
  is_first: Any
  is_last: Any

  def packed(self) -> jax.Array:
    fields = (*self.lows, *self.highs, self.idle)
    packed = functools.reduce(
      lambda x, y: x | y, [x << (_NIBBLE * i) for i, x in enumerate(fields)]
    )
    flags = jnp.where(self.is_first, _IS_FIRST, 0) | jnp.where(self.is_last, _IS_LAST, 0)
    return packed | flags | _IS_VISIT

  @classmethod
  def unpacked(cls, word: jax.Array) -> "Visit":
    fields = [(word >> (_NIBBLE * i)) & (2**_NIBBLE - 1) for i in range(5)]
    flags = [(word & flag) != 0 for flag in (_IS_FIRST, _IS_LAST)]
    return cls((fields[0], fields[1]), (fields[2], fields[3]), fields[4], *flags)

  @property
  def high(self) -> jax.Array:
    return lax.max(*self.highs)

  @property
  def steps(self) -> jax.Array:
    """Return how many tiles pass by, from `high` down."""
    return self.high - lax.min(*self.lows) + self.idle


def walk_of(visited: jax.Array, sizes: Sizes) -> Walk:
  """Return every head's walk, from the blocks [b, n, tiles, 2] that the forward pass visited."""
  rows, units = sizes.tiles(ROWS), sizes.padded_keys // KEYS
  windows, pairs = -(-rows // WINDOW), -(-units // 2)
  first, end = (visited[:, :, :rows, i] for i in range(2))
  last_query = jnp.minimum((jnp.arange(rows) + 1) * ROWS, sizes.num_queries) - 1
  diagonal = ((sizes.history + last_query) // KEYS).astype(jnp.int32)
  is_live = end > first
  # A tile that sees nothing has a dQ, too.
  first, end = jnp.where(is_live, first, diagonal), jnp.where(is_live, end, diagonal + 1)
  tiles = jnp.stack([first, end, is_live.astype(jnp.int32)], axis=-1)

  def by_pass(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, windows * WINDOW - rows)))
    x = x.reshape(sizes.batch, -1, sizes.num_kv_heads, windows, WINDOW)
    return x.swapaxes(1, 2).reshape(sizes.batch, sizes.num_kv_heads, -1, 1, WINDOW)

  unit = jnp.arange(2 * pairs)[:, None]
  sees = (by_pass(first) <= unit) & (unit < by_pass(end))  # [b, h, passes, blocks, tiles]
  tile = jnp.arange(WINDOW, dtype=jnp.int32)
  low = jnp.where(sees, tile, WINDOW).min(-1).reshape(*sees.shape[:3], pairs, 2)
  high = jnp.where(sees, tile + 1, 0).max(-1).reshape(low.shape)
  is_visit = (high > 0).any(-1)
  # Keys that nobody saw have gradients, too: none of the tiles visits them in the last pass.
  is_visit = is_visit.at[:, :, -1].set(is_visit[:, :, -1] | ~is_visit.any(2))
  is_none = high == 0
  low = jnp.where(is_none, low.min(-1, keepdims=True), low)
  high = jnp.where(is_none, low, high)

  top = high.max(-1).reshape(*sees.shape[:2], -1)
  order = jnp.arange(top.shape[-1], dtype=jnp.int32)
  following = lax.cummin(
    jnp.where(is_visit.reshape(top.shape), order, top.shape[-1]), axis=2, reverse=True
  )
  following = jnp.pad(following[..., 1:], ((0, 0), (0, 0), (0, 1)), constant_values=len(order))
  after_all = WINDOW + _APART
  tops = jnp.pad(top, ((0, 0), (0, 0), (0, 1)), constant_values=after_all)
  next_top = jnp.take_along_axis(tops, following, axis=2).reshape(is_visit.shape)
  # A tile that two visits share comes _APART steps later or more.
  idle = _APART - next_top + low.min(-1)
  seen_before = jnp.cumsum(is_visit, axis=2) - is_visit > 0
  seen_after = is_visit.sum(2, keepdims=True) - jnp.cumsum(is_visit, axis=2) > 0
  visit = Visit(
    (low[..., 0], low[..., 1]),
    (high[..., 0], high[..., 1]),
    jnp.maximum(idle, 0),
    ~seen_before,
    ~seen_after,
  )
  visits = jnp.where(is_visit, visit.packed(), 0)
  pair = jnp.arange(pairs, dtype=jnp.int32)
  first_pair = jnp.where(is_visit, pair, pairs).min(-1)
  end_pair = jnp.where(is_visit, pair + 1, 0).max(-1)
  return Walk(tiles, jnp.stack([first_pair, end_pair], axis=-1), visits)


def gradients(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  d_out: jax.Array,
  saved: Saved,
  blocks: Blocks,
  sizes: Sizes,
  scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return dQ, dK and dV in the shapes of q, k and v.

  Args:
    q, d_out: [b, q, n, 64]. k, v: [blocks, 4, 8, 2, h, 64] (gpu_copy.permutable).
    saved, blocks: of the forward pass.
  """
  walk = walk_of(saved.visited, sizes)
  passes, pairs = walk.visits.shape[2:]
  out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
  if passes > 1:
    shape = (sizes.batch, sizes.num_kv_heads, 2 * pairs, 2, KEYS, COLUMNS)
    out_type.append(jax.ShapeDtypeStruct(shape, jnp.float32))

  def stick_breaking_gradients(*refs: Ref) -> None:
    _kernel(*refs, sizes=sizes, scale=scale, query_tile=blocks.tile)

  def tiles(count: int, dtype: Any = q.dtype) -> Any:
    return plgpu.SMEM((count, 1, ROWS, COLUMNS), dtype, transforms=TRANSFORMS)

  kernel = plgpu.kernel(
    stick_breaking_gradients,
    out_type=out_type,
    scratch_types=_Scratch(
      k=tiles(_CONSUMERS),
      v=tiles(_CONSUMERS),
      kv_full=gpu_copy.barriers(2 * _CONSUMERS),
      kv_free=plgpu.Barrier(num_barriers=_CONSUMERS),
      q=tiles(_QUERY_SLOTS),
      q_full=plgpu.Barrier(num_barriers=_QUERY_SLOTS),
      q_free=plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=_QUERY_SLOTS),
      d_out=tiles(_OUTPUT_SLOTS),
      d_full=plgpu.Barrier(num_barriers=_OUTPUT_SLOTS),
      d_free=plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=_OUTPUT_SLOTS),
      squares=tiles(_CONSUMERS),
      prefixes=plgpu.SMEM((WINDOW, ROWS), jnp.float32),
      prefix_done=plgpu.Barrier(num_barriers=_QUERY_SLOTS),
      dq=plgpu.SMEM((WINDOW, ROWS, COLUMNS), jnp.float32, transforms=_FLOAT_TRANSFORMS),
      dq_done=plgpu.Barrier(num_barriers=_QUERY_SLOTS),
    ),
    grid=(sizes.num_kv_heads, sizes.batch),
    grid_names=("head", "batch"),
    num_threads=_CONSUMERS + 1,
    thread_name="warpgroup",
    compiler_params=compiler_params(),
  )
  dq, dk, dv, *_ = kernel(
    q, k, v, d_out, saved.sticks, *walk, blocks.plain_from, blocks.q_segments, blocks.k_segments
  )
  return dq, dk, dv


class _Inputs(NamedTuple):
  q: Ref
  k: Ref
  v: Ref
  d_out: Ref
  sticks: Ref
  tiles: Ref
  pairs: Ref
  visits: Ref
  plain_from: Ref
  q_segments: Ref
  k_segments: Ref


class _Scratch(NamedTuple):
  """Shared memory: keys and values of each warpgroup, rings of tiles of queries, results."""

  k: Ref
  v: Ref
  kv_full: Ref  # Of gpu_copy: keys and values of each warpgroup.
  kv_free: Ref
  q: Ref
  q_full: Ref
  q_free: Ref
  d_out: Ref
  d_full: Ref
  d_free: Ref
  squares: Ref  # Weights, gradients of logits, or results on their way.
  prefixes: Ref
  prefix_done: Ref  # The left warpgroup has added to the prefix of a step's tile
  dq: Ref
  dq_done: Ref  # and to its dQ.


def _kernel(*refs: Ref, sizes: Sizes, scale: float, query_tile: int) -> None:
  """Compute the gradients of one head of one row of the batch."""
  num_inputs, num_scratch = len(_Inputs._fields), len(_Scratch._fields)
  head, b, warpgroup = (lax.axis_index(name) for name in ("head", "batch", "warpgroup"))
  block = _Block(
    inputs=_Inputs(*refs[:num_inputs]),
    outputs=refs[num_inputs:-num_scratch],
    scratch=_Scratch(*refs[-num_scratch:]),
    batch=b,
    head=head,
    sizes=sizes,
    scale=scale,
    query_tile=query_tile,
  )
  gpu_copy.init(block.scratch.kv_full)

  @pl.when(warpgroup < _CONSUMERS)
  def _() -> None:
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    block.for_each_visit(_Consumer(block, warpgroup).visit)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  @pl.when(warpgroup == _CONSUMERS)
  def _() -> None:
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    block.for_each_visit(_Producer(block).visit)


class _Place(NamedTuple):
  """Where in the walk: how many visits and steps were before, the pass, the pair and its `Visit`.

  What follows from these is computed where it is needed, again in every step: registers are short.
  """

  number: jax.Array
  step: jax.Array
  window: jax.Array  # Number of the pass: of a window of a slot's queries.
  pair: jax.Array
  word: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Block:
  """What all warpgroups of a thread block know."""

  inputs: _Inputs
  outputs: tuple[Ref, ...]
  scratch: _Scratch
  batch: jax.Array
  head: jax.Array
  sizes: Sizes
  scale: float
  query_tile: int

  def queries_of(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a pass' head of the queries and first tile."""
    num_passes, num_slots = self.inputs.visits.shape[2], self.sizes.num_heads
    num_slots //= self.sizes.num_kv_heads
    slot = lax.div(index, jnp.int32(num_passes // num_slots))
    window = (index - slot * (num_passes // num_slots)) * WINDOW
    return slot * self.sizes.num_kv_heads + self.head, window

  def for_each_visit(self, visit: Any) -> None:
    """Call visit(place) for all visits."""
    visits, pairs = self.inputs.visits, self.inputs.pairs
    num_passes, num_pairs = visits.shape[2:]

    def at() -> tuple[jax.Array, jax.Array]:
      # Nothing that follows from them may stay in registers.
      return gpu_registers.unhoisted(self.batch), gpu_registers.unhoisted(self.head)

    def go_pass(index: Any, state: tuple[jax.Array, jax.Array]) -> Any:
      def go_pair(pair: jax.Array, state: Any) -> Any:
        number, step, word = state
        # The next one is on its way while this one is computed.
        next_word = visits[*at(), index, lax.min(pair + 1, jnp.int32(num_pairs - 1))]

        def go(number: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
          visit(_Place(number, step, index, pair, word))
          return number + 1, step + Visit.unpacked(gpu_registers.unhoisted(word)).steps

        return *lax.cond(word != 0, go, lambda *state: state, number, step), next_word

      first, end = (pairs[*at(), index, i] for i in range(2))
      word = visits[*at(), index, lax.min(first, jnp.int32(num_pairs - 1))]
      number, step, _ = lax.fori_loop(first, end, go_pair, (*state, word))
      return number, step

    start = (jnp.int32(0), jnp.int32(0))
    if num_passes == 1:
      go_pass(jnp.int32(0), start)
    else:
      lax.fori_loop(jnp.int32(0), jnp.int32(num_passes), go_pass, start)


@dataclasses.dataclass(frozen=True)
class _Producer:
  """The warpgroup that loads."""

  block: _Block

  def visit(self, place: _Place) -> None:
    visit = Visit.unpacked(place.word)
    query_head, window = self.block.queries_of(place.window)

    def load(step: jax.Array, _: None) -> None:
      # In idle steps the last tile comes again.
      tile = lax.max(visit.high - 1 - step, lax.min(*visit.lows))
      self._load_queries(place.step + step, query_head, (window + tile) * ROWS)

    self._load_keys(place, 0)
    # The other warpgroup may still be at its keys of the visit before.
    first = lax.min(jnp.int32(1), visit.steps)
    lax.fori_loop(jnp.int32(0), first, load, None)
    self._load_keys(place, 1)
    lax.fori_loop(first, visit.steps, load, None)

  def _load_keys(self, place: _Place, consumer: int) -> None:
    block, scratch = self.block, self.block.scratch

    @pl.when(place.number > 0)
    def wait_free() -> None:
      plgpu.barrier_wait(scratch.kv_free.at[consumer])

    unit = block.batch * (block.sizes.padded_keys // KEYS) + 2 * place.pair + consumer
    sources = (block.inputs.k, scratch.k), (block.inputs.v, scratch.v)
    for i, (source, target) in enumerate(sources):
      destination = target.at[consumer]
      gpu_copy.load(source, unit, block.head, destination, scratch.kv_full, 2 * consumer + i)

  def _load_queries(self, step: jax.Array, query_head: jax.Array, row: jax.Array) -> None:
    block, scratch = self.block, self.block.scratch
    at = (block.batch, row, query_head)
    for source, ring, full, free, slots in (
      (block.inputs.q, scratch.q, scratch.q_full, scratch.q_free, _QUERY_SLOTS),
      (block.inputs.d_out, scratch.d_out, scratch.d_full, scratch.d_free, _OUTPUT_SLOTS),
    ):
      slot = lax.rem(step, jnp.int32(slots))
      pl.when(step >= slots)(functools.partial(plgpu.barrier_wait, free.at[slot]))
      copy_halves(source, at, ring.at[slot], full.at[slot])


@dataclasses.dataclass(frozen=True)
class _Consumer:
  """A warpgroup that computes: the left block of every pair, or the right one."""

  block: _Block
  index: jax.Array

  def visit(self, place: _Place) -> None:
    for i in range(2):
      gpu_copy.wait(self.block.scratch.kv_full, 2 * self.index + i, place.number)
    is_left, visit = self.index == 0, Visit.unpacked(place.word)
    low, high = (lax.select(is_left, *ends) for ends in (visit.lows, visit.highs))
    start, end = visit.high - high, visit.high - low

    def pass_on(step: jax.Array, _: None) -> None:
      self._pass_on(place.step + step)

    def run(*accs: Ref) -> None:
      lax.fori_loop(jnp.int32(0), start, pass_on, None)
      lax.fori_loop(start, end, functools.partial(self._step, accs, place), None)
      again = Visit.unpacked(gpu_registers.unhoisted(place.word))
      lax.fori_loop(end, again.steps, pass_on, None)
      plgpu.wgmma_wait(0)
      plgpu.barrier_arrive(self.block.scratch.kv_free.at[self.index])
      self._finish(accs, place, again)

    pl.run_scoped(run, *[ACC((KEYS, COLUMNS), jnp.float32)] * 2)

  def _pass_on(self, step: jax.Array) -> None:
    """Let a step pass that this warpgroup has no use for."""
    scratch = self.block.scratch
    slot, out_slot = self._slots(step)
    plgpu.barrier_wait(scratch.q_full.at[slot])
    plgpu.barrier_wait(scratch.d_full.at[out_slot])
    for done in (scratch.prefix_done, scratch.dq_done):
      self._right_waits(done.at[slot])
      self._left_is_done(done.at[slot])
    plgpu.barrier_arrive(scratch.d_free.at[out_slot])
    plgpu.barrier_arrive(scratch.q_free.at[slot])

  def _slots(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    return lax.rem(step, jnp.int32(_QUERY_SLOTS)), lax.rem(step, jnp.int32(_OUTPUT_SLOTS))

  def _right_waits(self, barrier: Ref) -> None:
    pl.when(self.index == 1)(lambda: plgpu.barrier_wait(barrier))

  def _left_is_done(self, barrier: Ref) -> None:
    pl.when(self.index == 0)(lambda: plgpu.barrier_arrive(barrier))

  def _step(self, accs: tuple[Ref, ...], place: _Place, step: jax.Array, _: None) -> None:
    """Add what a tile of 64 queries contributes to dK and dV, and this block to its dQ."""
    block, scratch, inputs = self.block, self.block.scratch, self.block.inputs
    dk, dv = accs
    unhoisted = gpu_registers.unhoisted
    b, mine = unhoisted(block.batch), unhoisted(self.index)
    n, window = block.queries_of(unhoisted(place.window))
    unit = 2 * unhoisted(place.pair) + mine
    tile = Visit.unpacked(unhoisted(place.word)).high - 1 - step
    part = window + tile
    row = part * ROWS
    slot, out_slot = self._slots(place.step + step)
    first, end, is_live = (inputs.tiles[b, n, part, i] for i in range(3))
    is_seen = (first <= unit) & (unit < end)
    stick = load_rows(inputs.sticks, b, n, unit, pl.ds(row, ROWS))
    stick = jnp.where(is_seen & (is_live != 0), stick, 0.0)
    plain = unit >= tile_value(inputs.plain_from, b, row, block.query_tile)
    square = scratch.squares.at[mine, 0]
    plgpu.barrier_wait(scratch.q_full.at[slot])
    plgpu.barrier_wait(scratch.d_full.at[out_slot])

    def products(s_acc: Ref, d_acc: Ref) -> tuple[jax.Array, jax.Array]:
      multiply(s_acc, scratch.q.at[slot], scratch.k.at[mine], 1)
      multiply(d_acc, scratch.d_out.at[out_slot], scratch.v.at[mine], 1)
      return s_acc[...], d_acc[...]

    s, d_weights = pl.run_scoped(products, *[ACC((ROWS, KEYS), jnp.float32)] * 2)
    position, key = block.sizes.history + row, unit * KEYS
    s = mask(s, plain, (inputs.q_segments, inputs.k_segments), (b, row, position, key))
    factor = block.scale * math.log2(math.e)
    weights, g, betas, before, total = gpu_registers.gains(s, d_weights, stick, factor)
    # What was copied from the square is read, and all warps are here.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    square[...] = weights.astype(block.sizes.dtype)
    plgpu.commit_smem()
    plgpu.wgmma(dv, transpose(square), scratch.d_out.at[out_slot, 0])

    self._right_waits(scratch.prefix_done.at[slot])
    prefix = plgpu.layout_cast(scratch.prefixes.at[tile][...], gpu_registers.ROWS)
    prefix = jnp.where(is_seen & (unit != first), prefix, 0.0)

    @pl.when(is_seen)
    def add_up() -> None:
      scratch.prefixes.at[tile][...] = prefix + total

    self._left_is_done(scratch.prefix_done.at[slot])
    d_scores = gpu_registers.d_logits(g, betas, before, prefix)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(scratch.d_free.at[out_slot])
    plgpu.commit_smem()  # All warps have read the weights.
    square[...] = d_scores.astype(block.sizes.dtype)
    plgpu.commit_smem()
    plgpu.wgmma(dk, transpose(square), scratch.q.at[slot, 0])

    def product(acc: Ref) -> jax.Array:
      plgpu.wgmma(acc, square, scratch.k.at[mine, 0])
      return acc[...]

    dq = pl.run_scoped(product, ACC((ROWS, COLUMNS), jnp.float32))
    plgpu.barrier_arrive(scratch.q_free.at[slot])
    self._right_waits(scratch.dq_done.at[slot])
    self._add_to_dq(dq, tile, (b, n, row), is_seen, (unit == first, unit + 1 == end))
    self._left_is_done(scratch.dq_done.at[slot])

  def _add_to_dq(
    self,
    dq: jax.Array,
    tile: jax.Array,
    at: tuple[jax.Array, jax.Array, jax.Array],
    is_seen: jax.Array,
    is_end: tuple[jax.Array, jax.Array],
  ) -> None:
    """Add to a tile's dQ, and write it after its last block; `is_end`: this is the first, last."""
    b, n, row = at
    scratch = self.block.scratch
    kept = scratch.dq.at[tile]

    def add(dq: jax.Array) -> jax.Array:
      return dq + plgpu.layout_cast(kept[...], gpu_registers.SCORES)

    dq = lax.cond(is_end[0], lambda dq: dq, add, dq)

    @pl.when(is_seen & ~is_end[1])
    def keep() -> None:
      kept[...] = dq

    @pl.when(is_seen & is_end[1])
    def write() -> None:
      square = self._stage(dq * self.block.scale)
      destination = self.block.outputs[0].at[b, pl.ds(row, ROWS), n, pl.ds(0, COLUMNS)]
      plgpu.copy_smem_to_gmem(square.at[0], destination)

  def _stage(self, values: jax.Array) -> Ref:
    """Return shared memory that holds values [64, 64] for a copy."""
    square = self.block.scratch.squares.at[self.index]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    square.at[0][...] = values.astype(self.block.sizes.dtype)
    plgpu.commit_smem()
    return square

  def _finish(self, accs: tuple[Ref, ...], place: _Place, visit: Visit) -> None:
    """Write dK and dV of a block, or keep them for the next pass."""
    block = self.block
    unit = 2 * place.pair + self.index
    _, dk, dv, *kept = block.outputs
    units = block.sizes.padded_keys // KEYS
    for i, (acc, grad) in enumerate(zip(accs, (dk, dv), strict=True)):
      values = acc[...]
      if kept:
        index = (block.batch, block.head, unit, i)
        values = self._with_kept(values, kept[0], index, visit)

      # The last pair may reach past the keys, into those of the next sequence.
      @pl.when(visit.is_last & (unit < units))
      def write(values: jax.Array = values, grad: Ref = grad, is_key: bool = i == 0) -> None:
        square = self._stage(values * block.scale if is_key else values)
        gpu_copy.store(square, grad, block.batch * units + unit, block.head)

  def _with_kept(
    self, values: jax.Array, kept: Ref, index: tuple[Any, ...], visit: Visit
  ) -> jax.Array:
    """Add what the passes before kept, and keep the sum unless this is the last."""
    values = lax.cond(
      visit.is_first,
      lambda values: values,
      lambda values: values + load_square(kept, *index),
      values,
    )

    @pl.when(~visit.is_last)
    def keep() -> None:
      kept[index] = values

    return values
