"""Portable stick-breaking attention: blocks of queries, keys right of the diagonal never read.

Only q, k, v are kept for the backward pass, which recomputes a block's weights. Per block
    log A_ij = log beta_ij + sum_{j<l<=i} log(1 - beta_il),      beta = sigmoid(scale q.k)
    d loss / d logit_im = g_im - beta_im * sum_{j<=m} g_ij,      g = A * (dO . V^T)
in float32. Deterministic: every sum has one order.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels.precision import matmul_precision

_NUM_BLOCKS = 8  # Bounds the program; an eighth of the causal square is computed in vain.
_MIN_BLOCK = 64

Segments = tuple[jax.Array, jax.Array]


def _blocks(num_queries: int, num_keys: int) -> list[tuple[int, int, int]]:
  """Return (first query, past-the-last query, number of keys that they may see)."""
  size = max(_MIN_BLOCK, -(-num_queries // _NUM_BLOCKS))
  history = num_keys - num_queries
  edges = [*range(0, num_queries, size), num_queries]
  return [(a, b, history + b) for a, b in itertools.pairwise(edges)]


_ONE_LEFT, _ONE_RIGHT = (((0, 0),) * 4 + (pad,) for pad in ((1, 0), (0, 1)))  # Of the keys.


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  precision = matmul_precision(b.dtype)
  return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _weights(
  q: jax.Array, k: jax.Array, segments: Segments, first: int, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return A, beta and 1 - beta, float32 [b, s, h, q, t]; the first query sits at key `first`."""
  q_segments, k_segments = segments
  causal = jnp.arange(k.shape[1])[None, :] <= first + jnp.arange(q.shape[1])[:, None]
  same = q_segments[:, :, None] == k_segments[:, None, :]
  allowed = (causal & same & (k_segments > 0)[:, None, :])[:, None, None]
  logits = scale * _einsum("bqshd,bthd->bshqt", q, k)
  # log(1 - beta) is summed over many keys: computed as such, for a difference would cancel.
  log_keep = jax.nn.log_sigmoid(-logits)
  log_beta = logits + log_keep
  log_keep = jnp.where(allowed, log_keep, 0)
  after = jax.lax.cumsum(jnp.pad(log_keep[..., 1:], _ONE_RIGHT), axis=4, reverse=True)
  weights = jnp.where(allowed, jnp.exp(log_beta + after), 0)
  return weights, jnp.where(allowed, jnp.exp(log_beta), 0), jnp.exp(log_keep)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, scale: float
) -> jax.Array:
  """Return [b, q, s, h, d] in q's dtype.

  Args:
    q: [b, q, s, h, d], s query slots sharing the keys; the last query sits at the last key.
    k, v: [b, t, h, d] with t >= q.
    segments: int32 [b, q] of the queries and [b, t] of the keys; 0 is padding.
    scale: factor of q . k.
  """
  q_segments, k_segments = segments
  outputs = []
  for a, b, t in _blocks(q.shape[1], k.shape[1]):
    block = (q_segments[:, a:b], k_segments[:, :t])
    weights, _, _ = _weights(q[:, a:b], k[:, :t], block, t - (b - a), scale)
    out = _einsum("bshqt,bthd->bqshd", weights.astype(v.dtype), v[:, :t])
    outputs.append(out.astype(q.dtype))
  return jnp.concatenate(outputs, axis=1)


def _forward(
  q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, scale: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, Segments]]:
  return attention(q, k, v, segments, scale), (q, k, v, segments)


def _backward(
  scale: float, saved: tuple[jax.Array, jax.Array, jax.Array, Segments], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  q, k, v, (q_segments, k_segments) = saved
  dq = []
  dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  for a, b, t in _blocks(q.shape[1], k.shape[1]):
    block = (q_segments[:, a:b], k_segments[:, :t])
    weights, beta, keep = _weights(q[:, a:b], k[:, :t], block, t - (b - a), scale)
    d_block = d_out[:, a:b]
    g = weights * _einsum("bqshd,bthd->bshqt", d_block, v[:, :t])
    # g - beta * (sum of g up to the key), without the difference of equal numbers where beta is 1.
    before = jax.lax.cumsum(jnp.pad(g[..., :-1], _ONE_LEFT), axis=4)
    d_logits = (scale * (keep * g - beta * before)).astype(q.dtype)
    dq.append(_einsum("bshqt,bthd->bqshd", d_logits, k[:, :t]).astype(q.dtype))
    dk = _add_first(dk, _einsum("bshqt,bqshd->bthd", d_logits, q[:, a:b]))
    dv = _add_first(dv, _einsum("bshqt,bqshd->bthd", weights.astype(v.dtype), d_block))
  return jnp.concatenate(dq, axis=1), dk.astype(k.dtype), dv.astype(v.dtype), None


attention.defvjp(_forward, _backward)


def _add_first(total: jax.Array, part: jax.Array) -> jax.Array:
  """Add [b, t, ...] to the first t keys."""
  # `.at[:, :t].add` crashes the CPU compiler of JAX 0.11.2 under shard_map.
  t = part.shape[1]
  return jnp.concatenate([total[:, :t] + part, total[:, t:]], axis=1)
