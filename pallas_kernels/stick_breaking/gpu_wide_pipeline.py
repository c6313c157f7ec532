"""Sizes, and the pipeline that the kernels of wide stick-breaking attention on Hopper share.

Two warpgroups compute, a third one loads, through a ring of stages in shared memory with a barrier
for each stage's filling and one for its release. A tile row is one slot and ROWS positions; its
weights are in memory up to the diagonal, and from its first live chunk of CHUNK keys.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

ROWS = 128
CHUNK = 256
HALF = CHUNK // 2
STEP = 64  # Contracted at a time: 128 bytes of bf16, the widest swizzle.
WARPGROUPS = 2
LOADER_REGISTERS = 24
COMPUTE_REGISTERS = 240
TRANSFORMS = (plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(128))


Ref = Any  # Mosaic GPU's references have no common public type.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """How a kernel pipelines.

  tile_rows: how many a thread block that walks keys takes: a long and a short one, or 1.
  product_stages: how deep products with weights load ahead; 4 leave less room for their results.
  """

  tile_rows: int = 2
  product_stages: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Sizes of a call, padded: queries to ROWS, keys to CHUNK. Query i sits at key `history` + i."""

  batch: int
  num_queries: int
  num_keys: int
  history: int
  slots: int
  heads: int
  dim: int

  @property
  def num_q_tiles(self) -> int:
    return self.num_queries // ROWS

  @property
  def num_rows(self) -> int:
    """Tile rows: row r is tile r // slots of slot r % slots."""
    return self.num_q_tiles * self.slots

  @property
  def num_chunks(self) -> int:
    return self.num_keys // CHUNK

  @property
  def num_halves(self) -> int:
    return self.num_keys // HALF

  @property
  def weights_shape(self) -> tuple[int, ...]:
    return (self.batch, self.heads, self.slots, self.num_queries, self.num_keys)

  def visible_halves(self, tile: jax.Array | np.ndarray) -> jax.Array:
    """Return how many halves of chunks hold keys up to a tile's last position."""
    return jnp.minimum((tile * ROWS + (ROWS - 1 + self.history)) // HALF + 1, self.num_halves)


def compiler_params() -> plgpu.CompilerParams:
  return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def transposed(ref: Ref) -> Ref:
  if jax.__version_info__ < (0, 11):
    return plgpu.transpose_ref(ref, (1, 0))
  return ref.transpose((1, 0))


def fill(step: jax.Array, num_stages: int, free: Ref, copies: Callable[[jax.Array], None]) -> None:
  """Fill the stage of a step by `copies` of its index as soon as its last use is over."""
  stage = lax.rem(step, num_stages)

  @pl.when(step >= num_stages)
  def _() -> None:
    plgpu.barrier_wait(free.at[stage])

  copies(stage)


def finish(step: jax.Array, num_stages: int, free: Ref) -> None:
  """Wait until the last stages that were filled are free, too."""

  def body(i: jax.Array, _: None) -> None:
    plgpu.barrier_wait(free.at[lax.rem(i, num_stages)])

  lax.fori_loop(jnp.maximum(step - num_stages, 0), step, body, None)


def accumulate(
  first: jax.Array,
  num_steps: jax.Array | int,
  num_stages: int,
  barriers: tuple[Ref, Ref],
  product: Callable[[jax.Array, jax.Array], None],
) -> None:
  """Issue `product` of the stage of each step; a stage is freed one step after its product."""
  full, free = barriers

  def body(i: jax.Array, _: None) -> None:
    stage = lax.rem(first + i, num_stages)
    plgpu.barrier_wait(full.at[stage])
    product(stage, i)
    plgpu.wgmma_wait(1)

    @pl.when(i > 0)
    def free_stage_before() -> None:
      plgpu.barrier_arrive(free.at[lax.rem(first + i - 1, num_stages)])

  lax.fori_loop(0, num_steps, body, None)
  plgpu.wgmma_wait(0)

  @pl.when(num_steps > 0)
  def free_stage() -> None:
    plgpu.barrier_arrive(free.at[lax.rem(first + num_steps - 1, num_stages)])
