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

  def rows(self, ref: Ref, row: int) -> Ref:
    """Return the part of a reference [m] that units from `row` of the tile on have."""
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
    warpgroup = lax.axis_index("warpgroup")

    def sizes() -> tuple[jax.Array, jax.Array]:
      """Return the row tiles in use and how many tiles this block computes."""
      rows_end = starts_ref[g - 1] + sizes_ref[g - 1]
      tiles_m = lax.div(rows_end + tile_m - 1, jnp.int32(tile_m))
      return tiles_m, pipeline.num_mine(tiles_m * (n // tile_n // tiling.cluster))

    @pl.when(warpgroup == pipeline.CONSUMERS)
    def produce() -> None:
      plgpu.set_max_registers(pipeline.PRODUCER_REGISTERS, action="decrease")
      tiles_m, num_tiles = sizes()

      def load(i: jax.Array, _: None) -> None:
        tm, tn = pipeline.tile_of(pipeline.mine(i), tiles_m, tiling)
        group = lax.div(info_ref[tm], jnp.int32(INFO_ROWS))
        rows, columns = pl.ds(tm * tile_m, tile_m), pl.ds(tn * tile_n, tile_n)

        def step(j: jax.Array, _: None) -> None:
          ks = pl.ds(j * STEP, STEP)
          rhs_slice = (group, columns, ks) if transpose_rhs else (group, ks, columns)
          ring.load(i, i * k_steps + j, lhs_ref.at[rows, ks], rhs_ref.at[rhs_slice])

        lax.fori_loop(0, k_steps, step, None)

      lax.fori_loop(0, num_tiles, load, None)
      ring.drain(num_tiles * k_steps)

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
        tm, tn = pipeline.tile_of(pipeline.mine(i), tiles_m, tiling)
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
  tiles_m = k // tile_m
  tiles_group = tiles_m * (n // tile_n // tiling.cluster)
  store_n = 128 // jnp.dtype(out_dtype).itemsize  # What a store of one swizzled row holds.

  def body(
    lhs_ref: Ref,
    rhs_ref: Ref,
    starts_ref: Ref,
    sizes_ref: Ref,
    order_ref: Ref,
    out_ref: Ref,
    *refs: Ref,
  ) -> None:
    ring, slots = Ring(tiling, *refs[:4]), refs[4]
    warpgroup = lax.axis_index("warpgroup")
    num_tiles = pipeline.num_mine(g * tiles_group)

    def steps_of(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
      """Return the rank and size of the i-th tile's group and how many slices it has."""
      rank = lax.div(pipeline.mine(i), jnp.int32(tiles_group))
      group = order_ref[lax.min(rank, jnp.int32(g - 1))]
      size = sizes_ref[group]
      return rank, group, lax.max(lax.div(size + STEP - 1, jnp.int32(STEP)), jnp.int32(1))

    @pl.when(warpgroup == pipeline.CONSUMERS)
    def produce() -> None:
      plgpu.set_max_registers(pipeline.PRODUCER_REGISTERS, action="decrease")

      def load(i: jax.Array, first: jax.Array) -> jax.Array:
        rank, group, steps = steps_of(i)
        tm, tn = pipeline.tile_of(pipeline.mine(i) - rank * tiles_group, tiles_m, tiling)
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

    @pl.when(warpgroup < pipeline.CONSUMERS)
    def consume() -> None:
      plgpu.set_max_registers(pipeline.CONSUMER_REGISTERS, action="increase")

      def operands(lhs_slice: Ref, rhs_slice: Ref) -> tuple[Ref, Ref]:
        return pipeline.transpose(lhs_slice), rhs_slice

      def compute(i: jax.Array, first: jax.Array) -> jax.Array:
        rank, group, steps = steps_of(i)
        tm, tn = pipeline.tile_of(pipeline.mine(i) - rank * tiles_group, tiles_m, tiling)
        used = sizes_ref[group] - (steps - 1) * STEP

        def prepare(j: jax.Array, slot: jax.Array) -> None:
          @pl.when((j == steps - 1) & (used < STEP))
          def clear() -> None:
            _clear_rows(ring.lhs.at[slot], used)
            _clear_rows(ring.rhs.at[slot], used)
            plgpu.commit_smem()

        def product(acc: Ref) -> jax.Array:
          ring.multiply(acc, warpgroup, first, steps, operands, prepare)
          return acc[...]

        acc = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((tile_m, tile_n), jnp.float32))
        units = itertools.product(range(0, tile_m, UNIT), range(0, tile_n, store_n))
        for j, (row, column) in enumerate(units):
          rows, columns = pl.ds(tm * tile_m + row, UNIT), pl.ds(tn * tile_n + column, store_n)
          part = acc[row : row + UNIT, column : column + store_n].astype(out_dtype)
          pipeline.store(slots.at[warpgroup], j, [(out_ref.at[group, rows, columns], part)])
        return first + steps

      def turn(j: jax.Array, first: jax.Array) -> jax.Array:
        i = j * pipeline.CONSUMERS + warpgroup
        # The other consumer's tile comes before (for the second) or after (for the first).
        before = lax.select(warpgroup == 1, steps_of(lax.max(i - 1, jnp.int32(0)))[2], jnp.int32(0))
        after = lax.select(warpgroup == 0, steps_of(i + 1)[2], jnp.int32(0))
        return compute(i, first + before) + after

      turns = lax.div(num_tiles + pipeline.CONSUMERS - 1 - warpgroup, jnp.int32(pipeline.CONSUMERS))
      lax.fori_loop(0, turns, turn, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

  kernel = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((g, k, n), out_dtype),
    scratch_types=(
      *Ring.scratch(tiling, (STEP, tile_m), (STEP, tile_n), lhs.dtype),
      pipeline.store_slots(1, (UNIT, store_n), out_dtype),
    ),
    **pipeline.launch(tiling),
  )
  return kernel(lhs, rhs, starts, group_sizes, _longest_first(group_sizes))


def _clear_rows(ref: Ref, used: jax.Array) -> None:
  """Set rows of a slice in shared memory from the used-th on to zero: NaN there would spread."""
  values = plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA)
  row = plgpu.broadcasted_iota(jnp.int32, ref.shape, 0, layout=plgpu.Layout.WGMMA)
  ref[...] = jnp.where(row < used, values, jnp.zeros_like(values))


def _longest_first(sizes: jax.Array) -> jax.Array:
  """Return int32 [g]: the groups in order of falling size, without the cost of a sort."""
  index = jnp.arange(len(sizes), dtype=jnp.int32)
  tie = (sizes[None] == sizes[:, None]) & (index[None] < index[:, None])
  rank = jnp.sum((sizes[None] > sizes[:, None]) | tie, axis=1)
  return jnp.sum(jnp.where(rank[None] == index[:, None], index[None], 0), axis=1, dtype=jnp.int32)
