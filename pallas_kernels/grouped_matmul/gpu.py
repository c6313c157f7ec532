"""Grouped matmul for Hopper GPUs in bf16: Pallas Mosaic GPU kernels.

See the package's legend for the layout of rows. Groups start at multiples of the row tile, so a
tile never holds rows of two groups, and whole tiles are stored.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.grouped_matmul import gpu_kernels as kernels
from pallas_kernels.grouped_matmul import gpu_pipeline as pipeline
from pallas_kernels.grouped_matmul.gpu_kernels import UNIT, Place
from pallas_kernels.grouped_matmul.gpu_pipeline import STEP, Ref, Tiling

TILE_M = TILE_N = 128
SPLIT_TILE_N = 256
LARGE_MATRIX = 16 * 2**20  # Bytes from which on consumers split tiles.
LARGE_RESULT = 4 * 2**20  # The same of `outer`,
LONG_GROUP = 2048  # and rows of the mean group.
L2_SHARE = 24 * 2**20  # Bytes of a group's matrix that stay in the L2 cache beside other traffic.
GELU_SCALE = 0.7978845608028654  # sqrt(2 / pi)
GELU_CUBIC = 0.044715
RESERVED = 3072  # Bytes of shared memory for barriers and small slots, each rounded up to 1024.
LOG2_E = 1.4426950408889634


def row_alignment(num_rows: int, num_groups: int) -> int:
  """Return the multiple at which groups start: the row tile that suits the mean group."""
  return 128 if num_rows >= 128 * num_groups else 64


def matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  starts: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  transpose_rhs: bool,
  tiling: Tiling | None = None,
) -> jax.Array:
  """Return [m, n]: lhs [m, k] times rhs [g, k, n] (or [g, n, k], transposed) of the row's group.

  Raises:
    NotImplementedError: another dtype than bf16, or k or n not a multiple of 64 or 128.
  """
  name = "transposed" if transpose_rhs else "matmul"
  n = rhs.shape[1] if transpose_rhs else rhs.shape[2]
  tiling = _resolve(name, tiling, lhs, rhs, n, alignment)
  [out] = kernels.by_rows(
    lhs,
    rhs,
    (),
    starts,
    group_sizes,
    [jax.ShapeDtypeStruct((lhs.shape[0], n), lhs.dtype)],
    Write(),
    transpose_rhs=transpose_rhs,
    tiling=tiling,
  )
  return out


def matmul_gelu(
  lhs: jax.Array,
  rhs: jax.Array,
  starts: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Return hidden [m, n] = lhs [m, k] times rhs [g, k, n] and gelu_tanh of it.

  Raises:
    NotImplementedError: as `matmul`.
  """
  n = rhs.shape[2]
  tiling = _resolve("matmul_gelu", tiling, lhs, rhs, n, alignment)
  out = jax.ShapeDtypeStruct((lhs.shape[0], n), lhs.dtype)
  hidden, activation = kernels.by_rows(
    lhs,
    rhs,
    (),
    starts,
    group_sizes,
    [out, out],
    WriteGelu(),
    transpose_rhs=False,
    tiling=tiling,
  )
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return the gradients through a weighted expert's second product and its gelu_tanh.

  Args:
    dy: [m, d] gradient of the rows' results. w_out: [g, f, d] second matrices.
    hidden: [m, f] input of the activation. row_weights: float32 [m].

  Returns:
    With u = dy . w_out^T: d_hidden [m, f] = gelu'(hidden) * row_weights * u; weighted [m, f] =
    gelu(hidden) * row_weights; float32 [m], the sum over f of gelu(hidden) * u.

  Raises:
    NotImplementedError: as `matmul`.
  """
  m, f = hidden.shape
  tiling = _resolve("matmul_gelu_backward", tiling, dy, w_out, f, alignment)
  out = jax.ShapeDtypeStruct((m, f), dy.dtype)
  parts = jax.ShapeDtypeStruct((f // tiling.tile_n, m), jnp.float32)
  d_hidden, weighted, sums = kernels.by_rows(
    dy,
    w_out,
    (hidden, row_weights),
    starts,
    group_sizes,
    [out, out, parts],
    WriteGeluBackward(),
    transpose_rhs=True,
    tiling=tiling,
  )
  return d_hidden, weighted, jnp.sum(sums, axis=0)


def outer(
  lhs: jax.Array,
  rhs: jax.Array,
  starts: jax.Array,
  group_sizes: jax.Array,
  *,
  alignment: int,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  tiling: Tiling | None = None,
) -> jax.Array:
  """Return [g, k, n]: per group the sum over its rows of lhs [m, k]^T times rhs [m, n].

  The sum is float32 and rounded once, to `out_dtype`. Where rows hold an infinity it may be NaN
  instead of infinite.

  Raises:
    NotImplementedError: another dtype than bf16, or k or n not a multiple of 128.
  """
  (m, k), n, g = lhs.shape, rhs.shape[1], group_sizes.shape[0]
  _check(lhs.dtype, rhs.dtype, alignment)
  if k % TILE_N or n % TILE_N:
    raise NotImplementedError(
      f"the GPU kernel of grouped_outer needs k and n that are multiples of {TILE_N}; got k={k}, "
      f"n={n}: use xla"
    )
  if tiling is None:
    fields = tuning.lookup("grouped_matmul.outer", lhs.dtype, (m, k, n, g))
    tiling = Tiling(**fields) if fields else outer_tiling(m, k, n, g)
  if k % (tiling.tile_m * tiling.cluster) or n % (tiling.tile_n * tiling.panel):
    raise ValueError(f"{tiling} does not divide the results of grouped_outer, {k} x {n}")
  return kernels.by_groups(lhs, rhs, starts, group_sizes, out_dtype=out_dtype, tiling=tiling)


def default_tiling(operation: str, alignment: int, k: int, n: int) -> Tiling:
  """Return a good tiling of an operation by rows."""
  if _can_split(operation, alignment, n) and 2 * k * n >= LARGE_MATRIX:
    return split_tiling(n)
  return turns_tiling(operation, alignment, k, n)


def turns_tiling(operation: str, alignment: int, k: int, n: int) -> Tiling:
  """Return a good tiling by rows with consumers that take turns: as many slots as memory holds."""
  slice_bytes = 2 * STEP * (alignment + TILE_N)
  units = 4 if operation == "matmul_gelu_backward" else 2
  slot_bytes = 2 * UNIT * UNIT * pipeline.CONSUMERS * units
  stages = min(8, (pipeline.SHARED_MEMORY - RESERVED - slot_bytes) // slice_bytes)
  panel = _panel(L2_SHARE // (2 * k * TILE_N), n // TILE_N)
  return Tiling(tile_m=alignment, tile_n=TILE_N, stages=stages, panel=panel, cluster=1)


def split_tiling(n: int, panel: int = 11, cluster: int = 2) -> Tiling:
  """Return a good tiling with consumers that split tiles, n a multiple of their width.

  The panel is lowered to what parts the tiles evenly.
  """
  return Tiling(
    tile_m=TILE_M,
    tile_n=SPLIT_TILE_N,
    stages=4,
    panel=_panel(panel, n // SPLIT_TILE_N),
    cluster=cluster,
    split=True,
  )


def _can_split(operation: str, alignment: int, n: int) -> bool:
  if operation == "outer":
    return n % SPLIT_TILE_N == 0
  is_plain = operation in ("matmul", "transposed")  # Longer epilogues would not be hidden.
  return is_plain and alignment == TILE_M and n % SPLIT_TILE_N == 0


def outer_tiling(m: int, k: int, n: int, g: int) -> Tiling:
  """Return a good tiling of `outer`.

  Where consumers split tiles, clusters that run together are neighbours along k, which share slices
  of rhs: on an H200 less is read from the L2 cache and, by equal groups, from memory. Where they
  take turns, tiles that run together span about as much of k as of n.
  """
  is_large = 2 * k * n >= LARGE_RESULT and m >= LONG_GROUP * g
  if is_large and n % SPLIT_TILE_N == 0 and k % (2 * TILE_M) == 0:
    return split_tiling(n, panel=1)
  return outer_turns_tiling(k, n)


def outer_turns_tiling(k: int, n: int) -> Tiling:
  """Return a good tiling of `outer` with consumers that take turns."""
  panel = _panel(pipeline.MULTIPROCESSORS * 9 // 8 // (k // TILE_M), n // TILE_N)
  return Tiling(tile_m=TILE_M, tile_n=TILE_N, stages=6, panel=panel, cluster=1)


def _panel(fit: int, tiles_n: int) -> int:
  """Return the widest panel that fits and parts the tiles evenly."""
  return max(w for w in range(1, max(1, min(fit, tiles_n)) + 1) if tiles_n % w == 0)


def candidates(
  operation: str,
  dtype: jax.typing.DTypeLike,
  shape: tuple[int, int, int, int],
  alignment: int,
) -> tuple[Tiling, ...]:
  """Return tilings of an operation worth measuring, the default one first.

  Args:
    operation: as in `tuning.OPERATIONS`, without the module.
    dtype: of the operands. shape: (m, k, n, g). alignment: of the groups.
  """
  _check(jnp.dtype(dtype), jnp.dtype(dtype), alignment)
  m, k, n, g = shape
  is_outer = operation == "outer"
  if is_outer:
    default, turns = outer_tiling(m, k, n, g), outer_turns_tiling(k, n)
  else:
    default = default_tiling(operation, alignment, k, n)
    turns = turns_tiling(operation, alignment, k, n)
  found = [default, turns]
  tiles_n = n // TILE_N
  clusters = (1,) if is_outer and k % (2 * TILE_M) else (1, 2)
  for cluster in clusters:
    for panel in (turns.panel, 4, 8, 11, 16, 22, 32, tiles_n):
      if tiles_n % panel == 0:
        found.append(dataclasses.replace(turns, cluster=cluster, panel=panel))
  if _can_split(operation, alignment, n):
    panels = (1, 2, 4, 8, 11, n // SPLIT_TILE_N)
    found += [split_tiling(n, panel, clusters[-1]) for panel in panels]
  # The first one has as many slots as fit; fewer keep fewer copies in flight.
  found += [dataclasses.replace(turns, stages=turns.stages - fewer) for fewer in (1, 2)]
  return tuple(dict.fromkeys(found))


def _resolve(
  name: str, tiling: Tiling | None, lhs: jax.Array, rhs: jax.Array, n: int, alignment: int
) -> Tiling:
  """Return the given, the measured or the default tiling, after checking the operands.

  A row tile must not hold rows of two groups: it is lowered to the alignment.
  """
  m, k = lhs.shape
  _check(lhs.dtype, rhs.dtype, alignment)
  if k % STEP or n % TILE_N:
    raise NotImplementedError(
      f"the GPU kernel of grouped_matmul needs k and n that are multiples of {STEP} and {TILE_N}; "
      f"got k={k}, n={n}: use xla"
    )
  if tiling is None:
    fields = tuning.lookup(f"grouped_matmul.{name}", lhs.dtype, (m, k, n, rhs.shape[0]))
    tiling = Tiling(**fields) if fields else default_tiling(name, alignment, k, n)
  if tiling.split and not _can_split(name, alignment, n):
    tiling = turns_tiling(name, alignment, k, n)
  if n % (tiling.tile_n * tiling.panel):
    raise ValueError(f"{tiling} does not divide the results of grouped_matmul, {n} wide")
  return dataclasses.replace(tiling, tile_m=min(tiling.tile_m, alignment))


def _check(lhs: Any, rhs: Any, alignment: int) -> None:
  if lhs != jnp.bfloat16 or rhs != jnp.bfloat16:
    raise NotImplementedError(
      f"the GPU kernels of grouped_matmul compute in bfloat16; got {lhs} and {rhs}: use xla"
    )
  if alignment not in (64, 128):
    raise NotImplementedError(
      f"the GPU kernels of grouped_matmul need groups aligned to 64 or 128 rows, as row_alignment "
      f"says; got {alignment}: use xla"
    )


class Write:
  """Epilogue that writes the product."""

  def scratch(self, tiling: Tiling) -> Sequence[Any]:
    """Return slots for results."""
    return [pipeline.store_slots((UNIT, UNIT), jnp.bfloat16)]

  def prefetch(self, place: Place, refs: Sequence[Ref], scratch: Sequence[Ref]) -> None:
    """Load nothing."""

  def finish(
    self, acc: jax.Array, place: Place, refs: Sequence[Ref], scratch: Sequence[Ref]
  ) -> None:
    """Write the tile [m, n]."""
    [slots] = scratch
    for i, unit in enumerate(place.units):
      value = _part(acc, unit).astype(refs[0].dtype)
      pipeline.store(slots.at[place.consumer], i, place.of(refs[0], unit), value)


class WriteGelu(Write):
  """Epilogue that writes the product and its gelu_tanh."""

  def finish(
    self, acc: jax.Array, place: Place, refs: Sequence[Ref], scratch: Sequence[Ref]
  ) -> None:
    """Write both tiles [m, n]."""
    [slots] = scratch
    for i, unit in enumerate(place.units):
      hidden = _part(acc, unit)
      results = zip(refs, (hidden, hidden * _gelu_gate(hidden)[0]), strict=True)
      for j, (ref, value) in enumerate(results):
        value = value.astype(ref.dtype)
        pipeline.store(slots.at[place.consumer], 2 * i + j, place.of(ref, unit), value)


class WriteGeluBackward:
  """Epilogue of `matmul_gelu_backward`: hidden and row_weights come in, three results go out.

  The first rows of hidden are loaded during the products, the others when the results, which take
  the place of the inputs, have been written: the ring gets the memory that this spares.
  """

  def scratch(self, tiling: Tiling) -> Sequence[Any]:
    """Return room for weighted, hidden, the row weights and a barrier of these two."""
    return [
      pipeline.shared((pipeline.CONSUMERS, UNIT, tiling.tile_n), jnp.bfloat16),
      pipeline.shared((pipeline.CONSUMERS, UNIT, tiling.tile_n), jnp.bfloat16),
      plgpu.SMEM((pipeline.CONSUMERS, UNIT), jnp.float32),
      plgpu.Barrier(num_arrivals=2, num_barriers=pipeline.CONSUMERS),
    ]

  def prefetch(self, place: Place, refs: Sequence[Ref], scratch: Sequence[Ref]) -> None:
    """Load the first rows."""
    self._load(place, 0, refs, scratch)

  def _load(self, place: Place, row: int, refs: Sequence[Ref], scratch: Sequence[Ref]) -> None:
    """Load hidden and the row weights from a row of the tile on."""
    _, hidden, weights, loaded = (ref.at[place.consumer] for ref in scratch)
    pipeline.wait_for_stores(0)
    plgpu.copy_gmem_to_smem(place.wide(refs[0], row), hidden, loaded)
    plgpu.copy_gmem_to_smem(place.rows(refs[1], row), weights, loaded)

  def finish(
    self, acc: jax.Array, place: Place, refs: Sequence[Ref], scratch: Sequence[Ref]
  ) -> None:
    """Write d_hidden, weighted and the sums over this tile's columns; these replace the inputs."""
    _, _, d_hidden_ref, weighted_ref, sums_ref = refs
    weighted, hidden, weights, loaded = (ref.at[place.consumer] for ref in scratch)
    for row in range(0, place.num_rows, UNIT):
      if row:
        self._load(place, row, refs, scratch)
      plgpu.barrier_wait(loaded)
      row_weights = plgpu.layout_cast(weights[...], plgpu.Layout.WGMMA.reduce(1))
      row_weights = lax.broadcast_in_dim(row_weights, (UNIT, UNIT), (0,))
      total = jnp.float32(0)
      for column in range(0, place.num_columns, UNIT):
        columns = slice(column, column + UNIT)
        x = plgpu.layout_cast(hidden[:, columns], plgpu.Layout.WGMMA).astype(jnp.float32)
        gate, slope = _gelu_gate(x)
        a, u = x * gate, acc[row : row + UNIT, columns]
        total += jnp.sum(a * u, axis=1)
        # gelu' = gate + x gate', where gate = sigmoid(2 z) and so gate' = (2 z)' gate (1 - gate).
        d_hidden = (gate + a * (1 - gate) * slope) * row_weights * u
        hidden[:, columns] = d_hidden.astype(jnp.bfloat16)
        weighted[:, columns] = (a * row_weights).astype(jnp.bfloat16)
      weights[...] = total
      column_tile = lax.div(place.column, jnp.int32(place.num_columns))
      pipeline.copy_out(
        [
          (hidden, place.wide(d_hidden_ref, row)),
          (weighted, place.wide(weighted_ref, row)),
          (weights, place.rows(sums_ref.at[column_tile], row)),
        ]
      )


def _part(acc: jax.Array, unit: tuple[int, int]) -> jax.Array:
  row, column = unit
  return lax.optimization_barrier(acc[row : row + UNIT, column : column + UNIT])


def _gelu_gate(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return gate and d(2 z)/dx of gelu_tanh(x) = x gate, gate = (1 + tanh(z)) / 2 = sigmoid(2 z).

  z = sqrt(2 / pi) (x + 0.044715 x^3). The reciprocal is the square of a reciprocal square root:
  that is one instruction, a division is many; tanh's fast form is too coarse where gate is small.
  """
  square = x * x
  exponent = x * (square * (-LOG2_E * 2 * GELU_SCALE * GELU_CUBIC) - LOG2_E * 2 * GELU_SCALE)
  root = lax.rsqrt(1 + lax.exp2(exponent))
  return root * root, square * (6 * GELU_SCALE * GELU_CUBIC) + 2 * GELU_SCALE
