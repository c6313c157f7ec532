"""Kernels of the grouped matmul for Hopper, on the pipeline of `gpu_pipeline`."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import gpu_pipeline as pipeline
from pallas_kernels.grouped_matmul.gpu_pipeline import STEP, Ref, Ring, Tiling

UNIT = 64
# What a tile takes beside its slices, in slices, a guess: in one run on an H200 `outer` reached 619
# TFLOP/s with tiles of 32 slices and 647 with tiles of 64, which would be 3.
TILE_COST = 2
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
      """Return (m, n) of this block's i-th tile. Without a neighbour, two compute the last one."""
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

  The longest groups come first, so that blocks end at about the same time.
  """
  (m, k), n, g = lhs.shape, rhs.shape[1], group_sizes.shape[0]
  tile_m, tile_n = tiling.tile_m, tiling.tile_n
  tiles_m = k // tile_m // tiling.cluster
  tiles_group = tiles_m * (n // tile_n)
  store_n = 128 // jnp.dtype(out_dtype).itemsize  # What a store of one swizzled row holds.

  def body(
    lhs_ref: Ref,
    rhs_ref: Ref,
    starts_ref: Ref,
    sizes_ref: Ref,
    order_ref: Ref,
    extra_ref: Ref,
    out_ref: Ref,
    *refs: Ref,
  ) -> None:
    ring, slots, cleared = Ring(tiling, *refs[:4]), refs[4], refs[5]
    warpgroup, here = lax.axis_index("warpgroup"), pipeline.Here.find(tiling)
    deal = pipeline.Deal(here, g * tiles_group, tiles_group, extra_ref[0])
    num_tiles = deal.num_mine()

    def tile_at(i: jax.Array) -> tuple[jax.Array, ...]:
      """Return the i-th tile's group, how many slices that has, and the tile's (m, n) in it."""
      rank = lax.div(deal.mine(i), jnp.int32(tiles_group))
      group = order_ref[lax.min(rank, jnp.int32(g - 1))]
      steps = lax.max(lax.div(sizes_ref[group] + STEP - 1, jnp.int32(STEP)), jnp.int32(1))
      index = deal.mine(i) - rank * tiles_group
      return group, steps, *pipeline.tile_of(index, tiles_m, tiling, here.block)

    def load_all() -> None:
      def load(i: jax.Array, first: jax.Array) -> jax.Array:
        group, steps, tm, tn = tile_at(i)
        start = lax.min(starts_ref[group], jnp.int32(m - STEP))

        def step(j: jax.Array, _: None) -> None:
          rows = pl.ds(start + j * STEP, STEP)
          ring.load(
            i,
            first + j,
            lhs_ref.at[rows, pl.ds(tm * tile_m, tile_m)],
            rhs_ref.at[rows, pl.ds(tn * tile_n, tile_n)],
          )

        lax.fori_loop(0, steps, step, None)
        return first + steps

      ring.drain(lax.fori_loop(0, num_tiles, load, jnp.int32(0)))

    @pl.when(warpgroup == pipeline.CONSUMERS)
    def produce() -> None:
      plgpu.set_max_registers(pipeline.PRODUCER_REGISTERS, action="decrease")
      pipeline.in_one_warp(load_all)

    @pl.when(warpgroup < pipeline.CONSUMERS)
    def consume() -> None:
      plgpu.set_max_registers(pipeline.CONSUMER_REGISTERS, action="increase")

      first_row = tiling.own_part(warpgroup)
      own_rows: Any = slice(None)
      own_columns: Any = slice(None)
      if tiling.split:
        width = tile_n // pipeline.CONSUMERS
        own_rows, own_columns = pl.ds(first_row, tiling.own_rows), pl.ds(warpgroup * width, width)

      def operands(lhs_slice: Ref, rhs_slice: Ref) -> tuple[Ref, Ref]:
        return pipeline.transpose(lhs_slice.at[:, own_rows]), rhs_slice

      def compute(tile: tuple[jax.Array, ...], first: jax.Array) -> None:
        group, steps, tm, tn = tile
        used = sizes_ref[group] - (steps - 1) * STEP

        def prepare(j: jax.Array, slot: jax.Array) -> None:
          @pl.when((j == steps - 1) & (used < STEP))
          def clear() -> None:
            _clear_rows(ring.lhs.at[slot, :, own_rows], used)
            _clear_rows(ring.rhs.at[slot, :, own_columns], used)
            plgpu.commit_smem()
            if tiling.split:  # Each has cleared half of what both will read.
              plgpu.barrier_arrive(cleared)
              plgpu.barrier_wait(cleared)

        def product(acc: Ref) -> jax.Array:
          ring.multiply(acc, warpgroup, first, steps, operands, prepare)
          return acc[...]

        shape = (tiling.own_rows, tile_n)
        acc = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        units = itertools.product(range(0, tiling.own_rows, UNIT), range(0, tile_n, store_n))
        for j, (row, column) in enumerate(units):
          rows = pl.ds(tm * tile_m + first_row + row, UNIT)
          columns = pl.ds(tn * tile_n + column, store_n)
          part = acc[row : row + UNIT, column : column + store_n].astype(out_dtype)
          pipeline.store(slots.at[warpgroup], j, out_ref.at[group, rows, columns], part)

      def turn(i: jax.Array, first: jax.Array) -> jax.Array:
        tile = tile_at(i)
        is_own = tiling.split or lax.rem(i, jnp.int32(pipeline.CONSUMERS)) == warpgroup
        pl.when(is_own)(lambda: compute(tile, first))
        return first + tile[1]

      lax.fori_loop(0, num_tiles, turn, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

  kernel = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((g, k, n), out_dtype),
    scratch_types=(
      *Ring.scratch(tiling, (STEP, tile_m), (STEP, tile_n), lhs.dtype),
      pipeline.store_slots((UNIT, store_n), out_dtype),
      plgpu.Barrier(num_arrivals=pipeline.CONSUMERS),
    ),
    **pipeline.launch(tiling),
  )
  order, extra = schedule(group_sizes, tiles_group, pipeline.num_clusters(tiling))
  return kernel(lhs, rhs, starts, group_sizes, order, extra)


def _clear_rows(ref: Ref, used: jax.Array) -> None:
  """Set rows of a slice in shared memory from the used-th on to zero: NaN there would spread."""
  values = plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA)
  row = plgpu.broadcasted_iota(jnp.int32, ref.shape, 0, layout=plgpu.Layout.WGMMA)
  ref[...] = jnp.where(row < used, values, jnp.zeros_like(values))


def schedule(sizes: jax.Array, tiles: int, clusters: int) -> tuple[jax.Array, jax.Array]:
  """Return the groups' order for `pipeline.Deal` and its extra tiles.

  Each group has as many tiles.

  Returns:
    int32 [g], the groups by falling size, without the cost of a sort. int32 [1], how many of the
    tiles after the longest group's take together as long as one of these.
  """
  index = jnp.arange(len(sizes), dtype=jnp.int32)
  tie = (sizes[None] == sizes[:, None]) & (index[None] < index[:, None])
  is_before = (sizes[None] > sizes[:, None]) | tie
  rank = jnp.sum(is_before, axis=1)
  order = jnp.sum(jnp.where(rank[None] == index[:, None], index[None], 0), axis=1, dtype=jnp.int32)
  left_out = pipeline.Deal.left_out(tiles, clusters)
  if not left_out:
    return order, jnp.zeros(1, jnp.int32)
  cost = jnp.ceil(jnp.maximum(sizes, 1) / STEP) + TILE_COST
  longest = jnp.max(cost)
  done = jnp.sum(jnp.where(is_before, cost[None], 0), axis=1) - longest
  found = jnp.where(rank > 0, jnp.clip((left_out * longest / tiles - done) / cost, 0, 1), 0)
  extra = jnp.minimum(
    jnp.round(jnp.sum(found) * tiles / left_out), (len(sizes) - 1) * tiles // left_out
  )
  return order, extra.astype(jnp.int32)[None]
