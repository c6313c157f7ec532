"""Forward kernel of stick-breaking attention on a TPU: key blocks from the diagonal leftwards."""

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


def forward(
  q: jax.Array,
  kv: Sequence[jax.Array],
  rows: jax.Array,
  key_segments: jax.Array,
  schedule: blocks.Schedule,
  *,
  geometry: Geometry,
  eps: float,
  save: bool,
  vmem_limit_bytes: int,
  interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, ...]:
  """Return the output, and if `save` also what the backward needs of it.

  Args:
    q: [b, h, r, d], padded to tiles.
    kv: keys [b, h, t, d] and, unless they are the values too, values; permuted in each block.
    rows: int32 [b, 2, r], segment and position of every row.
    key_segments: int32 [b, t / block_k, 8, block_k / 8], in logical order.

  Returns:
    [b, h, r, d] in q's dtype; float32 [b, h, t / block_k, 1, r], the sum of log2(1 + 2^s) over
    the keys to the right of a block (undefined where a block was skipped); int32
    [b, h, 1, r / block_q], the leftmost block that was visited.
  """
  b, h, r, d = q.shape
  t = kv[0].shape[2]
  block_q, block_k = geometry.block_q, geometry.block_k
  num_tiles, num_blocks = r // block_q, t // block_k
  out_specs = [pl.BlockSpec((None, None, block_q, d), lambda b, h, i, *_: (b, h, i, 0))]
  out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
  if save:
    out_specs += [
      pl.BlockSpec((None, None, num_blocks, 1, block_q), lambda b, h, i, *_: (b, h, 0, 0, i)),
      pl.BlockSpec(
        (None, None, 1, num_tiles), lambda b, h, i, *_: (b, h, 0, 0), memory_space=pltpu.SMEM
      ),
    ]
    out_shape += [
      jax.ShapeDtypeStruct((b, h, num_blocks, 1, r), jnp.float32),
      jax.ShapeDtypeStruct((b, h, 1, num_tiles), jnp.int32),
    ]
  num_scores = b * h * r * t // 2
  return pl.pallas_call(
    functools.partial(_kernel, num_kinds=len(kv), geometry=geometry, eps=eps),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(schedule),
      grid=(b, h, num_tiles),
      in_specs=[
        pl.BlockSpec((None, None, block_q, d), lambda b, h, i, *_: (b, h, i, 0)),
        pl.BlockSpec((None, 2, block_q), lambda b, h, i, *_: (b, 0, i)),
        pl.BlockSpec((None, *key_segments.shape[1:]), lambda b, h, i, *_: (b, 0, 0, 0)),
        *[pl.BlockSpec(memory_space=pl.ANY)] * len(kv),
      ],
      out_specs=out_specs,
      scratch_shapes=[
        pltpu.VMEM((d, block_q), jnp.float32),
        pltpu.VMEM((blocks.SUBLANES, block_q), jnp.float32),
        pltpu.VMEM((2, len(kv), block_k, d), q.dtype),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2, len(kv))),
      ],
    ),
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem_limit_bytes,
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * d * num_scores,
      transcendentals=2 * num_scores,
      bytes_accessed=(2 * q.size + len(kv) * kv[0].size * num_tiles // 2) * q.dtype.itemsize,
    ),
    interpret=interpret,
    name="stick_breaking_forward",
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
  kv_hbm, (out_ref, *saved_refs) = refs[:num_kinds], refs[num_kinds:-5]
  acc_ref, after_ref, kv_ref, slot_ref, semaphores = refs[-5:]
  b, h, i = (pl.program_id(axis) for axis in range(3))
  num_tiles, num_blocks = pl.num_programs(2), key_segments_ref.shape[0]
  acc_ref[...] = jnp.zeros_like(acc_ref)
  after = jnp.where(rows_ref[0:1, :] < 0, blocks.BROKEN, 0.0)
  after_ref[...] = jnp.broadcast_to(after, after_ref.shape)

  def walk(tile: jax.Array) -> Walk:
    first, last = first_ref[b * num_tiles + tile], last_ref[b * num_tiles + tile]
    return Walk(first=last, count=last - first + 1, step=-1)

  def visit(block: jax.Array, slot: jax.Array) -> jax.Array | None:
    if saved_refs:
      saved_refs[0][block] = after_ref[0:1, :]
    compute = functools.partial(
      _tile, block, q_ref, rows_ref, key_segments_ref, kv_ref.at[slot], acc_ref, after_ref, geometry
    )
    row_segment = row_segment_ref[b * num_tiles + i]
    uniform = row_segment == key_segment_ref[b * num_blocks + block]
    full = jnp.logical_and(uniform, block < geometry.num_full(i))
    pl.when(full)(functools.partial(compute, masked=False))
    pl.when(jnp.logical_not(full))(functools.partial(compute, masked=True))
    return jnp.min(after_ref[...]) < -math.log2(eps) if eps > 0 else None

  own = walk(i)
  num_visited = blocks.walk_blocks(
    own,
    walk(jnp.minimum(i + 1, num_tiles - 1)),
    is_first=i == 0,
    is_last=i == num_tiles - 1,
    fetch=functools.partial(
      blocks.fetch_block,
      [x.at[b, h] for x in kv_hbm],
      kv_ref,
      semaphores,
      geometry.block_k,
    ),
    slot_ref=slot_ref,
    visit=visit,
  )
  out_ref[...] = acc_ref[...].T.astype(out_ref.dtype)
  if saved_refs:
    saved_refs[1][0, i] = own.first + 1 - num_visited


def _tile(
  block: jax.Array,
  q_ref: Any,
  rows_ref: Any,
  key_segments_ref: Any,
  kv_ref: Any,
  acc_ref: Any,
  after_ref: Any,
  geometry: Geometry,
  *,
  masked: bool,
) -> None:
  """Add one block of keys to the output [d, block_q] of a tile."""
  precision = matmul_precision(kv_ref.dtype)
  scores = jax.lax.dot_general(
    kv_ref[0], q_ref[...], blocks.NT, precision, preferred_element_type=jnp.float32
  )
  scores = blocks.to_runs(scores * (geometry.factor * blocks.LOG2_E))
  if masked:
    scores = blocks.hide(scores, rows_ref[...], key_segments_ref[block], block, geometry)
  weights, _, after_ref[...] = blocks.break_stick(
    scores, after_ref[...], exact=kv_ref.dtype == jnp.float32
  )
  acc_ref[...] += jax.lax.dot_general(
    kv_ref[kv_ref.shape[0] - 1],
    blocks.from_runs(weights).astype(kv_ref.dtype),
    blocks.TN,
    precision,
    preferred_element_type=jnp.float32,
  )
