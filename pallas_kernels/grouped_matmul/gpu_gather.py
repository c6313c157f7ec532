"""Gather of rows on Hopper by the tensor memory accelerator alone: no register holds a value.

A block of four warps copies its rows into shared memory, each warp a quarter of them, one copy per
row, and out again with one copy. A multiprocessor runs several blocks, so that copies in and out
overlap.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import gpu_pipeline as pipeline
from pallas_kernels.grouped_matmul.gpu_pipeline import Ref

BLOCK_BYTES = 64 * 2**10  # More only where four rows take more.
MOST_ROW_BYTES = 56 * 2**10  # Four rows fit in shared memory.
MOST_ROWS = 64  # Of a block.
WIDTHS = (256, 128)  # A copy moves [1, d / width, width]: at most 256 along each dimension.
MOST_NUMBERS = 256 * WIDTHS[-1]


def take_rows(values: jax.Array, index: jax.Array) -> jax.Array:
  """Return [r, d]: rows of values [m, d] by index int32 [r]; one past the end gives zeros.

  Raises:
    NotImplementedError: values are not of rank 2, d is not a multiple of 128, or a row has more
      than 56 KiB or 32,768 numbers.
  """
  d = values.shape[1] if values.ndim == 2 else 0
  row_bytes = d * values.dtype.itemsize
  if d % WIDTHS[-1] or not d or row_bytes > MOST_ROW_BYTES or d > MOST_NUMBERS:
    raise NotImplementedError(
      f"the GPU kernel of take_rows needs rows of a multiple of {WIDTHS[-1]} numbers, at most "
      f"{MOST_NUMBERS} and {MOST_ROW_BYTES} bytes; got {values.shape[1:]} of {values.dtype}: use "
      f"xla"
    )
  m, r = values.shape[0], index.shape[0]
  width = next(width for width in WIDTHS if d % width == 0)
  if r < pipeline.WARPS:
    return take_rows(values, jnp.pad(index, (0, pipeline.WARPS - r)))[:r]
  per_warp = max(1, min(BLOCK_BYTES // row_bytes, MOST_ROWS, r) // pipeline.WARPS)
  rows = pipeline.WARPS * per_warp

  def body(values_ref: Ref, index_ref: Ref, out_ref: Ref, slots: Ref, loaded: Ref) -> None:
    # The last block moves up to the end: another one writes some of its rows, too, the same.
    first = lax.min(lax.axis_index("block") * rows, jnp.int32(r - rows))

    def load(warp: jax.Array) -> None:
      own = warp * per_warp
      found = [index_ref[first + own + i] for i in range(per_warp)]
      for i, row in enumerate(found):  # Copies fill what lies past the end with zeros.
        slot = slots.at[pl.ds(own + i, 1)]
        plgpu.copy_gmem_to_smem(values_ref.at[pl.ds(row, 1)], slot, loaded)

    pipeline.each_warp(load)
    plgpu.barrier_wait(loaded)
    plgpu.copy_smem_to_gmem(slots, out_ref.at[pl.ds(first, rows)])
    plgpu.wait_smem_to_gmem(0)

  kernel = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((r, d // width, width), values.dtype),
    scratch_types=(
      plgpu.SMEM((rows, d // width, width), values.dtype),
      plgpu.Barrier(num_arrivals=rows),
    ),
    grid=(-(-r // rows),),
    grid_names=("block",),
    num_threads=1,
    thread_name="warpgroup",
  )
  return kernel(values.reshape(m, d // width, width), index).reshape(r, d)
