"""Forward kernel for a few query slots against many keys on a TPU: decoding against a cache.

Its time is that of reading the cache, so the keys stay in their order: scores are [row, key], and
the few of them are summed along the lanes by rotations.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.precision import matmul_precision
from pallas_kernels.stick_breaking import tpu_blocks as blocks
from pallas_kernels.stick_breaking.tpu_blocks import Geometry, Walk

MAX_ROWS = 32


def decode(
  q: jax.Array,
  kv: Sequence[jax.Array],
  rows: jax.Array,
  key_segments: jax.Array,
  schedule: blocks.Schedule,
  *,
  geometry: Geometry,
  eps: float,
  vmem_limit_bytes: int,
  interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
  """Return [b, h, r, d] in q's dtype.

  Args:
    q: [b, h, r, d], one padded tile.
    kv: keys [b, h, t, d] and, unless they are the values too, values; in their order.
    rows: int32 [b, r, 2], segment and position of every row.
    key_segments: int32 [b, t / block_k, 1, block_k].
    schedule: of the one tile of each sequence.
  """
  b, h, r, d = q.shape
  tile_spec = pl.BlockSpec((None, None, r, d), lambda b, h, *_: (b, h, 0, 0))
  num_scores = q.size // d * kv[0].shape[2]
  return pl.pallas_call(
    functools.partial(_kernel, num_kinds=len(kv), geometry=geometry, eps=eps),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(schedule),
      grid=(b, h),
      in_specs=[
        tile_spec,
        pl.BlockSpec((None, r, 2), lambda b, h, *_: (b, 0, 0)),
        pl.BlockSpec((None, *key_segments.shape[1:]), lambda b, h, *_: (b, 0, 0, 0)),
        *[pl.BlockSpec(memory_space=pl.ANY)] * len(kv),
      ],
      out_specs=tile_spec,
      scratch_shapes=[
        pltpu.VMEM((r, d), jnp.float32),
        pltpu.VMEM((r, 1), jnp.float32),
        pltpu.VMEM((2, len(kv), geometry.block_k, d), q.dtype),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2, len(kv))),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_limit_bytes
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * d * num_scores,
      transcendentals=3 * num_scores,
      bytes_accessed=(2 * q.size + len(kv) * kv[0].size) * q.dtype.itemsize,
    ),
    interpret=interpret,
    name="stick_breaking_decode",
  )(*schedule, q, rows, key_segments, *kv)


def _kernel(
  first_ref: Any,
  last_ref: Any,
  row_segment_ref: Any,
  key_segment_ref: Any,
  q_ref: Any,
  rows_ref: Any,
  key_segments_ref: Any,
  *refs: Any,
  num_kinds: int,
  geometry: Geometry,
  eps: float,
) -> None:
  del row_segment_ref, key_segment_ref  # The mask costs nothing here.
  kv_hbm, (out_ref, acc_ref, after_ref, kv_ref, slot_ref, semaphores) = (
    refs[:num_kinds],
    refs[num_kinds:],
  )
  b, h = (pl.program_id(axis) for axis in range(2))
  acc_ref[...] = jnp.zeros_like(acc_ref)
  after_ref[...] = jnp.where(rows_ref[:, 0:1] < 0, blocks.BROKEN, 0.0)

  def visit(block: jax.Array, slot: jax.Array) -> jax.Array | None:
    _block(block, q_ref, rows_ref, key_segments_ref, kv_ref.at[slot], acc_ref, after_ref, geometry)
    return jnp.min(after_ref[...]) < -math.log2(eps) if eps > 0 else None

  walk = Walk(first=last_ref[b], count=last_ref[b] - first_ref[b] + 1, step=-1)
  blocks.walk_blocks(
    walk,
    walk,
    is_first=jnp.bool_(True),
    is_last=jnp.bool_(True),
    fetch=functools.partial(
      blocks.fetch_block, [x.at[b, h] for x in kv_hbm], kv_ref, semaphores, geometry.block_k
    ),
    slot_ref=slot_ref,
    visit=visit,
  )
  out_ref[...] = acc_ref[...].astype(out_ref.dtype)


def _block(
  block: jax.Array,
  q_ref: Any,
  rows_ref: Any,
  key_segments_ref: Any,
  kv_ref: Any,
  acc_ref: Any,
  after_ref: Any,
  geometry: Geometry,
) -> None:
  """Add one block of keys to the output [r, d]."""
  precision = matmul_precision(kv_ref.dtype)
  scores = jax.lax.dot_general(
    q_ref[...], kv_ref[0], blocks.NT, precision, preferred_element_type=jnp.float32
  )
  scores = scores * (geometry.factor * blocks.LOG2_E)
  lane = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
  visible = rows_ref[:, 0:1] == key_segments_ref[block]
  visible = visible & (rows_ref[:, 1:2] - block * geometry.block_k >= lane)
  scores = jnp.where(visible, scores, blocks.HIDDEN)
  sums = blocks.log_keep(scores)
  shift = 1
  while shift < geometry.block_k:
    right = pltpu.roll(sums, geometry.block_k - shift, 1)
    sums = sums + jnp.where(lane < geometry.block_k - shift, right, 0.0)
    shift *= 2
  weights = jnp.exp2(scores - sums - after_ref[...])
  after_ref[...] += sums[:, 0:1]
  acc_ref[...] += jax.lax.dot_general(
    weights.astype(kv_ref.dtype),
    kv_ref[kv_ref.shape[0] - 1],
    blocks.NN,
    precision,
    preferred_element_type=jnp.float32,
  )
