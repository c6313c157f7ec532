"""Stick-breaking attention with wide heads on Hopper GPUs: bf16, head dims above 256.

A head of width 1024 leaves no room for queries, keys, values and an output tile in one thread
block, but at that width a product with an intermediate in memory is still bound by arithmetic. So
one kernel writes the weights A in bf16, and a second one multiplies them with V. Backward, one
kernel turns A into the gradients of the logits, two products give dq and the gradient of the keys.

A is [b, h, s, q, t], of which what lies below the diagonal is touched. No call holds more than
MAX_WEIGHTS_BYTES of it, or of its gradient: larger ones are split by batch rows, then by queries.
A is kept for the backward pass up to t = 2 d, and computed again beyond.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.stick_breaking import gpu_wide_products as products
from pallas_kernels.stick_breaking import gpu_wide_walk as walk
from pallas_kernels.stick_breaking import xla
from pallas_kernels.stick_breaking.gpu_wide_pipeline import CHUNK, ROWS, Shape, Tiling
from pallas_kernels.stick_breaking.residuals import named

MAX_WEIGHTS_BYTES = 2**30
_KEPT_KEYS_PER_DIM = 2
_MIN_QUERIES = 16  # Fewer would leave a tile of 128 positions all but empty.
_NUM_SMS = 132  # H100 and H200 (SXM); elsewhere the balance suffers, not the result.

Segments = tuple[jax.Array, jax.Array]


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array | None,
  segments: Segments,
  scale: float,
  *,
  eps: float = 0.0,
  tiling: Tiling | None = None,
) -> jax.Array:
  """Return [b, q, s, h, d] in q's dtype; differentiable in q, k and v.

  Decoding, of fewer than 16 queries, reads little but the keys, and is left to `xla`.

  Args:
    q: [b, q, s, h, d], s query slots sharing the keys; the last query sits at the last key.
    k, v: [b, t, h, d] with t >= q; v None: the values are the keys.
    segments: int32 [b, q] of the queries and [b, t] of the keys; 0 is padding.
    scale: factor of q . k.
    eps: skip the keys left of those at which less than eps is left of every stick of a tile of 128
      queries, an absolute error of at most eps times the largest value; 0: exact.
    tiling: sizes, else measured ones, else the default.

  Raises:
    NotImplementedError: another dtype or head dim.
  """
  _, num_queries, slots, _, dim = q.shape
  if q.dtype != jnp.bfloat16:
    raise NotImplementedError(
      f"the GPU kernel of stick-breaking attention takes bfloat16, not {q.dtype}: use xla"
    )
  if dim <= 256 or dim % 128:
    raise NotImplementedError(
      "the wide GPU kernel of stick-breaking attention takes head dims above 256 that are "
      f"multiples of 128, not {dim}: use xla"
    )
  if num_queries < _MIN_QUERIES:
    return xla.attention(q, k, k if v is None else v, segments, scale)
  if tiling is None:
    shape = (num_queries, k.shape[1], slots, dim)
    tiling = Tiling(**(tuning.lookup("stick_breaking.forward", q.dtype, shape) or {}))
  return _bounded(q, k, v, segments, _Options(scale, eps, tiling))


def candidates() -> list[Tiling]:
  """Return tilings worth measuring."""
  return [Tiling(tile_rows=rows, product_stages=stages) for rows in (1, 2) for stages in (3, 4)]


def _bounded(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array | None,
  segments: Segments,
  options: "_Options",
) -> jax.Array:
  """Split what would take more than MAX_WEIGHTS_BYTES."""
  q_segments, k_segments = segments
  batch, num_queries = q.shape[:2]
  history = k.shape[1] - num_queries
  shape = _shape(q, k)
  query_bytes = 2 * shape.heads * shape.slots * shape.num_keys
  num_rows = MAX_WEIGHTS_BYTES // (query_bytes * shape.num_queries)
  if num_rows >= batch:
    return _attention(q, k, v, segments, options)
  parts = []
  if num_rows:
    for i in range(0, batch, num_rows):
      j = min(i + num_rows, batch)
      values = None if v is None else v[i:j]
      part = (q[i:j], k[i:j], values, (q_segments[i:j], k_segments[i:j]))
      parts.append(_attention(*part, options))
    return jnp.concatenate(parts)
  size = max(MAX_WEIGHTS_BYTES // query_bytes // ROWS, 1) * ROWS
  for i in range(0, num_queries, size):
    j = min(i + size, num_queries)
    end = history + j
    values = None if v is None else v[:, :end]
    block = (q_segments[:, i:j], k_segments[:, :end])
    parts.append(_bounded(q[:, i:j], k[:, :end], values, block, options))
  return jnp.concatenate(parts, axis=1)


def _shape(q: jax.Array, k: jax.Array) -> Shape:
  batch, num_queries, slots, heads, dim = q.shape
  num_keys = k.shape[1]
  return Shape(
    batch=batch,
    num_queries=-(-num_queries // ROWS) * ROWS,
    num_keys=-(-num_keys // CHUNK) * CHUNK,
    history=num_keys - num_queries,
    slots=slots,
    heads=heads,
    dim=dim,
  )


class _Blocks(NamedTuple):
  """What the segments mean for tile rows and chunks of keys.

  segments: int32 [b, positions] with -1 for padding, and [b, keys].
  first: int32 [b, h, rows], the first chunk with anything to see.
  masked: int32 [b, q tiles, chunks], whether not all of a chunk may be seen.
  """

  segments: Segments
  first: jax.Array
  masked: jax.Array


def _pad(x: jax.Array, length: int, mode: str = "constant") -> jax.Array:
  padding = ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2))
  return jnp.pad(x, padding, mode=mode) if length > x.shape[1] else x


def _extremes(segments: jax.Array, length: int, block: int) -> tuple[jax.Array, ...]:
  """Return per block the lowest and highest segment, and the lowest one that is not padding."""
  blocks = _pad(segments, length, "edge").reshape(segments.shape[0], -1, block)
  lowest = jnp.where(blocks > 0, blocks, jnp.iinfo(jnp.int32).max).min(2)
  return blocks.min(2), blocks.max(2), lowest


def _blocks(shape: Shape, segments: Segments) -> _Blocks:
  q_segments, k_segments = segments
  q_min, q_max, q_low = (x[:, :, None] for x in _extremes(q_segments, shape.num_queries, ROWS))
  k_min, k_max, k_low = (x[:, None, :] for x in _extremes(k_segments, shape.num_keys, CHUNK))
  tiles, chunks = np.arange(shape.num_q_tiles), np.arange(shape.num_chunks)
  whole = (chunks * CHUNK + CHUNK - 1)[None, :] <= (tiles * ROWS + shape.history)[:, None]
  whole = whole & (q_min == q_max) & (k_min == k_max) & (q_min == k_min) & (q_min > 0)

  last = (shape.visible_halves(tiles) - 1) // 2
  live = (k_low <= q_max) & (k_max >= q_low) & (chunks[None, :] <= last[:, None])
  # A tile without any visits its last chunk all the same: its weights have to be zeros.
  first = jnp.where(live.any(2), live.argmax(2).astype(jnp.int32), last)
  first = jnp.repeat(first, shape.slots, axis=1)[:, None]
  return _Blocks(
    segments=(
      _pad(jnp.where(q_segments > 0, q_segments, -1), shape.num_queries),
      _pad(k_segments, shape.num_keys),
    ),
    first=jnp.broadcast_to(first, (shape.batch, shape.heads, shape.num_rows)),
    masked=jnp.asarray(~whole, jnp.int32),
  )


def _live_rows(shape: Shape, first: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return per half chunk the tile rows with weights in it, and their number.

  Args:
    shape: sizes.
    first: int32 [b, h, rows], the first live chunk of a tile row.

  Returns:
    int32 [b, h, halves, rows] and int32 [b, h, halves].
  """
  rows, halves = np.arange(shape.num_rows), np.arange(shape.num_halves)[:, None]
  live = (2 * first[:, :, None] <= halves) & (halves < shape.visible_halves(rows // shape.slots))
  rank = jnp.cumsum(live.astype(jnp.int32), axis=3)
  # The j-th live row is the number of rows up to which at most j are live.
  order = (rank[..., None, :] <= rows[:, None]).sum(4, dtype=jnp.int32)
  return order, rank[..., -1]


def _weights(
  q: jax.Array, k: jax.Array, segments: Segments, shape: Shape, options: "_Options"
) -> tuple[jax.Array, jax.Array, jax.Array]:
  segments, first, masked = _blocks(shape, segments)
  return walk.weights(
    shape, q, k, segments, first, masked, options.scale, options.eps, options.tiling
  )


class _Options(NamedTuple):
  scale: float
  eps: float
  tiling: Tiling


_Kept = tuple[jax.Array, jax.Array, jax.Array]
_Saved = tuple[jax.Array, jax.Array, jax.Array | None, Segments, _Kept | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array | None,
  segments: Segments,
  options: _Options,
) -> jax.Array:
  return _forward(q, k, v, segments, options)[0]


def _padded(
  q: jax.Array, k: jax.Array, v: jax.Array | None, shape: Shape
) -> tuple[jax.Array, jax.Array, jax.Array]:
  k_padded = _pad(k, shape.num_keys)
  v_padded = k_padded if v is None else _pad(v, shape.num_keys)
  return _pad(q, shape.num_queries), k_padded, v_padded


def _forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array | None,
  segments: Segments,
  options: _Options,
) -> tuple[jax.Array, _Saved]:
  shape = _shape(q, k)
  q_padded, k_padded, v_padded = _padded(q, k, v, shape)
  weights, sticks, first = _weights(q_padded, k_padded, segments, shape, options)
  out = products.row_products(shape, weights, v_padded, first, _NUM_SMS, options.tiling)
  keep = k.shape[1] <= _KEPT_KEYS_PER_DIM * shape.dim
  kept = named((weights, sticks, first)) if keep else None
  return out[:, : q.shape[1]], (q, k, v, segments, kept)


def _backward(
  options: _Options, saved: _Saved, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None, None]:
  q, k, v, segments, kept = saved
  shape = _shape(q, k)
  q_padded, k_padded, v_padded = _padded(q, k, v, shape)
  d_out = _pad(d_out, shape.num_queries)
  weights, sticks, first = kept or _weights(q_padded, k_padded, segments, shape, options)
  d_logits = walk.d_logits(
    shape, d_out, v_padded, weights, sticks, first, options.scale, options.tiling
  )
  dq = products.row_products(shape, d_logits, k_padded, first, _NUM_SMS, options.tiling)
  live = _live_rows(shape, first)
  key_products = functools.partial(
    products.key_products,
    shape,
    live_rows=live,
    num_sms=_NUM_SMS,
    tiling=options.tiling,
  )
  if v is None:
    dk, dv = key_products((d_logits, weights), (q_padded, d_out)), None
  else:
    dk, dv = key_products((d_logits,), (q_padded,)), key_products((weights,), (d_out,))
    dv = dv[:, : v.shape[1]]
  return dq[:, : q.shape[1]], dk[:, : k.shape[1]], dv, None


_attention.defvjp(_forward, _backward)
