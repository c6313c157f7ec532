"""Copies of key blocks that permute their keys on the way (gpu_scan says how and why).

The tensor memory accelerator can write a block's keys in any order that a five-dimensional box
describes, so that permuting costs nothing; Pallas cannot express it. Barriers of Pallas cannot be
handed to inlined Mosaic GPU code: these copies bring their own, pairs of words in shared memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import launch_context
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm

from pallas_kernels.stick_breaking.gpu_scan import KEYS, LANES

COLUMNS = 64  # 128 bytes of bf16, the widest swizzle.
TRANSFORMS = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(128))
_SCALAR = plgpu.Layout.WG_SPLAT(())
_PERMUTE = launch_context.TransposeTransform((1, 0, 2, 3))


def inline(*, arg_types: Any, return_type: Any = None) -> Callable[[Any], Callable[..., Any]]:
  """Return plgpu.inline_mgpu with types."""
  return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)


def permutable(x: jax.Array) -> jax.Array:
  """Return keys or values [b, t, h, d], t a multiple of 64, as a copy of blocks takes them."""
  b, t, h, d = x.shape
  return x.reshape(b * t // KEYS, LANES, KEYS // LANES // 2, 2, h, d)


def barriers(count: int) -> Any:
  """Return the scratch type of barriers for copies."""
  return plgpu.SMEM((2 * count,), jnp.int32)


def _barrier(words: Any, index: Any) -> mgpu_utils.BarrierRef:
  base = mgpu_utils.memref_ptr(words)
  # Waits name their phase: the phases that a BarrierRef can keep are not used.
  return mgpu_utils.BarrierRef(base, index, None, 1)  # type: ignore[arg-type]


def _scalar(array: Any) -> Any:
  return array.registers.flat[0]


def init(*barriers: Any) -> None:
  """Make barriers usable; for all threads of the block, before any other use."""

  @inline(arg_types=(plgpu.RefType(),) * len(barriers))
  def apply(_: Any, *barriers: Any) -> None:
    i32 = ir.IntegerType.get_signless(32)
    one = mgpu_utils.c(1, i32)
    leader = mgpu_utils.single_thread_predicate()
    for words in barriers:
      for i in range(ir.MemRefType(words.type).shape[0] // 2):
        barrier = _barrier(words, mgpu_utils.c(i, i32))
        nvvm.mbarrier_init(barrier.get_ptr(), one, predicate=leader)
    nvvm.fence_mbarrier_init()
    gpu.barrier()

  apply(*barriers)


def load(source: Any, block: Any, head: Any, destination: Any, words: Any, index: Any) -> None:
  """Begin to copy keys; for one warpgroup.

  Args:
    source: global [blocks, 4, 8, 2, h, d], see `permutable`.
    block: first block; destination: shared [d / 64, keys, 64], keys a multiple of 64.
    words, index: the barrier that the copy completes.
  """
  halves, keys, _ = destination.shape
  ref = plgpu.RefType()
  tiled = plgpu.RefType(TRANSFORMS)

  @inline(arg_types=(ref, tiled, ref, _SCALAR, _SCALAR, _SCALAR))
  def apply(
    ctx: Any, source: Any, destination: Any, words: Any, block: Any, head: Any, index: Any
  ) -> None:
    barrier = _barrier(words, _scalar(index))
    leader = mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARPGROUP)
    barrier.arrive_expect_tx(halves * keys * COLUMNS * 2, predicate=leader)
    for half in range(halves):
      for i in range(keys // KEYS):
        rows = mgpu_utils.memref_slice(destination, (half, mgpu_utils.ds(i * 8, 8), 0))
        this = arith.addi(_scalar(block), mgpu_utils.c(i, _scalar(block).type))
        ctx.async_copy(
          src_ref=source,
          dst_ref=mgpu_utils.memref_unfold(rows, 1, (LANES, 2)),
          gmem_slice=_box(this, _scalar(head), half),
          gmem_transform=_PERMUTE,
          barrier=barrier,
          arrive=False,
          swizzle=128,
          predicate=leader,
        )

  apply(source, destination, words, jnp.int32(block), jnp.int32(head), jnp.int32(index))


def store(source: Any, destination: Any, block: Any, head: Any) -> None:
  """Begin to write one block of 64 keys to where `load` takes it from; for one warpgroup.

  `plgpu.wait_smem_to_gmem` waits for it.
  """
  halves = source.shape[0]

  @inline(arg_types=(plgpu.RefType(TRANSFORMS), plgpu.RefType(), _SCALAR, _SCALAR))
  def apply(ctx: Any, source: Any, destination: Any, block: Any, head: Any) -> None:
    for half in range(halves):
      rows = mgpu_utils.memref_slice(source, (half, slice(None), 0))
      ctx.async_copy(
        src_ref=mgpu_utils.memref_unfold(rows, 1, (LANES, 2)),
        dst_ref=destination,
        gmem_slice=_box(_scalar(block), _scalar(head), half),
        gmem_transform=_PERMUTE,
        swizzle=128,
        predicate=mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARPGROUP),
      )

  apply(source, destination, jnp.int32(block), jnp.int32(head))


def _box(block: Any, head: Any, half: int) -> tuple[Any, ...]:
  """Return where 64 columns of a block of keys lie in `permutable` keys."""
  indices = ir.IndexType.get()
  every = (slice(None),) * 3
  columns = mgpu_utils.ds(half * COLUMNS, COLUMNS)
  return arith.index_cast(indices, block), *every, arith.index_cast(indices, head), columns


def wait(words: Any, index: Any, phase: Any) -> None:
  """Wait until the phase-th copy (from 0) on a barrier is complete."""

  @inline(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR))
  def apply(_: Any, words: Any, index: Any, parity: Any) -> None:
    i1 = ir.IntegerType.get_signless(1)
    barrier = _barrier(words, _scalar(index))
    barrier.wait_parity(arith.trunci(i1, _scalar(parity)))

  apply(words, jnp.int32(index), lax.bitwise_and(jnp.int32(phase), jnp.int32(1)))


def arrive(words: Any, index: Any) -> None:
  """Complete a barrier without a copy; for one warpgroup."""

  @inline(arg_types=(plgpu.RefType(), _SCALAR))
  def apply(_: Any, words: Any, index: Any) -> None:
    leader = mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARPGROUP)
    _barrier(words, _scalar(index)).arrive(predicate=leader)

  apply(words, jnp.int32(index))


@dataclasses.dataclass(frozen=True)
class Ring:
  """Slots for blocks of keys and of values, with barriers in both directions.

  A thread block may hold several rings, which share nothing. Consumers may leave before the last
  step: a consumer that does says so in `exits`, and the producer, once all have, notes there the
  step that it does not issue. No copy is then on its way when the block ends.
  """

  k: Any
  v: Any
  k_full: Any
  v_full: Any
  k_free: Any
  v_free: Any
  exits: Any  # int32 per ring [1 + consumers]: steps that are issued; whether a consumer has left.
  count: int = 1  # Of rings.
  index: Any = 0  # Of this ring.

  @staticmethod
  def scratch(
    stages: int, halves: int, keys: int, dtype: Any, consumers: int, count: int = 1
  ) -> tuple[Any, ...]:
    """Return the scratch types of the first seven fields; `consumers` are those of each ring."""
    slots = count * stages
    tile = plgpu.SMEM((slots, halves, keys, COLUMNS), dtype, transforms=TRANSFORMS)
    free = plgpu.Barrier(num_arrivals=consumers, num_barriers=slots)
    exits = plgpu.SMEM((count * (1 + consumers),), jnp.int32)
    return tile, tile, barriers(slots), barriers(slots), free, free, exits

  @property
  def _stages(self) -> int:
    return int(self.k.shape[0]) // self.count

  @property
  def _limit(self) -> Any:
    """Return where `exits` holds the steps of this ring, its consumers after it."""
    return self.index * (self.exits.shape[0] // self.count)

  def slot(self, step: jax.Array) -> jax.Array:
    return lax.rem(step, jnp.int32(self._stages)) + self.index * self._stages

  def init(self, steps: jax.Array | None = None) -> None:
    """Prepare all rings; for all threads of the block.

    Args:
      steps: how many there are at most where consumers may leave; None: they never do.
    """
    if steps is not None:
      size = self.exits.shape[0] // self.count
      for i in range(self.exits.shape[0]):
        self.exits[i] = steps if i % size == 0 else jnp.int32(0)
    init(self.k_full, self.v_full)

  def wait_k(self, step: jax.Array) -> None:
    wait(self.k_full, self.slot(step), lax.div(step, jnp.int32(self._stages)))

  def wait_v(self, step: jax.Array) -> None:
    wait(self.v_full, self.slot(step), lax.div(step, jnp.int32(self._stages)))

  def release_k(self, step: jax.Array) -> None:
    """Tell the producer that this consumer has read the keys of a step."""
    plgpu.barrier_arrive(self.k_free.at[self.slot(step)])

  def release_v(self, step: jax.Array) -> None:
    """Tell the producer that this consumer has read the values of a step."""
    plgpu.barrier_arrive(self.v_free.at[self.slot(step)])

  def leave(self, consumer: jax.Array) -> None:
    """Say that a consumer needs no more steps; before it releases its last."""
    self.exits[self._limit + 1 + consumer] = jnp.int32(1)

  def pass_on(self, step: jax.Array) -> None:
    """Let a step pass that a consumer has no use for."""
    self.wait_k(step)
    self.wait_v(step)
    self.release_k(step)
    self.release_v(step)

  def drain(self, step: jax.Array) -> None:
    """Let the steps from `step` on pass until the producer has stopped; for a consumer."""

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      step, _ = state
      self.wait_k(step)
      limit = self.exits[self._limit]

      @pl.when(step < limit)
      def pass_on() -> None:
        self.wait_v(step)
        self.release_k(step)
        self.release_v(step)

      return step + 1, limit

    lax.while_loop(lambda state: state[0] < state[1], body, (step, self.exits[self._limit]))

  def produce(
    self, steps: jax.Array, load_k: Callable[..., None], load_v: Callable[..., None]
  ) -> None:
    """Issue all steps; load_k(step, destination, barrier, index), load_v alike."""

    def body(step: jax.Array, _: None) -> None:
      self._load(step, self.k, self.k_full, self.k_free, load_k)
      self._load(step, self.v, self.v_full, self.v_free, load_v)

    lax.fori_loop(jnp.int32(0), steps, body, None)

  def produce_until_left(
    self, steps: jax.Array, load_k: Callable[..., None], load_v: Callable[..., None]
  ) -> None:
    """Issue steps until all consumers have left."""

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      step, _ = state
      slot = self.slot(step)

      @pl.when(step >= self._stages)
      def wait_free() -> None:
        plgpu.barrier_wait(self.k_free.at[slot])
        plgpu.barrier_wait(self.v_free.at[slot])

      consumers = range(1, self.exits.shape[0] // self.count)
      left = functools.reduce(lax.min, [self.exits[self._limit + i] for i in consumers])
      left = any_thread(left)

      @pl.when(left == 1)
      def stop() -> None:
        self.exits[self._limit] = step
        arrive(self.k_full, slot)

      @pl.when(left == 0)
      def issue() -> None:
        load_k(step, self.k.at[slot], self.k_full, slot)
        load_v(step, self.v.at[slot], self.v_full, slot)

      return step + 1, left

    lax.while_loop(
      lambda state: (state[0] < steps) & (state[1] == 0), body, (jnp.int32(0), jnp.int32(0))
    )

  def _load(self, step: jax.Array, ring: Any, full: Any, free: Any, load: Any) -> None:
    slot = self.slot(step)

    @pl.when(step >= self._stages)
    def _() -> None:
      plgpu.barrier_wait(free.at[slot])

    load(step, ring.at[slot], full, slot)


def any_thread(flag: jax.Array) -> jax.Array:
  """Return int32 1 if the int32 flag is not 0 for any thread of this warpgroup, else 0."""
  scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR)

  @inline(arg_types=(_SCALAR,), return_type=scalar)
  def apply(_: Any, flag: Any) -> Any:
    value = warpgroup_any(_scalar(flag))
    return mgpu.FragmentedArray.splat(value, (), is_signed=True)

  return apply(flag)


def warpgroup_any(flag: Any) -> Any:
  """Return the i32 1 if an i32 is not 0 for any thread of the warpgroup, else 0."""
  i32 = ir.IntegerType.get_signless(32)
  # Barrier 0 is the block's; Mosaic GPU gives warpgroup i the barrier i + 1.
  index = arith.addi(mgpu_utils.warpgroup_idx(sync=False), mgpu_utils.c(1, i32))
  text = (
    "{ .reg .pred p, q; setp.ne.s32 p, $1, 0; "
    f"bar.red.or.pred q, $2, {mgpu_utils.WARPGROUP_SIZE}, p; selp.s32 $0, 1, 0, q; }}"
  )
  return llvm.inline_asm(i32, [flag, index], text, "=r,r,r", has_side_effects=True)
