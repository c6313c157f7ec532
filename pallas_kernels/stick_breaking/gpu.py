"""Stick-breaking attention for Hopper GPUs: bf16, head dims 64, 128 and 256; wider by gpu_wide.

The forward kernel computes 64-query tiles per warpgroup from the diagonal leftwards; two backward
kernels, or one (gpu_fused), recompute the weights from the sticks that it saves. Blocks of keys
that no query of a tile sees are skipped, segments are compared only in blocks that hold a border.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.stick_breaking import gpu_backward, gpu_copy, gpu_forward, gpu_fused, gpu_wide
from pallas_kernels.stick_breaking.gpu_blocks import Blocks, Segments, blocks_of
from pallas_kernels.stick_breaking.gpu_scan import ROWS
from pallas_kernels.stick_breaking.gpu_tiles import Sizes
from pallas_kernels.stick_breaking.residuals import named

Tiling = gpu_forward.Tiling
BackwardTiling = gpu_backward.Tiling

HEAD_DIMS = (64, 128, 256)
MULTIPROCESSORS = 132  # Of an H100 or H200 SXM.
FILLED = 0.9  # What one backward kernel takes of the time of two, at worst.


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array | None,
  segments: Segments,
  scale: float,
  *,
  eps: float = 0.0,
  tiling: Tiling | None = None,
  backward_tiling: BackwardTiling | None = None,
  fused_backward: bool | None = None,
) -> jax.Array:
  """Return [b, q, s, h, d] in q's dtype; differentiable in q, k and v.

  Args:
    q: [b, q, s, h, d], s query slots sharing the keys; the last query sits at the last key.
    k, v: [b, t, h, d] with t >= q; v None: the values are the keys.
    segments: int32 [b, q] of the queries and [b, t] of the keys; 0 is padding.
    scale: factor of q . k.
    eps: skip what is left of a tile of queries once less than eps is left of each of its sticks,
      an absolute error of at most eps times the largest value; 0: exact.
    tiling, backward_tiling: sizes, else measured ones, else a guess from the shape. An odd number
      of heads is computed one by one.
    fused_backward: one backward kernel, which has no tiling, instead of two; for heads of 64. None:
      where its thread blocks, one for each row and head of keys, fill the device, unless a tiling
      of the two is given or was measured to be faster.

  Raises:
    NotImplementedError: another dtype or head dim.
  """
  b, num_queries, num_slots, num_heads, dim = q.shape
  if dim > HEAD_DIMS[-1]:
    return gpu_wide.attention(q, k, v, segments, scale, eps=eps)
  if q.dtype != jnp.bfloat16:
    raise NotImplementedError(
      f"the GPU kernel of stick-breaking attention takes bfloat16, not {q.dtype}: use xla"
    )
  if dim not in HEAD_DIMS:
    raise NotImplementedError(
      f"the GPU kernel of stick-breaking attention has head dims {HEAD_DIMS}, not {dim}: use xla"
    )
  sizes = Sizes(
    batch=b,
    num_queries=num_queries,
    num_keys=k.shape[1],
    num_heads=num_slots * num_heads,
    num_kv_heads=num_heads,
    dim=dim,
    dtype=q.dtype,
  )
  shape = (num_queries, sizes.num_keys, num_slots, dim)
  if tiling is None:
    fields = tuning.lookup("stick_breaking.forward", q.dtype, shape)
    tiling = Tiling(**fields) if fields else default_tiling(sizes)
  if backward_tiling is None:
    fields = tuning.lookup("stick_breaking.backward", q.dtype, shape)
    backward_tiling = BackwardTiling(**fields) if fields else None
  tiling = dataclasses.replace(tiling, heads=math.gcd(tiling.heads, sizes.num_heads))
  # Rows of a copy to shared memory come in eights; the kernels never look at those added.
  rows = q.reshape(b, num_queries, -1, dim)
  rows = jnp.pad(rows, ((0, 0), (0, -num_queries % 8), (0, 0), (0, 0)))
  keys, values = (_padded_keys(x, sizes) for x in (k, k if v is None else v))
  if fused_backward is None:
    fused_backward = backward_tiling is None and dim == gpu_fused.DIM and fills(b * num_heads)
  if fused_backward and dim != gpu_fused.DIM:
    raise NotImplementedError(
      f"the fused backward kernel has heads that are {gpu_fused.DIM} wide, not {dim}: "
      f"fused_backward=False"
    )
  blocks = blocks_of(segments, ROWS * tiling.consumers, sizes.covered_queries, sizes.covered_keys)
  call = _Call(
    sizes=sizes,
    scale=scale,
    eps=eps,
    tiling=tiling,
    backward_tiling=None if fused_backward else backward_tiling or default_backward_tiling(sizes),
  )
  out = _attention(rows, keys, values, blocks, call)
  return out[:, :num_queries].reshape(q.shape)


def default_tiling(sizes: Sizes) -> Tiling:
  """Return sizes that fit any shape of a head dim."""
  if sizes.num_queries > ROWS and sizes.dim == 64:
    return Tiling(consumers=2, block_k=64, stages=2, heads=2)
  consumers = 1 if sizes.num_queries <= ROWS else 2
  block_k = 64 if sizes.dim > 128 or sizes.num_keys <= 64 else 128
  return Tiling(consumers=consumers, block_k=block_k, stages=2)


def default_backward_tiling(sizes: Sizes) -> BackwardTiling:
  """Return sizes that fit any shape of a head dim."""
  if sizes.dim > 128:
    return BackwardTiling(consumers=1, block_k=64, stages=2)
  return BackwardTiling(consumers=2, block_k=64, stages=2)


def fills(blocks: int) -> bool:
  """Return whether so many thread blocks of equal length keep the multiprocessors busy."""
  rounds = -(-blocks // MULTIPROCESSORS)
  return blocks >= FILLED * rounds * MULTIPROCESSORS


def candidates(dim: int) -> list[Tiling]:
  """Return forward tilings worth measuring."""
  blocks = (64,) if dim > 128 else (64, 128)
  pairs = [Tiling(consumers=2, block_k=64, stages=stages, heads=2) for stages in (2, 3, 4)]
  return (pairs if dim == 64 else []) + [
    Tiling(consumers=2, block_k=block_k, stages=stages)
    for block_k in blocks
    for stages in (2, 3, 4)
    if 2 * ROWS * dim + 2 * stages * block_k * dim <= 100 * 1024
  ]


def backward_candidates(dim: int) -> list[BackwardTiling]:
  """Return backward tilings worth measuring."""
  if dim > 128:
    return [BackwardTiling(consumers=1, block_k=64, stages=2)]
  blocks = (64,) if dim > 64 else (64, 128)
  return [
    BackwardTiling(consumers=2, block_k=block_k, stages=stages)
    for block_k in blocks
    for stages in (2, 3)
  ]


def _padded_keys(x: jax.Array, sizes: Sizes) -> jax.Array:
  padding = sizes.padded_keys - sizes.num_keys
  return gpu_copy.permutable(jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
  """What is static of a call."""

  sizes: Sizes
  scale: float
  eps: float
  tiling: Tiling
  backward_tiling: BackwardTiling | None  # None: one kernel.


_Residuals = tuple[jax.Array, jax.Array, jax.Array, Blocks, gpu_forward.Saved]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks, call: _Call) -> jax.Array:
  """Return [b, q, n, d]; keys and values as gpu_copy.permutable gives them."""
  out, _ = _run_forward(q, k, v, blocks, call, save=False)
  return out


def _run_forward(
  q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks, call: _Call, save: bool
) -> tuple[jax.Array, gpu_forward.Saved | None]:
  return gpu_forward.forward(
    q, k, v, blocks, call.sizes, call.scale, eps=call.eps, save=save, tiling=call.tiling
  )


def _forward(
  q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks, call: _Call
) -> tuple[jax.Array, _Residuals]:
  out, saved = _run_forward(q, k, v, blocks, call, save=True)
  assert saved is not None
  return out, (q, k, v, blocks, named(saved))


def _backward(
  call: _Call, residuals: _Residuals, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  # What the forward kernel skipped is among what it saved.
  q, k, v, blocks, saved = residuals
  sizes, scale, tiling = call.sizes, call.scale, call.backward_tiling
  if tiling is None:
    return *gpu_fused.gradients(q, k, v, d_out, saved, blocks, sizes, scale), None
  dq, prefixes = gpu_backward.d_queries(q, k, v, d_out, saved, blocks, sizes, scale, tiling=tiling)
  dk, dv = gpu_backward.d_keys_values(
    q, k, v, d_out, saved, prefixes, blocks, sizes, scale, tiling=tiling
  )
  return dq, dk, dv, None


_attention.defvjp(_forward, _backward)
