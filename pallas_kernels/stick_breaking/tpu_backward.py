"""Backward kernel of stick-breaking attention on a TPU: key blocks from the left to the diagonal.

    d loss / d logit_im = g_im - beta_im sum_{j<=m} g_ij,      g = A * (dO . V^T)
One walk gives all gradients: those of the keys add up in VMEM over the query tiles, in one order.
Where the keys do not fit, they are cut into chunks; a row's sum of g is kept from chunk to chunk.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.precision import matmul_precision
from pallas_kernels.stick_breaking import tpu_blocks as blocks
from pallas_kernels.stick_breaking.tpu_blocks import Geometry, Walk


def backward(
  q: jax.Array,
  d_out: jax.Array,
  kv: Sequence[jax.Array],
  rows: jax.Array,
  key_segments: jax.Array,
  sums: jax.Array,
  leftmost: jax.Array,
  schedule: blocks.Schedule,
  *,
  geometry: Geometry,
  chunk_blocks: int,
  vmem_limit_bytes: int,
  interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array]:
  """Return the gradients of q [b, h, r, d] and, float32 [b, h, kinds, t, d], of kv in its order.

  The gradient of the keys, if values are given apart, is still to be multiplied by the factor.

  Args:
    q, d_out: [b, h, r, d], padded to tiles (d_out with zeros).
    kv, rows, key_segments, schedule: as of the forward pass.
    sums, leftmost: what it saved.
    chunk_blocks: key blocks whose gradients are in VMEM at once.
  """
  b, h, r, d = q.shape
  num_kinds, t = len(kv), kv[0].shape[2]
  block_q, block_k = geometry.block_q, geometry.block_k
  num_tiles, num_blocks = r // block_q, t // block_k
  num_chunks = pl.cdiv(num_blocks, chunk_blocks)
  chunk = chunk_blocks * block_k
  tile_spec = pl.BlockSpec((None, None, block_q, d), lambda b, h, c, i, *_: (b, h, i, 0))
  num_scores = b * h * r * t // 2
  dq, dkv = pl.pallas_call(
    functools.partial(_kernel, geometry=geometry, chunk_blocks=chunk_blocks),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(schedule),
      grid=(b, h, num_chunks, num_tiles),
      in_specs=[
        pl.BlockSpec(
          (None, None, 1, num_tiles), lambda b, h, *_: (b, h, 0, 0), memory_space=pltpu.SMEM
        ),
        tile_spec,
        tile_spec,
        pl.BlockSpec((None, 2, block_q), lambda b, h, c, i, *_: (b, 0, i)),
        pl.BlockSpec((None, *key_segments.shape[1:]), lambda b, *_: (b, 0, 0, 0)),
        pl.BlockSpec((None, None, num_blocks, 1, block_q), lambda b, h, c, i, *_: (b, h, 0, 0, i)),
        *[pl.BlockSpec(memory_space=pl.ANY)] * num_kinds,
      ],
      out_specs=[
        pl.BlockSpec((None, None, None, block_q, d), lambda b, h, c, i, *_: (c, b, h, i, 0)),
        pl.BlockSpec(
          (None, None, num_kinds, chunk, d),
          lambda b, h, c, *_: (b, h, 0, c, 0),
          pipeline_mode=pl.Buffered(1),
        ),
      ],
      scratch_shapes=[
        pltpu.VMEM((d, block_q), jnp.float32),
        pltpu.VMEM((1 if num_chunks == 1 else num_tiles, blocks.SUBLANES, block_q), jnp.float32),
        pltpu.VMEM((2, num_kinds, block_k, d), q.dtype),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2, num_kinds)),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((num_chunks, *q.shape), q.dtype if num_chunks == 1 else jnp.float32),
      jax.ShapeDtypeStruct((b, h, num_kinds, t, d), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=vmem_limit_bytes,
    ),
    cost_estimate=pl.CostEstimate(
      flops=10 * d * num_scores,
      transcendentals=3 * num_scores,
      bytes_accessed=4 * q.size * q.dtype.itemsize
      + num_kinds * kv[0].size * (num_tiles // 2 * q.dtype.itemsize + 4),
    ),
    interpret=interpret,
    name="stick_breaking_backward",
  )(*schedule, leftmost, q, d_out, rows, key_segments, sums, *kv)
  return dq.sum(axis=0).astype(q.dtype), dkv


def _kernel(
  first_ref: Any,
  last_ref: Any,
  row_segment_ref: Any,
  key_segment_ref: Any,
  leftmost_ref: Any,
  q_ref: Any,
  d_out_ref: Any,
  rows_ref: Any,
  key_segments_ref: Any,
  sums_ref: Any,
  *refs: Any,
  geometry: Geometry,
  chunk_blocks: int,
) -> None:
  del first_ref  # The forward pass may have stopped before it.
  *kv_hbm, dq_ref, dkv_ref, dq_acc_ref, before_ref, kv_ref, slot_ref, semaphores = refs
  b, h, c, i = (pl.program_id(axis) for axis in range(4))
  num_tiles, num_blocks = pl.num_programs(3), key_segments_ref.shape[0]
  kept = i if before_ref.shape[0] > 1 else 0
  dq_acc_ref[...] = jnp.zeros_like(dq_acc_ref)

  @pl.when(i == 0)
  def _begin_chunk() -> None:
    dkv_ref[...] = jnp.zeros_like(dkv_ref)

  @pl.when(c == 0)
  def _begin_row() -> None:
    before_ref[kept] = jnp.zeros(before_ref.shape[1:], jnp.float32)

  def walk(tile: jax.Array) -> Walk:
    first = jnp.maximum(leftmost_ref[0, tile], c * chunk_blocks)
    last = jnp.minimum(last_ref[b * num_tiles + tile], (c + 1) * chunk_blocks - 1)
    return Walk(first=first, count=last - first + 1, step=1)

  def visit(block: jax.Array, slot: jax.Array) -> None:
    start = pl.multiple_of((block - c * chunk_blocks) * geometry.block_k, geometry.block_k)
    compute = functools.partial(
      _tile,
      block,
      q_ref,
      d_out_ref,
      rows_ref,
      key_segments_ref,
      sums_ref,
      kv_ref.at[slot],
      dq_acc_ref,
      before_ref.at[kept],
      dkv_ref.at[:, pl.ds(start, geometry.block_k)],
      geometry,
    )
    row_segment = row_segment_ref[b * num_tiles + i]
    uniform = row_segment == key_segment_ref[b * num_blocks + block]
    full = jnp.logical_and(uniform, block < geometry.num_full(i))
    pl.when(full)(functools.partial(compute, masked=False))
    pl.when(jnp.logical_not(full))(functools.partial(compute, masked=True))

  blocks.walk_blocks(
    walk(i),
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
  scale = geometry.factor if kv_ref.shape[1] > 1 else 1.0  # As in _tile.
  dq_ref[...] = (dq_acc_ref[...] * scale).T.astype(dq_ref.dtype)


def _tile(
  block: jax.Array,
  q_ref: Any,
  d_out_ref: Any,
  rows_ref: Any,
  key_segments_ref: Any,
  sums_ref: Any,
  kv_ref: Any,
  dq_acc_ref: Any,
  before_ref: Any,
  dkv_ref: Any,
  geometry: Geometry,
  *,
  masked: bool,
) -> None:
  """Add what a tile and a block of keys give to dq / factor [d, block_q] and to dkv."""
  dtype = kv_ref.dtype
  precision = matmul_precision(dtype)
  value = kv_ref.shape[0] - 1

  def dot(a: jax.Array, b: jax.Array, contract: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, contract, precision, preferred_element_type=jnp.float32)

  scores = dot(kv_ref[0], q_ref[...], blocks.NT) * (geometry.factor * blocks.LOG2_E)
  scores = blocks.to_runs(scores)
  if masked:
    scores = blocks.hide(scores, rows_ref[...], key_segments_ref[block], block, geometry)
  after = jnp.broadcast_to(sums_ref[block], (blocks.SUBLANES, geometry.block_q))
  weights, beta, _ = blocks.break_stick(scores, after, exact=dtype == jnp.float32)
  gains = weights * blocks.to_runs(dot(kv_ref[value], d_out_ref[...], blocks.NT))
  d_logits, before_ref[...] = _d_logits(gains, beta, before_ref[...])
  if value == 0:  # The gradients of keys and values share a sum: else scaled after it.
    d_logits = d_logits * geometry.factor
  d_logits = blocks.from_runs(d_logits).astype(dtype)
  dq_acc_ref[...] += dot(kv_ref[0], d_logits, blocks.TN)
  dkv_ref[0] += dot(d_logits, q_ref[...], blocks.NN)
  weights = blocks.from_runs(weights).astype(dtype)
  dkv_ref[value] += dot(weights, d_out_ref[...], blocks.NN)


def _d_logits(gains: jax.Array, beta: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return g - beta * (sum of g up to the key) [block_k / 8, 8, n], and `before` further right."""
  below, total = blocks.exclusive_sum(jnp.sum(gains, axis=0), reverse=False)
  run = before + below
  d_logits = []
  for g in range(gains.shape[0]):
    run = run + gains[g]
    d_logits.append(gains[g] - beta[g] * run)
  return jnp.stack(d_logits), before + total
