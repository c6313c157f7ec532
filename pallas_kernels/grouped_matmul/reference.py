"""Oracle of the grouped matmul: every group against every row, at `g` times the work."""

import jax
import jax.numpy as jnp


def _rows_of_groups(m: int, starts: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """Return bool [g, m]: whether the row belongs to the group."""
  row = jnp.arange(m)[None, :]
  return (row >= starts[:, None]) & (row < (starts + group_sizes)[:, None])


def matmul(lhs: jax.Array, rhs: jax.Array, starts: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """Return float32 [m, n]: lhs [m, k] times rhs [g, k, n] of the row's group; 0 in unused rows."""
  member = _rows_of_groups(lhs.shape[0], starts, group_sizes)
  rows = jnp.where(member[:, :, None], lhs[None].astype(jnp.float32), 0)
  return jnp.einsum("gmk,gkn->mn", rows, rhs.astype(jnp.float32), precision="highest")


def outer(lhs: jax.Array, rhs: jax.Array, starts: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """Return float32 [g, k, n]: per group the sum of lhs row [k] times rhs row [n]."""
  member = _rows_of_groups(lhs.shape[0], starts, group_sizes)[:, :, None]
  lhs_rows = jnp.where(member, lhs[None].astype(jnp.float32), 0)
  rhs_rows = jnp.where(member, rhs[None].astype(jnp.float32), 0)
  return jnp.einsum("gmk,gmn->gkn", lhs_rows, rhs_rows, precision="highest")
