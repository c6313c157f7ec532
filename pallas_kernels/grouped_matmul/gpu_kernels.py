"""Kernels of the grouped matmul for Hopper, on the pipeline of `gpu_pipeline`."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import gpu_pipeline as pipeline
from pallas_kernels.grouped_matmul.gpu_pipeline import STEP, Ref, Ring, Tiling

UNIT = 64
# What a tile takes beside its slices, in slices. With half of all rows in one of 32 groups, 2 and 3
# took the fewest cycles of 1 to 4 on an H200; equal and random groups take as many with each.
TILE_COST = 2
KEPT = 16  # Rows of rhs, as many as a warpgroup moves at once, that are cleared together.
INFO_ROWS = 256  # row_tile_info packs the rows in use below this base.


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a consumer's tile lies. Epilogues handle it in square units."""

  consumer: jax.Array
  row: jax.Array
  column: jax.Array
  num_rows: int
  num_columns: int

  @property
  def units(self) -> list[tuple[int, int]]:
    """Rows and columns at which the units of the tile begin."""
    return list(itertools.product(range(0, self.num_rows, UNIT), range(0, self.num_columns, UNIT)))

  def of(self, ref: Ref, unit: tuple[int, int]) -> Ref:
    """Return a unit's part of a reference [m, n]."""
    return ref.at[pl.ds(self.row + unit[0], UNIT), pl.ds(self.column + unit[1], UNIT)]

  def wide(self, ref: Ref, row: int) -> Ref:
    """Return the part of a reference [m, n] that units from `row` of the tile on have together."""
    return ref.at[pl.ds(self.row + row, UNIT), pl.ds(self.column, self.num_columns)]

  def rows(self, ref: Ref, row: int) -> Ref:
    """Return the part of a reference [m] that these have."""
    return ref.at[pl.ds(self.row + row, UNIT)]


class Epilogue(Protocol):
  """What becomes of a finished tile. `refs` are the extra inputs, then the outputs."""

  def scratch(self, tiling: Tiling) -> Sequence[Any]:
    """Return scratch types; each consumer uses its own part of every reference."""

  def prefetch(self, place: Place, refs: Sequence[Ref], scratch: Sequence[Ref]) -> None:
    """Start loading what `finish` needs first."""

  def finish(
    self, acc: jax.Array, place: Place, refs: Sequence[Ref], scratch: Sequence[Ref]
  ) -> None:
    """Write the results of a tile from its float32 products."""


def row_tile_info(
  starts: jax.Array, group_sizes: jax.Array, tile: int, num_tiles: int
) -> jax.Array:
  """Return int32 [num_tiles]: INFO_ROWS times a row tile's group, plus the rows that it uses."""
  row = jnp.arange(num_tiles, dtype=jnp.int32)[:, None] * tile
  ends = starts + group_sizes
  info = jnp.arange(len(starts), dtype=jnp.int32) * INFO_ROWS + jnp.minimum(ends - row, tile)
  return jnp.sum(jnp.where((row >= starts) & (row < ends), info, 0), axis=1, dtype=jnp.int32)


def by_rows(
  lhs: jax.Array,
  rhs: jax.Array,
  extra: Sequence[jax.Array],
  starts: jax.Array,
  group_sizes: jax.Array,
  out_type: Sequence[jax.ShapeDtypeStruct],
  epilogue: Epilogue,
  *,
  transpose_rhs: bool,
  tiling: Tiling,
) -> Sequence[jax.Array]:
  """Multiply rows [m, k] by their group's matrix and hand the float32 tiles to the epilogue.

  Row tiles in use are a prefix of all, as groups follow each other at multiples of the tile.
  """
  (m, k), g = lhs.shape, rhs.shape[0]
  n = rhs.shape[1] if transpose_rhs else rhs.shape[2]
  tile_m, tile_n = tiling.tile_m, tiling.tile_n
  k_steps = k // STEP

  def body(
    lhs_ref: Ref, rhs_ref: Ref, starts_ref: Ref, sizes_ref: Ref, info_ref: Ref, *refs: Ref
  ) -> None:
    count = len(extra) + len(out_type)
    ring = Ring(tiling, *refs[count : count + 4])
    refs, scratch = refs[:count], refs[count + 4 :]
    warpgroup, here = lax.axis_index("warpgroup"), pipeline.Here.find(tiling)

    def pairs_of(tiles_m: jax.Array) -> jax.Array:
      return lax.div(tiles_m + tiling.cluster - 1, jnp.int32(tiling.cluster))

    def sizes() -> tuple[jax.Array, jax.Array]:
      """Return the row tiles in use and how many tiles this block computes."""
      rows_end = starts_ref[g - 1] + sizes_ref[g - 1]
      tiles_m = lax.div(rows_end + tile_m - 1, jnp.int32(tile_m))
      return tiles_m, here.num_mine(pairs_of(tiles_m) * (n // tile_n))

    def tile_of(i: jax.Array, tiles_m: jax.Array) -> tuple[jax.Array, jax.Array]:
      """Return (m, n) of this block's i-th tile. Without a neighbour, two compute the last one.

      Both write the same.
      """
      tm, tn = pipeline.tile_of(here.mine(i), pairs_of(tiles_m), tiling, here.block)
      return lax.min(tm, tiles_m - 1), tn

    def group_of(tm: jax.Array) -> jax.Array:
      return lax.div(info_ref[tm], jnp.int32(INFO_ROWS))

    def load_all() -> None:
      tiles_m, num_tiles = sizes()

      def load(i: jax.Array, _: None) -> None:
        tm, tn = tile_of(i, tiles_m)
        group = group_of(tm)
        is_shared: jax.Array | bool = True
        if tiling.cluster > 1:
          neighbour = lax.min(lax.bitwise_or(tm, jnp.int32(1)), tiles_m - 1)
          is_shared = group_of(lax.bitwise_and(tm, jnp.int32(-2))) == group_of(neighbour)
        rows, columns = pl.ds(tm * tile_m, tile_m), pl.ds(tn * tile_n, tile_n)

        def step(j: jax.Array, _: None) -> None:
          ks = pl.ds(j * STEP, STEP)
          rhs_slice = (group, columns, ks) if transpose_rhs else (group, ks, columns)
          ring.load(i, i * k_steps + j, lhs_ref.at[rows, ks], rhs_ref.at[rhs_slice], is_shared)

        lax.fori_loop(0, k_steps, step, None)

      lax.fori_loop(0, num_tiles, load, None)
      ring.drain(num_tiles * k_steps)

    @pl.when(warpgroup == pipeline.CONSUMERS)
    def produce() -> None:
      plgpu.set_max_registers(pipeline.PRODUCER_REGISTERS, action="decrease")
      pipeline.in_one_warp(load_all)

    @pl.when(warpgroup < pipeline.CONSUMERS)
    def consume() -> None:
      plgpu.set_max_registers(pipeline.CONSUMER_REGISTERS, action="increase")
      tiles_m, num_tiles = sizes()

      def compute(i: jax.Array, row: jax.Array, column: jax.Array, num_rows: int) -> None:
        first_row = tiling.own_part(warpgroup)
        place = Place(warpgroup, row + first_row, column, num_rows, tile_n)
        epilogue.prefetch(place, refs, scratch)

        def operands(lhs_slice: Ref, rhs_slice: Ref) -> tuple[Ref, Ref]:
          rhs_slice = pipeline.transpose(rhs_slice) if transpose_rhs else rhs_slice
          return lhs_slice.at[pl.ds(first_row if tiling.split else 0, num_rows)], rhs_slice

        def product(acc: Ref) -> jax.Array:
          ring.multiply(acc, warpgroup, i * k_steps, k_steps, operands)
          return acc[...]

        acc = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((num_rows, tile_n), jnp.float32))
        epilogue.finish(acc, place, refs, scratch)

      def turn(j: jax.Array, _: None) -> None:
        """Compute a tile, or its first half if the last tile of a group has no more rows."""
        i = tiling.own_tile(j, warpgroup)
        tm, tn = tile_of(i, tiles_m)
        used = lax.rem(info_ref[tm], jnp.int32(INFO_ROWS))
        place = tm * tile_m, tn * tile_n
        if tiling.own_rows <= STEP:
          compute(i, *place, tiling.own_rows)
          return

        @pl.when(used > tile_m // 2)
        def whole() -> None:
          compute(i, *place, tile_m)

        @pl.when(used <= tile_m // 2)
        def half() -> None:
          compute(i, *place, tile_m // 2)

      lax.fori_loop(0, tiling.own_tiles(num_tiles, warpgroup), turn, None)
      plgpu.wait_smem_to_gmem(0)

  rhs_shape = (tile_n, STEP) if transpose_rhs else (STEP, tile_n)
  kernel = plgpu.kernel(
    body,
    out_type=tuple(out_type),
    scratch_types=(
      *Ring.scratch(tiling, (tile_m, STEP), rhs_shape, lhs.dtype),
      *epilogue.scratch(tiling),
    ),
    **pipeline.launch(tiling),
  )
  info = row_tile_info(starts, group_sizes, tile_m, m // tile_m)
  return kernel(lhs, rhs, starts, group_sizes, info, *extra)


class OuterTile(NamedTuple):
  """What a tile of `by_groups` sums over: its group, and the first and the number of its rows."""

  group: jax.Array
  start: jax.Array
  size: jax.Array

  @property
  def steps(self) -> jax.Array:
    """How many slices the group has."""
    return lax.max(lax.div(self.size + STEP - 1, jnp.int32(STEP)), jnp.int32(1))

  @property
  def last(self) -> jax.Array:
    """First row, in the group, of the last slice, a multiple of 8 as copies need them."""
    return lax.max(lax.div(self.size + 7, jnp.int32(8)) * 8 - STEP, jnp.int32(0))


def by_groups(
  lhs: jax.Array,
  rhs: jax.Array,
  starts: jax.Array,
  group_sizes: jax.Array,
  *,
  out_dtype: jax.typing.DTypeLike,
  tiling: Tiling,
) -> jax.Array:
  """Return [g, k, n]: per group the sum over its rows of lhs [m, k]^T times rhs [m, n].

  The longest groups come first, so that blocks end at about the same time. A group's last slice
  reaches back rather than far past the group's end: the rows of the slice before need be cleared
  in one operand, those of others, which may hold NaN, in both. Consumers that split tiles write
  most of a bf16 result during the products of the next tile.
  """
  (m, k), n, g = lhs.shape, rhs.shape[1], group_sizes.shape[0]
  tile_m, tile_n = tiling.tile_m, tiling.tile_n
  tiles_m = k // tile_m // tiling.cluster
  tiles_group = tiles_m * (n // tile_n)
  store_n = 128 // jnp.dtype(out_dtype).itemsize  # What a store of one swizzled row holds.
  units = list(itertools.product(range(0, tiling.own_rows, UNIT), range(0, tile_n, store_n)))
  if len(units) % pipeline.STORE_ROUNDS:
    raise ValueError(f"{tiling} has {len(units)} units to store, and slots for pairs: widen it")

  def body(lhs_ref: Ref, rhs_ref: Ref, *refs: Ref) -> None:
    *groups_refs, extra_ref, out_ref = refs[:5]
    ring, slots, cleared = Ring(tiling, *refs[5:9]), *refs[9:]
    warpgroup, here = lax.axis_index("warpgroup"), pipeline.Here.find(tiling)
    extra = round_extra(extra_ref[g - 1], g, tiles_group, here.clusters)
    deal = pipeline.Deal(here, g * tiles_group, tiles_group, extra)
    num_tiles = deal.num_mine()

    def tile_at(i: jax.Array) -> OuterTile:
      """Return the i-th tile. To wait less for memory, ask for it during the one before."""
      rank = lax.div(deal.mine(i), jnp.int32(tiles_group))
      rank = lax.min(rank, jnp.int32(g - 1))  # The one after the last is asked for, too.
      return OuterTile(*(ref[rank] for ref in groups_refs))

    def place_of(i: jax.Array) -> tuple[jax.Array, jax.Array]:
      """Return the first row and column of the i-th tile in its group's result."""
      index = lax.rem(deal.mine(i), jnp.int32(tiles_group))
      tm, tn = pipeline.tile_of(index, tiles_m, tiling, here.block)
      return tm * tile_m, tn * tile_n

    def load_all() -> None:
      def load(i: jax.Array, carry: tuple[jax.Array, OuterTile]) -> tuple[jax.Array, OuterTile]:
        first, tile = carry
        following = tile_at(i + 1)
        start = lax.min(tile.start, jnp.int32(m - STEP))
        row, column = place_of(i)

        def step(j: jax.Array, _: None) -> None:
          rows = pl.ds(start + lax.min(j * STEP, tile.last), STEP)
          lhs_slice = lhs_ref.at[rows, pl.ds(row, tile_m)]
          ring.load(i, first + j, lhs_slice, rhs_ref.at[rows, pl.ds(column, tile_n)])

        lax.fori_loop(0, tile.steps, step, None)
        return first + tile.steps, following

      num_steps, _ = lax.fori_loop(0, num_tiles, load, (jnp.int32(0), tile_at(jnp.int32(0))))
      ring.drain(num_steps)

    @pl.when(warpgroup == pipeline.CONSUMERS)
    def produce() -> None:
      plgpu.set_max_registers(pipeline.PRODUCER_REGISTERS, action="decrease")
      pipeline.in_one_warp(load_all)

    @pl.when(warpgroup < pipeline.CONSUMERS)
    def consume() -> None:
      plgpu.set_max_registers(pipeline.CONSUMER_REGISTERS, action="increase")
      first_row = tiling.own_part(warpgroup)
      own_rows: Any = pl.ds(first_row, tiling.own_rows) if tiling.split else slice(None)

      def operands(lhs_slice: Ref, rhs_slice: Ref) -> tuple[Ref, Ref]:
        return pipeline.transpose(lhs_slice.at[:, own_rows]), rhs_slice

      def compute(
        tile: OuterTile, first: jax.Array, meanwhile: Callable[[jax.Array], None] | None = None
      ) -> jax.Array:
        def prepare(j: jax.Array, slot: jax.Array) -> None:
          pl.when(j == tile.steps - 1)(
            lambda: _clear(ring, slot, own_rows, tile, warpgroup == 0, cleared)
          )

        def product(acc: Ref) -> jax.Array:
          ring.multiply(acc, warpgroup, first, tile.steps, operands, prepare, meanwhile)
          return acc[...]

        shape = (tiling.own_rows, tile_n)
        return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

      def part_of(result: jax.Array, unit: int) -> jax.Array:
        row, column = units[unit]
        return result[row : row + UNIT, column : column + store_n].astype(out_dtype)

      def store(part: jax.Array, i: jax.Array, group: jax.Array, unit: int) -> None:
        (row, column), (tile_row, tile_column) = units[unit], place_of(i)
        rows = pl.ds(tile_row + first_row + row, UNIT)
        columns = pl.ds(tile_column + column, store_n)
        pipeline.store(slots.at[warpgroup], unit, out_ref.at[group, rows, columns], part)

      def whole(i: jax.Array, carry: tuple[jax.Array, OuterTile]) -> tuple[jax.Array, OuterTile]:
        """Compute and write a tile, if it is this consumer's."""
        first, tile = carry
        following = tile_at(i + 1)

        @pl.when(tiling.split | (lax.rem(i, jnp.int32(pipeline.CONSUMERS)) == warpgroup))
        def own() -> None:
          result = compute(tile, first)
          for unit in range(len(units)):
            store(part_of(result, unit), i, tile.group, unit)

        return first + tile.steps, following

      def overlapped(i: jax.Array, carry: Any) -> Any:
        """Compute a tile; write its first unit, and the others of the one before."""
        first, tile, group, *parts = carry
        following = tile_at(i + 1)

        def store_if(condition: jax.Array, unit: int) -> None:
          last = functools.partial(store, parts[unit - 1], i - 1, group, unit)
          pl.when((i > 0) & condition)(last)

        def meanwhile(step: jax.Array) -> None:
          for unit in range(1, len(units)):
            store_if(step == unit - 1, unit)

        result = compute(tile, first, meanwhile)
        for unit in range(2, len(units)):
          store_if(tile.steps < unit, unit)
        store(part_of(result, 0), i, tile.group, 0)
        parts = [part_of(result, unit) for unit in range(1, len(units))]
        return first + tile.steps, following, tile.group, *parts

      begin = jnp.int32(0), tile_at(jnp.int32(0))
      if tiling.split and jnp.dtype(out_dtype).itemsize == 2:  # Wider ones need more registers.
        none = plgpu.layout_cast(jnp.zeros((UNIT, store_n), out_dtype), plgpu.Layout.WGMMA)
        carry = (*begin, jnp.int32(0), *[none] * (len(units) - 1))
        _, _, group, *parts = lax.fori_loop(0, num_tiles, overlapped, carry)
        for unit, part in enumerate(parts, 1):
          pl.when(num_tiles > 0)(functools.partial(store, part, num_tiles - 1, group, unit))
      else:
        lax.fori_loop(0, num_tiles, whole, begin)
      plgpu.wait_smem_to_gmem(0)

  kernel = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((g, k, n), out_dtype),
    scratch_types=(
      *Ring.scratch(tiling, (STEP, tile_m), (STEP, tile_n), lhs.dtype),
      pipeline.store_slots((UNIT, store_n), out_dtype),
      plgpu.Barrier(num_arrivals=1, num_barriers=tiling.stages),
    ),
    **pipeline.launch(tiling),
  )
  clusters = pipeline.num_clusters(tiling)
  return kernel(lhs, rhs, *schedule(starts, group_sizes, tiles_group, clusters))


def _clear(
  ring: Ring, slot: jax.Array, own_rows: Any, tile: OuterTile, is_first: jax.Array, cleared: Ref
) -> None:
  """Clear what the last slice of a group holds of other slices and of other groups.

  Args:
    own_rows: of the result, which are columns of lhs, that the consumer computes. is_first: whether
      it is the first consumer: where tiles are split it clears rhs for both, and waits for nobody;
      where they are not, each clears its own. cleared: a
      barrier per slot, to tell the other one. Of a single barrier the first consumer, who may be
      ahead by as many slices as there are slots, could complete two phases before the other looks.
  """
  is_split = ring.tiling.split
  repeated, end = (tile.steps - 1) * STEP - tile.last, tile.size - tile.last

  def clear_rhs(block: jax.Array, _: None) -> None:
    start = block * KEPT
    _keep_rows(ring.rhs.at[slot, pl.ds(start, KEPT)], 0, end - start)

  @pl.when((repeated > 0) | (end < STEP))
  def clear() -> None:
    _keep_rows(ring.lhs.at[slot, :, own_rows], repeated, end)

    @pl.when(is_first | (not is_split))
    def clear_all_rhs() -> None:
      lax.fori_loop(lax.div(end, jnp.int32(KEPT)), STEP // KEPT, clear_rhs, None)

    plgpu.commit_smem()
    if is_split:

      @pl.when(end < STEP)
      def tell() -> None:
        pl.when(is_first)(lambda: plgpu.barrier_arrive(cleared.at[slot]))
        pl.when(~is_first)(lambda: plgpu.barrier_wait(cleared.at[slot]))


def _keep_rows(ref: Ref, first: jax.Array | int, end: jax.Array) -> None:
  """Set the rows of a part of a slice before `first` and from `end` on to zero."""
  layout = plgpu.Layout.SMEM_GMEM_COPY(ref.shape, ref.dtype, 128)  # Moves 16 bytes at once.
  values = plgpu.layout_cast(ref[...], layout)
  row = plgpu.broadcasted_iota(jnp.int32, ref.shape, 0, layout=layout)
  ref[...] = jnp.where((row >= first) & (row < end), values, jnp.zeros_like(values))


def schedule(
  starts: jax.Array, sizes: jax.Array, tiles: int, clusters: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Return the groups in the order of `pipeline.Deal` and its extra tiles.

  Each group has `tiles` tiles. All sums are of rows of a [g, g] matrix, in two steps: XLA makes one
  GPU kernel of each step, where a sort or a sum over all groups would be one more.

  Returns:
    int32 [g] each, of the groups by falling size: their numbers, first rows and sizes. float32 [g],
    running sums, of which the last one is how many of the tiles after the longest group's take
    together as long as one of these; see `round_extra`.
  """
  index = jnp.arange(len(sizes), dtype=jnp.int32)
  tie = (sizes[None] == sizes[:, None]) & (index[None] < index[:, None])
  is_before = (sizes[None] > sizes[:, None]) | tie
  cost = lax.div(jnp.maximum(sizes, 1) + STEP - 1, STEP) + TILE_COST
  costs_before = jnp.where(is_before, cost[None], 0)
  rank = jnp.sum(is_before, axis=1, dtype=jnp.int32)
  longest = jnp.max(costs_before, axis=1)  # 0 for the longest itself.
  done = jnp.sum(costs_before, axis=1, dtype=jnp.int32) - longest

  is_at = rank[None] == index[:, None]
  order, starts, sizes = (
    jnp.sum(jnp.where(is_at, x[None], 0), axis=1, dtype=jnp.int32) for x in (index, starts, sizes)
  )
  left_out = pipeline.Deal.left_out(tiles, clusters)
  if not left_out:
    return order, starts, sizes, jnp.zeros_like(index, jnp.float32)
  found = jnp.clip((longest * (left_out / tiles) - done) / cost, 0, 1) * (tiles / left_out)
  extra = jnp.sum(jnp.where(rank[None] <= index[:, None], found[None], 0), axis=1)
  return order, starts, sizes, extra


def round_extra(extra: jax.Array, groups: int, tiles: int, clusters: int) -> jax.Array:
  """Return a whole number of extra tiles, no more than there are, of `schedule`'s last number."""
  most = (groups - 1) * tiles // max(pipeline.Deal.left_out(tiles, clusters), 1)
  return lax.min((extra + 0.5).astype(jnp.int32), jnp.int32(most))
