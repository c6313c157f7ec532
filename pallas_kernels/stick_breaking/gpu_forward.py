"""Forward kernel of stick-breaking attention for Hopper.

A thread block computes a tile of queries of one head: each consumer warpgroup 64 of them, from the
diagonal leftwards, while a producer warpgroup copies keys and values into a ring of slots. Where
registers allow, a block does so for two heads, which share nothing, so that one computes while the
other waits for copies or products; otherwise a head's two consumers multiply in turns. What is
left of a row's stick is a register (gpu_scan says why that is exact); no maximum and no rescaling
of the output is needed. For the backward pass the stick right of every block is saved.
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
from pallas_kernels.stick_breaking.gpu_scan import KEYS, ROWS
from pallas_kernels.stick_breaking.gpu_tiles import (
  ACC,
  CONSUMER_REGISTERS,
  HALF_CONSUMER_REGISTERS,
  PRODUCER_REGISTERS,
  Ref,
  Sizes,
  compiler_params,
  copy_halves,
  mask,
  multiply,
  store_halves,
)
from pallas_kernels.stick_breaking.gpu_turns import Turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """Sizes of the forward kernel."""

  consumers: int  # Warpgroups of 64 queries.
  block_k: int  # Keys per step: 64 or 128.
  stages: int  # Slots of the ring.
  heads: int = 1  # Of a thread block: 1 or 2.


@dataclasses.dataclass(frozen=True)
class Saved:
  """What the forward kernel keeps for the backward kernels.

  sticks: float32 [b, n, blocks, rows]: what is left of a row's stick right of a block.
  visited: int32 [b, n, tiles of 64 rows, 2]: first and past-the-last block that were visited;
    `sticks` holds nothing elsewhere.
  """

  sticks: jax.Array
  visited: jax.Array


jax.tree_util.register_dataclass(Saved, data_fields=("sticks", "visited"), meta_fields=())


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  blocks: Blocks,
  sizes: Sizes,
  scale: float,
  *,
  eps: float,
  save: bool,
  tiling: Tiling,
) -> tuple[jax.Array, Saved | None]:
  """Return the output [b, q, n, d], and what the backward pass needs if `save`.

  Args:
    q: [b, q, n, d]. k, v: [blocks, 4, 8, 2, h, d] (gpu_copy.permutable); head n uses n % h.
    blocks: for tiles of 64 * tiling.consumers queries.
    eps: leave a tile when less than this is left of each of its sticks; 0: never.
    tiling: two heads in a thread block need an even number of them.
  """
  consumers = tiling.heads * tiling.consumers
  tile = ROWS * tiling.consumers
  num_tiles = sizes.tiles(tile)
  out_types: list[Any] = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
  if save:
    b, n, rows = sizes.batch, sizes.num_heads, sizes.covered_queries
    out_types += [
      jax.ShapeDtypeStruct((b, n, sizes.covered_keys // KEYS, rows), jnp.float32),
      jax.ShapeDtypeStruct((b, n, rows // ROWS, 2), jnp.int32),
    ]

  def stick_breaking_forward(*refs: Ref) -> None:
    factor = scale * math.log2(math.e)
    _kernel(*refs, sizes=sizes, factor=factor, eps=eps, save=save, tiling=tiling)

  kernel = plgpu.kernel(
    stick_breaking_forward,
    out_type=out_types,
    scratch_types=(
      plgpu.SMEM((consumers, sizes.halves, ROWS, COLUMNS), q.dtype, transforms=TRANSFORMS),
      plgpu.Barrier(num_arrivals=sizes.halves, num_barriers=consumers),
      *Ring.scratch(
        tiling.stages, sizes.halves, tiling.block_k, q.dtype, tiling.consumers, tiling.heads
      ),
      *(Turns.scratch(tiling.consumers) if _takes_turns(tiling, sizes, eps) else ()),
    ),
    grid=(sizes.num_heads // tiling.heads, num_tiles, sizes.batch),
    grid_names=("head", "tile", "batch"),
    num_threads=consumers + tiling.heads,
    thread_name="warpgroup",
    compiler_params=compiler_params(),
  )
  out, *saved = kernel(
    q, k, v, blocks.first, blocks.last, blocks.plain_from, blocks.q_segments, blocks.k_segments
  )
  return out, Saved(*saved) if save else None


def _takes_turns(tiling: Tiling, sizes: Sizes, eps: float) -> bool:
  # A consumer that leaves early would not give what the other waits for; the widest heads lack
  # the registers.
  return tiling.heads == 1 and tiling.consumers == 2 and eps == 0 and sizes.halves <= 2


def _kernel(
  q: Ref,
  k: Ref,
  v: Ref,
  firsts: Ref,
  lasts: Ref,
  plain_from: Ref,
  q_segments: Ref,
  k_segments: Ref,
  *refs: Ref,
  sizes: Sizes,
  factor: float,
  eps: float,
  save: bool,
  tiling: Tiling,
) -> None:
  """Walk the visible blocks of one tile, from right to left."""
  out, *saved = refs[: 3 if save else 1]
  q_tile, q_full, *fields = refs[3 if save else 1 :]
  *fields, turn = fields if _takes_turns(tiling, sizes, eps) else (*fields, None)
  b, warpgroup = (lax.axis_index(name) for name in ("batch", "warpgroup"))
  consumers = tiling.heads * tiling.consumers
  is_consumer = warpgroup < consumers
  if tiling.heads == 1:
    index, ring, head = warpgroup, Ring(*fields), lax.axis_index("head")
  else:
    pair = lax.div(warpgroup, jnp.int32(tiling.consumers))
    pair = lax.select(is_consumer, pair, warpgroup - consumers)
    index = lax.rem(warpgroup, jnp.int32(tiling.consumers))
    ring = dataclasses.replace(Ring(*fields), count=tiling.heads, index=pair)
    head = lax.axis_index("head") * tiling.heads + pair
  # Long tiles first: short ones fill the multiprocessors that the last long ones leave idle.
  tile = sizes.tiles(ROWS * tiling.consumers) - 1 - lax.axis_index("tile")
  row = (tile * tiling.consumers + index) * ROWS

  @pl.when(is_consumer)
  def _() -> None:
    copy_halves(q, (b, row, head), q_tile.at[warpgroup], q_full.at[warpgroup])

  units = tiling.block_k // KEYS
  end = lasts[b, tile] + 1
  first = lax.div(lax.min(firsts[b, tile], end), jnp.int32(units))
  top = lax.div(end + (units - 1), jnp.int32(units)) - 1
  steps = top - first + 1
  ring.init(steps if eps > 0 else None)

  @pl.when(is_consumer)
  def _() -> None:
    registers = CONSUMER_REGISTERS if tiling.heads == 1 else HALF_CONSUMER_REGISTERS
    plgpu.set_max_registers(registers, action="increase")
    mine = q_tile.at[warpgroup]
    plgpu.barrier_wait(q_full.at[warpgroup])
    consumer = _Consumer(
      q=mine, ring=ring, index=index, at=(b, head, row), top=top, steps=steps,
      turn=turn,
      plain_from=plain_from[b, tile], segments=(q_segments, k_segments), saved=tuple(saved),
      sizes=sizes, factor=factor, eps=eps, block_k=tiling.block_k,
      overlaps=tiling.heads == 1,  # Two heads lack the registers, and compute meanwhile.
    )  # fmt: skip
    accs = [ACC((ROWS, COLUMNS), jnp.float32)] * sizes.halves
    store_halves(pl.run_scoped(consumer.run, *accs), mine, out, (b, row, head))

  @pl.when(warpgroup >= consumers)
  def _() -> None:
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    kv_head = lax.rem(head, jnp.int32(sizes.num_kv_heads))
    left = b * (sizes.padded_keys // KEYS)

    def load(source: Ref, step: jax.Array, *destination: Any) -> None:
      gpu_copy.load(source, left + (top - step) * units, kv_head, *destination)

    produce = ring.produce_until_left if eps > 0 else ring.produce
    produce(steps, functools.partial(load, k), functools.partial(load, v))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Consumer:
  """One warpgroup's 64 queries of a tile."""

  q: Ref
  ring: Ring
  turn: Ref  # None: consumers take no turns.
  index: jax.Array
  at: tuple[jax.Array, jax.Array, jax.Array]  # Batch, head, first row.
  top: jax.Array  # The rightmost visible block, in steps' units.
  steps: jax.Array
  plain_from: jax.Array
  segments: tuple[Ref, Ref]
  saved: tuple[Ref, ...]
  sizes: Sizes
  factor: float
  eps: float
  block_k: int
  overlaps: bool  # Whether a product with values may still run when the next step begins.

  def run(self, *accs: Ref) -> list[jax.Array]:
    """Return the output [64, 64] of each half."""
    stick = plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), gpu_registers.ROWS)
    position = self.sizes.history + self.at[2]
    start, shared = self._start(position), self._start(position - self.index * ROWS)
    lax.fori_loop(jnp.int32(0), start, lambda step, _: self.ring.pass_on(step), None)
    turns = Turns(self.turn, self.index, shared, self.steps)
    step = functools.partial(self._step, accs, turns, start)
    if self.eps == 0:
      turns.prepare(self.turn, self.index)
      turns.before(start)
      lax.fori_loop(start, self.steps, step, stick)
      plgpu.wgmma_wait(0)
      turns.after(self.steps)
      visited = self.steps
    else:
      visited = self._until_broken(step, start, stick)
    if self.saved:
      b, head, row = self.at
      units = self.block_k // KEYS
      tile, end = lax.div(row, jnp.int32(ROWS)), self.top + 1
      self.saved[1][b, head, tile, 0] = (end - visited) * units
      self.saved[1][b, head, tile, 1] = (end - start) * units
    return [acc[...] for acc in accs]

  def _start(self, position: jax.Array) -> jax.Array:
    """Return how many steps are right of the diagonal of 64 queries, the first one's given."""
    end = lax.div(position + (ROWS - 1), jnp.int32(self.block_k)) + 1
    return lax.clamp(jnp.int32(0), self.top + 1 - end, self.steps)

  def _until_broken(self, step: Any, start: jax.Array, stick: jax.Array) -> jax.Array:
    """Take steps until less than eps is left of every stick; return the one after the last."""

    def body(state: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
      i, stick, _ = state
      stick = step(i, stick)
      return i + 1, stick, gpu_registers.any_at_least(stick, self.eps)

    visited, *_ = lax.while_loop(
      lambda state: (state[0] < self.steps) & (state[2] == 1),
      body,
      (start, stick, jnp.int32(1)),
    )
    plgpu.wgmma_wait(0)
    self.ring.leave(self.index)
    if self.overlaps:
      pl.when(visited > start)(lambda: self.ring.release_v(visited - 1))
    self.ring.drain(visited)
    return visited

  def _step(
    self,
    accs: tuple[Ref, ...],
    turns: Turns,
    start: jax.Array,
    step: jax.Array,
    stick: jax.Array,
  ) -> jax.Array:
    """Add a block's weights times values, under way on return; return the stick left of it."""
    ring, halves = self.ring, self.sizes.halves
    slot = ring.slot(step)
    ring.wait_k(step)

    def scores(acc: Ref) -> jax.Array:
      multiply(acc, self.q, ring.k.at[slot], halves)
      return acc[...]

    s = pl.run_scoped(scores, ACC((ROWS, self.block_k), jnp.float32))
    turns.multiplied(step)
    ring.release_k(step)
    if self.overlaps:
      # The product with the values of the step before is complete as well.
      pl.when(step > start)(lambda: ring.release_v(step - 1))

    weights, stick = self._weigh(self.top - step, s, stick)
    ring.wait_v(step)
    turns.multiply(step)
    for half, acc in enumerate(accs):
      plgpu.wgmma(acc, weights.astype(self.sizes.dtype), ring.v.at[slot, half])
    if not self.overlaps:
      plgpu.wgmma_wait(0)
      ring.release_v(step)
    return stick

  def _weigh(self, block: jax.Array, s: jax.Array, stick: jax.Array) -> tuple[jax.Array, jax.Array]:
    b, head, row = self.at
    position, key = self.sizes.history + row, block * self.block_k
    units = self.block_k // KEYS
    plain = block * units >= self.plain_from
    s = mask(s, plain, self.segments, (b, row, position, key))
    weights, left = gpu_registers.weights(s, stick, self.factor)
    if self.saved:
      for unit, right in enumerate([*left[1:], stick]):
        self.saved[0][b, head, block * units + unit, pl.ds(row, ROWS)] = right
    return weights, left[0]
