"""Tile order and ring of shared memory slots of the grouped matmul kernels for Hopper.

A kernel runs one block per multiprocessor, of three warpgroups. The producer copies slices of the
operands into a ring of slots, tile after tile. Two consumers take turns: each computes every
other tile of the block, so that one writes its result while the other keeps the tensor cores busy.
Or they split: each computes half of the rows of every tile. The tile can then be twice as wide,
which takes a fifth off the traffic of shared memory, and power with it, but nobody multiplies while
they write results, unless they keep them in registers and write them during the next tile's
products. Blocks in clusters of two compute neighbouring tiles along m and share their
slices of rhs.
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
WARPS = 4  # Of a warpgroup.
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
  cluster: int  # Blocks (1 or 2), neighbours along m, that share slices of rhs.
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


def num_clusters(tiling: Tiling) -> int:
  """Return how many clusters fill the device of the mesh in context."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (getattr(device, "num_cores", None) or MULTIPROCESSORS) // tiling.cluster


def launch(tiling: Tiling) -> dict[str, Any]:
  """Return the arguments of `plgpu.kernel` that say what runs."""
  arguments = {
    "grid": (num_clusters(tiling),),
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


def each_warp(function: Callable[[jax.Array], None]) -> None:
  """Run a function of a warp's number in each of a warpgroup's warps."""
  plgpu.warp_map(function)


def in_one_warp(function: Callable[[], None]) -> None:
  """Run a function of a warpgroup in its first warp, the others idle.

  A warpgroup issues everything four times: copying a slice would take as long as its products.
  """
  each_warp(lambda warp: pl.when(warp == 0)(function))


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

  def load(
    self, tile: jax.Array, step: jax.Array, lhs: Ref, rhs: Ref, is_shared: jax.Array | bool = True
  ) -> None:
    """Copy a slice of the block's tile-th tile from global memory, once its slot is free.

    Where all blocks of the cluster need the same slice of rhs, each copies a part of it to all.
    """
    slot = self.slot(step)
    full = self._full(lax.rem(tile, jnp.int32(CONSUMERS)), slot)

    @pl.when(step >= self.tiling.stages)
    def wait() -> None:
      plgpu.barrier_wait(self.empty.at[slot])

    plgpu.copy_gmem_to_smem(lhs, self.lhs.at[slot], full)

    def load_rhs(axes: str | None) -> None:
      plgpu.copy_gmem_to_smem(rhs, self.rhs.at[slot], full, collective_axes=axes)

    if self.tiling.cluster > 1:
      lax.cond(is_shared, lambda: load_rhs("block"), lambda: load_rhs(None))
    else:
      load_rhs(None)

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
    meanwhile: Callable[[jax.Array], None] | None = None,
  ) -> None:
    """Add the products of `num_steps` (at least one) slices, from slice `first` on, to acc.

    `operands` makes views of the slices in a slot, `prepare` may change the i-th slot beforehand.
    `meanwhile` does something else during the i-th product.
    """

    def step(i: jax.Array, _: None) -> None:
      slot = self.slot(first + i)
      plgpu.barrier_wait(self._full(consumer, slot))
      if prepare is not None:
        prepare(i, slot)
      plgpu.wgmma(acc, *operands(self.lhs.at[slot], self.rhs.at[slot]))
      if meanwhile is not None:
        meanwhile(i)
      plgpu.wgmma_wait(1)

      @pl.when(i > 0)
      def release() -> None:
        plgpu.barrier_arrive(self.empty.at[self.slot(first + i - 1)])

    lax.fori_loop(0, num_steps, step, None)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(self.empty.at[self.slot(first + num_steps - 1)])


@dataclasses.dataclass(frozen=True)
class Here:
  """Which cluster of how many, and which block of it, runs this program."""

  clusters: int
  cluster: jax.Array
  block: jax.Array

  @staticmethod
  def find(tiling: Tiling) -> "Here":
    """Ask for it; one warp alone could not."""
    block = lax.axis_index("block") if tiling.cluster > 1 else jnp.int32(0)
    return Here(lax.axis_size("cluster"), lax.axis_index("cluster"), block)

  def num_mine(self, num_cluster_tiles: jax.Array) -> jax.Array:
    """Return how many of cluster tiles that are dealt in turn are this cluster's."""
    left = num_cluster_tiles - self.cluster
    return lax.div(left + self.clusters - 1, jnp.int32(self.clusters))

  def mine(self, i: jax.Array) -> jax.Array:
    """Return the number of this cluster's i-th tile of those."""
    return self.cluster + i * self.clusters


def tile_of(
  index: jax.Array, rows: jax.Array | int, tiling: Tiling, block: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Return (m, n) of a block's tile in the index-th cluster tile; `rows` of these along m.

  The order is panels along n, within one along m, every other reversed. Tiles that run at the same
  time then share few rows and the columns of one panel; the next panel begins with the last rows.
  """
  rows, width = jnp.asarray(rows, jnp.int32), jnp.int32(tiling.panel)
  panel = lax.div(index, rows * width)
  within = index - panel * rows * width
  row = lax.div(within, width)
  n = panel * width + within - row * width
  m = lax.select(lax.rem(panel, jnp.int32(2)) == 0, row, rows - 1 - row)
  return m * tiling.cluster + block if tiling.cluster > 1 else m, n


@dataclasses.dataclass(frozen=True)
class Deal:
  """Which of `total` cluster tiles, numbered by falling length, each cluster computes.

  Tiles are dealt in turn, the first `longest`, all of one length, always in the same direction.
  Clusters that got one of them less then get `extra` tiles each to make up for it. All others are
  dealt in alternating directions, so that no cluster always gets the shorter one.
  """

  here: Here
  total: int
  longest: int
  extra: jax.Array

  @staticmethod
  def left_out(longest: int, clusters: int) -> int:
    """Return how many clusters get one of the first tiles less."""
    return -longest % clusters

  @property
  def _head(self) -> jax.Array:
    """Tiles of this cluster before those dealt in alternating directions."""
    rounds, more = divmod(self.longest, self.here.clusters)
    if not more:
      return jnp.int32(rounds)
    return rounds + lax.select(self.here.cluster < more, jnp.int32(1), self.extra)

  @property
  def _tail(self) -> jax.Array:
    """First of the tiles that are dealt in alternating directions."""
    return self.longest + self.left_out(self.longest, self.here.clusters) * self.extra

  def _place(self, round_: jax.Array) -> jax.Array:
    last = self.here.clusters - 1
    is_even = lax.rem(round_, jnp.int32(2)) == 0
    return lax.select(is_even, self.here.cluster, last - self.here.cluster)

  def num_mine(self) -> jax.Array:
    """Return how many tiles this cluster computes."""
    left = self.total - self._tail
    rounds = lax.div(left, jnp.int32(self.here.clusters))
    is_in_last = self._place(rounds) < left - rounds * self.here.clusters
    return self._head + rounds + is_in_last.astype(jnp.int32)

  def mine(self, i: jax.Array) -> jax.Array:
    """Return the number of this cluster's i-th tile."""
    clusters, cluster = self.here.clusters, self.here.cluster
    rounds, more = divmod(self.longest, clusters)
    ahead = lax.select(
      (i < rounds) | (cluster < more),
      i * clusters + cluster,
      self.longest + (i - rounds) * (clusters - more) + cluster - more,
    )
    round_ = i - self._head
    behind = self._tail + round_ * clusters + self._place(round_)
    return lax.select(round_ < 0, ahead, behind)


def store_slots(shape: tuple[int, int], dtype: jax.typing.DTypeLike) -> Any:
  """Return the scratch type of every consumer's slots for `store`."""
  return shared((CONSUMERS, STORE_ROUNDS, *shape), dtype)


def store(slots: Ref, turn: int, destination: Ref, value: jax.Array) -> None:
  """Write a value to global memory through slots that consecutive turns alternate."""
  wait_for_stores(STORE_ROUNDS - 1)
  slot = slots.at[turn % STORE_ROUNDS]
  slot[...] = value
  copy_out([(slot, destination)])


def wait_for_stores(but: int) -> None:
  """Wait until shared memory has been read by all stores of this consumer but the last few."""
  plgpu.wait_smem_to_gmem(but, wait_read_only=True)


def copy_out(copies: Sequence[tuple[Ref, Ref]]) -> None:
  """Start copies of shared memory just written to global memory; `wait_for_stores` counts one."""
  plgpu.commit_smem()
  for i, (source, destination) in enumerate(copies):
    plgpu.copy_smem_to_gmem(source, destination, commit_group=i == len(copies) - 1)
