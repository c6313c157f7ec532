"""Breaking the stick along a wide tile of keys, in the registers of a Hopper warpgroup.

As in gpu_scan, keys are loaded permuted, such that lane t of four, to which wgmma leaves columns
8g + 2t + {0, 1} of a row, holds consecutive keys: here a quarter of the tile. In shared memory,
tiles of weights are in the order of keys.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.stick_breaking import gpu_scan
from pallas_kernels.stick_breaking.gpu_registers import _Lane as Lane
from pallas_kernels.stick_breaking.gpu_wide_pipeline import TRANSFORMS

LOG2_E = math.log2(math.e)

_CHUNK = 8  # Keys in 16 bytes.

_TILE = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)
_SCALAR = plgpu.Layout.WG_SPLAT(())

Value = Any  # A value of MLIR, or a reference lowered to one.


def _f32() -> ir.Type:
  return ir.F32Type.get()


def _i32() -> ir.Type:
  return ir.IntegerType.get_signless(32)


def _constant(value: float) -> Value:
  return mgpu.c(value, _i32() if isinstance(value, int) else _f32())


def _extract(register: Value, i: int) -> Value:
  position = ir.DenseI64ArrayAttr.get([i])
  return vector.extract(register, dynamic_position=[], static_position=position)


class _Thread:
  """Where the calling thread's elements are in a tile of `num_keys` keys."""

  def __init__(self, num_keys: int, tile: Value | None = None):
    self.num_keys = num_keys
    thread = arith.andi(mgpu_utils.thread_idx(), _constant(127))
    self.quad = arith.andi(thread, _constant(3))
    self.line = arith.andi(arith.shrui(thread, _constant(2)), _constant(7))
    self.warp = arith.shrui(thread, _constant(5))
    self.first_row = arith.addi(arith.muli(self.warp, _constant(16)), self.line)
    self._chunks = [] if tile is None else self._first_chunks(tile)

  def is_bit_clear(self, bit: int) -> Value:
    masked = arith.andi(self.quad, _constant(bit))
    return arith.cmpi(arith.CmpIPredicate.eq, masked, _constant(0))

  def _first_chunks(self, tile: Value) -> list[Value]:
    own = self.num_keys // 32  # Chunks to a thread.
    lines = arith.addi(
      arith.muli(self.warp, _constant(2 * self.num_keys * 16)),
      arith.muli(self.line, _constant(128)),
    )
    base = mgpu_utils.memref_ptr(tile)
    addresses = []
    for i in range(own):
      chunk = arith.addi(arith.muli(self.quad, _constant(own)), _constant(i))
      box = arith.muli(arith.shrui(chunk, _constant(3)), _constant(1024))
      place = arith.xori(arith.andi(chunk, _constant(7)), self.line)
      offset = arith.addi(arith.addi(lines, box), arith.muli(place, _constant(16)))
      addresses.append(_at_byte(base, offset))
    return addresses

  def chunks(self, m: int, half: int) -> list[Value]:
    """Return the shared-memory addresses of a row's own keys, eight keys each.

    Tiles are bf16 [rows, num_keys] under TRANSFORMS: boxes of 8 rows and 64 keys, in which
    the 16-byte chunk c of row r lies at place c xor r.
    """
    box_row = 8 * m + half
    return [_at_byte(chunk, box_row * self.num_keys * 16) for chunk in self._chunks]


def _row_offset(m: int, half: int) -> int:
  """Return the rows from a thread's first row to the one of registers [m, :, half]."""
  return 64 * m + 8 * half


def _at_byte(base: Value, offset: Value | int) -> Value:
  return mgpu_utils.getelementptr(base, [offset], ir.IntegerType.get_signless(8))


def _load_chunk(address: Value) -> list[Value]:
  """Return eight bf16 values as float32."""
  values = []
  chunk = llvm.load(ir.VectorType.get((4,), _i32()), address, alignment=16, volatile_=True)
  for i in range(4):
    word = _extract(chunk, i)
    low = arith.shli(word, _constant(16))
    high = arith.andi(word, _constant(-65536))
    values += [arith.bitcast(_f32(), low), arith.bitcast(_f32(), high)]
  return values


def _store_chunk(values: Sequence[Value], address: Value) -> None:
  pair = ir.VectorType.get((2,), ir.BF16Type.get())
  words = []
  for a, b in zip(values[::2], values[1::2], strict=True):
    both = vector.from_elements(ir.VectorType.get((2,), _f32()), [a, b])
    word = vector.bitcast(ir.VectorType.get((1,), _i32()), arith.truncf(pair, both))
    words.append(_extract(word, 0))
  chunk = vector.from_elements(ir.VectorType.get((4,), _i32()), words)
  llvm.store(chunk, address, alignment=16)


def _row_registers(array: mgpu.FragmentedArray) -> np.ndarray:
  """Return registers [m, half] of an array of rows."""
  return array.registers.reshape(-1, 2)


def _tile_rows(array: mgpu.FragmentedArray) -> dict[tuple[int, int], list[Value]]:
  """Return per (m, half) the thread's elements of the row, in the order of keys."""
  registers = array.registers
  num_m, num_groups = registers.shape[:2]
  registers = registers.reshape(num_m, num_groups, 2)
  return {
    (m, half): [_extract(registers[m, g, half], b) for g in range(num_groups) for b in (0, 1)]
    for m, half in np.ndindex(num_m, 2)
  }


def _new_rows(like: mgpu.FragmentedArray, values: Sequence[Value]) -> mgpu.FragmentedArray:
  registers = np.empty_like(like.registers).reshape(-1)
  for i, value in enumerate(values):
    kind = like.registers.flat[i].type
    registers[i] = vector.broadcast(kind, value) if isinstance(kind, ir.VectorType) else value
  return mgpu.FragmentedArray(
    _registers=registers.reshape(like.registers.shape),
    _layout=like.layout,
    _is_signed=None,
  )


def _rows_of(values: Sequence[Value], num_rows: int) -> mgpu.FragmentedArray:
  like = mgpu.FragmentedArray.splat(_constant(0.0), (num_rows,), _ROW.to_mgpu())
  return _new_rows(like, values)


def _load_own_rows(thread: _Thread, rows: Value, num_rows: int, kind: ir.Type) -> list[Value]:
  first = mgpu_utils.getelementptr(mgpu_utils.memref_ptr(rows), [thread.first_row], kind)
  return [
    llvm.load(kind, _at_byte(first, 4 * _row_offset(m, half)))
    for m, half in np.ndindex(num_rows // 64, 2)
  ]


def _scalar_of(register: Value) -> Value:
  return _extract(register, 0) if isinstance(register.type, ir.VectorType) else register


def _allowed_of_row(
  thread: _Thread, offset: int, q_segments: Value, k_segments: Value, ahead: Value
) -> list[Value]:
  """Return which of its own keys a thread's row may see; row r is `ahead` + r past the first key.

  The row is `offset` below the thread's first one.
  """
  i32 = _i32()
  own = thread.num_keys // 4
  first = arith.muli(thread.quad, _constant(own))
  row_segments = mgpu_utils.getelementptr(
    mgpu_utils.memref_ptr(q_segments), [thread.first_row], i32
  )
  segment = llvm.load(i32, _at_byte(row_segments, 4 * offset))
  visible = arith.subi(arith.addi(thread.first_row, ahead), first)
  visible = arith.addi(visible, _constant(offset))
  key_segments = mgpu_utils.getelementptr(mgpu_utils.memref_ptr(k_segments), [first], i32)
  allowed = []
  for i in range(0, own, 4):
    # Volatile: kept for the next row, they would take too many registers.
    four = llvm.load(
      ir.VectorType.get((4,), i32),
      _at_byte(key_segments, 4 * i),
      alignment=16,
      volatile_=True,
    )
    for j in range(4):
      causal = arith.cmpi(arith.CmpIPredicate.sle, _constant(i + j), visible)
      same = arith.cmpi(arith.CmpIPredicate.eq, _extract(four, j), segment)
      allowed.append(arith.andi(causal, same))
  return allowed


def weigh(logits: jax.Array, stick: jax.Array, weights_smem: Value, *, scale: float) -> jax.Array:
  """Write the weights A of a tile, bf16 [rows, keys], and return what is left of the sticks.

  Args:
    logits: float32 [rows, keys], the products q . k, their columns permuted.
    stick: float32 [rows], what is left of the sticks right of the tile.
    weights_smem: bf16 [rows, keys] under TRANSFORMS, in the order of keys.
    scale: factor of q . k.
  """
  return _weigh(logits.shape, scale, False)(logits, stick, weights_smem)


def weigh_masked(
  logits: jax.Array,
  stick: jax.Array,
  weights_smem: Value,
  q_segments: Value,
  k_segments: Value,
  ahead: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """Do as `weigh`, of keys of the same segment up to the row's position only.

  Args:
    logits, stick, weights_smem, scale: as in `weigh`.
    q_segments: int32 [rows] in global memory; k_segments: int32 [keys].
    ahead: int32 scalar, position of the first row less position of the first key.
  """
  arguments = (logits, stick, weights_smem, q_segments, k_segments, ahead)
  return _weigh(logits.shape, scale, True)(*arguments)


@functools.cache
def _weigh(shape: tuple[int, int], scale: float, masked: bool) -> Callable[..., jax.Array]:
  refs = (plgpu.RefType(TRANSFORMS),)
  mask_types = (plgpu.RefType(), plgpu.RefType(), _SCALAR) if masked else ()

  def write(
    context: mgpu.LaunchContext,
    logits: mgpu.FragmentedArray,
    stick: mgpu.FragmentedArray,
    tile: Value,
    *mask: Value,
  ) -> mgpu.FragmentedArray:
    del context
    thread, lane = _Thread(shape[1], tile), Lane()
    sticks = []
    for (m, half), own in _tile_rows(logits).items():
      if masked:
        q_segments, k_segments, ahead = (
          mask[0],
          mask[1],
          mask[2].registers.item(),
        )
        offset = _row_offset(m, half)
        allowed = _allowed_of_row(thread, offset, q_segments, k_segments, ahead)
        hidden = _constant(-1e30)
        own = [arith.select(a, x, hidden) for a, x in zip(allowed, own, strict=True)]
      before = _scalar_of(_row_registers(stick)[m, half])
      factor = lane.constant(scale * LOG2_E)
      weights, after = gpu_scan.weights(lane, own, factor, before)
      for i, address in enumerate(thread.chunks(m, half)):
        _store_chunk(weights[8 * i : 8 * i + 8], address)
      sticks.append(after)
    return _new_rows(stick, sticks)

  return plgpu.inline_mgpu(
    arg_types=(_TILE, _ROW, *refs, *mask_types),
    return_type=plgpu.ShapeDtypeStruct((shape[0],), jnp.float32, layout=_ROW),
  )(write)


def d_logits(
  lane: gpu_scan.Lane,
  d_weights: Sequence[Any],
  scale: Any,
  stick: Any,
  gain: Any,
  load: Callable[[int], Sequence[Any]],
  store: Callable[[int, Sequence[Any]], None],
) -> tuple[Any, Any]:
  """Replace a lane's weights of one row by the gradients of its logits, eight keys at a time.

  Args:
    lane: arithmetic on registers.
    d_weights: the lane's products dO . v, in the order of the keys.
    scale: factor of q . k.
    stick, gain: of the row, R and the sum of A dA left of the tile; see `differentiate`.
    load: returns weights 8 i to 8 i + 7, twice: kept, they would take too many registers.
    store: takes the gradients in their place.

  Returns:
    stick and gain right of the tile.
  """
  minus_scale = lane.subtract_product(lane.constant(0.0), scale, lane.constant(1.0))
  own_stick, own_gain = lane.constant(0.0), lane.constant(0.0)
  for i in range(0, len(d_weights), _CHUNK):
    for weight, d_weight in zip(load(i // _CHUNK), d_weights[i : i + _CHUNK], strict=True):
      own_stick = lane.add(own_stick, weight)
      own_gain = lane.add(own_gain, lane.multiply(weight, d_weight))
  before, total_stick = lane.sum_before(own_stick)
  running_stick = lane.add(stick, before)
  before, total_gain = lane.sum_before(own_gain)
  running_gain = lane.add(gain, before)
  for i in range(0, len(d_weights), _CHUNK):
    gradients = []
    for weight, d_weight in zip(load(i // _CHUNK), d_weights[i : i + _CHUNK], strict=True):
      # A (dA - gain / R), without the difference of equal numbers where A is nearly all of R.
      rest = lane.subtract_product(running_gain, d_weight, running_stick)
      running_stick = lane.add(running_stick, weight)
      running_gain = lane.add(running_gain, lane.multiply(weight, d_weight))
      beta = lane.multiply(weight, lane.reciprocal(running_stick))
      gradients.append(lane.multiply(lane.multiply(beta, minus_scale), rest))
    store(i // _CHUNK, gradients)
  return lane.add(stick, total_stick), lane.add(gain, total_gain)


def differentiate(
  d_weights: jax.Array,
  stick: jax.Array,
  gain: jax.Array,
  tile_smem: Value,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Replace the weights of a tile by the gradients of its products q . k, left to right.

  With R_m the stick that key m met, which is what remains at the end and all weights up to m,
      d loss / d logit_m = A_m (dA_m - sum_{j<=m} A_j dA_j / R_m)
                         = A_m / R_m ((R_m - A_m) dA_m - sum_{j<m} A_j dA_j).
  Every term of R is positive and A / R is beta: no logit, mask or logarithm is needed again.

  Args:
    d_weights: float32 [rows, keys], dO . V^T, its columns permuted.
    stick: float32 [rows], R left of the tile, more than 0.
    gain: float32 [rows], the sum of A dA before the tile.
    tile_smem: bf16 [rows, keys] under TRANSFORMS, A on entry.
    scale: factor of q . k.

  Returns:
    stick and gain after the tile.
  """
  return _differentiate(d_weights.shape, scale)(d_weights, stick, gain, tile_smem)


@functools.cache
def _differentiate(
  shape: tuple[int, int], scale: float
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  row_type = plgpu.ShapeDtypeStruct((shape[0],), jnp.float32, layout=_ROW)

  def write(
    context: mgpu.LaunchContext,
    d_weights: mgpu.FragmentedArray,
    stick: mgpu.FragmentedArray,
    gain: mgpu.FragmentedArray,
    tile: Value,
  ) -> tuple[mgpu.FragmentedArray, mgpu.FragmentedArray]:
    del context
    thread, lane = _Thread(shape[1], tile), Lane()
    sticks, gains = [], []
    for (m, half), own in _tile_rows(d_weights).items():
      before_stick, before_gain = (_scalar_of(_row_registers(x)[m, half]) for x in (stick, gain))
      chunks = thread.chunks(m, half)

      def load(i: int, chunks: Sequence[Value] = chunks) -> list[Value]:
        return _load_chunk(chunks[i])

      def store(i: int, values: Sequence[Value], chunks: Sequence[Value] = chunks) -> None:
        _store_chunk(values, chunks[i])

      factor = lane.constant(scale)
      after = d_logits(lane, own, factor, before_stick, before_gain, load, store)
      sticks.append(after[0])
      gains.append(after[1])
    return _new_rows(stick, sticks), _new_rows(gain, gains)

  return plgpu.inline_mgpu(
    arg_types=(_TILE, _ROW, _ROW, plgpu.RefType(TRANSFORMS)),
    return_type=(row_type, row_type),
  )(write)


@functools.cache
def initial_sticks(num_rows: int) -> Callable[[Value], jax.Array]:
  """Return a function of int32 [num_rows] segments: 1, or 0 for padding, which is negative."""
  row_type = plgpu.ShapeDtypeStruct((num_rows,), jnp.float32, layout=_ROW)

  def read(context: mgpu.LaunchContext, segments: Value) -> mgpu.FragmentedArray:
    del context
    thread = _Thread(num_rows)
    sticks = []
    for segment in _load_own_rows(thread, segments, num_rows, _i32()):
      is_padding = arith.cmpi(arith.CmpIPredicate.slt, segment, _constant(0))
      sticks.append(arith.select(is_padding, _constant(0.0), _constant(1.0)))
    return _rows_of(sticks, num_rows)

  return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=row_type)(read)


@functools.cache
def vote(num_rows: int, eps: float) -> Callable[[jax.Array, Value], None]:
  """Return a function that writes whether all of float32 [num_rows] are less than eps.

  Each warp writes its vote, 0 or 1, to its place in int32 [warps] in shared memory.
  """

  def write(context: mgpu.LaunchContext, rows: mgpu.FragmentedArray, votes: Value) -> None:
    del context
    own = (_scalar_of(_row_registers(rows)[i]) for i in np.ndindex(num_rows // 64, 2))
    longest = functools.reduce(arith.maximumf, own)
    is_short = arith.cmpf(arith.CmpFPredicate.OLT, longest, _constant(eps))
    everyone: Value = llvm.inline_asm(
      _i32(),
      [arith.extui(_i32(), is_short)],
      "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.all.pred p, p, 0xffffffff;"
      " selp.u32 $0, 1, 0, p; }",
      "=r,r",
      has_side_effects=True,
    )
    warp = arith.shrui(mgpu_utils.thread_idx(), _constant(5))
    llvm.store(everyone, mgpu_utils.getelementptr(mgpu_utils.memref_ptr(votes), [warp], _i32()))

  return plgpu.inline_mgpu(arg_types=(_ROW, plgpu.RefType()))(write)


@functools.cache
def store_rows(num_rows: int) -> Callable[[jax.Array, Value], None]:
  """Return a function that writes float32 [num_rows] of the row layout to global memory."""

  def write(context: mgpu.LaunchContext, rows: mgpu.FragmentedArray, out: Value) -> None:
    del context
    thread = _Thread(num_rows)
    first = mgpu_utils.getelementptr(mgpu_utils.memref_ptr(out), [thread.first_row], _f32())
    for m, half in np.ndindex(num_rows // 64, 2):
      value = _scalar_of(_row_registers(rows)[m, half])
      llvm.store(
        value, _at_byte(first, 4 * _row_offset(m, half))
      )  # The four threads of a quad hold the same value.

  return plgpu.inline_mgpu(arg_types=(_ROW, plgpu.RefType()))(write)


@functools.cache
def load_rows(num_rows: int) -> Callable[[Value], jax.Array]:
  """Return a function that reads float32 [num_rows] of global memory in the row layout."""
  row_type = plgpu.ShapeDtypeStruct((num_rows,), jnp.float32, layout=_ROW)

  def read(context: mgpu.LaunchContext, rows: Value) -> mgpu.FragmentedArray:
    del context
    return _rows_of(_load_own_rows(_Thread(num_rows), rows, num_rows, _f32()), num_rows)

  return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=row_type)(read)
