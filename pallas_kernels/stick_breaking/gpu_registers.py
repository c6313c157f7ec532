"""The block-local scan (gpu_scan) on the registers that wgmma leaves its scores in."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.stick_breaking import gpu_scan
from pallas_kernels.stick_breaking.gpu_copy import inline, warpgroup_any

SCORES = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
_INDEX = plgpu.Layout.WG_SPLAT(())
_LANE_KEYS = gpu_scan.KEYS // gpu_scan.LANES
_NO_SEGMENT = -1  # Of padding keys.
_HIDDEN = -1e30  # A score whose beta is 0.
_LANE_COLUMNS = 8  # Of the narrowest array in wgmma's layout: two for each lane.


class _Lane:
  """gpu_scan.Lane in MLIR."""

  def __init__(self) -> None:
    i32 = ir.IntegerType.get_signless(32)
    lane = arith.remui(mgpu_utils.thread_idx(), mgpu_utils.c(gpu_scan.LANES, i32))
    self._lane = lane
    self._i32 = i32
    self._f32 = ir.F32Type.get()
    self._contract = ir.Attribute.parse("#arith.fastmath<contract>")

  def _bit_is_set(self, bit: int) -> Any:
    masked = arith.andi(self._lane, mgpu_utils.c(bit, self._i32))
    return arith.cmpi(arith.CmpIPredicate.ne, masked, mgpu_utils.c(0, self._i32))

  def _approximate(self, instruction: str, x: Any) -> Any:
    return llvm.inline_asm(self._f32, [x], f"{instruction} $0, $1;", "=f,f")

  def constant(self, value: float) -> Any:
    return mgpu_utils.c(value, self._f32)

  def add(self, x: Any, y: Any) -> Any:
    return arith.addf(x, y)

  def multiply(self, x: Any, y: Any) -> Any:
    return arith.mulf(x, y)

  def subtract_product(self, x: Any, y: Any, z: Any) -> Any:
    product = arith.mulf(y, z, fastmath=self._contract)
    return arith.subf(x, product, fastmath=self._contract)

  def minimum(self, x: Any, y: Any) -> Any:
    return arith.minimumf(x, y)

  def exp2(self, x: Any) -> Any:
    return self._approximate("ex2.approx.ftz.f32", x)

  def reciprocal(self, x: Any) -> Any:
    return self._approximate("rcp.approx.ftz.f32", x)

  def product_after(self, x: Any) -> tuple[Any, Any]:
    one = self.constant(1.0)
    neighbour = mgpu_utils.shfl_bfly(x, 1)
    pair = arith.mulf(x, neighbour)
    other = mgpu_utils.shfl_bfly(pair, 2)
    after = arith.select(self._bit_is_set(1), one, neighbour)
    after = arith.mulf(after, arith.select(self._bit_is_set(2), one, other))
    return after, arith.mulf(pair, other)

  def sum_before(self, x: Any) -> tuple[Any, Any]:
    zero = self.constant(0.0)
    neighbour = mgpu_utils.shfl_bfly(x, 1)
    pair = arith.addf(x, neighbour)
    other = mgpu_utils.shfl_bfly(pair, 2)
    before = arith.select(self._bit_is_set(1), neighbour, zero)
    before = arith.addf(before, arith.select(self._bit_is_set(2), other, zero))
    return before, arith.addf(pair, other)


def _at(register: Any, i: int) -> Any:
  position = ir.DenseI64ArrayAttr.get([i])
  return vector.extract(register, dynamic_position=[], static_position=position)


class _Scores:
  """Registers of a [64, n] array in wgmma's layout, read and written as a lane's scalars."""

  def __init__(self, array: Any) -> None:
    self._array = array
    self._registers = np.empty_like(array.registers)

  def _index(self, half: int, group: int) -> tuple[int, ...]:
    # WGMMA's tiling of [64, n]: (64-row tiles, 8-column groups, ..., row halves, ...).
    shape = self._array.registers.shape
    index = [0] * len(shape)
    index[1], index[4] = group, half
    return tuple(index)

  def row(self, half: int, block: int) -> list[Any]:
    """Return the lane's 16 scalars of one of its two rows and one block of 64 keys."""
    groups = range(block * 8, block * 8 + 8)
    pairs = [self._array.registers[self._index(half, group)] for group in groups]
    return [_at(pair, i) for pair in pairs for i in range(2)]

  def set_row(self, half: int, block: int, values: Sequence[Any]) -> None:
    for i, group in enumerate(range(block * 8, block * 8 + 8)):
      index = self._index(half, group)
      kind = self._array.registers[index].type
      self._registers[index] = vector.from_elements(kind, values[2 * i : 2 * i + 2])

  def array(self) -> Any:
    return mgpu.FragmentedArray(
      _registers=self._registers, _layout=self._array.layout, _is_signed=None
    )


def _like(array: Any, values: Sequence[Any]) -> Any:
  registers = np.empty_like(array.registers)
  for index, value in zip(np.ndindex(registers.shape), values, strict=True):
    kind = array.registers[index].type
    registers[index] = vector.from_elements(kind, [value])
  return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)


def _lane_pairs(values: Sequence[Any]) -> Any:
  """Return [64, 8] in wgmma's layout, a lane's two columns with its value of each half of rows."""
  layout = mgpu.WGMMA_LAYOUT
  registers = np.empty(layout.registers_shape((gpu_scan.ROWS, _LANE_COLUMNS)), dtype=object)
  kind = ir.VectorType.get((2,), values[0].type)
  for index, value in zip(np.ndindex(registers.shape), values, strict=True):
    registers[index] = vector.from_elements(kind, [value, value])
  return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _per_row(array: Any) -> list[Any]:
  return [_at(register, 0) for register in array.registers.flat]


def weights(
  scores: jax.Array, stick: jax.Array, factor: float
) -> tuple[jax.Array, list[jax.Array]]:
  """Return the weights [64, n], and what is left of the stick left of each block of 64 keys.

  Args:
    scores: float32 [64, n] q . k in wgmma's layout, n a multiple of 64, keys permuted by blocks.
    stick: float32 [64] left of the sticks right of these keys.
    factor: scale times log2(e).
  """
  num_blocks = scores.shape[1] // gpu_scan.KEYS

  rows = plgpu.ShapeDtypeStruct(stick.shape, jnp.float32, layout=ROWS)
  scores_type = plgpu.ShapeDtypeStruct(scores.shape, jnp.float32, layout=SCORES)

  @inline(arg_types=(SCORES, ROWS), return_type=(scores_type, [rows] * num_blocks))
  def apply(_: Any, scores: Any, stick: Any) -> Any:
    lane = _Lane()
    scale = lane.constant(factor)
    scores = _Scores(scores)
    left = [stick] * num_blocks
    carry = _per_row(stick)
    for block in reversed(range(num_blocks)):
      for half in range(2):
        values, carry[half] = gpu_scan.weights(lane, scores.row(half, block), scale, carry[half])
        scores.set_row(half, block, values)
      left[block] = _like(stick, carry)
    return scores.array(), left

  return apply(scores, stick)


def gradients(
  scores: jax.Array,
  d_weights: jax.Array,
  sticks: list[jax.Array],
  prefix: jax.Array,
  factor: float,
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
  """Return the weights and the gradients of the logits [64, n], and the prefixes right of blocks.

  Args:
    scores, factor: as of `weights`.
    d_weights: float32 [64, n] dO . v.
    sticks: float32 [64] for each block of 64 keys, left of the stick right of it.
    prefix: float32 [64] sum of weights * d_weights over the keys left of these.
  """
  num_blocks = scores.shape[1] // gpu_scan.KEYS

  rows = plgpu.ShapeDtypeStruct(prefix.shape, jnp.float32, layout=ROWS)
  scores_type = plgpu.ShapeDtypeStruct(scores.shape, jnp.float32, layout=SCORES)

  @inline(
    arg_types=(SCORES, SCORES, [ROWS] * num_blocks, ROWS),
    return_type=(scores_type, scores_type, [rows] * num_blocks),
  )
  def apply(_: Any, scores: Any, d_weights: Any, sticks: Any, prefix: Any) -> Any:
    lane = _Lane()
    scale = lane.constant(factor)
    scores, d_weights = _Scores(scores), _Scores(d_weights)
    carry, right = _per_row(prefix), []
    for block in range(num_blocks):
      stick = _per_row(sticks[block])
      for half in range(2):
        values, d_values, carry[half] = gpu_scan.gradients(
          lane, scores.row(half, block), d_weights.row(half, block), scale, stick[half], carry[half]
        )
        scores.set_row(half, block, values)
        d_weights.set_row(half, block, d_values)
      right.append(_like(prefix, carry))
    return scores.array(), d_weights.array(), right

  return apply(scores, d_weights, sticks, prefix)


def gains(
  scores: jax.Array, d_weights: jax.Array, stick: jax.Array, factor: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Return the weights A [64, 64] of one block, g = A * d_weights, beta, and sums of g.

  The sums are [64, 8], of which a lane's two columns hold that over the keys of the lanes before
  it, and [64], over all keys. `d_logits` takes g, beta and the first sums.

  Args:
    scores, d_weights, factor: as of `gradients`. stick: float32 [64] left right of the block.
  """
  rows = plgpu.ShapeDtypeStruct(stick.shape, jnp.float32, layout=ROWS)
  square = plgpu.ShapeDtypeStruct(scores.shape, jnp.float32, layout=SCORES)
  lanes = plgpu.ShapeDtypeStruct((gpu_scan.ROWS, _LANE_COLUMNS), jnp.float32, layout=SCORES)

  @inline(arg_types=(SCORES, SCORES, ROWS), return_type=(square, square, square, lanes, rows))
  def apply(_: Any, scores: Any, d_weights: Any, stick: Any) -> Any:
    lane = _Lane()
    scale = lane.constant(factor)
    attention, g, betas = (_Scores(x) for x in (scores, d_weights, scores))
    befores, totals = [], []
    for half, left in enumerate(_per_row(stick)):
      *values, (before, total) = gpu_scan.gains(
        lane, attention.row(half, 0), g.row(half, 0), scale, left
      )
      for array, value in zip((attention, g, betas), values, strict=True):
        array.set_row(half, 0, value)
      befores.append(before)
      totals.append(total)
    squares = (array.array() for array in (attention, g, betas))
    return *squares, _lane_pairs(befores), _like(stick, totals)

  return apply(scores, d_weights, stick)


def d_logits(g: jax.Array, betas: jax.Array, before: jax.Array, prefix: jax.Array) -> jax.Array:
  """Return the gradients of the logits [64, 64] of one block, in g's layout.

  Args:
    g, betas, before: as `gains` returns them. prefix: float32 [64] sum of g left of the block.
  """

  @inline(arg_types=(SCORES, SCORES, SCORES, ROWS), return_type=_type_of(g, SCORES))
  def apply(_: Any, g: Any, betas: Any, before: Any, prefix: Any) -> Any:
    lane = _Lane()
    g, betas = _Scores(g), _Scores(betas)
    befores = [_at(register, 0) for register in before.registers.flat]
    for half, left in enumerate(_per_row(prefix)):
      running = lane.add(left, befores[half])
      g.set_row(half, 0, gpu_scan.d_logits(lane, g.row(half, 0), betas.row(half, 0), running))
    return g.array()

  return apply(g, betas, before, prefix)


def unhoisted(index: jax.Array) -> jax.Array:
  """Return a scalar whose value the compiler takes to change in every iteration of a loop.

  It would otherwise keep what is computed from it, descriptors of shared memory and addresses, in
  registers across the loop, and spill them.
  """
  scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_INDEX)

  @inline(arg_types=(scalar.layout,), return_type=scalar)
  def apply(_: Any, index: Any) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    value = index.registers.flat[0]
    same: Any = llvm.inline_asm(i32, [value], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)
    return mgpu.FragmentedArray.splat(same, (), is_signed=True)

  return apply(index)


def any_at_least(rows: jax.Array, bound: float) -> jax.Array:
  """Return int32 1 if any of the values [64] is at least `bound`, else 0."""
  scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_INDEX)

  @inline(arg_types=(ROWS,), return_type=scalar)
  def apply(_: Any, rows: Any) -> Any:
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    limit = mgpu_utils.c(bound, f32)
    first, second = _per_row(rows)
    most = arith.maximumf(first, second)
    flag = arith.extui(i32, arith.cmpf(arith.CmpFPredicate.OGE, most, limit))
    return mgpu.FragmentedArray.splat(warpgroup_any(flag), (), is_signed=True)

  return apply(rows)


def hide_later(scores: jax.Array, distance: jax.Array) -> jax.Array:
  """Return scores [64, n] with those of keys after their query so low that their beta is 0.

  Args:
    distance: position of the first row minus that of the first key.
  """

  @inline(arg_types=(SCORES, _INDEX), return_type=_type_of(scores, SCORES))
  def apply(_: Any, scores: Any, distance: Any) -> Any:
    return _select(scores, _keys_before(distance), lambda half, unit, i: None)

  return apply(scores, distance)


def hide_invisible(
  scores: jax.Array,
  distance: jax.Array,
  q_segments: jax.Array,
  k_segments: Any,
  batch: jax.Array,
  key: jax.Array,
) -> jax.Array:
  """Return scores as `hide_later` does, those of keys of another segment hidden as well.

  Args:
    q_segments: int32 [64]. k_segments: global [b, keys]; key: the first one, a multiple of 64.
  """

  @inline(
    arg_types=(SCORES, _INDEX, ROWS, plgpu.RefType(), _INDEX, _INDEX),
    return_type=_type_of(scores, SCORES),
  )
  def apply(
    _: Any, scores: Any, distance: Any, q_segments: Any, k_segments: Any, batch: Any, key: Any
  ) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    length = mgpu_utils.c(ir.MemRefType(k_segments.type).shape[1], i32)
    first = arith.addi(arith.muli(batch.registers.flat[0], length), key.registers.flat[0])
    keys = _lane_segments(k_segments, first, scores.shape[1])
    queries = _per_row(q_segments)

    def same(half: int, unit: int, i: int) -> Any:
      return arith.cmpi(arith.CmpIPredicate.eq, keys[unit * _LANE_KEYS + i], queries[half])

    return _select(scores, _keys_before(distance), same)

  return apply(scores, distance, q_segments, k_segments, batch, key)


def _keys_before(distance: Any) -> list[Any]:
  """Return, of each of the lane's two rows, how many keys its first key is before the query."""
  i32 = ir.IntegerType.get_signless(32)
  thread = mgpu_utils.thread_idx()
  lane = arith.remui(thread, mgpu_utils.c(gpu_scan.LANES, i32))
  # Of 128 threads, every four share rows r and r + 8; a warp of 32 has 16 rows.
  quad = arith.divui(arith.remui(thread, mgpu_utils.c(128, i32)), mgpu_utils.c(4, i32))
  warp = arith.divui(quad, mgpu_utils.c(8, i32))
  row = arith.addi(quad, arith.muli(warp, mgpu_utils.c(8, i32)))
  before = arith.addi(distance.registers.flat[0], row)
  before = arith.subi(before, arith.muli(lane, mgpu_utils.c(_LANE_KEYS, i32)))
  return [before, arith.addi(before, mgpu_utils.c(8, i32))]


def _lane_segments(segments: Any, first: Any, count: int) -> list[Any]:
  """Return the segments of the lane's keys among `count`, padding as one that no query has."""
  i32 = ir.IntegerType.get_signless(32)
  four = ir.VectorType.get((4,), i32)
  zero, none = mgpu_utils.c(0, i32), mgpu_utils.c(_NO_SEGMENT, i32)
  lane = arith.remui(mgpu_utils.thread_idx(), mgpu_utils.c(gpu_scan.LANES, i32))
  first = arith.addi(first, arith.muli(lane, mgpu_utils.c(_LANE_KEYS, i32)))
  found = []
  for start in range(0, count // gpu_scan.LANES, 4):
    unit, within = divmod(start, _LANE_KEYS)
    offset = arith.addi(first, mgpu_utils.c(unit * gpu_scan.KEYS + within, i32))
    place = mgpu_utils.getelementptr(mgpu_utils.memref_ptr(segments), [offset], i32)
    loaded = llvm.load(four, place, alignment=16)
    for i in range(4):
      segment = _at(loaded, i)
      is_key = arith.cmpi(arith.CmpIPredicate.sgt, segment, zero)
      found.append(arith.select(is_key, segment, none))
  return found


def _select(scores: Any, before: list[Any], same: Callable[[int, int, int], Any]) -> Any:
  """Keep the scores of keys that are not after the query, and, where it says, of its segment."""
  lane, i32 = _Lane(), ir.IntegerType.get_signless(32)
  hidden = lane.constant(_HIDDEN)
  values = _Scores(scores)
  for unit in range(scores.shape[1] // gpu_scan.KEYS):
    for half in range(2):
      kept = []
      for i, score in enumerate(values.row(half, unit)):
        ahead = mgpu_utils.c(unit * gpu_scan.KEYS + i, i32)
        visible = arith.cmpi(arith.CmpIPredicate.sge, before[half], ahead)
        if (equal := same(half, unit, i)) is not None:
          visible = arith.andi(visible, equal)
        kept.append(arith.select(visible, score, hidden))
      values.set_row(half, unit, kept)
  return values.array()


def _type_of(array: jax.Array, layout: Any) -> plgpu.ShapeDtypeStruct:
  return plgpu.ShapeDtypeStruct(array.shape, array.dtype, layout=layout)
