"""Choose an implementation of stick-breaking attention and call it."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import implementation as implementations
from pallas_kernels.implementation import Implementation, not_callable
from pallas_kernels.stick_breaking import reference, xla


def resolve(
  implementation: Implementation,
  platform: str,
  dtype: jax.typing.DTypeLike,
  heads: tuple[int, int],
  slots: int,
  shares_kv: bool,
) -> Implementation:
  """Return what AUTO means on a platform ('cpu', 'gpu', 'tpu'), or the explicit choice, checked.

  Args:
    implementation: the choice. platform: of the mesh. dtype: of queries, keys and values.
    heads: their number and width. slots: queries per position that share a head's keys.
    shares_kv: whether values are the keys.

  Raises:
    NotImplementedError: the explicit choice cannot; names the shape and what can.
  """
  length = 256
  q = jax.ShapeDtypeStruct((1, length, slots, *heads), dtype)
  k = jax.ShapeDtypeStruct((1, length, *heads), dtype)
  v = None if shares_kv else k
  segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def probe(choice: Implementation) -> None:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array | None, segments: jax.Array) -> jax.Array:
      return stick_breaking_attention(q, k, v, segments, segments, implementation=choice)

    jax.eval_shape(attend, q, k, v, segments)

  return implementations.resolve("stick_breaking", implementation, platform, probe)


def stick_breaking_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array | None,
  q_segments: jax.Array,
  k_segments: jax.Array,
  *,
  implementation: Implementation,
  eps: float = 0.0,
) -> jax.Array:
  """Attend to earlier keys and the current one, nearest first (MoLM's form of 2410.17980, eq. 4).

  A_ij = beta_ij prod_{j<l<=i} (1 - beta_il) with beta_ij = sigmoid(q_i.k_j / sqrt(d)); the
  remainder of the stick is dropped. Keys of another segment, and padding, take no part of it. A
  query that may see no key gives 0. Differentiable in q, k and v.

  Args:
    q: [b, q, s, h, d]: s query slots share the keys and values of head h. The last query is at the
      position of the last key, so that t - q keys are history.
    k, v: [b, t, h, d]; None for v: the values are the keys.
    q_segments: int32 [b, q]; k_segments: int32 [b, t]: documents of a packed row; 0 is padding.
    implementation: who computes; never AUTO.
    eps: a kernel may leave out keys once less than `eps` of each query's stick in its tile is left:
      the error of an output is at most eps times the largest |v|. 0 is exact. The portable path
      leaves nothing out.

  Returns:
    [b, q, s, h, d] in q's dtype.

  Raises:
    ValueError: wrong ranks, sizes or dtypes. NotImplementedError: a shape or dtype that the
      implementation cannot do; names one that can.
  """
  _check(q, k, v, q_segments, k_segments, eps)
  scale = q.shape[-1] ** -0.5
  match implementation:
    case Implementation.REFERENCE:
      num_queries, num_keys = q.shape[1], k.shape[1]
      position = jnp.arange(num_queries) + num_keys - num_queries
      allowed = jnp.arange(num_keys)[None, :] <= position[:, None]
      allowed = allowed & (q_segments[:, :, None] == k_segments[:, None, :])
      allowed = allowed & (k_segments > 0)[:, None, :]
      return reference.attention(q, k, k if v is None else v, allowed, scale).astype(q.dtype)
    case Implementation.XLA:
      return xla.attention(q, k, k if v is None else v, (q_segments, k_segments), scale)
    case Implementation.PALLAS_TPU | Implementation.INTERPRET:
      from pallas_kernels.stick_breaking import tpu

      interpret = implementation is Implementation.INTERPRET
      segments = (q_segments, k_segments)
      return tpu.attention(q, k, v, segments, scale, eps=eps, interpret=interpret)
    case Implementation.PALLAS_GPU:
      from pallas_kernels.stick_breaking import gpu

      return gpu.attention(q, k, v, (q_segments, k_segments), scale, eps=eps)
  raise not_callable("stick_breaking", implementation)


def _check(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array | None,
  q_segments: jax.Array,
  k_segments: jax.Array,
  eps: float,
) -> None:
  values: Any = k if v is None else v
  if q.ndim != 5 or k.ndim != 4 or k.shape != values.shape or q.shape[3:] != k.shape[2:]:
    raise ValueError(
      "stick_breaking_attention needs q [b, q, s, h, d] and k, v [b, t, h, d]; got "
      f"{q.shape}, {k.shape}, {values.shape}"
    )
  if q_segments.shape != q.shape[:2] or k_segments.shape != k.shape[:2] or q.shape[1] > k.shape[1]:
    raise ValueError(
      "stick_breaking_attention needs q_segments [b, q], k_segments [b, t] and t >= q; got "
      f"{q_segments.shape}, {k_segments.shape} for q {q.shape}, k {k.shape}"
    )
  if not jnp.issubdtype(q.dtype, jnp.floating) or {k.dtype, values.dtype} != {q.dtype}:
    raise ValueError(
      "stick_breaking_attention needs q, k and v of one floating point dtype; got "
      f"{q.dtype}, {k.dtype}, {values.dtype}"
    )
  if not (0 <= eps < 1 and math.isfinite(eps)):
    raise ValueError(f"stick_breaking_attention needs 0 <= eps < 1; got {eps}")
