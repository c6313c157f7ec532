"""Stick-breaking attention on TPUs (Pallas Mosaic): layouts, tiles and the custom gradient."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.stick_breaking import tpu_blocks as blocks
from pallas_kernels.stick_breaking.residuals import named
from pallas_kernels.stick_breaking.tpu_backward import backward
from pallas_kernels.stick_breaking.tpu_blocks import SUBLANES, Geometry
from pallas_kernels.stick_breaking.tpu_decode import MAX_ROWS, decode
from pallas_kernels.stick_breaking.tpu_forward import forward

Segments = tuple[jax.Array, jax.Array]

_LANES = 128
_MAX_BLOCK = 512
_MAX_ROW_BYTES = 2048  # Wider rows take smaller tiles.
_VMEM_BYTES = 60 << 20  # Of the 64 MiB of the smallest targets, v5p and tpu7x.
_GRADIENT_BYTES = 36 << 20  # Of it, for the gradients of the keys.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """Rows (query slots) and keys of a tile; multiples of 128 on a device."""

  block_q: int
  block_k: int


def default_tiling(num_rows: int, num_keys: int, row_bytes: int) -> Tiling:
  """Return the tiling for r rows (q * s) and t keys, each of d * itemsize bytes."""
  largest = _MAX_BLOCK if row_bytes <= _MAX_ROW_BYTES else _MAX_BLOCK // 2
  block_q = min(largest, _round_up(num_rows, _LANES))
  block_k = min(largest, _round_up(num_keys, _LANES))
  return Tiling(block_q=block_q, block_k=block_k)


def candidates(num_rows: int, num_keys: int, operation: str) -> tuple[Tiling, ...]:
  """Return the tilings that are worth measuring.

  Args:
    num_rows, num_keys: r and t.
    operation: "stick_breaking.forward" or "stick_breaking.backward", which holds more in VMEM.
  """
  sizes = (256, 512) if operation == "stick_breaking.backward" else (256, 512, 1024)
  found = [
    Tiling(
      block_q=min(block_q, _round_up(num_rows, _LANES)),
      block_k=min(block_k, _round_up(num_keys, _LANES)),
    )
    for block_q, block_k in itertools.product(sizes, sizes)
  ]
  return tuple(dict.fromkeys(found))


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array | None,
  segments: Segments,
  scale: float,
  *,
  eps: float = 0.0,
  tiling: Tiling | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """Return [b, q, s, h, d] in q's dtype. Differentiable in q, k and v; deterministic.

  Args:
    q: [b, q, s, h, d], s query slots sharing the keys; the last query sits at the last key.
    k, v: [b, t, h, d] with t >= q; v None: the values are the keys.
    segments: int32 [b, q] of the queries and [b, t] of the keys; 0 is padding.
    scale: factor of q . k.
    eps: stop at a key block once the sticks that are left of all rows of a tile are below it, in
      both passes; 0: never.
    tiling: of both passes.
    interpret: run under Pallas' interpreter.

  Raises:
    NotImplementedError: dtypes other than bfloat16 and float32, or mixed ones.
  """
  if q.dtype not in (jnp.bfloat16, jnp.float32) or k.dtype != q.dtype:
    raise NotImplementedError(
      f"stick-breaking attention on a TPU takes bfloat16 or float32, got q {q.dtype}, "
      f"k {k.dtype}: use the xla implementation"
    )
  values = () if v is None else (v,)
  return _attention(q, (k, *values), segments, scale, eps, tiling, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _attention(
  q: jax.Array,
  kv: tuple[jax.Array, ...],
  segments: Segments,
  scale: float,
  eps: float,
  tiling: Tiling | None,
  interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
  if q.shape[1] * q.shape[2] <= MAX_ROWS:
    return _decode(q, kv, segments, scale, eps, tiling, interpret)
  geometry = _geometry(q, kv[0], scale, tiling, "stick_breaking.forward")
  (out,) = forward(
    *_lay_out(q, kv, segments, geometry),
    geometry=geometry,
    eps=eps,
    save=False,
    vmem_limit_bytes=_VMEM_BYTES,
    interpret=interpret,
  )
  return _from_rows(out, q.shape)


def _decode(
  q: jax.Array,
  kv: tuple[jax.Array, ...],
  segments: Segments,
  scale: float,
  eps: float,
  tiling: Tiling | None,
  interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
  geometry = _geometry(q, kv[0], scale, tiling, "stick_breaking.forward")
  geometry = dataclasses.replace(geometry, block_q=_round_up(q.shape[1] * q.shape[2], 16))
  rows, keys = _row_segments(segments, geometry)
  out = decode(
    _to_rows(q, geometry.block_q),
    [_pad(x, 1, geometry.block_k).swapaxes(1, 2) for x in kv],
    rows.swapaxes(1, 2),
    keys.reshape(keys.shape[0], -1, 1, geometry.block_k),
    blocks.make_schedule(rows, keys, geometry),
    geometry=geometry,
    eps=eps,
    vmem_limit_bytes=_VMEM_BYTES,
    interpret=interpret,
  )
  return _from_rows(out, q.shape)


def _attention_forward(
  q: jax.Array,
  kv: tuple[jax.Array, ...],
  segments: Segments,
  scale: float,
  eps: float,
  tiling: Tiling | None,
  interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, tuple[object, ...]]:
  # The saved sums belong to blocks: both passes use the tiling of the backward.
  geometry = _geometry(q, kv[0], scale, tiling, "stick_breaking.backward")
  out, sums, leftmost = forward(
    *_lay_out(q, kv, segments, geometry),
    geometry=geometry,
    eps=eps,
    save=True,
    vmem_limit_bytes=_VMEM_BYTES,
    interpret=interpret,
  )
  return _from_rows(out, q.shape), (q, kv, segments, named((sums, leftmost)))


def _attention_backward(
  scale: float,
  eps: float,
  tiling: Tiling | None,
  interpret: bool | pltpu.InterpretParams,
  residuals: tuple[jax.Array, tuple[jax.Array, ...], Segments, tuple[jax.Array, jax.Array]],
  d_out: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...], None]:
  q, kv, segments, (sums, leftmost) = residuals
  geometry = _geometry(q, kv[0], scale, tiling, "stick_breaking.backward")
  rows_q, kv_blocks, rows, key_segments, schedule = _lay_out(q, kv, segments, geometry)
  dq, dkv = backward(
    rows_q,
    _to_rows(d_out, geometry.block_q),
    kv_blocks,
    rows,
    key_segments,
    sums,
    leftmost,
    schedule,
    geometry=geometry,
    chunk_blocks=_chunk_blocks(kv_blocks, geometry.block_k),
    vmem_limit_bytes=_VMEM_BYTES,
    interpret=interpret,
  )
  t = kv[0].shape[1]
  gradients = [_from_blocks(dkv[:, :, n], geometry.block_k)[:, :t] for n in range(len(kv))]
  if len(kv) > 1:
    gradients[0] = gradients[0] * scale
  d_keys = tuple(gradient.astype(x.dtype) for gradient, x in zip(gradients, kv, strict=True))
  return _from_rows(dq, q.shape), d_keys, None


_attention.defvjp(_attention_forward, _attention_backward)


def _geometry(
  q: jax.Array, k: jax.Array, scale: float, tiling: Tiling | None, operation: str
) -> Geometry:
  _, num_queries, num_slots, _, d = q.shape
  t = k.shape[1]
  if tiling is None:
    fields = tuning.lookup(operation, q.dtype, (num_queries, t, num_slots, d))
    default = default_tiling(num_queries * num_slots, t, d * q.dtype.itemsize)
    tiling = Tiling(**fields) if fields else default
  return Geometry(
    block_q=tiling.block_q,
    block_k=tiling.block_k,
    num_slots=num_slots,
    history=t - num_queries,
    factor=scale,
  )


def _chunk_blocks(kv: Sequence[jax.Array], block_k: int) -> int:
  """Return how many key blocks' float32 gradients fit VMEM, for keys and values [b, h, t, d]."""
  t, d = kv[0].shape[2:]
  fitting = _GRADIENT_BYTES // (4 * len(kv) * block_k * _round_up(d, _LANES))
  num_blocks = t // block_k
  num_chunks = -(-num_blocks // max(1, fitting))
  return -(-num_blocks // num_chunks)


def _lay_out(
  q: jax.Array, kv: tuple[jax.Array, ...], segments: Segments, geometry: Geometry
) -> tuple[jax.Array, list[jax.Array], jax.Array, jax.Array, blocks.Schedule]:
  """Return what the kernels read: q, kv, rows, key_segments, schedule."""
  rows, keys = _row_segments(segments, geometry)
  schedule = blocks.make_schedule(rows, keys, geometry)
  keys = keys.reshape(keys.shape[0], -1, SUBLANES, geometry.block_k // SUBLANES)
  kv_blocks = [_to_blocks(x, geometry.block_k) for x in kv]
  return _to_rows(q, geometry.block_q), kv_blocks, rows, keys, schedule


def _row_segments(segments: Segments, geometry: Geometry) -> Segments:
  """Return int32 [b, 2, r], segment and position of every row, and [b, t]; both padded."""
  q_segments, k_segments = (jnp.asarray(x, jnp.int32) for x in segments)
  position = jnp.arange(q_segments.shape[1], dtype=jnp.int32) + geometry.history
  # A row's segment 0 would be equal to a key's.
  segment = jnp.where(q_segments > 0, q_segments, -1)
  rows = jnp.stack([segment, jnp.broadcast_to(position, segment.shape)], axis=1)
  rows = _pad(jnp.repeat(rows, geometry.num_slots, axis=2), 2, geometry.block_q, value=-1)
  keys = _pad(jnp.maximum(k_segments, 0), 1, geometry.block_k)
  return rows, keys


def _to_rows(x: jax.Array, block: int) -> jax.Array:
  """Return [b, h, r, d], padded, of [b, q, s, h, d]."""
  b, q, s, h, d = x.shape
  return _pad(x.reshape(b, q * s, h, d).swapaxes(1, 2), 2, block)


def _from_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Return [b, q, s, h, d] of [b, h, r, d]."""
  _, q, s, _, _ = shape
  return x[:, :, : q * s].swapaxes(1, 2).reshape(shape)


def _to_blocks(x: jax.Array, block: int) -> jax.Array:
  """Return [b, h, t, d], padded, keys permuted in each block, of [b, t, h, d]."""
  x = _pad(x, 1, block)
  b, t, h, d = x.shape
  x = x.reshape(b, t // block, SUBLANES, block // SUBLANES, h, d)
  return x.transpose(0, 4, 1, 3, 2, 5).reshape(b, h, t, d)


def _from_blocks(x: jax.Array, block: int) -> jax.Array:
  """Undo _to_blocks, padding apart: [b, t, h, d] of [b, h, t, d]."""
  b, h, t, d = x.shape
  x = x.reshape(b, h, t // block, block // SUBLANES, SUBLANES, d)
  return x.transpose(0, 2, 4, 3, 1, 5).reshape(b, t, h, d)


def _pad(x: jax.Array, axis: int, multiple: int, value: int = 0) -> jax.Array:
  missing = -x.shape[axis] % multiple
  widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=value) if missing else x


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
