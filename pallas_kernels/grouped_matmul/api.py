"""Choose an implementation of the grouped matmul and call it.

Layout of rows: group e's rows are contiguous from `group_starts(group_sizes, alignment)[e]` on; the
rows between a group's last and the next group's first are unused: they may hold anything, NaN
included, and no result depends on them.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import reference, xla
from pallas_kernels.implementation import Implementation, check_available

AVAILABLE = (Implementation.REFERENCE, Implementation.XLA)


def resolve(implementation: Implementation, platform: str) -> Implementation:
  """Return what AUTO means on a platform ('cpu', 'gpu', 'tpu'), or the explicit choice.

  Raises:
    NotImplementedError: no such implementation; names those that exist.
  """
  del platform  # The portable path is the best one everywhere until a kernel is registered.
  if implementation is Implementation.AUTO:
    implementation = Implementation.XLA
  check_available("grouped_matmul", implementation, AVAILABLE)
  return implementation


def row_alignment(implementation: Implementation, num_rows: int, num_groups: int) -> int:
  """Return the multiple at which groups start: a quarter of the mean group, as a power of two.

  A quarter keeps unused rows at an eighth of the total on average. Between 8 and 512.
  """
  if implementation is not Implementation.XLA:
    return 1
  quarter = max(1, num_rows // num_groups // 4)
  return min(512, max(8, 1 << (quarter.bit_length() - 1)))


def group_starts(group_sizes: jax.Array, alignment: int) -> jax.Array:
  """Return int32 [g]: the first row of each group."""
  aligned = (group_sizes + alignment - 1) // alignment * alignment
  return jnp.cumsum(aligned) - aligned


def grouped_matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  implementation: Implementation,
  transpose_rhs: bool = False,
) -> jax.Array:
  """Multiply each row by its group's matrix, with float32 accumulation.

  Args:
    lhs: [m, k] rows sorted by group (see the module's layout).
    rhs: [g, k, n], or [g, n, k] with `transpose_rhs` (the gradient of the rows).
    group_sizes: int32 [g], rows per group; any sizes whose aligned sum is at most m.
    alignment: `row_alignment` of this implementation and shape.
    implementation: who computes; never AUTO.
    transpose_rhs: multiply by the transposed matrices.

  Returns:
    [m, n] in lhs' dtype; unused rows are unspecified.

  Raises:
    ValueError: wrong ranks or sizes. NotImplementedError: no such implementation.
  """
  check_available("grouped_matmul", implementation, AVAILABLE)
  k = rhs.shape[2 if transpose_rhs else 1] if rhs.ndim == 3 else None
  if lhs.ndim != 2 or k != lhs.shape[1] or group_sizes.shape != rhs.shape[:1]:
    raise ValueError(
      f"grouped_matmul needs lhs [m, k], rhs [g, k, n], group_sizes [g]; got {lhs.shape}, "
      f"{rhs.shape}, {group_sizes.shape} with transpose_rhs={transpose_rhs}"
    )
  starts = group_starts(group_sizes, alignment)
  match implementation:
    case Implementation.REFERENCE:
      rhs = rhs.swapaxes(1, 2) if transpose_rhs else rhs
      return reference.matmul(lhs, rhs, starts, group_sizes).astype(lhs.dtype)
    case Implementation.XLA:
      return xla.matmul(
        lhs,
        rhs,
        starts,
        group_sizes,
        tile=alignment,
        transpose_rhs=transpose_rhs,
        out_dtype=lhs.dtype,
      )
  raise AssertionError(f"{implementation} is available but not called")


def grouped_outer(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  implementation: Implementation,
) -> jax.Array:
  """Sum the outer products of each group's rows: the gradient of the grouped matrices.

  Args:
    lhs: [m, k], rhs: [m, n]: rows sorted by group. group_sizes: int32 [g].
    alignment, implementation: as in `grouped_matmul`.

  Returns:
    float32 [g, k, n]; 0 for an empty group.
  """
  check_available("grouped_outer", implementation, AVAILABLE)
  if lhs.ndim != 2 or rhs.ndim != 2 or lhs.shape[0] != rhs.shape[0]:
    raise ValueError(f"grouped_outer needs [m, k] and [m, n]; got {lhs.shape} and {rhs.shape}")
  starts = group_starts(group_sizes, alignment)
  match implementation:
    case Implementation.REFERENCE:
      return reference.outer(lhs, rhs, starts, group_sizes)
    case Implementation.XLA:
      return xla.outer(lhs, rhs, starts, group_sizes, tile=alignment)
  raise AssertionError(f"{implementation} is available but not called")
