"""Backward kernels of stick-breaking attention for Hopper, without atomics.

With A the weights, beta = sigmoid(scale q . k) and g = A * (dO . V^T):
    d logit_m = g_m - beta_m * sum_{j<=m} g_j.
The first kernel walks the keys of a tile of queries from left to right, in whose order the sum of
g runs, writes dQ and leaves the sum at every block. The second walks the queries of a tile of keys
and writes dK and dV. Both recompute A from the sticks that the forward kernel saved; blocks that it
did not visit have no weight.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.stick_breaking import gpu_copy, gpu_registers
from pallas_kernels.stick_breaking.gpu_blocks import Blocks
from pallas_kernels.stick_breaking.gpu_copy import COLUMNS, TRANSFORMS, Ring
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
  mask,
  multiply,
  store_halves,
  transpose,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """Sizes of the backward kernels."""

  consumers: int  # Warpgroups of 64 queries (dQ) or of 64 keys (dK, dV).
  block_k: int  # Keys per step of the dQ kernel: 64 or 128.
  stages: int  # Slots of the rings.


SPLIT_DIM = 256  # Heads this wide take one pass for dV and one for dK: registers hold one of them.


def d_queries(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  d_out: jax.Array,
  saved: Saved,
  blocks: Blocks,
  sizes: Sizes,
  scale: float,
  *,
  tiling: Tiling,
) -> tuple[jax.Array, jax.Array]:
  """Return dQ, and float32 [b, n, blocks, rows] sum of g over the keys left of each block.

  Args:
    q, d_out: [b, q, n, d]. k, v: [blocks, 4, 8, 2, h, d] (gpu_copy.permutable).
    blocks: those of the forward pass.
  """

  def stick_breaking_dq(*refs: Ref) -> None:
    _dq_kernel(*refs, sizes=sizes, scale=scale, query_tile=blocks.tile, tiling=tiling)

  tile = (tiling.consumers, sizes.halves, ROWS, COLUMNS)
  kernel = plgpu.kernel(
    stick_breaking_dq,
    out_type=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct(saved.sticks.shape, jnp.float32),
    ],
    scratch_types=(
      plgpu.SMEM(tile, q.dtype, transforms=TRANSFORMS),
      plgpu.SMEM(tile, q.dtype, transforms=TRANSFORMS),
      plgpu.Barrier(num_arrivals=2 * sizes.halves, num_barriers=tiling.consumers),
      *Ring.scratch(tiling.stages, sizes.halves, tiling.block_k, q.dtype, tiling.consumers),
    ),
    grid=(sizes.num_heads, sizes.tiles(ROWS * tiling.consumers), sizes.batch),
    grid_names=("head", "tile", "batch"),
    num_threads=tiling.consumers + 1,
    thread_name="warpgroup",
    compiler_params=compiler_params(),
  )
  dq, prefixes = kernel(
    q, k, v, d_out, saved.sticks, saved.visited,
    blocks.plain_from, blocks.q_segments, blocks.k_segments,
  )  # fmt: skip
  return dq, prefixes


def _dq_kernel(
  q: Ref,
  k: Ref,
  v: Ref,
  d_out: Ref,
  sticks: Ref,
  visited: Ref,
  plain_from: Ref,
  q_segments: Ref,
  k_segments: Ref,
  dq: Ref,
  prefixes: Ref,
  q_tile: Ref,
  d_tile: Ref,
  full: Ref,
  *ring_fields: Ref,
  sizes: Sizes,
  scale: float,
  query_tile: int,
  tiling: Tiling,
) -> None:
  """Walk the visited blocks of one tile of queries, from left to right."""
  ring = Ring(*ring_fields)
  head, b, warpgroup = (lax.axis_index(name) for name in ("head", "batch", "warpgroup"))
  tile = sizes.tiles(ROWS * tiling.consumers) - 1 - lax.axis_index("tile")
  units = jnp.int32(tiling.block_k // KEYS)
  last_part = sizes.tiles(ROWS) - 1
  parts = [lax.min(tile * tiling.consumers + i, last_part) for i in range(tiling.consumers)]
  row = (tile * tiling.consumers + warpgroup) * ROWS

  @pl.when(warpgroup < tiling.consumers)
  def _() -> None:
    copy_halves(q, (b, row, head), q_tile.at[warpgroup], full.at[warpgroup])
    copy_halves(d_out, (b, row, head), d_tile.at[warpgroup], full.at[warpgroup])

  first = functools.reduce(lax.min, [visited[b, head, part, 0] for part in parts])
  end = functools.reduce(lax.max, [visited[b, head, part, 1] for part in parts])
  first = lax.div(first, units)
  steps = lax.div(end + units - 1, units) - first
  ring.init()

  @pl.when(warpgroup < tiling.consumers)
  def _() -> None:
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    part = lax.min(tile * tiling.consumers + warpgroup, last_part)
    mine = q_tile.at[warpgroup]
    plgpu.barrier_wait(full.at[warpgroup])
    consumer = _QueryConsumer(
      q=q_tile, d_out=d_tile, index=warpgroup, ring=ring,
      at=(b, head, row), first=first, steps=steps,
      visited=(visited[b, head, part, 0], visited[b, head, part, 1]),
      plain_from=tile_value(plain_from, b, row, query_tile), segments=(q_segments, k_segments),
      sticks=sticks, prefixes=prefixes, sizes=sizes, scale=scale, block_k=tiling.block_k,
    )  # fmt: skip
    accs = [ACC((ROWS, COLUMNS), jnp.float32)] * sizes.halves
    store_halves(pl.run_scoped(consumer.run, *accs), mine, dq, (b, row, head))

  @pl.when(warpgroup == tiling.consumers)
  def _() -> None:
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    kv_head = lax.rem(head, jnp.int32(sizes.num_kv_heads))
    left = b * (sizes.padded_keys // KEYS)

    def load(source: Ref, step: jax.Array, *destination: Any) -> None:
      gpu_copy.load(source, left + (first + step) * units, kv_head, *destination)

    ring.produce(steps, functools.partial(load, k), functools.partial(load, v))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _QueryConsumer:
  """One warpgroup's 64 queries of a tile."""

  q: Ref
  d_out: Ref
  index: jax.Array
  ring: Ring
  at: tuple[jax.Array, jax.Array, jax.Array]  # Batch, head, first row.
  first: jax.Array  # Leftmost block, in steps' units.
  steps: jax.Array
  visited: tuple[jax.Array, jax.Array]
  plain_from: jax.Array
  segments: tuple[Ref, Ref]
  sticks: Ref
  prefixes: Ref
  sizes: Sizes
  scale: float
  block_k: int

  def run(self, *accs: Ref) -> list[jax.Array]:
    """Return dQ [64, 64] of each half."""
    prefix = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), gpu_registers.ROWS)
    # Blocks right of the diagonal of these queries belong to another warpgroup's.
    position = self.sizes.history + self.at[2]
    end = lax.div(position + (ROWS - 1), jnp.int32(self.block_k)) + 1 - self.first
    end = lax.clamp(jnp.int32(0), end, self.steps)
    lax.fori_loop(jnp.int32(0), end, functools.partial(self._step, accs), prefix)
    plgpu.wgmma_wait(0)

    @pl.when((end > 0) & (end < self.steps))
    def release() -> None:
      self.ring.release_k(end - 1)

    lax.fori_loop(end, self.steps, lambda step, _: self.ring.pass_on(step), None)
    return [acc[...] * self.scale for acc in accs]

  def _step(self, accs: tuple[Ref, ...], step: jax.Array, prefix: jax.Array) -> jax.Array:
    """Add a block's gradients of logits times keys; return the sum of g left of the next."""
    ring, halves = self.ring, self.sizes.halves
    b, head, row = self.at
    slot = ring.slot(step)
    block = self.first + step
    num_units = self.block_k // KEYS
    units = [block * num_units + i for i in range(num_units)]
    sticks = [visited_rows(self.sticks, self.visited, self.at, unit) for unit in units]
    mine = gpu_registers.unhoisted(self.index)
    ring.wait_k(step)
    ring.wait_v(step)

    def scores(s_acc: Ref, d_acc: Ref) -> tuple[jax.Array, jax.Array]:
      multiply(s_acc, self.q.at[mine], ring.k.at[slot], halves)
      multiply(d_acc, self.d_out.at[mine], ring.v.at[slot], halves)
      return s_acc[...], d_acc[...]

    shape = ACC((ROWS, self.block_k), jnp.float32)
    s, d_weights = pl.run_scoped(scores, shape, shape)
    ring.release_v(step)

    # The product with the keys of the step before is complete as well.
    @pl.when(step > 0)
    def release() -> None:
      ring.release_k(step - 1)

    position, key = self.sizes.history + row, block * self.block_k
    plain = units[0] >= self.plain_from
    s = mask(s, plain, self.segments, (b, row, position, key))
    factor = self.scale * math.log2(math.e)
    _weights, d_scores, right = gpu_registers.gradients(s, d_weights, sticks, prefix, factor)
    for unit, sums in zip(units, [prefix, *right[:-1]], strict=True):
      self.prefixes[b, head, unit, pl.ds(row, ROWS)] = sums
    for half, acc in enumerate(accs):
      plgpu.wgmma(acc, d_scores.astype(self.sizes.dtype), ring.k.at[slot, half])
    return right[-1]


def tile_value(values: Ref, batch: jax.Array, row: jax.Array, tile: int) -> jax.Array:
  """Return the value of the forward pass' tile that a row is in; the last one's past the end."""
  last = values.shape[1] - 1
  return values[batch, lax.min(lax.div(row, jnp.int32(tile)), jnp.int32(last))]


def visited_rows(
  values: Ref, visited: tuple[Any, Any], at: tuple[Any, Any, Any], block: jax.Array
) -> jax.Array:
  """Return one value per row at a block, 0 where the forward pass was not and nothing is saved."""
  b, head, row = at
  rows = load_rows(values, b, head, block, pl.ds(row, ROWS))
  first, end = visited
  return jnp.where((first <= block) & (block < end), rows, 0.0)


def d_keys_values(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  d_out: jax.Array,
  saved: Saved,
  prefixes: jax.Array,
  blocks: Blocks,
  sizes: Sizes,
  scale: float,
  *,
  tiling: Tiling,
) -> tuple[jax.Array, jax.Array]:
  """Return dK and dV in the shape of k and v.

  Args:
    q, k, v, d_out, saved: as of `d_queries`; prefixes: its second result.
    blocks: those of the forward pass.
  """
  if sizes.dim >= SPLIT_DIM:
    _, dv = _d_keys_values(q, k, v, d_out, saved, prefixes, blocks, sizes, scale, "v", tiling)
    dk, _ = _d_keys_values(q, k, v, d_out, saved, prefixes, blocks, sizes, scale, "k", tiling)
    return dk, dv
  return _d_keys_values(q, k, v, d_out, saved, prefixes, blocks, sizes, scale, "kv", tiling)


def _d_keys_values(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  d_out: jax.Array,
  saved: Saved,
  prefixes: jax.Array,
  blocks: Blocks,
  sizes: Sizes,
  scale: float,
  wanted: str,
  tiling: Tiling,
) -> tuple[Any, Any]:
  """Return dK and dV, those that are wanted; the other is not defined."""

  def stick_breaking_dkv(*refs: Ref) -> None:
    _dkv_kernel(
      *refs, sizes=sizes, scale=scale, wanted=wanted, query_tile=blocks.tile, tiling=tiling
    )

  tile = plgpu.SMEM((tiling.consumers, sizes.halves, KEYS, COLUMNS), q.dtype, transforms=TRANSFORMS)
  slots = plgpu.SMEM((tiling.stages, sizes.halves, ROWS, COLUMNS), q.dtype, transforms=TRANSFORMS)
  square = plgpu.SMEM((tiling.consumers, ROWS, KEYS), q.dtype, transforms=TRANSFORMS)
  num_tiles = -(-sizes.padded_keys // (KEYS * tiling.consumers))
  firsts, ends = _query_ranges(saved.visited, sizes, num_tiles, tiling.consumers)
  kernel = plgpu.kernel(
    stick_breaking_dkv,
    out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * len(wanted),
    scratch_types=(
      tile,
      tile,
      gpu_copy.barriers(2 * tiling.consumers),
      slots,
      slots,
      plgpu.Barrier(num_arrivals=2 * sizes.halves, num_barriers=tiling.stages),
      plgpu.Barrier(num_arrivals=tiling.consumers, num_barriers=tiling.stages),
      *[square] * len(wanted),
    ),
    grid=(sizes.num_kv_heads, num_tiles, sizes.batch),
    grid_names=("head", "tile", "batch"),
    num_threads=tiling.consumers + 1,
    thread_name="warpgroup",
    compiler_params=compiler_params(),
  )
  grads = kernel(
    q, k, v, d_out, saved.sticks, prefixes, saved.visited, firsts, ends,
    blocks.plain_from, blocks.q_segments, blocks.k_segments,
  )  # fmt: skip
  return grads[0], grads[-1]


def _query_ranges(
  visited: jax.Array, sizes: Sizes, num_tiles: int, units: int
) -> tuple[jax.Array, jax.Array]:
  """Return int32 [b, h, key tiles]: first and past-the-last tile of queries that visited."""
  rows = sizes.tiles(ROWS)
  shape = (sizes.batch, -1, sizes.num_kv_heads, rows, 1)
  first, end = (visited[:, :, :rows, i].reshape(shape) for i in range(2))
  left = jnp.arange(num_tiles) * units
  hit = ((first < left + units) & (end > left)).any(1)
  index = jnp.arange(rows)[:, None]
  low = jnp.where(hit, index, rows).min(2)
  high = jnp.where(hit, index + 1, 0).max(2)
  return jnp.minimum(low, high), high


def _dkv_kernel(
  q: Ref,
  k: Ref,
  v: Ref,
  d_out: Ref,
  sticks: Ref,
  prefixes: Ref,
  visited: Ref,
  firsts: Ref,
  ends: Ref,
  plain_from: Ref,
  q_segments: Ref,
  k_segments: Ref,
  *refs: Ref,
  sizes: Sizes,
  scale: float,
  wanted: str,
  query_tile: int,
  tiling: Tiling,
) -> None:
  """Walk the tiles of queries, of all slots, that visited one tile of keys."""
  grads, (k_tile, v_tile, kv_full, q_ring, d_ring, full, free, *squares) = (
    refs[: len(wanted)],
    refs[len(wanted) :],
  )
  head, tile, b, warpgroup = (
    lax.axis_index(name) for name in ("head", "tile", "batch", "warpgroup")
  )
  first = firsts[b, head, tile]
  per_slot = ends[b, head, tile] - first
  num_slots = sizes.num_heads // sizes.num_kv_heads
  gpu_copy.init(kv_full)

  @pl.when(warpgroup < tiling.consumers)
  def _() -> None:
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    unit = tile * tiling.consumers + warpgroup
    block = b * (sizes.padded_keys // KEYS) + unit
    for i, (source, tiles) in enumerate(((k, k_tile), (v, v_tile))):
      gpu_copy.load(source, block, head, tiles.at[warpgroup], kv_full, 2 * warpgroup + i)
    for i in range(2):
      gpu_copy.wait(kv_full, 2 * warpgroup + i, 0)
    consumer = _KeyConsumer(
      k=k_tile, v=v_tile, q=q_ring, d_out=d_ring, full=full, free=free, squares=tuple(squares),
      index=warpgroup, batch=b, unit=unit, head=head, first=first, per_slot=per_slot,
      sticks=sticks, prefixes=prefixes, visited=visited, plain_from=plain_from,
      tile=query_tile,
      segments=(q_segments, k_segments), sizes=sizes, scale=scale, wanted=wanted,
    )  # fmt: skip
    accs = [ACC((KEYS, COLUMNS), jnp.float32)] * (sizes.halves * len(wanted))
    values = pl.run_scoped(consumer.run, *accs)

    # The last tile may reach past the keys, into those of the next sequence.
    @pl.when(unit < sizes.padded_keys // KEYS)
    def _() -> None:
      for i, (name, grad) in enumerate(zip(wanted, grads, strict=True)):
        staging = (k_tile if name == "k" else v_tile).at[warpgroup]
        for half in range(sizes.halves):
          staging.at[half][...] = values[i * sizes.halves + half].astype(sizes.dtype)
        plgpu.commit_smem()
        gpu_copy.store(staging, grad, block, head)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  @pl.when(warpgroup == tiling.consumers)
  def _() -> None:
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

    def load(step: jax.Array, _: None) -> None:
      slot = lax.rem(step, jnp.int32(tiling.stages))
      query_slot = lax.div(step, per_slot)
      row = (first + step - query_slot * per_slot) * ROWS
      n = query_slot * sizes.num_kv_heads + head

      @pl.when(step >= tiling.stages)
      def wait_free() -> None:
        plgpu.barrier_wait(free.at[slot])

      copy_halves(q, (b, row, n), q_ring.at[slot], full.at[slot])
      copy_halves(d_out, (b, row, n), d_ring.at[slot], full.at[slot])

    lax.fori_loop(jnp.int32(0), per_slot * num_slots, load, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _KeyConsumer:
  """One warpgroup's 64 keys of a tile."""

  k: Ref
  v: Ref
  q: Ref
  d_out: Ref
  full: Ref
  free: Ref
  squares: tuple[Ref, ...]  # Gradients of logits and weights on their way to be transposed.
  index: jax.Array
  batch: jax.Array
  unit: jax.Array
  head: jax.Array
  first: jax.Array  # Tile of 64 queries.
  per_slot: jax.Array  # Tiles of each query slot.
  sticks: Ref
  prefixes: Ref
  visited: Ref
  plain_from: Ref
  tile: int
  segments: tuple[Ref, Ref]
  sizes: Sizes
  scale: float
  wanted: str

  def run(self, *accs: Ref) -> list[jax.Array]:
    """Return the halves [64, 64] of dK, then of dV, where wanted."""
    num_slots = self.sizes.num_heads // self.sizes.num_kv_heads
    if num_slots == 1:
      self._slot(accs, jnp.int32(0), None)
    else:
      lax.fori_loop(jnp.int32(0), jnp.int32(num_slots), functools.partial(self._slot, accs), None)
    is_k = [name == "k" for name in self.wanted for _ in range(self.sizes.halves)]
    return [acc[...] * (self.scale if k else 1.0) for acc, k in zip(accs, is_k, strict=True)]

  def _slot(self, accs: tuple[Ref, ...], query_slot: jax.Array, _: None) -> None:
    """Add what the queries of a slot contribute."""
    head = query_slot * self.sizes.num_kv_heads + self.head
    ahead = query_slot * self.per_slot - self.first  # Of steps over tiles.
    end = self.first + self.per_slot
    # Queries left of the diagonal of these keys belong to another warpgroup's.
    start = lax.div(self.unit * KEYS - self.sizes.history, jnp.int32(ROWS))
    start = lax.clamp(self.first, start, end)

    def pass_on(part: jax.Array, _: None) -> None:
      plgpu.barrier_wait(self.full.at[self._ring_slot(part + ahead)])
      self._release(part + ahead)

    lax.fori_loop(self.first, start, pass_on, None)
    lax.fori_loop(start, end, functools.partial(self._step, accs, head, ahead, start), None)
    plgpu.wgmma_wait(0)

    @pl.when(start < end)
    def release() -> None:
      self._release(end - 1 + ahead)

  def _ring_slot(self, step: jax.Array) -> jax.Array:
    return lax.rem(step, jnp.int32(self.q.shape[0]))

  def _release(self, step: jax.Array) -> None:
    plgpu.barrier_arrive(self.free.at[self._ring_slot(step)])

  def _step(
    self,
    accs: tuple[Ref, ...],
    head: jax.Array,
    ahead: jax.Array,
    start: jax.Array,
    part: jax.Array,
    _: None,
  ) -> None:
    """Add what a tile of 64 queries contributes; its products are still under way on return."""
    halves = self.sizes.halves
    slot = self._ring_slot(part + ahead)
    batch, head, unit, mine = (
      gpu_registers.unhoisted(x) for x in (self.batch, head, self.unit, self.index)
    )
    at = (batch, head, part * ROWS)
    seen = (self.visited[batch, head, part, 0], self.visited[batch, head, part, 1])
    stick = visited_rows(self.sticks, seen, at, unit)
    prefix = visited_rows(self.prefixes, seen, at, unit)
    plain = unit >= tile_value(self.plain_from, batch, part * ROWS, self.tile)
    plgpu.barrier_wait(self.full.at[slot])

    def products(s_acc: Ref, *d_acc: Ref) -> list[jax.Array]:
      multiply(s_acc, self.q.at[slot], self.k.at[mine], halves)
      for acc in d_acc:
        multiply(acc, self.d_out.at[slot], self.v.at[mine], halves)
      return [acc[...] for acc in (s_acc, *d_acc)]

    shape = ACC((ROWS, KEYS), jnp.float32)
    s, *d_weights = pl.run_scoped(products, shape, *[shape] * ("k" in self.wanted))

    # The products of the step before are complete as well.
    @pl.when(part > start)
    def release() -> None:
      self._release(part - 1 + ahead)

    position, key = self.sizes.history + part * ROWS, unit * KEYS
    s = mask(s, plain, self.segments, (batch, part * ROWS, position, key))
    factor = self.scale * math.log2(math.e)
    found = {}
    if d_weights:
      found["v"], found["k"], _prefixes = gpu_registers.gradients(
        s, d_weights[0], [stick], prefix, factor
      )
    else:
      found["v"], _sticks = gpu_registers.weights(s, stick, factor)
    squares = [ref.at[mine] for ref in self.squares]
    for name, square in zip(self.wanted, squares, strict=True):
      square[...] = found[name].astype(self.sizes.dtype)
    plgpu.commit_smem()
    for i, (name, square) in enumerate(zip(self.wanted, squares, strict=True)):
      rows = self.q if name == "k" else self.d_out
      for half in range(halves):
        plgpu.wgmma(accs[i * halves + half], transpose(square), rows.at[slot, half])
