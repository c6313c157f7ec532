"""Choose an implementation of the grouped matmul and call it.

Layout of rows: group e's rows are contiguous from `group_starts(group_sizes, alignment)[e]` on; the
rows between a group's last and the next group's first are unused: they may hold anything, NaN
included, and no result depends on them.

None of the operations is differentiable by itself: each is the gradient of another, and
`mfjax/experts.py` composes them.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import implementation as implementations
from pallas_kernels.grouped_matmul import reference, xla
from pallas_kernels.implementation import Implementation, not_callable


def resolve(
  implementation: Implementation,
  platform: str,
  dtype: jax.typing.DTypeLike,
  shapes: tuple[tuple[int, int, int], ...],
) -> Implementation:
  """Return what AUTO means on a platform ('cpu', 'gpu', 'tpu'), or the explicit choice, checked.

  Args:
    implementation: the choice. platform: of the mesh. dtype: of the rows.
    shapes: (g, k, n) of every product that will be asked for.

  Raises:
    NotImplementedError: the explicit choice cannot; names the shape and what can.
  """

  def probe(choice: Implementation) -> None:
    for g, k, n in shapes:
      alignment = row_alignment(choice, g, g)
      m = g * alignment
      lhs, out = jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((m, n), dtype)
      rhs, sizes = jax.ShapeDtypeStruct((g, k, n), dtype), jax.ShapeDtypeStruct((g,), jnp.int32)

      def products(
        lhs: jax.Array, out: jax.Array, rhs: jax.Array, sizes: jax.Array, alignment: int = alignment
      ) -> Any:
        options: Any = {"alignment": alignment, "implementation": choice}
        return (
          grouped_matmul(lhs, rhs, sizes, **options),
          grouped_matmul(out, rhs, sizes, transpose_rhs=True, **options),
          grouped_outer(lhs, out, sizes, **options),
          # Where they come from and go to; any int32 numbers are an index.
          *(take_rows(rows, sizes, implementation=choice) for rows in (lhs, out)),
        )

      jax.eval_shape(products, lhs, out, rhs, sizes)

  return implementations.resolve("grouped_matmul", implementation, platform, probe)


def row_alignment(implementation: Implementation, num_rows: int, num_groups: int) -> int:
  """Return the multiple at which groups start: the row tile of the implementation.

  XLA: a quarter of the mean group as a power of two, from 8 to 512, so that unused rows are an
  eighth of the total on average.
  """
  if implementation is Implementation.REFERENCE:
    return 1
  if implementation is Implementation.XLA:
    quarter = max(1, num_rows // num_groups // 4)
    return min(512, max(8, 1 << (quarter.bit_length() - 1)))
  alignment: int = _kernels(implementation).row_alignment(num_rows, num_groups)
  return alignment


def group_starts(group_sizes: jax.Array, alignment: int) -> jax.Array:
  """Return int32 [g]: the first row of each group."""
  aligned = (group_sizes + alignment - 1) // alignment * alignment
  index = jnp.arange(len(aligned))
  # XLA's GPU compiler fuses sums of a matrix' rows with others of them; a cumsum is a kernel alone.
  return jnp.sum(jnp.where(index[None] < index[:, None], aligned[None], 0), axis=1, dtype=jnp.int32)


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
    ValueError: wrong ranks, sizes or dtypes. NotImplementedError: a shape or dtype that the
      implementation cannot do; names one that can.
  """
  _check_matrices(lhs, rhs, group_sizes, transpose_rhs)
  starts = group_starts(group_sizes, alignment)
  if implementation is Implementation.REFERENCE:
    rhs = rhs.swapaxes(1, 2) if transpose_rhs else rhs
    return reference.matmul(lhs, rhs, starts, group_sizes).astype(lhs.dtype)
  options: dict[str, Any] = {"alignment": alignment, "transpose_rhs": transpose_rhs}
  if implementation is Implementation.XLA:
    return xla.matmul(lhs, rhs, starts, group_sizes, **options)
  kernels = _kernels(implementation)
  return kernels.matmul(lhs, rhs, starts, group_sizes, **options, **_interpret(implementation))


def grouped_outer(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  implementation: Implementation,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Sum the outer products of each group's rows: the gradient of the grouped matrices.

  Args:
    lhs: [m, k], rhs: [m, n]: rows sorted by group. group_sizes: int32 [g].
    alignment, implementation: as in `grouped_matmul`.
    out_dtype: what the float32 sum is rounded to.

  Returns:
    [g, k, n] in `out_dtype`; 0 for an empty group.

  Raises:
    ValueError, NotImplementedError: as in `grouped_matmul`.
  """
  _check_ranks("grouped_outer", lhs=(lhs, "mk"), rhs=(rhs, "mn"))
  if lhs.shape[0] != rhs.shape[0] or lhs.dtype != rhs.dtype:
    raise ValueError(f"grouped_outer needs [m, k] and [m, n] of one dtype; got {lhs} and {rhs}")
  starts = group_starts(group_sizes, alignment)
  if implementation is Implementation.REFERENCE:
    return reference.outer(lhs, rhs, starts, group_sizes).astype(out_dtype)
  options: Any = {"alignment": alignment, "out_dtype": out_dtype}
  if implementation is Implementation.XLA:
    return xla.outer(lhs, rhs, starts, group_sizes, **options)
  options |= _interpret(implementation)
  return _kernels(implementation).outer(lhs, rhs, starts, group_sizes, **options)


def take_rows(values: jax.Array, index: jax.Array, *, implementation: Implementation) -> jax.Array:
  """Gather rows, as on the way to experts, and back.

  Args:
    values: [m, ...], any dtype. index: int32 [r], not negative; m or more: a row of zeros.
    implementation: who copies; never AUTO. All but Hopper's kernel leave it to XLA, which can fuse
      it with what is done to the rows.

  Returns:
    [r, ...] in values' dtype.

  Raises:
    ValueError: wrong ranks or dtypes. NotImplementedError: Hopper's kernel cannot; names what can.
  """
  if values.ndim == 0 or index.ndim != 1 or index.dtype != jnp.int32:
    raise ValueError(
      f"take_rows needs values [m, ...] and int32 index [r]; got {values.shape} and {index.dtype} "
      f"{index.shape}"
    )
  if implementation is Implementation.PALLAS_GPU:
    from pallas_kernels.grouped_matmul import gpu_gather

    return gpu_gather.take_rows(values, index)
  return values.at[index].get(mode="fill", fill_value=0)


def grouped_matmul_gelu(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  implementation: Implementation,
) -> tuple[jax.Array, jax.Array]:
  """Multiply each row by its group's matrix and apply GELU (tanh form), in one pass.

  Args: as in `grouped_matmul`.

  Returns:
    hidden [m, n] and gelu(hidden) [m, n] in lhs' dtype; unused rows are unspecified.

  Raises:
    ValueError, NotImplementedError: as in `grouped_matmul`.
  """
  _check_matrices(lhs, rhs, group_sizes, False)
  if implementation in (Implementation.REFERENCE, Implementation.XLA):
    options: Any = {"alignment": alignment, "implementation": implementation}
    hidden = grouped_matmul(lhs, rhs, group_sizes, **options)
    return hidden, _gelu(hidden.astype(jnp.float32)).astype(lhs.dtype)
  starts = group_starts(group_sizes, alignment)
  options = {"alignment": alignment, **_interpret(implementation)}
  return _kernels(implementation).matmul_gelu(lhs, rhs, starts, group_sizes, **options)


def grouped_matmul_gelu_backward(
  dy: jax.Array,
  w_out: jax.Array,
  hidden: jax.Array,
  row_weights: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  implementation: Implementation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Differentiate y = row_weights * (gelu(hidden) W_out[e]) but for W_out, in one pass.

  With u = dy W_out[e]^T and a = gelu(hidden), tanh form.

  Args:
    dy: [m, d]: the gradient of each row's result.
    w_out: [g, f, d]. hidden: [m, f]. row_weights: float32 [m].
    group_sizes, alignment, implementation: as in `grouped_matmul`.

  Returns:
    The gradient of hidden, gelu'(hidden) * row_weights * u [m, f]; the left factor of W_out's
    gradient, row_weights * a [m, f]; the gradient of row_weights, sum_f a u, float32 [m]. Unused
    rows are unspecified.

  Raises:
    ValueError, NotImplementedError: as in `grouped_matmul`.
  """
  _check_matrices(dy, w_out, group_sizes, True)
  if hidden.shape != (dy.shape[0], w_out.shape[1]) or row_weights.shape != dy.shape[:1]:
    raise ValueError(
      "grouped_matmul_gelu_backward needs hidden [m, f] and row_weights [m]; got "
      f"{hidden.shape}, {row_weights.shape} for dy {dy.shape}, w_out {w_out.shape}"
    )
  if implementation in (Implementation.REFERENCE, Implementation.XLA):
    options: Any = {"alignment": alignment, "implementation": implementation}
    u = grouped_matmul(dy, w_out, group_sizes, transpose_rhs=True, **options)
    u = u.astype(jnp.float32)
    a, derivative = jax.vjp(_gelu, hidden.astype(jnp.float32))
    (d_hidden,) = derivative(u * row_weights[:, None])
    weighted = (a * row_weights[:, None]).astype(dy.dtype)
    return d_hidden.astype(dy.dtype), weighted, (a * u).sum(1)
  starts = group_starts(group_sizes, alignment)
  options = {"alignment": alignment, **_interpret(implementation)}
  kernels = _kernels(implementation)
  return kernels.matmul_gelu_backward(
    dy, w_out, hidden, row_weights, starts, group_sizes, **options
  )


def _gelu(x: jax.Array) -> jax.Array:
  return jax.nn.gelu(x, approximate=True)


def _kernels(implementation: Implementation) -> ModuleType:
  """Return the module of Pallas kernels; loaded when first asked for."""
  if implementation in (Implementation.PALLAS_TPU, Implementation.INTERPRET):
    from pallas_kernels.grouped_matmul import tpu

    return tpu
  if implementation is Implementation.PALLAS_GPU:
    from pallas_kernels.grouped_matmul import gpu

    return gpu
  raise not_callable("grouped_matmul", implementation)


def _interpret(implementation: Implementation) -> dict[str, bool]:
  return {"interpret": True} if implementation is Implementation.INTERPRET else {}


def _check_ranks(operation: str, **arrays: tuple[jax.Array, str]) -> None:
  for name, (array, dims) in arrays.items():
    if array.ndim != len(dims):
      raise ValueError(f"{operation} needs {name} [{', '.join(dims)}]; got {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{operation} needs a floating point {name}; got {array.dtype}")


def _check_matrices(
  lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, transpose_rhs: bool
) -> None:
  _check_ranks("grouped_matmul", lhs=(lhs, "mk"), rhs=(rhs, "gnk" if transpose_rhs else "gkn"))
  k = rhs.shape[2 if transpose_rhs else 1]
  if k != lhs.shape[1] or group_sizes.shape != rhs.shape[:1]:
    raise ValueError(
      f"grouped_matmul needs lhs [m, k], rhs [g, k, n], group_sizes [g]; got {lhs.shape}, "
      f"{rhs.shape}, {group_sizes.shape} with transpose_rhs={transpose_rhs}"
    )
  if lhs.dtype != rhs.dtype or group_sizes.dtype != jnp.int32:
    raise ValueError(
      "grouped_matmul needs lhs and rhs of one dtype and int32 group_sizes; got "
      f"{lhs.dtype}, {rhs.dtype}, {group_sizes.dtype}"
    )
