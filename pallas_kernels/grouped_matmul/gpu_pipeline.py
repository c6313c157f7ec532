"""Tile order and ring of shared memory slots of the grouped matmul kernels for Hopper.

A kernel runs one block per multiprocessor, of three warpgroups. The producer copies slices of the
operands into a ring of slots, tile after tile. Two consumers take turns: each computes every
other tile of the block, so that one writes its result while the other keeps the tensor cores busy.
Or they split: each computes half of the rows of every tile. The tile can then be twice as wide,
which takes a fifth off the traffic of shared memory, and power with it, but nothing hides the
writing of results. Blocks in clusters of two compute neighbouring tiles along n and share their
slices of lhs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CONSUMERS = 2
PRODUCER_REGISTERS = 40  # Of 504 that three warpgroups share, per thread.
CONSUMER_REGISTERS = 232
STEP = 64  # Contraction per slot of the ring: 128 bytes of bf16, the widest swizzle.
STORE_ROUNDS = 2
SHARED_MEMORY = 227 * 1024
MULTIPROCESSORS = 132  # Of an H100 or H200 SXM; on another device it is only a slower grid.

Ref = Any  # Pallas' references have no public type.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """How a result is cut and computed."""

  tile_m: int
  tile_n: int
  stages: int  # Slots of the ring.
  panel: int  # Tiles along n that are computed side by side before the next tile along m.
  cluster: int  # Blocks (1 or 2) that share slices of lhs.
  split: bool = False  # Whether consumers compute half of every tile, not every other tile.

  @property
  def own_rows(self) -> int:
    """Rows of a tile that one consumer computes."""
    return self.tile_m // CONSUMERS if self.split else self.tile_m

  def own_part(self, warpgroup: jax.Array) -> jax.Array:
    """Return the first of them."""
    return warpgroup * self.own_rows if self.split else jnp.int32(0)

  def own_tiles(self, num_tiles: jax.Array, warpgroup: jax.Array) -> jax.Array:
    """Return how many of a block's tiles a consumer computes."""
    if self.split:
      return num_tiles
    return lax.div(num_tiles + CONSUMERS - 1 - warpgroup, jnp.int32(CONSUMERS))

  def own_tile(self, turn: jax.Array, warpgroup: jax.Array) -> jax.Array:
    """Return the number, in its block, of a consumer's tile."""
    return turn if self.split else turn * CONSUMERS + warpgroup


def launch(tiling: Tiling) -> dict[str, Any]:
  """Return the arguments of `plgpu.kernel` that say what runs."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  blocks = getattr(device, "num_cores", None) or MULTIPROCESSORS
  arguments = {
    "grid": (blocks // tiling.cluster,),
    "grid_names": ("cluster",),
    "num_threads": CONSUMERS + 1,
    "thread_name": "warpgroup",
    "compiler_params": plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      reduction_scratch_bytes=0,  # Sums along n stay within a warp.
    ),
  }
  if tiling.cluster > 1:
    arguments |= {"cluster": (tiling.cluster,), "cluster_names": ("block",)}
  return arguments


def shared(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
  """Return a shared memory scratch type with the layout that wgmma and wide copies want."""
  itemsize = jnp.dtype(dtype).itemsize
  swizzle = min(128, shape[-1] * itemsize)
  transforms = (plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def transpose(ref: Ref) -> Ref:
  """Return the transposed view of a two-dimensional reference; JAX 0.11 renamed the function."""
  if hasattr(ref, "transpose"):
    return ref.transpose((1, 0))
  return plgpu.transpose_ref(ref, (1, 0))


@dataclasses.dataclass(frozen=True)
class Ring:
  """Slots for slices of both operands, with barriers in both directions.

  Slices are numbered through all tiles of the block. A consumer that takes turns sees only its own
  tiles' slices, and a barrier must be seen at each of its phases: hence one set of `full` for each.
  """

  tiling: Tiling
  lhs: Ref
  rhs: Ref
  full: Ref
  empty: Ref

  @staticmethod
  def scratch(
    tiling: Tiling, lhs: tuple[int, int], rhs: tuple[int, int], dtype: jax.typing.DTypeLike
  ) -> tuple[Any, ...]:
    """Return the scratch types of the references, for slices of these shapes."""
    empty: Any
    arrivals = CONSUMERS if tiling.split else 1
    if tiling.cluster > 1:
      empty = plgpu.ClusterBarrier(
        collective_axes=("block",), num_arrivals=arrivals, num_barriers=tiling.stages
      )
    else:
      empty = plgpu.Barrier(num_arrivals=arrivals, num_barriers=tiling.stages)
    return (
      shared((tiling.stages, *lhs), dtype),
      shared((tiling.stages, *rhs), dtype),
      plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS * tiling.stages),
      empty,
    )

  def slot(self, step: jax.Array) -> jax.Array:
    """Return the slot of a slice."""
    return lax.rem(step, jnp.int32(self.tiling.stages))

  def _full(self, consumer: jax.Array, slot: jax.Array) -> Ref:
    return self.full.at[slot if self.tiling.split else consumer * self.tiling.stages + slot]

  def load(self, tile: jax.Array, step: jax.Array, lhs: Ref, rhs: Ref) -> None:
    """Copy a slice of the block's tile-th tile from global memory, once its slot is free."""
    slot = self.slot(step)
    full = self._full(lax.rem(tile, jnp.int32(CONSUMERS)), slot)

    @pl.when(step >= self.tiling.stages)
    def wait() -> None:
      plgpu.barrier_wait(self.empty.at[slot])

    axes = ("block",) if self.tiling.cluster > 1 else None
    plgpu.copy_gmem_to_smem(lhs, self.lhs.at[slot], full, collective_axes=axes)
    plgpu.copy_gmem_to_smem(rhs, self.rhs.at[slot], full)

  def drain(self, num_steps: jax.Array) -> None:
    """Wait until all slices are consumed: a block must not end while its neighbour writes to it."""

    def wait(step: jax.Array, _: None) -> None:
      plgpu.barrier_wait(self.empty.at[self.slot(step)])

    lax.fori_loop(lax.max(num_steps - self.tiling.stages, jnp.int32(0)), num_steps, wait, None)

  def multiply(
    self,
    acc: Ref,
    consumer: jax.Array,
    first: jax.Array,
    num_steps: jax.Array | int,
    operands: Callable[[Ref, Ref], tuple[Ref, Ref]],
    prepare: Callable[[jax.Array, jax.Array], None] | None = None,
  ) -> None:
    """Add the products of `num_steps` (at least one) slices, from slice `first` on, to acc.

    `operands` makes views of the slices in a slot, `prepare` may change the i-th slot beforehand.
    """

    def step(i: jax.Array, _: None) -> None:
      slot = self.slot(first + i)
      plgpu.barrier_wait(self._full(consumer, slot))
      if prepare is not None:
        prepare(i, slot)
      plgpu.wgmma(acc, *operands(self.lhs.at[slot], self.rhs.at[slot]))
      plgpu.wgmma_wait(1)

      @pl.when(i > 0)
      def release() -> None:
        plgpu.barrier_arrive(self.empty.at[self.slot(first + i - 1)])

    lax.fori_loop(0, num_steps, step, None)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(self.empty.at[self.slot(first + num_steps - 1)])


def tile_of(
  index: jax.Array, tiles_m: jax.Array | int, tiling: Tiling
) -> tuple[jax.Array, jax.Array]:
  """Return (m, n) of this block's tile in the index-th cluster tile.

  The order is panels along n, within one along m, every other reversed. Tiles that run at the same
  time then share few rows and the columns of one panel; the next panel begins with the last rows.
  """
  tiles_m = jnp.asarray(tiles_m, jnp.int32)
  width = jnp.int32(tiling.panel // tiling.cluster)
  panel = lax.div(index, tiles_m * width)
  within = index - panel * tiles_m * width
  m = lax.div(within, width)
  n = panel * width + within - m * width
  if tiling.cluster > 1:
    n = n * tiling.cluster + lax.axis_index("block")
  return lax.select(lax.rem(panel, jnp.int32(2)) == 0, m, tiles_m - 1 - m), n


def num_mine(num_cluster_tiles: jax.Array | int) -> jax.Array:
  """Return how many tiles this block computes."""
  clusters = jnp.int32(lax.axis_size("cluster"))
  left = jnp.asarray(num_cluster_tiles, jnp.int32) - lax.axis_index("cluster")
  return lax.div(left + clusters - 1, clusters)


def mine(i: jax.Array) -> jax.Array:
  """Return the number of this block's i-th tile among all tiles of clusters."""
  return lax.axis_index("cluster") + i * jnp.int32(lax.axis_size("cluster"))


def store_slots(num: int, shape: tuple[int, int], dtype: jax.typing.DTypeLike) -> Any:
  """Return the scratch type of every consumer's slots for `store` of `num` values at once."""
  return shared((CONSUMERS, STORE_ROUNDS, num, *shape), dtype)


def store(slots: Ref, turn: int, values: Sequence[tuple[Ref, jax.Array]]) -> None:
  """Write values to references in global memory through slots that consecutive turns alternate."""
  wait_for_stores(STORE_ROUNDS - 1)
  slots = slots.at[turn % STORE_ROUNDS]
  for i, (_, value) in enumerate(values):
    slots.at[i][...] = value
  copy_out([(slots.at[i], destination) for i, (destination, _) in enumerate(values)])


def wait_for_stores(but: int) -> None:
  """Wait until shared memory has been read by all stores of this consumer but the last few."""
  plgpu.wait_smem_to_gmem(but, wait_read_only=True)


def copy_out(copies: Sequence[tuple[Ref, Ref]]) -> None:
  """Start copies of shared memory just written to global memory; `wait_for_stores` counts one."""
  plgpu.commit_smem()
  for i, (source, destination) in enumerate(copies):
    plgpu.copy_smem_to_gmem(source, destination, commit_group=i == len(copies) - 1)
