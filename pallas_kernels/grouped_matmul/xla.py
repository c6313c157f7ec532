"""Portable grouped matmul: loops over groups and their row tiles at the cost of the active FLOPs.

A group's rows start at a multiple of the tile, so that a tile never holds rows of two groups and a
group's matrix is read once. Trip counts are data: only tiles that hold rows are computed.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.precision import matmul_precision


def matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  starts: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  transpose_rhs: bool,
) -> jax.Array:
  """Return [m, n]: lhs [m, k] times rhs [g, k, n] (or [g, n, k], transposed) of the row's group.

  `starts` [g] are multiples of `alignment`, the row tile, and so is m. Unused rows of the result
  are unspecified.
  """
  m, tile = lhs.shape[0], alignment
  g, n = rhs.shape[0], rhs.shape[1] if transpose_rhs else rhs.shape[2]
  contract = (((1,), (1,)), ((), ())) if transpose_rhs else (((1,), (0,)), ((), ()))

  precision = matmul_precision(lhs.dtype)

  def group(e: jax.Array, out: jax.Array) -> jax.Array:
    weights = jax.lax.dynamic_index_in_dim(rhs, e, keepdims=False)

    def one_tile(j: jax.Array, out: jax.Array) -> jax.Array:
      row = starts[e] + j * tile
      rows = jax.lax.dynamic_slice_in_dim(lhs, row, tile)
      product = jax.lax.dot_general(
        rows, weights, contract, precision=precision, preferred_element_type=jnp.float32
      )
      return jax.lax.dynamic_update_slice_in_dim(out, product.astype(lhs.dtype), row, 0)

    return jax.lax.fori_loop(0, _ceil_div(group_sizes[e], tile), one_tile, out)

  return jax.lax.fori_loop(0, g, group, jnp.zeros((m, n), lhs.dtype))


def outer(
  lhs: jax.Array,
  rhs: jax.Array,
  starts: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Return [g, k, n]: per group the sum over its rows of lhs [m, k]^T times rhs [m, n]."""
  g, k, n, tile = group_sizes.shape[0], lhs.shape[1], rhs.shape[1], alignment
  precision = matmul_precision(lhs.dtype)

  def group(e: jax.Array, out: jax.Array) -> jax.Array:
    def one_tile(j: jax.Array, total: jax.Array) -> jax.Array:
      row = starts[e] + j * tile
      used = (jnp.arange(tile) < group_sizes[e] - j * tile)[:, None]
      a = jnp.where(used, jax.lax.dynamic_slice_in_dim(lhs, row, tile), 0)
      b = jnp.where(used, jax.lax.dynamic_slice_in_dim(rhs, row, tile), 0)
      contract = (((0,), (0,)), ((), ()))
      return total + jax.lax.dot_general(
        a, b, contract, precision=precision, preferred_element_type=jnp.float32
      )

    zero = jnp.zeros((k, n), jnp.float32)
    total = jax.lax.fori_loop(0, _ceil_div(group_sizes[e], tile), one_tile, zero)
    return jax.lax.dynamic_update_index_in_dim(out, total.astype(out_dtype), e, 0)

  return jax.lax.fori_loop(0, g, group, jnp.zeros((g, k, n), out_dtype))


def _ceil_div(a: jax.Array, b: int) -> jax.Array:
  return (a + b - 1) // b
