"""Choose an implementation of stick-breaking attention and call it."""

import jax
import jax.numpy as jnp

from pallas_kernels.implementation import Implementation, check_available
from pallas_kernels.stick_breaking import reference, xla

AVAILABLE = (Implementation.REFERENCE, Implementation.XLA)


def resolve(implementation: Implementation, platform: str) -> Implementation:
  """Return what AUTO means on a platform ('cpu', 'gpu', 'tpu'), or the explicit choice.

  Raises:
    NotImplementedError: no such implementation; names those that exist.
  """
  del platform  # The portable path is the best one everywhere until a kernel is registered.
  if implementation is Implementation.AUTO:
    implementation = Implementation.XLA
  check_available("stick_breaking", implementation, AVAILABLE)
  return implementation


def stick_breaking_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  q_segments: jax.Array,
  k_segments: jax.Array,
  *,
  implementation: Implementation,
) -> jax.Array:
  """Attend to earlier keys and the current one, nearest first (MoLM's form of 2410.17980, eq. 4).

  A_ij = beta_ij prod_{j<l<=i} (1 - beta_il) with beta_ij = sigmoid(q_i.k_j / sqrt(d)); the
  remainder of the stick is dropped. Keys of another segment, and padding, take no part of it. A
  query that may see no key gives 0.

  Args:
    q: [b, q, s, h, d]: s query slots share the keys and values of head h. The last query is at the
      position of the last key, so that t - q keys are history.
    k, v: [b, t, h, d].
    q_segments: int32 [b, q]; k_segments: int32 [b, t]: documents of a packed row; 0 is padding.
    implementation: who computes; never AUTO.

  Returns:
    [b, q, s, h, d] in q's dtype.

  Raises:
    ValueError: wrong ranks or sizes. NotImplementedError: no such implementation.
  """
  check_available("stick_breaking", implementation, AVAILABLE)
  if q.ndim != 5 or k.ndim != 4 or k.shape != v.shape or q.shape[3:] != k.shape[2:]:
    raise ValueError(
      "stick_breaking_attention needs q [b, q, s, h, d] and k, v [b, t, h, d]; got "
      f"{q.shape}, {k.shape}, {v.shape}"
    )
  if q_segments.shape != q.shape[:2] or k_segments.shape != k.shape[:2] or q.shape[1] > k.shape[1]:
    raise ValueError(
      "stick_breaking_attention needs q_segments [b, q], k_segments [b, t] and t >= q; got "
      f"{q_segments.shape}, {k_segments.shape} for q {q.shape}, k {k.shape}"
    )
  scale = q.shape[-1] ** -0.5
  match implementation:
    case Implementation.REFERENCE:
      num_queries, num_keys = q.shape[1], k.shape[1]
      position = jnp.arange(num_queries) + num_keys - num_queries
      allowed = jnp.arange(num_keys)[None, :] <= position[:, None]
      allowed = allowed & (q_segments[:, :, None] == k_segments[:, None, :])
      allowed = allowed & (k_segments > 0)[:, None, :]
      return reference.attention(q, k, v, allowed, scale).astype(q.dtype)
    case Implementation.XLA:
      return xla.attention(q, k, v, (q_segments, k_segments), scale)
  raise AssertionError(f"{implementation} is available but not called")
