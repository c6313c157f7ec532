"""The kernels of wide stick-breaking attention that walk the keys of a tile row, on Hopper.

Each of the two computing warpgroups has half of the row's positions; their running sums pass from
chunk to chunk of keys, from the diagonal leftwards for the weights, and back for their gradients.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.state.types import TransposeTransform  # No public name makes a load permute.

from pallas_kernels.stick_breaking import gpu_wide_scan as scan
from pallas_kernels.stick_breaking.gpu_wide_pipeline import (
  CHUNK,
  COMPUTE_REGISTERS,
  HALF,
  LOADER_REGISTERS,
  ROWS,
  STEP,
  TRANSFORMS,
  WARPGROUPS,
  Ref,
  Shape,
  Tiling,
  accumulate,
  compiler_params,
  fill,
  finish,
  transposed,
)

_NUM_STAGES = 3
_OWN_ROWS = ROWS // WARPGROUPS
_NUM_VOTES = 4 * WARPGROUPS  # Of warps.
_AXES = ("batch_head", "group", "slot")


def _rows_of_zeros(num_rows: int) -> jax.Array:
  return plgpu.layout_cast(jnp.zeros((num_rows,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def permuted(keys: jax.Array, num_keys: int) -> jax.Array:
  """Return [b, t, h, d] as blocks [blocks, 4, num_keys / 8, 2, h * d] that a load can permute."""
  _, _, heads, dim = keys.shape
  return keys.reshape(-1, 4, num_keys // 8, 2, heads * dim)


def _permuting(num_keys: int, num_stages: int) -> Any:
  transforms = (TransposeTransform((0, 2, 1, 3, 4)), plgpu.SwizzleTransform(128))
  shape = (num_stages, 4, num_keys // 8, 2, STEP)
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def _walk_scratch() -> list[Any]:
  """Return stages of rows and of keys, tiles to write, and barriers.

  The views of a stage of keys: to load a permuted half, to load a permuted chunk, to read. The
  views of tiles: halves (of which every other one is used) and chunks.
  """
  return [
    plgpu.SMEM((_NUM_STAGES, ROWS, STEP), jnp.bfloat16, transforms=TRANSFORMS),
    plgpu.RefUnion(
      _permuting(HALF, 2 * _NUM_STAGES),
      _permuting(CHUNK, _NUM_STAGES),
      plgpu.SMEM((_NUM_STAGES, CHUNK, STEP), jnp.bfloat16, transforms=TRANSFORMS),
    ),
    plgpu.RefUnion(
      plgpu.SMEM((2 * WARPGROUPS, _OWN_ROWS, HALF), jnp.bfloat16, transforms=TRANSFORMS),
      plgpu.SMEM((WARPGROUPS, _OWN_ROWS, CHUNK), jnp.bfloat16, transforms=TRANSFORMS),
    ),
    plgpu.Barrier(num_arrivals=2, num_barriers=_NUM_STAGES),
    plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=_NUM_STAGES),
  ]


@dataclasses.dataclass(frozen=True)
class _Walk:
  """The pipeline of a kernel that walks the keys of tile rows, products of rows and keys at hand.

  Its grid is (b * h, tiles or pairs of them, slots).
  """

  shape: Shape
  tiling: Tiling

  @property
  def steps(self) -> int:
    return self.shape.dim // STEP

  @property
  def grid(self) -> tuple[int, int, int]:
    tiles = self.shape.num_q_tiles
    groups = -(-tiles // 2) if self.tiling.tile_rows > 1 else tiles
    return (self.shape.batch * self.shape.heads, groups, self.shape.slots)

  def for_each_tile(
    self, first_ref: Ref, body: Callable[[jax.Array, "_Tile"], jax.Array]
  ) -> jax.Array:
    """Call body(steps so far, tile), which returns its steps, of the block's tiles; return all."""
    bh, group, slot = (lax.axis_index(name) for name in _AXES)
    b, h = lax.div(bh, self.shape.heads), lax.rem(bh, self.shape.heads)
    far = self.shape.num_q_tiles - 1 - group

    def visit(i: jax.Array, step: jax.Array) -> jax.Array:
      q_tile = jnp.where(i == 0, far, group)
      first = first_ref[b, h, q_tile * self.shape.slots + slot]
      halves = self.shape.visible_halves(q_tile)
      tile = _Tile(b, h, slot, q_tile, first, lax.div(halves, 2), lax.rem(halves, 2))
      return step + body(step, tile)

    visits = jnp.where(far == group, 1, 2) if self.tiling.tile_rows > 1 else 1
    return lax.fori_loop(0, visits, visit, jnp.int32(0))

  def load(
    self,
    step: jax.Array,
    tile: "_Tile",
    chunks: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    sources: tuple[Ref, Ref, Ref],
    targets: tuple[Ref, tuple[Ref, Ref, Ref]],
    barriers: tuple[Ref, Ref],
    is_over: Callable[[jax.Array], jax.Array] | None = None,
  ) -> jax.Array:
    """Load rows and keys of every visit and return the number of steps.

    Args:
      step: steps so far.
      tile: the tile row.
      chunks: of a visit, its index of a chunk and whether it is half a chunk.
      sources: [b, q, s, h, d] and `permuted` keys by halves and by chunks.
      targets: stages of rows, views of stages of keys.
      barriers: full and free stages.
      is_over: whether a visit was the last one. By the time this is known, the first
        `steps_ahead` steps of the next visit are on their way.
    """
    rows_ref, halves_ref, chunks_ref = sources
    rows_smem, (half_smem, chunk_smem, _) = targets
    full, free = barriers
    shape = self.shape
    positions = pl.ds(tile.q_tile * ROWS, ROWS)

    def load(n: jax.Array, _: None) -> None:
      chunk, is_half = chunks(lax.div(n, self.steps))
      column = lax.rem(n, self.steps) * STEP

      def copies(stage: jax.Array) -> None:
        source = rows_ref.at[tile.b, positions, tile.slot, tile.h, pl.ds(column, STEP)]
        plgpu.copy_gmem_to_smem(source, rows_smem.at[stage], full.at[stage])
        columns = pl.ds(tile.h * shape.dim + column, STEP)

        @pl.when(is_half)
        def copy_half() -> None:
          source = halves_ref.at[tile.b * shape.num_halves + 2 * chunk, :, :, :, columns]
          plgpu.copy_gmem_to_smem(source, half_smem.at[2 * stage], full.at[stage])

        @pl.when(jnp.logical_not(is_half))
        def copy_chunk() -> None:
          source = chunks_ref.at[tile.b * shape.num_chunks + chunk, :, :, :, columns]
          plgpu.copy_gmem_to_smem(source, chunk_smem.at[stage], full.at[stage])

      fill(step + n, _NUM_STAGES, free, copies)

    num_steps = tile.num_visits * self.steps
    if is_over is None:
      lax.fori_loop(0, num_steps, load, None)
      return num_steps

    def visit(end: jax.Array) -> jax.Array:
      ahead = jnp.minimum(end + self.steps_ahead, num_steps)
      lax.fori_loop(end, ahead, load, None)
      over = is_over(lax.div(end, self.steps) - 1)
      end = jnp.where(over, ahead, end + self.steps)
      lax.fori_loop(ahead, end, load, None)
      return jnp.where(over, end + num_steps, end)

    # Past the end once over: the loop stops, and the excess is taken off again.
    lax.fori_loop(0, self.steps, load, None)
    end = lax.while_loop(lambda end: end < num_steps, visit, jnp.int32(self.steps))
    return jnp.where(end > num_steps, end - num_steps, end)

  def drain(self, step: jax.Array, num_steps: jax.Array, barriers: tuple[Ref, Ref]) -> None:
    """Let steps that nobody needs go by."""
    full, free = barriers

    def body(i: jax.Array, _: None) -> None:
      stage = lax.rem(step + i, _NUM_STAGES)
      plgpu.barrier_wait(full.at[stage])
      plgpu.barrier_arrive(free.at[stage])

    lax.fori_loop(0, num_steps, body, None)

  @property
  def steps_ahead(self) -> int:
    return _NUM_STAGES + 1

  def products(
    self,
    step: jax.Array,
    num_keys: int,
    wg: jax.Array,
    stages: tuple[Ref, tuple[Ref, Ref, Ref]],
    barriers: tuple[Ref, Ref],
    meanwhile: Callable[[], None] | None = None,
  ) -> jax.Array:
    """Return float32 [own rows, num_keys], the products of a visit, and call `meanwhile`."""
    rows_smem, (_, _, keys_smem) = stages
    rows = pl.ds(wg * _OWN_ROWS, _OWN_ROWS)

    def body(acc: Ref) -> jax.Array:
      def product(stage: jax.Array, i: jax.Array) -> None:
        keys = keys_smem.at[stage, pl.ds(0, num_keys)]
        plgpu.wgmma(acc, rows_smem.at[stage, rows], transposed(keys))
        if meanwhile is not None:
          pl.when(i == 1)(meanwhile)

      accumulate(step, self.steps, _NUM_STAGES, barriers, product)
      return acc[...]

    return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((_OWN_ROWS, num_keys), jnp.float32))


class _Tile(NamedTuple):
  """A tile row and the keys it visits: whole chunks first .. end, and then half a chunk or not."""

  b: jax.Array
  h: jax.Array
  slot: jax.Array
  q_tile: jax.Array
  first: jax.Array
  end: jax.Array
  has_half: jax.Array

  @property
  def num_visits(self) -> jax.Array:
    return self.end - self.first + self.has_half

  def chunk(self, visit: jax.Array) -> jax.Array:
    """Return the chunk of a visit, if they go from the right to the left."""
    return self.end - 1 + self.has_half - visit

  def row(self, shape: Shape) -> jax.Array:
    return self.q_tile * shape.slots + self.slot


class _WeightsRefs(NamedTuple):
  """What the kernel of the weights reads, writes and waits for."""

  q: Ref
  halves: Ref
  chunks: Ref
  q_segments: Ref
  k_segments: Ref
  first: Ref
  masked: Ref
  out: Ref
  sticks: Ref
  live: Ref
  q_smem: Ref
  k_smems: tuple[Ref, Ref, Ref]
  tiles: tuple[Ref, Ref]
  full: Ref
  free: Ref
  votes: Ref
  voted: Ref


def _run_roles(
  walk: _Walk, refs: Any, compute: Callable[..., jax.Array], load: Callable[..., jax.Array]
) -> None:
  """Let two warpgroups compute every tile of the walk and a third load for them."""
  wg = lax.axis_index("wg")

  @pl.when(wg < WARPGROUPS)
  def _() -> None:
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    walk.for_each_tile(refs.first, functools.partial(compute, wg))
    plgpu.wait_smem_to_gmem(0)

  @pl.when(wg == WARPGROUPS)
  def _() -> None:
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    finish(walk.for_each_tile(refs.first, load), _NUM_STAGES, refs.free)


@dataclasses.dataclass(frozen=True)
class _Weights:
  """The kernel of the weights, from the diagonal leftwards."""

  walk: _Walk
  scale: float
  eps: float
  refs: _WeightsRefs

  def run(self) -> None:
    _run_roles(self.walk, self.refs, self._compute, self._load)

  def _is_over(self, n: jax.Array) -> jax.Array:
    """Return whether both warpgroups found all sticks too short after a visit."""
    votes = [self.refs.votes[lax.rem(n, 2), i] for i in range(_NUM_VOTES)]
    return functools.reduce(jnp.bitwise_and, votes) != 0

  def _load(self, step: jax.Array, tile: _Tile) -> jax.Array:
    refs = self.refs

    def chunks(n: jax.Array) -> tuple[jax.Array, jax.Array]:
      return tile.chunk(n), (n == 0) & (tile.has_half != 0)

    def is_over(n: jax.Array) -> jax.Array:
      # There is no vote on half a chunk.
      return jnp.where(n < tile.has_half, False, self._is_over(n))

    return self.walk.load(
      step,
      tile,
      chunks,
      (refs.q, refs.halves, refs.chunks),
      (refs.q_smem, refs.k_smems),
      (refs.full, refs.free),
      is_over if self.eps else None,
    )

  def _compute(self, wg: jax.Array, step: jax.Array, tile: _Tile) -> jax.Array:
    refs = self.refs
    rows = pl.ds(tile.q_tile * ROWS + wg * _OWN_ROWS, _OWN_ROWS)
    visit = functools.partial(self._visit, wg, step, tile)

    def visit_chunk(n: jax.Array, stick: jax.Array) -> jax.Array:
      return visit(n, stick, CHUNK, refs.tiles[1].at[wg])

    stick = lax.cond(
      tile.has_half != 0,
      lambda stick: visit(jnp.int32(0), stick, HALF, refs.tiles[0].at[2 * wg]),
      lambda stick: stick,
      scan.initial_sticks(_OWN_ROWS)(refs.q_segments.at[tile.b, rows]),
    )
    if self.eps:
      n, num_steps, stick = self._visit_while_long(step, tile, stick, visit_chunk)
    else:
      stick = lax.fori_loop(tile.has_half, tile.num_visits, visit_chunk, stick)
      n, num_steps = tile.num_visits, tile.num_visits * self.walk.steps
    scan.store_rows(_OWN_ROWS)(stick, refs.sticks.at[tile.b, tile.h, tile.slot, rows])
    refs.live[tile.b, tile.h, tile.row(self.walk.shape)] = tile.chunk(n - 1)
    return num_steps

  def _visit(
    self,
    wg: jax.Array,
    step: jax.Array,
    tile: _Tile,
    n: jax.Array,
    stick: jax.Array,
    num_keys: int,
    tile_smem: Ref,
  ) -> jax.Array:
    """Write the weights of a visit's keys and return what they leave of the sticks."""
    refs, chunk = self.refs, tile.chunk(n)
    first_row = tile.q_tile * ROWS + wg * _OWN_ROWS
    rows, keys = pl.ds(first_row, _OWN_ROWS), pl.ds(chunk * CHUNK, num_keys)
    is_masked = refs.masked[tile.b, tile.q_tile, chunk]
    stages, barriers = (refs.q_smem, refs.k_smems), (refs.full, refs.free)
    logits = self.walk.products(step + n * self.walk.steps, num_keys, wg, stages, barriers)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def weigh_masked() -> jax.Array:
      segments = refs.q_segments.at[tile.b, rows], refs.k_segments.at[tile.b, keys]
      ahead = first_row + self.walk.shape.history - chunk * CHUNK
      return scan.weigh_masked(logits, stick, tile_smem, *segments, ahead, scale=self.scale)

    def weigh() -> jax.Array:
      return scan.weigh(logits, stick, tile_smem, scale=self.scale)

    # Half a chunk holds the diagonal.
    left = weigh_masked() if num_keys == HALF else lax.cond(is_masked != 0, weigh_masked, weigh)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile_smem, refs.out.at[tile.b, tile.h, tile.slot, rows, keys])
    return left

  def _visit_while_long(
    self,
    step: jax.Array,
    tile: _Tile,
    stick: jax.Array,
    visit: Callable[[jax.Array, jax.Array], jax.Array],
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Visit chunks until all sticks are short; return visits, steps and what is left."""
    refs, walk = self.refs, self.walk
    barriers = (refs.full, refs.free)

    def body(
      state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
      n, _, stick = state
      stick = visit(n, stick)
      scan.vote(_OWN_ROWS, self.eps)(stick, refs.votes.at[lax.rem(n, 2)])
      plgpu.barrier_arrive(refs.voted)
      plgpu.barrier_wait(refs.voted)
      return n + 1, self._is_over(n), stick

    n, is_over, stick = lax.while_loop(
      lambda state: (state[0] < tile.num_visits) & jnp.logical_not(state[1]),
      body,
      (tile.has_half, jnp.bool(False), stick),
    )
    num_steps = n * walk.steps
    ahead = jnp.where(is_over & (n < tile.num_visits), walk.steps_ahead, 0)
    walk.drain(step + num_steps, ahead, barriers)
    return n, num_steps + ahead, stick


def weights(
  shape: Shape,
  q: jax.Array,
  k: jax.Array,
  segments: tuple[jax.Array, jax.Array],
  first_chunks: jax.Array,
  masked: jax.Array,
  scale: float,
  eps: float,
  tiling: Tiling,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return the weights A, what is left of the sticks, and first live chunks.

  The sticks are float32 [b, h, s, positions], 0 for padding.

  Args:
    shape: sizes.
    q: bf16 [b, q, s, h, d]. k: bf16 [b, t, h, d].
    segments: int32 [b, positions], -1 for padding, and [b, keys].
    first_chunks: int32 [b, h, rows], the first live chunk of a tile row.
    masked: int32 [b, q tiles, chunks], whether not all of a chunk may be seen.
    scale: factor of q . k.
    eps: a tile row ends with the chunk after which all its sticks are shorter; 0 is never.
    tiling: sizes of the pipeline.
  """
  walk = _Walk(shape, tiling)

  def kernel(*refs: Ref) -> None:
    _Weights(walk, scale, eps, _WeightsRefs(*refs)).run()

  return plgpu.kernel(
    kernel,
    out_type=(
      jax.ShapeDtypeStruct(shape.weights_shape, jnp.bfloat16),
      jax.ShapeDtypeStruct(shape.weights_shape[:-1], jnp.float32),
      jax.ShapeDtypeStruct(first_chunks.shape, jnp.int32),
    ),
    grid=walk.grid,
    grid_names=_AXES,
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    kernel_name="stick_breaking_weights",
    scratch_types=[
      *_walk_scratch(),
      plgpu.SMEM((2, _NUM_VOTES), jnp.int32),
      plgpu.Barrier(num_arrivals=WARPGROUPS),
    ],
    compiler_params=compiler_params(),
  )(q, permuted(k, HALF), permuted(k, CHUNK), *segments, first_chunks, masked)


class _GradientRefs(NamedTuple):
  """What the kernel of the gradients of the logits reads, writes and waits for."""

  d_out: Ref
  halves: Ref
  chunks: Ref
  weights: Ref
  sticks: Ref
  first: Ref
  out: Ref
  d_out_smem: Ref
  v_smems: tuple[Ref, Ref, Ref]
  tiles: tuple[Ref, Ref]
  full: Ref
  free: Ref
  loaded: Ref


@dataclasses.dataclass(frozen=True)
class _Gradient:
  """The kernel of the gradients of the logits, back to the diagonal."""

  walk: _Walk
  scale: float
  refs: _GradientRefs

  def run(self) -> None:
    _run_roles(self.walk, self.refs, self._compute, self._load)

  def _load(self, step: jax.Array, tile: _Tile) -> jax.Array:
    refs = self.refs

    def chunks(n: jax.Array) -> tuple[jax.Array, jax.Array]:
      return tile.first + n, tile.first + n == tile.end

    sources = (refs.d_out, refs.halves, refs.chunks)
    targets = (refs.d_out_smem, refs.v_smems)
    return self.walk.load(step, tile, chunks, sources, targets, (refs.full, refs.free))

  def _compute(self, wg: jax.Array, step: jax.Array, tile: _Tile) -> jax.Array:
    refs = self.refs
    rows = pl.ds(tile.q_tile * ROWS + wg * _OWN_ROWS, _OWN_ROWS)
    visit = functools.partial(self._visit, wg, step, tile)
    sticks = refs.sticks.at[tile.b, tile.h, tile.slot, rows]
    # More than nothing: where no weight is, either, the sums would be divided by zero.
    stick = scan.load_rows(_OWN_ROWS)(sticks) + 1e-30
    sums = lax.fori_loop(
      0,
      tile.end - tile.first,
      lambda n, sums: visit(n, sums, CHUNK, refs.tiles[1].at[wg]),
      (stick, _rows_of_zeros(_OWN_ROWS)),
    )

    @pl.when(tile.has_half != 0)
    def visit_half() -> None:
      visit(tile.end - tile.first, sums, HALF, refs.tiles[0].at[2 * wg])

    return tile.num_visits * self.walk.steps

  def _visit(
    self,
    wg: jax.Array,
    step: jax.Array,
    tile: _Tile,
    n: jax.Array,
    sums: tuple[jax.Array, jax.Array],
    num_keys: int,
    tile_smem: Ref,
  ) -> tuple[jax.Array, jax.Array]:
    """Write the gradients of a visit's logits and return the sums right of its keys."""
    refs = self.refs
    rows = pl.ds(tile.q_tile * ROWS + wg * _OWN_ROWS, _OWN_ROWS)
    keys = pl.ds((tile.first + n) * CHUNK, num_keys)
    index = (tile.b, tile.h, tile.slot, rows, keys)

    def load_weights() -> None:
      # The gradients of the visit before are written by now.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.copy_gmem_to_smem(refs.weights.at[index], tile_smem, refs.loaded.at[wg])

    stages, barriers = (refs.d_out_smem, refs.v_smems), (refs.full, refs.free)
    step = step + n * self.walk.steps
    d_weights = self.walk.products(step, num_keys, wg, stages, barriers, load_weights)
    plgpu.barrier_wait(refs.loaded.at[wg])
    sums = scan.differentiate(d_weights, *sums, tile_smem, scale=self.scale)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile_smem, refs.out.at[index])
    return sums


def d_logits(
  shape: Shape,
  d_out: jax.Array,
  v: jax.Array,
  weights: jax.Array,
  sticks: jax.Array,
  first_chunks: jax.Array,
  scale: float,
  tiling: Tiling,
) -> jax.Array:
  """Return the gradients of the products q . k, bf16 like the weights.

  Args:
    shape: sizes.
    d_out: bf16 [b, q, s, h, d]. v: bf16 [b, t, h, d].
    weights, sticks, first_chunks: as `weights` returns and takes them.
    scale: factor of q . k.
    tiling: sizes of the pipeline.
  """
  walk = _Walk(shape, tiling)

  def kernel(*refs: Ref) -> None:
    _Gradient(walk, scale, _GradientRefs(*refs)).run()

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(shape.weights_shape, jnp.bfloat16),
    grid=walk.grid,
    grid_names=_AXES,
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    kernel_name="stick_breaking_d_logits",
    scratch_types=[
      *_walk_scratch(),
      plgpu.Barrier(num_barriers=WARPGROUPS),
    ],
    compiler_params=compiler_params(),
  )(d_out, permuted(v, HALF), permuted(v, CHUNK), weights, sticks, first_chunks)
