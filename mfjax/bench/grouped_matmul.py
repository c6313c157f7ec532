"""The grouped matmul and its gradients beside other ways to do the same work.

Shapes: m rows, k and n widths, g groups.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mfjax.bench.timing import Call, Comparison, compare, jit_local
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_outer, row_alignment
from pallas_kernels.implementation import Implementation

# Where XLA decomposes ragged_dot, it multiplies every row by every group's matrix.
_MOST_DENSE_FLOPS = 1e12


class GroupedShape(NamedTuple):
  """Sizes of a grouped matmul; `m` is the number of rows in all groups together."""

  m: int
  k: int
  n: int
  g: int

  def __str__(self) -> str:
    return f"{self.m} x {self.k} -> {self.n}, {self.g} groups"


def balanced(shape: GroupedShape) -> np.ndarray:
  """Return int32 [g]: equal groups; the first ones take the remainder."""
  return _spread(shape.m, shape.g)


def skewed(shape: GroupedShape) -> np.ndarray:
  """Return int32 [g]: half of the rows in one group, three groups empty, the rest equal."""
  empty = max(0, min(3, shape.g - 2))
  rest = shape.g - empty - 1
  half = shape.m // 2 if rest else shape.m
  others = _spread(shape.m - half, rest).tolist() if rest else []
  return np.array([half, *(0,) * empty, *others], np.int32)


def _spread(rows: int, groups: int) -> np.ndarray:
  return (np.arange(groups) < rows % groups).astype(np.int32) + rows // groups


GROUPS = {"balanced": balanced, "skewed": skewed}


class Rows(NamedTuple):
  """Where groups lie among aligned rows."""

  num_rows: int
  group: np.ndarray  # int32 [rows]: the row's group, g where unused
  sizes: jax.Array  # int32 [g]


def layout(sizes: np.ndarray, alignment: int) -> Rows:
  """Return where groups of these sizes lie; as many rows as the experts' dispatch makes."""
  num_rows = int(sizes.sum()) + len(sizes) * (alignment - 1)
  num_rows = -(-num_rows // alignment) * alignment
  aligned = -(-sizes // alignment) * alignment
  group = np.full(num_rows, len(sizes), np.int32)
  for e, start in enumerate(np.cumsum(aligned) - aligned):
    group[start : start + sizes[e]] = e
  return Rows(num_rows, group, jnp.asarray(sizes, jnp.int32))


def draw_rows(key: jax.Array, rows: Rows, width: int, dtype: Any) -> jax.Array:
  """Return random [rows, width], NaN in unused rows."""
  values = jax.random.normal(key, (rows.num_rows, width), dtype)
  return jnp.where(jnp.asarray(rows.group < len(rows.sizes))[:, None], values, jnp.nan)


def measure(
  shape: GroupedShape, implementation: Implementation, dtype: Any, repeats: int
) -> Iterator[Comparison]:
  """Time the product and its gradients, with equal and with unequal groups; inside `set_mesh`.

  All alternatives sum in float32 and return `dtype`.

  Raises:
    AssertionError: a result is wrong.
  """
  alignment = row_alignment(implementation, shape.m, shape.g)
  options: Any = {"alignment": alignment, "implementation": implementation}
  ours = operations(options, dtype)
  portable = operations(options | {"implementation": Implementation.XLA}, dtype)
  keys = jax.random.split(jax.random.key(0), 5)
  rhs = (jax.random.normal(keys[0], (shape.g, shape.k, shape.n)) * shape.k**-0.5).astype(dtype)
  x = jax.random.normal(keys[1], (shape.m, shape.k), dtype)
  dy = jax.random.normal(keys[2], (shape.m, shape.n), dtype)
  dense = {name: Call(jax.jit(f), args) for name, (f, args) in _dense(x, rhs[0], dy).items()}
  for groups, sizes_of in GROUPS.items():
    rows = layout(sizes_of(shape), alignment)
    lhs_rows = draw_rows(keys[3], rows, shape.k, dtype)
    dy_rows = draw_rows(keys[4], rows, shape.n, dtype)
    args = {
      "forward": (lhs_rows, rhs, rows.sizes),
      "rows' gradient": (dy_rows, rhs, rows.sizes),
      "weights' gradient": (lhs_rows, dy_rows, rows.sizes),
    }
    torch = _torch(shape, np.asarray(rows.sizes))
    for name, function in ours.items():
      check(name, function(*args[name]), args[name], rows)
      alternatives = {
        "dense": dense[name],
        "xla": "it is what is measured"
        if implementation is Implementation.XLA
        else Call(portable[name], args[name]),
        "ragged_dot": _ragged_dot(name, shape, x, rhs, dy, rows.sizes),
        "torch": torch if isinstance(torch, str) else torch[name],
      }
      flops = 2.0 * shape.m * shape.k * shape.n
      call = Call(function, args[name])
      yield compare(f"grouped {name}, {groups}", str(shape), flops, call, alternatives, repeats)


def operations(options: Any, dtype: Any) -> dict[str, Callable[..., jax.Array]]:
  """Return the jitted product and its gradients in `dtype`, with these arguments of the api."""
  functions = {
    "forward": functools.partial(grouped_matmul, **options),
    "rows' gradient": functools.partial(grouped_matmul, transpose_rhs=True, **options),
    "weights' gradient": functools.partial(grouped_outer, out_dtype=dtype, **options),
  }
  return {name: jit_local(f) for name, f in functions.items()}


def check(name: str, result: jax.Array, args: tuple[Any, ...], rows: Rows) -> None:
  """Compare every number of a result with the oracle's through one random projection.

  Raises:
    AssertionError: it is off by more than rounding.
  """
  group, g = jnp.asarray(rows.group), len(rows.sizes)
  used, v = group < g, jax.random.normal(jax.random.key(7), (result.shape[-1],))

  def project(x: jax.Array, v: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * v).sum(-1)

  @jax.jit
  def errors(result: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    a = jnp.where(used[:, None], a, 0).astype(jnp.float32)
    actual = project(result, v)
    if name == "weights' gradient":
      weighted = a * project(jnp.where(used[:, None], b, 0), v)[:, None]
      expected = jax.ops.segment_sum(weighted, group, g + 1)[:g]
    else:
      b = b.swapaxes(1, 2) if name == "rows' gradient" else b
      expected = project(a, project(b, v)[jnp.minimum(group, g - 1)])[:, None]
      actual = jnp.where(used, actual, 0)[:, None]
    error, size = jnp.square(actual - expected), jnp.square(expected)
    scale = size.mean(-1, keepdims=True) if name == "weights' gradient" else size.mean()
    return jnp.sqrt((error / jnp.maximum(scale, 1e-30)).max())

  worst = float(errors(result, *args[:2]))
  tolerance = 1e-3 if args[0].dtype == jnp.float32 else 2e-2
  assert worst < tolerance, f"grouped {name}: an error of {worst:.2g} of the results' size"


def _dense(
  x: jax.Array, w: jax.Array, dy: jax.Array
) -> dict[str, tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]]:
  """Return {operation: (function, arguments)}: one matrix instead of one per group."""
  return {
    "forward": (lambda x, w: x @ w, (x, w)),
    "rows' gradient": (lambda dy, w: dy @ w.T, (dy, w)),
    "weights' gradient": (lambda x, dy: jnp.einsum("mk,mn->kn", x, dy), (x, dy)),
  }


def _ragged_dot(
  name: str, shape: GroupedShape, x: jax.Array, rhs: jax.Array, dy: jax.Array, sizes: jax.Array
) -> Call | str:
  platform = next(iter(x.devices())).platform
  if platform != "tpu" and 2.0 * shape.g * shape.m * shape.k * shape.n > _MOST_DENSE_FLOPS:
    return f"{shape.g} times the work on a {platform}"
  if name == "weights' gradient":
    contract = (((0,), (0,)), ((), ()))
    ragged = jax.lax.RaggedDotDimensionNumbers(contract, [0], [])

    def weights(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
      return jax.lax.ragged_dot_general(x, dy, sizes, ragged)

    return Call(jit_local(weights), (x, dy, sizes))
  if name == "forward":
    return Call(jit_local(jax.lax.ragged_dot), (x, rhs, sizes))
  transposed = jit_local(lambda dy, rhs, sizes: jax.lax.ragged_dot(dy, rhs.swapaxes(1, 2), sizes))
  return Call(transposed, (dy, rhs, sizes))


def _torch(shape: GroupedShape, sizes: np.ndarray) -> dict[str, Call] | str:
  """Return PyTorch's grouped matmuls (bf16 throughout), or why they cannot be had."""
  if importlib.util.find_spec("torch") is None:
    return "torch is not installed"
  torch = importlib.import_module("torch")
  if not torch.cuda.is_available():
    return "torch sees no GPU"
  if not hasattr(torch, "_grouped_mm"):
    return f"torch {torch.__version__} has no _grouped_mm"

  def draw(*size: int) -> Any:
    return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

  x, w, dy = draw(shape.m, shape.k), draw(shape.g, shape.k, shape.n), draw(shape.m, shape.n)
  ends = torch.tensor(np.cumsum(sizes), device="cuda", dtype=torch.int32)
  operands = {
    "forward": (x, w),
    "rows' gradient": (dy, w.transpose(1, 2)),
    "weights' gradient": (x.t(), dy),
  }

  def wait(_: Any) -> None:
    torch.cuda.synchronize()

  def product(a: Any, b: Any) -> Any:
    return torch._grouped_mm(a, b, offs=ends)

  return {name: Call(product, pair, wait) for name, pair in operands.items()}
