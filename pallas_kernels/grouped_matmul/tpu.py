"""Grouped matmul for TPUs (Mosaic): one row tile against its group's matrix per grid step.

Groups start at multiples of `row_alignment`, so a row tile never holds rows of two groups. Scalar
arrays made from the group sizes say which row tile and which group a grid step works on; the grid
ends with the last tile that holds rows, so unused tiles cost nothing. The contracted dimension is
whole in every block: a matrix stays in VMEM while the rows of its group pass by, is read from HBM
once per group, and a result is written once, with what follows it (GELU, its gradient) applied.

`outer` sums over row tiles into a block of its group's result that stays in VMEM.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.precision import matmul_precision

LANES = 128
MAX_ROWS = 512

# The smallest VMEM of the targets is 64 MiB (v5p, tpu7x). Beside the blocks, products live there.
_VMEM_LIMIT = 56 << 20
_BLOCKS_LIMIT = 40 << 20
# Multiply-adds of one product, which is straight-line code: 6,000 (v6e) or 12,000 cycles (v5p). A
# shorter body idles the matrix unit more at its ends. float32 takes six passes.
_PRODUCT_LIMIT = {"bfloat16": 3 << 29, "float32": 1 << 28}

Operation = Literal["matmul", "transposed", "outer", "matmul_gelu", "matmul_gelu_backward"]
Interpret = bool | pltpu.InterpretParams
# Blocks [tile_m, tile_n] that an operation reads and writes.
_COLUMN_BLOCKS = {"matmul": 1, "transposed": 1, "matmul_gelu": 2, "matmul_gelu_backward": 3}

_GELU_SLOPE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_SLOPE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """Sizes of blocks; `outer` also splits k, and has no steps.

  tile_m: rows per grid step, at most the alignment. tile_k: of the result of `outer`; k elsewhere.
  tile_n: columns of the result. step_n: columns of one product, a divisor of tile_n.
  """

  tile_m: int
  tile_k: int
  tile_n: int
  step_n: int


def row_alignment(num_rows: int, num_groups: int) -> int:
  """Return the multiple at which groups start: the row tile, a power of two from 8 to MAX_ROWS.

  An eighth of the mean group keeps unused rows at a sixteenth of the total. Below 128 rows a tile
  costs the matrix unit as much as one of 128, so small groups take half of their mean.
  """
  mean = num_rows // num_groups
  rows = max(mean // 8, min(mean // 2, 128), 8)
  return min(MAX_ROWS, 1 << (rows.bit_length() - 1))


def candidates(
  operation: Operation,
  dtype: jax.typing.DTypeLike,
  shape: tuple[int, int, int, int],
  alignment: int,
) -> tuple[Tiling, ...]:
  """Return tilings of an operation worth measuring, the default one first.

  Args:
    operation: as in `tuning.OPERATIONS`, without the module.
    dtype: of the operands. shape: (m, k, n, g). alignment: of the groups.
  """
  return _fitting(operation, dtype, shape, alignment)[:16]


def default_tiling(
  operation: Operation,
  dtype: jax.typing.DTypeLike,
  shape: tuple[int, int, int, int],
  alignment: int,
) -> Tiling:
  """Return the cheapest tiling by `_cost` that gives each core of the device a part.

  Raises:
    NotImplementedError: no tiling fits VMEM.
  """
  found = _fitting(operation, dtype, shape, alignment)
  if not found:
    raise NotImplementedError(
      f"{operation} of (m, k, n, g) = {shape} in {jnp.dtype(dtype).name} has no tiling that fits "
      "the VMEM of a TPU core: use xla"
    )
  # Only a static dimension is split over the two cores of a v4 or v5p.
  shared = (t for t in found if _num_blocks(operation, shape, t) % _num_cores() == 0)
  return next(shared, found[0])


def matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  starts: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  transpose_rhs: bool,
  tiling: Tiling | None = None,
  interpret: Interpret = False,
) -> jax.Array:
  """Return [m, n] in lhs' dtype: lhs [m, k] times rhs [g, k, n] of the row's group.

  Args:
    lhs: bf16 or float32 (in full precision), as every operand here.
    rhs: [g, n, k] with `transpose_rhs`.
    starts: int32 [g], the first row of each group, multiples of `alignment`. group_sizes: [g].
    alignment: what `row_alignment` returned; m is a multiple.
    transpose_rhs: multiply by the transposed matrices.
    tiling: overrides the tuned and the default one.
    interpret: run Pallas' interpreter instead of a TPU.

  Raises:
    NotImplementedError: another dtype, or a shape that does not fit VMEM.
  """

  def store(product: jax.Array, _: Any, columns: Any, out: Any) -> None:
    out[:, columns] = product.astype(out.dtype)

  call = _Products("transposed" if transpose_rhs else "matmul", lhs, rhs, alignment, tiling)
  (out,) = call.run(store, starts, group_sizes, [], [call.result()], interpret)
  return out


def matmul_gelu(
  lhs: jax.Array,
  rhs: jax.Array,
  starts: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  tiling: Tiling | None = None,
  interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array]:
  """Return hidden [m, n], as `matmul` does, and gelu_tanh of it before it was rounded."""

  def store(product: jax.Array, _: Any, columns: Any, hidden: Any, activation: Any) -> None:
    hidden[:, columns] = product.astype(hidden.dtype)
    activation[:, columns] = _gelu(product)[0].astype(activation.dtype)

  call = _Products("matmul_gelu", lhs, rhs, alignment, tiling)
  outs = [call.result(), call.result()]
  hidden, activation = call.run(store, starts, group_sizes, [], outs, interpret)
  return hidden, activation


def matmul_gelu_backward(
  dy: jax.Array,
  w_out: jax.Array,
  hidden: jax.Array,
  row_weights: jax.Array,
  starts: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  tiling: Tiling | None = None,
  interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return the gradient of hidden [m, f], row_weights * a [m, f] and sum_f a u, float32 [m].

  With u = dy [m, d] times w_out [g, f, d]^T of the row's group and a = gelu_tanh(hidden [m, f]).
  row_weights: float32 [m]. Everything else as in `matmul`.
  """

  def store(
    u: jax.Array,
    step: Any,
    columns: Any,
    hidden: Any,
    p: Any,
    d_hidden: Any,
    weighted: Any,
    dp: Any,
  ) -> None:
    a, derivative = _gelu(hidden[:, columns].astype(jnp.float32))
    weights = _column(p[...])
    d_hidden[:, columns] = (derivative * (u * weights)).astype(d_hidden.dtype)
    weighted[:, columns] = (a * weights).astype(weighted.dtype)
    dp[...] = jnp.where(step == 0, 0.0, dp[...]) + _row_sums(a * u)

  call = _Products("matmul_gelu_backward", dy, w_out, alignment, tiling)
  tile_m = call.tiling.tile_m
  per_row = (dy.shape[0] // tile_m, 1, tile_m)
  num_tiles_n = pl.cdiv(hidden.shape[1], call.tiling.tile_n)
  row_block = (None, 1, tile_m)
  extras = [
    (hidden, call.result()[1]),
    (
      row_weights.reshape(per_row),
      pl.BlockSpec(row_block, lambda n, t, group, row: (row[t], 0, 0)),
    ),
  ]
  sums = (
    jax.ShapeDtypeStruct((num_tiles_n, *per_row), jnp.float32),
    pl.BlockSpec((None, *row_block), lambda n, t, group, row: (n, row[t], 0, 0)),
  )
  outs = [call.result(), call.result(), sums]
  d_hidden, weighted, dp = call.run(store, starts, group_sizes, extras, outs, interpret)
  return d_hidden, weighted, dp.sum(0).reshape(-1)


def outer(
  lhs: jax.Array,
  rhs: jax.Array,
  starts: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  tiling: Tiling | None = None,
  interpret: Interpret = False,
) -> jax.Array:
  """Return [g, k, n]: the float32 sum of lhs row [k] times rhs row [n] of each group, or 0."""
  m, k, n, g = *lhs.shape, rhs.shape[1], len(group_sizes)
  if m == 0:
    return jnp.zeros((g, k, n), out_dtype)
  tiling = _tiling("outer", lhs.dtype, (m, k, n, g), alignment, tiling)
  tile_m, tile_k, tile_n = tiling.tile_m, tiling.tile_k, tiling.tile_n
  tiles = _visits(starts, group_sizes, m // tile_m, tile_m, visit_empty=True)
  itemsize = jnp.dtype(lhs.dtype).itemsize
  tiles_k, tiles_n = pl.cdiv(k, tile_k), pl.cdiv(n, tile_n)
  grid_spec = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=3,
    grid=(tiles_k, tiles_n, tiles.count),
    in_specs=[
      pl.BlockSpec((tile_m, tile_k), lambda i, j, t, group, row, used: (row[t], i)),
      pl.BlockSpec((tile_m, tile_n), lambda i, j, t, group, row, used: (row[t], j)),
    ],
    out_specs=pl.BlockSpec(
      (None, tile_k, tile_n), lambda i, j, t, group, row, used: (group[t], i, j)
    ),
  )
  total = pl.pallas_call(
    _outer_kernel,
    out_shape=jax.ShapeDtypeStruct((g, k, n), jnp.float32),
    grid_spec=grid_spec,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * k * n,
      bytes_accessed=(tiles_n * m * k + tiles_k * m * n) * itemsize + g * k * n * 4,
      transcendentals=0,
    ),
    interpret=interpret,
    name="grouped_outer",
  )(tiles.group, tiles.row, tiles.used, lhs, rhs)
  return total.astype(out_dtype)  # The kernel adds up in its output.


def _outer_kernel(group: Any, row: Any, used: Any, lhs: Any, rhs: Any, out: Any) -> None:
  del row
  t = pl.program_id(2)
  num_used = used[t]
  is_first = (t == 0) | (group[jnp.maximum(t - 1, 0)] != group[t])

  @pl.when(num_used > 0)
  def _() -> None:
    # Not a multiplication by 0: unused rows may hold NaN.
    is_used = jax.lax.broadcasted_iota(jnp.int32, (lhs.shape[0], 1), 0) < num_used
    product = jax.lax.dot_general(
      jnp.where(is_used, lhs[...], 0),
      jnp.where(is_used, rhs[...], 0),
      (((0,), (0,)), ((), ())),
      precision=matmul_precision(lhs.dtype),
      preferred_element_type=jnp.float32,
    )
    out[...] = product + jnp.where(is_first, 0.0, out[...])

  @pl.when(num_used <= 0)
  def _() -> None:
    out[...] = jnp.zeros_like(out)


class _Products:
  """Products of row tiles with their group's matrix; `run` hands each to an epilogue."""

  def __init__(
    self,
    operation: Operation,
    lhs: jax.Array,
    rhs: jax.Array,
    alignment: int,
    tiling: Tiling | None,
  ) -> None:
    self.operation, self.lhs, self.rhs = operation, lhs, rhs
    self.is_transposed = operation in ("transposed", "matmul_gelu_backward")
    self.m, self.k = lhs.shape
    self.g, self.n = rhs.shape[0], rhs.shape[1 if self.is_transposed else 2]
    self.tiling = _tiling(operation, lhs.dtype, (self.m, self.k, self.n, self.g), alignment, tiling)

  def result(self) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    """Return shape and blocks of a result [m, n]."""
    block = (self.tiling.tile_m, self.tiling.tile_n)
    spec = pl.BlockSpec(block, lambda n, t, group, row: (row[t], n))
    return jax.ShapeDtypeStruct((self.m, self.n), self.lhs.dtype), spec

  def run(
    self,
    epilogue: Callable[..., None],
    starts: jax.Array,
    group_sizes: jax.Array,
    extras: list[tuple[jax.Array, pl.BlockSpec]],
    outs: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    interpret: Interpret,
  ) -> Any:
    """Call `epilogue(product, step, columns, *extra blocks, *result blocks)` for every product."""
    out_shape = [shape for shape, _ in outs]
    if self.m == 0:
      return [jnp.zeros(shape.shape, shape.dtype) for shape in out_shape]
    tile_m, tile_n = self.tiling.tile_m, self.tiling.tile_n
    tiles = _visits(starts, group_sizes, self.m // tile_m, tile_m, visit_empty=False)
    if self.is_transposed:
      rhs_spec = pl.BlockSpec((None, tile_n, self.k), lambda n, t, group, row: (group[t], n, 0))
    else:
      rhs_spec = pl.BlockSpec((None, self.k, tile_n), lambda n, t, group, row: (group[t], 0, n))
    lhs_spec = pl.BlockSpec((tile_m, self.k), lambda n, t, group, row: (row[t], 0))
    num_tiles_n = pl.cdiv(self.n, tile_n)
    arrays: list[Any] = [*[self.lhs] * num_tiles_n, self.rhs, *(x for x, _ in extras), *out_shape]
    return pl.pallas_call(
      functools.partial(self._kernel, epilogue),
      out_shape=out_shape,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(num_tiles_n, tiles.count),
        in_specs=[lhs_spec, rhs_spec, *(spec for _, spec in extras)],
        out_specs=[spec for _, spec in outs],
      ),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
      ),
      cost_estimate=pl.CostEstimate(
        flops=2 * self.m * self.k * self.n,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        transcendentals=self.m * self.n if "gelu" in self.operation else 0,
      ),
      interpret=interpret,
      name=f"grouped_{self.operation}",
    )(tiles.group, tiles.row, self.lhs, self.rhs, *(array for array, _ in extras))

  def _kernel(
    self, epilogue: Callable[..., None], group: Any, row: Any, lhs: Any, rhs: Any, *blocks: Any
  ) -> None:
    del group, row
    step_n = self.tiling.step_n
    contract = (((1,), (1 if self.is_transposed else 0,)), ((), ()))

    def step(i: Any, _: None) -> None:
      columns = pl.ds(i * step_n, step_n)
      product = jax.lax.dot_general(
        lhs[...],
        rhs[columns, :] if self.is_transposed else rhs[:, columns],
        contract,
        precision=matmul_precision(lhs.dtype),
        preferred_element_type=jnp.float32,
      )
      epilogue(product, i, columns, *blocks)

    num_steps = self.tiling.tile_n // step_n
    if num_steps == 1:
      step(0, None)
    else:
      jax.lax.fori_loop(0, num_steps, step, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Visits:
  """What each grid step works on: int32 arrays over steps, of which the first `count` are run."""

  count: jax.Array
  group: jax.Array
  row: jax.Array  # Index of the row tile.
  used: jax.Array  # Rows of the group from the tile's first on; may exceed the tile.


def _visits(
  starts: jax.Array, group_sizes: jax.Array, num_tiles: int, tile_m: int, *, visit_empty: bool
) -> _Visits:
  """Return the row tiles that hold rows, in order; `visit_empty`: and one step per empty group."""
  steps_of = (group_sizes + tile_m - 1) // tile_m
  if visit_empty:
    steps_of = jnp.maximum(steps_of, 1)
  last = jnp.cumsum(steps_of)
  first = last - steps_of
  step = jnp.arange(num_tiles + (len(group_sizes) if visit_empty else 0), dtype=jnp.int32)[:, None]
  belongs = (first <= step) & (step < last)

  def of_group(values: jax.Array) -> jax.Array:
    return jnp.where(belongs, values, 0).sum(1)  # A table this small: faster than a gather.

  group = of_group(jnp.arange(len(group_sizes), dtype=jnp.int32))
  row = of_group(starts // tile_m - first + step)
  used = of_group(group_sizes - (step - first) * tile_m)
  # An empty group's start is that of the next group, whose first tile is then fetched once; the
  # last ones may start at the end of the array.
  row = jnp.minimum(row, num_tiles - 1)
  return _Visits(count=jnp.maximum(last[-1], 1), group=group, row=row, used=used)


def _gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return gelu(x) = x (1 + tanh z) / 2, z = sqrt(2/pi) (x + 0.044715 x^3), and its derivative.

  With h = (1 + tanh z) / 2: gelu = x h, gelu' = h + 2 x h (1 - h) dz/dx.
  """
  slope = _GELU_SLOPE + _GELU_CUBIC * (x * x)  # z / x; dz/dx = 3 slope - 2 _GELU_SLOPE.
  h = 0.5 + 0.5 * jnp.tanh(x * slope)
  gelu = x * h
  return gelu, h + gelu * (1 - h) * (6 * slope - 4 * _GELU_SLOPE)


def _column(row: jax.Array) -> jax.Array:
  """Return [m, 1] of [1, m]: values that lie along lanes, along sublanes."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _row_sums(x: jax.Array) -> jax.Array:
  """Return [1, m]: the sums of the rows of x [m, n]; adds registers before it transposes them."""
  num_columns = x.shape[1]
  if num_columns % LANES == 0:
    parts = [x[:, i : i + LANES] for i in range(0, num_columns, LANES)]
    x = functools.reduce(jnp.add, parts)
  return x.T.sum(0, keepdims=True)


def _tiling(
  operation: Operation,
  dtype: jax.typing.DTypeLike,
  shape: tuple[int, int, int, int],
  alignment: int,
  tiling: Tiling | None,
) -> Tiling:
  """Return the tiling to use, the given before the tuned before the default one."""
  if jnp.dtype(dtype).name not in _PRODUCT_LIMIT:
    names = ", ".join(_PRODUCT_LIMIT)
    raise NotImplementedError(f"{operation} in {jnp.dtype(dtype).name}: use {names}, or xla")
  if tiling is None:
    fields = tuning.lookup(f"grouped_matmul.{operation}", dtype, shape)
    tiling = Tiling(**fields) if fields else default_tiling(operation, dtype, shape, alignment)
  # A tuned entry holds for similar numbers of rows, whose alignment may be smaller.
  return dataclasses.replace(tiling, tile_m=min(tiling.tile_m, alignment))


def _fitting(
  operation: Operation,
  dtype: jax.typing.DTypeLike,
  shape: tuple[int, int, int, int],
  alignment: int,
) -> tuple[Tiling, ...]:
  """Return all tilings that fit VMEM, the cheapest first."""
  _, k, n, _ = shape
  is_outer = operation == "outer"
  exact = operation == "matmul_gelu_backward"  # Sums over columns: none beyond the array's.
  found: list[Tiling] = []
  rows = alignment
  # Below 128 rows the matrix unit idles: only for matrices that leave no room for more.
  while rows >= min(alignment, 128) or (rows >= 8 and not found):
    for tile_k in _tile_sizes(k, exact=False) if is_outer else (k,):
      for tile_n in _tile_sizes(n, exact=exact):
        step_n = _step(operation, dtype, rows, tile_k, tile_n)
        if step_n and _block_bytes(operation, dtype, rows, tile_k, tile_n) <= _BLOCKS_LIMIT:
          found.append(Tiling(tile_m=rows, tile_k=tile_k, tile_n=tile_n, step_n=step_n))
    rows //= 2
  return tuple(sorted(found, key=functools.partial(_cost, operation, dtype, shape)))


def _tile_sizes(size: int, *, exact: bool) -> Iterator[int]:
  """Yield sizes of blocks: all of `size`, and multiples of 128 (dividing it, if `exact`)."""
  yield size
  tiled = size % LANES == 0
  for tile in range(LANES, size, LANES):
    if size % tile == 0 or not (exact or tiled or tile & (tile - 1)):
      yield tile


def _step(
  operation: Operation, dtype: jax.typing.DTypeLike, tile_m: int, tile_k: int, tile_n: int
) -> int:
  """Return the most columns of one product that keep its code short; 0 if there are none."""
  limit = _PRODUCT_LIMIT[jnp.dtype(dtype).name] // (tile_m * tile_k)
  if operation == "outer":
    return tile_n if tile_n <= limit else 0
  return max((s for s in _tile_sizes(tile_n, exact=True) if s <= limit), default=0)


def _block_bytes(
  operation: Operation, dtype: jax.typing.DTypeLike, tile_m: int, tile_k: int, tile_n: int
) -> int:
  """Return the VMEM of all blocks, each double-buffered."""
  itemsize = jnp.dtype(dtype).itemsize
  if operation == "outer":
    return 2 * (tile_m * (tile_k + tile_n) * itemsize + tile_k * tile_n * 4)
  columns = _COLUMN_BLOCKS[operation]
  return 2 * itemsize * (tile_m * tile_k + tile_k * tile_n + columns * tile_m * tile_n)


def _num_blocks(operation: Operation, shape: tuple[int, int, int, int], tiling: Tiling) -> int:
  _, k, n, _ = shape
  return pl.cdiv(n, tiling.tile_n) * (pl.cdiv(k, tiling.tile_k) if operation == "outer" else 1)


def _cost(
  operation: Operation,
  dtype: jax.typing.DTypeLike,
  shape: tuple[int, int, int, int],
  tiling: Tiling,
) -> tuple[int, ...]:
  """Return a sort key: work of the matrix unit, short bodies, elements read per row, grid steps."""
  _, k, n, _ = shape
  tiles_n = pl.cdiv(n, tiling.tile_n)
  # The matrix unit of a v6e or tpu7x takes 256 columns at a time.
  columns = tiles_n * (tiling.tile_n // tiling.step_n) * pl.cdiv(tiling.step_n, 256) * 256
  body = tiling.tile_m * tiling.tile_k * tiling.step_n
  is_short = body < _PRODUCT_LIMIT[jnp.dtype(dtype).name] // 3
  read = tiles_n * k + (pl.cdiv(k, tiling.tile_k) * n if operation == "outer" else 0)
  return columns, is_short, read, -tiling.tile_m, -tiling.step_n


def _num_cores() -> int:
  """Return the TensorCores that share one device of the mesh in context; 2, if it does not say."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return 2 if device is None or device.num_cores is None else device.num_cores
