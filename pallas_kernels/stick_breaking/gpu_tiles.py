"""What the forward and backward kernels for Hopper share: sizes, tiles of queries, masks."""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.stick_breaking import gpu_registers
from pallas_kernels.stick_breaking.gpu_copy import COLUMNS
from pallas_kernels.stick_breaking.gpu_scan import KEYS, ROWS

Ref = Any  # Pallas' references have no public type.
ACC: Any = plgpu.ACC  # type: ignore[attr-defined]  # An accumulator of wgmma.

MAX_CONSUMERS = 2  # Registers allow no more.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24  # Per thread, of 504 that three warpgroups share.
HALF_CONSUMER_REGISTERS = 104  # Of 480 that four consumers and two producers share.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What the kernels know of their operands at trace time."""

  batch: int
  num_queries: int
  num_keys: int  # Without padding.
  num_heads: int  # Of the queries: slots times heads.
  num_kv_heads: int
  dim: int
  dtype: Any

  @property
  def history(self) -> int:
    """Keys before the first query."""
    return self.num_keys - self.num_queries

  @property
  def halves(self) -> int:
    """Pieces of 64 columns of a head."""
    return self.dim // COLUMNS

  @property
  def padded_keys(self) -> int:
    """Keys that keys and values are padded to."""
    return round_up(self.num_keys, KEYS)

  @property
  def covered_keys(self) -> int:
    """Keys that a kernel may read the segments and sticks of."""
    return round_up(self.num_keys, KEYS * MAX_CONSUMERS)

  @property
  def covered_queries(self) -> int:
    """Queries that a kernel may read or write one value per row of."""
    return round_up(self.num_queries, ROWS * MAX_CONSUMERS)

  def tiles(self, rows: int) -> int:
    """Return the number of tiles of `rows` queries."""
    return -(-self.num_queries // rows)


def round_up(size: int, multiple: int) -> int:
  """Return the smallest multiple that is not less than size."""
  return -(-size // multiple) * multiple


def compiler_params() -> plgpu.CompilerParams:
  """Return how all kernels are compiled."""
  return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def transpose(ref: Ref) -> Ref:
  """Return the transposed view of a two-dimensional reference; JAX 0.11 renamed the function."""
  if hasattr(ref, "transpose"):
    return ref.transpose((1, 0))
  return plgpu.transpose_ref(ref, (1, 0))


def load_rows(ref: Ref, *index: Any) -> jax.Array:
  """Load one value per row of a tile from global memory."""
  return _load(ref, index, gpu_registers.ROWS)


def load_square(ref: Ref, *index: Any) -> jax.Array:
  """Load [64, n] in the layout of scores from global memory."""
  return _load(ref, index, gpu_registers.SCORES)


def _load(ref: Ref, index: tuple[Any, ...], layout: Any) -> jax.Array:
  load: Any = plgpu.load  # JAX 0.11 takes the index with the reference.
  if jax.__version_info__ < (0, 11):
    return load(ref, index, layout=layout, optimized=False)
  return load(ref.at[index], layout=layout, optimized=False)


def mask(
  scores: jax.Array, plain: jax.Array, segments: tuple[Ref, Ref], at: tuple[Any, Any, Any, Any]
) -> jax.Array:
  """Return scores [64, n] with those of invisible keys so low that their beta is 0.

  Args:
    plain: whether all keys are in the segment of all queries, so that it need not be looked at.
    segments: global [b, queries] and [b, keys].
    at: batch, first row, position of the first row, first key.
  """
  b, row, position, key = at
  distance = position - key

  def hide_invisible(scores: jax.Array) -> jax.Array:
    rows = load_rows(segments[0], b, pl.ds(row, ROWS))
    return gpu_registers.hide_invisible(scores, distance, rows, segments[1], b, key)

  def hide_later(scores: jax.Array) -> jax.Array:
    crosses = distance < scores.shape[1] - 1
    return lax.cond(
      crosses,
      lambda scores: gpu_registers.hide_later(scores, distance),
      lambda scores: scores,
      scores,
    )

  return lax.cond(plain, hide_later, hide_invisible, scores)


def multiply(acc: Ref, a: Ref, b: Ref, halves: int) -> None:
  """Add a . b^T of two tiles in pieces of 64 columns."""
  for half in range(halves):
    plgpu.wgmma(acc, a.at[half], transpose(b.at[half]))


def copy_halves(source: Ref, at: tuple[Any, Any, Any], tile: Ref, barrier: Ref) -> None:
  """Begin to copy 64 rows of [b, q, n, d] from (batch, row, head) on; one arrival per half."""
  b, row, head = at
  for half in range(tile.shape[0]):
    columns = pl.ds(half * COLUMNS, COLUMNS)
    plgpu.copy_gmem_to_smem(source.at[b, pl.ds(row, ROWS), head, columns], tile.at[half], barrier)


def store_halves(values: list[jax.Array], tile: Ref, out: Ref, at: tuple[Any, Any, Any]) -> None:
  """Write [64, 64] halves to 64 rows of [b, q, n, d] by way of a tile; rows past the end drop."""
  b, row, head = at
  for half, value in enumerate(values):
    tile.at[half][...] = value.astype(tile.dtype)
  plgpu.commit_smem()
  for half in range(len(values)):
    columns = pl.ds(half * COLUMNS, COLUMNS)
    plgpu.copy_smem_to_gmem(tile.at[half], out.at[b, pl.ds(row, ROWS), head, columns])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # The tile is not needed any more.
