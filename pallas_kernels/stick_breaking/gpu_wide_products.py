"""Products of wide stick-breaking attention's weights, tile rows up to the diagonal, on Hopper.

A thread block goes from tile to tile of the result while its loader is already at the next one;
tiles come in pairs of a long and a short one, so that all blocks have the same to do.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.stick_breaking.gpu_wide_pipeline import (
  CHUNK,
  COMPUTE_REGISTERS,
  HALF,
  LOADER_REGISTERS,
  ROWS,
  STEP,
  TRANSFORMS,
  WARPGROUPS,
  Ref,
  Shape,
  Tiling,
  accumulate,
  compiler_params,
  fill,
  finish,
  transposed,
)

_TILE = 128  # Rows of a tile of the result: positions or keys.
_COLUMNS = 256
_WIDTH = _COLUMNS // WARPGROUPS


Slice = Any  # Of pl.ds.
_Place = tuple[jax.Array, ...]  # Indices of a tile.


class _Step(NamedTuple):
  """What a step multiplies, in global memory."""

  weights: Ref
  others: Ref


class _Problem(NamedTuple):
  """How to compute the tiles of a result, from references of the inputs.

  name: of the kernel.
  sizes: of the items of work, which are tiles or pairs of them; the columns come last.
  tiles: of an item, the number of its tiles.
  tile: of an item and a number, the tile and how many steps it has.
  load: (tile, columns, put) calls put(step, operands) for every step of a tile.
  target: (output, tile, columns), where a tile goes.
  """

  name: str
  sizes: tuple[int, ...]
  tiles: Callable[[Sequence[jax.Array]], jax.Array]
  tile: Callable[..., tuple[_Place, jax.Array]]
  load: Callable[..., None]
  target: Callable[[Ref, _Place, Slice], Ref]


def _unravel(index: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
  indices = []
  for size in reversed(sizes):
    indices.append(lax.rem(index, size))
    index = lax.div(index, size)
  return indices[::-1]


def _run(
  problem: _Problem,
  inputs: Sequence[jax.Array],
  out_type: jax.ShapeDtypeStruct,
  tiling: Tiling,
  num_sms: int,
  transpose_weights: bool,
) -> jax.Array:
  num_stages = tiling.product_stages
  part = _WIDTH if num_stages < 4 else _WIDTH // 2  # Columns stored at a time.
  num_items = math.prod(problem.sizes)
  num_blocks = min(num_sms, num_items)

  def kernel(*refs: Ref) -> None:
    inputs, (out_ref, w_smem, x_smem, out_smem, full, free) = refs[:-6], refs[-6:]
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

    def for_each_tile(body: Callable[..., None]) -> jax.Array:
      def item(i: jax.Array, step: jax.Array) -> jax.Array:
        *index, n = _unravel(cta + i * num_blocks, problem.sizes)

        def tile(j: jax.Array, step: jax.Array) -> jax.Array:
          place, num_steps = problem.tile(inputs, index, j)
          body(step, place, num_steps, n * _COLUMNS)
          return step + num_steps

        return lax.fori_loop(0, problem.tiles(index), tile, step)

      rounds = lax.div(num_items - 1 - cta, num_blocks) + 1
      return lax.fori_loop(0, rounds, item, jnp.int32(0))

    @pl.when(wg < WARPGROUPS)
    def compute_tiles() -> None:
      plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
      out = out_smem.at[wg]

      def compute(step: jax.Array, place: _Place, num_steps: jax.Array, column: jax.Array) -> None:
        def body(acc: Ref) -> jax.Array:
          def product(stage: jax.Array, _: jax.Array) -> None:
            weights = w_smem.at[stage]
            weights = transposed(weights) if transpose_weights else weights
            plgpu.wgmma(acc, weights, x_smem.at[stage, :, pl.ds(wg * _WIDTH, _WIDTH)])

          accumulate(step, num_steps, num_stages, (full, free), product)
          return acc[...]

        values = pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((_TILE, _WIDTH), jnp.float32))
        for i in range(0, _WIDTH, part):
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          out[...] = values[:, i : i + part].astype(jnp.bfloat16)
          plgpu.commit_smem()
          columns = pl.ds(column + wg * _WIDTH + i, part)
          plgpu.copy_smem_to_gmem(out, problem.target(out_ref, place, columns))

      for_each_tile(compute)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == WARPGROUPS)
    def load_tiles() -> None:
      plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

      def fetch(step: jax.Array, place: _Place, num_steps: jax.Array, column: jax.Array) -> None:
        def put(i: jax.Array, operands: _Step) -> None:
          def copies(stage: jax.Array) -> None:
            plgpu.copy_gmem_to_smem(operands.weights, w_smem.at[stage], full.at[stage])
            plgpu.copy_gmem_to_smem(operands.others, x_smem.at[stage], full.at[stage])

          fill(step + i, num_stages, free, copies)

        problem.load(inputs, place, num_steps, pl.ds(column, _COLUMNS), put)

      finish(for_each_tile(fetch), num_stages, free)

  w_shape = (STEP, _TILE) if transpose_weights else (_TILE, STEP)
  return plgpu.kernel(
    kernel,
    out_type=out_type,
    grid=(num_blocks,),
    grid_names=("cta",),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    kernel_name=f"stick_breaking_{problem.name}",
    scratch_types=[
      plgpu.SMEM((num_stages, *w_shape), jnp.bfloat16, transforms=TRANSFORMS),
      plgpu.SMEM((num_stages, STEP, _COLUMNS), jnp.bfloat16, transforms=TRANSFORMS),
      plgpu.SMEM((WARPGROUPS, _TILE, part), jnp.bfloat16, transforms=TRANSFORMS),
      plgpu.Barrier(num_arrivals=2, num_barriers=num_stages),
      plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=num_stages),
    ],
    compiler_params=compiler_params(),
  )(*inputs)


def row_products(
  shape: Shape,
  weights: jax.Array,
  keys: jax.Array,
  first_chunks: jax.Array,
  num_sms: int,
  tiling: Tiling,
) -> jax.Array:
  """Return bf16 [b, q, s, h, d], each row's products with the keys' rows.

  Args:
    shape: sizes.
    weights: bf16 [b, h, s, positions, keys].
    keys: bf16 [b, t, h, d].
    first_chunks: int32 [b, h, rows], the first live chunk of a tile row.
    num_sms: of the device: so many thread blocks share the work.
    tiling: sizes of the pipeline.
  """
  num_tiles = shape.num_q_tiles

  def tiles(index: Sequence[jax.Array]) -> jax.Array:
    return jnp.where(index[2] == num_tiles - 1 - index[2], 1, 2)

  def tile(
    refs: Sequence[Ref], index: Sequence[jax.Array], j: jax.Array
  ) -> tuple[_Place, jax.Array]:
    b, h, pair, slot = index
    q_tile = jnp.where(j == 0, num_tiles - 1 - pair, pair)
    first_key = refs[2][b, h, q_tile * shape.slots + slot] * CHUNK
    num_steps = lax.div(shape.visible_halves(q_tile) * HALF - first_key, STEP)
    return (b, h, slot, q_tile, first_key), num_steps

  def load(
    refs: Sequence[Ref],
    place: _Place,
    num_steps: jax.Array,
    columns: Slice,
    put: Callable[[jax.Array, _Step], None],
  ) -> None:
    b, h, slot, q_tile, first_key = place
    positions = pl.ds(q_tile * ROWS, ROWS)

    def step(i: jax.Array, _: None) -> None:
      keys = pl.ds(first_key + i * STEP, STEP)
      put(i, _Step(refs[0].at[b, h, slot, positions, keys], refs[1].at[b, keys, h, columns]))

    lax.fori_loop(0, num_steps, step, None)

  def target(out_ref: Ref, place: _Place, columns: Slice) -> Ref:
    b, h, slot, q_tile, _ = place
    return out_ref.at[b, pl.ds(q_tile * ROWS, ROWS), slot, h, columns]

  sizes = (shape.batch, shape.heads, -(-num_tiles // 2), shape.slots, -(-shape.dim // _COLUMNS))
  out_shape = (shape.batch, shape.num_queries, shape.slots, shape.heads, shape.dim)
  return _run(
    _Problem("row_products", sizes, tiles, tile, load, target),
    (weights, keys, first_chunks),
    jax.ShapeDtypeStruct(out_shape, jnp.bfloat16),
    tiling,
    num_sms,
    transpose_weights=False,
  )


def key_products(
  shape: Shape,
  weights: Sequence[jax.Array],
  rows: Sequence[jax.Array],
  live_rows: tuple[jax.Array, jax.Array],
  num_sms: int,
  tiling: Tiling,
) -> jax.Array:
  """Return bf16 [b, t, h, d]: for each key the sum over operands of its rows' products.

  Args:
    shape: sizes.
    weights: operands, each bf16 [b, h, s, positions, keys].
    rows: the other operands, each bf16 [b, q, s, h, d].
    live_rows: int32 [b, h, halves, rows], the tile rows with weights in half a chunk, and
      int32 [b, h, halves], their number.
    num_sms: of the device: so many thread blocks share the work.
    tiling: sizes of the pipeline.
  """
  num_operands = len(weights)
  row_steps = ROWS // STEP
  steps = num_operands * row_steps  # To a tile row.

  def tiles(index: Sequence[jax.Array]) -> jax.Array:
    return jnp.where(index[2] == shape.num_halves - 1 - index[2], 1, 2)

  def tile(
    refs: Sequence[Ref], index: Sequence[jax.Array], j: jax.Array
  ) -> tuple[_Place, jax.Array]:
    b, h, pair = index
    half = jnp.where(j == 0, pair, shape.num_halves - 1 - pair)
    return (b, h, half), refs[-1][b, h, half] * steps

  def load(
    refs: Sequence[Ref],
    place: _Place,
    num_steps: jax.Array,
    columns: Slice,
    put: Callable[[jax.Array, _Step], None],
  ) -> None:
    b, h, half = place
    keys = pl.ds(half * HALF, HALF)

    def tile_row(j: jax.Array, _: None) -> None:
      row = refs[-2][b, h, half, j]
      slot, first = lax.rem(row, shape.slots), lax.div(row, shape.slots) * ROWS
      for i in range(steps):
        operand, part = divmod(i, row_steps)
        positions = pl.ds(first + part * STEP, STEP)
        weights = refs[operand].at[b, h, slot, positions, keys]
        others = refs[num_operands + operand].at[b, positions, slot, h, columns]
        put(j * steps + i, _Step(weights, others))

    lax.fori_loop(0, lax.div(num_steps, steps), tile_row, None)

  def target(out_ref: Ref, place: _Place, columns: Slice) -> Ref:
    b, h, half = place
    return out_ref.at[b, pl.ds(half * HALF, HALF), h, columns]

  sizes = (shape.batch, shape.heads, -(-shape.num_halves // 2), -(-shape.dim // _COLUMNS))
  out_shape = (shape.batch, shape.num_keys, shape.heads, shape.dim)
  return _run(
    _Problem("key_products", sizes, tiles, tile, load, target),
    (*weights, *rows, *live_rows),
    jax.ShapeDtypeStruct(out_shape, jnp.bfloat16),
    tiling,
    num_sms,
    transpose_weights=True,
  )
