"""Who goes where: tokens' choices to rows sorted by expert, and back, also across devices.

Everything here runs inside a shard_map, on one device's tokens. A slot is one choice of one token:
slot = token * K + choice. Devices along the `expert` axis own equal, contiguous ranges of experts.

Peers tell each other once per layer how many slots they have for each expert; everything else
follows from these counts on every peer, so that only rows travel. They do so in rounds, through
buffers of fixed size. What is fullest (padded: a pair of peers; ragged: a receiver) decides how
many rounds there are, so that nothing is dropped and memory does not grow with skew; each round
takes an equal window of it. At least `chunks` rounds always happen: they are unrolled, and rows of
one can travel while those of another are computed.

Values are moved by gathers only, in both directions: no scatter of values, no atomics.

Shapes: S slots, R rows at the experts (groups aligned, see `pallas_kernels.grouped_matmul`),
E experts of this device, N of all, P devices along the axis, C rows of a buffer (padded: per peer).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mfjax import transport
from mfjax.config import Transport
from mfjax.transport import Slices
from pallas_kernels.grouped_matmul import group_starts, row_alignment, take_rows
from pallas_kernels.implementation import Implementation

_COUNTED_TOGETHER = 256


class RowOrder(NamedTuple):
  """Slots in rows sorted by expert, each group aligned."""

  slot_of_row: jax.Array  # int32 [R]; S for an unused row
  row_of_slot: jax.Array  # int32 [S]; R for a slot of nobody
  group_sizes: jax.Array  # int32 [E]


def order_rows(expert_ids_S: jax.Array, num_experts: int, alignment: int) -> RowOrder:
  """Sort slots by expert; expert `num_experts` means nobody. Stable, hence deterministic.

  By counting: a third of the time of a sort on a GPU (52 against 182 us for 65,536 slots of 32
  experts on an H200).
  """
  num_slots = expert_ids_S.shape[0]
  num_rows = num_slots + num_experts * (alignment - 1)
  num_rows = -(-num_rows // alignment) * alignment
  padding = (0, -num_slots % _COUNTED_TOGETHER)
  ids = jnp.pad(expert_ids_S, padding, constant_values=num_experts).reshape(-1, _COUNTED_TOGETHER)
  member = ids[:, :, None] == jnp.arange(num_experts, dtype=ids.dtype)
  rank = jnp.cumsum(member, axis=1, dtype=jnp.int32)
  counts = rank[:, -1]
  before = jnp.cumsum(counts, axis=0) - counts
  group_sizes = counts.sum(0)
  row = rank - 1 + (before + group_starts(group_sizes, alignment))[:, None]
  row_S = jnp.where(member, row, 0).sum(2).reshape(-1)[:num_slots]
  slot_S = jnp.arange(num_slots, dtype=jnp.int32)
  has_expert_S = expert_ids_S < num_experts
  target_S = jnp.where(has_expert_S, row_S, num_rows + slot_S)  # Beyond the end: dropped.
  slot_of_row = jnp.full(num_rows, num_slots, jnp.int32)
  slot_of_row = slot_of_row.at[target_S].set(slot_S, mode="drop", unique_indices=True)
  return RowOrder(slot_of_row, jnp.where(has_expert_S, row_S, num_rows), group_sizes)


@dataclasses.dataclass(frozen=True)
class Exchange:
  """How one kind of expert is reached: the mesh axis to cross (None: all experts are here)."""

  num_experts: int
  implementation: Implementation
  axis: str | None = None
  num_peers: int = 1
  buffer: float = 1.5
  transport: Transport = Transport.PADDED
  chunks: int = 1


class Crossing(NamedTuple):
  """How the slots of all peers cross; slots sorted by expert are sorted by peer, too."""

  slot_of_place: jax.Array  # int32 [S]: slots sorted by expert; S for nobody's, at the end
  place_of_slot: jax.Array  # int32 [S]; S for a slot of nobody
  counts: jax.Array  # int32 [P, N]: slots of each peer for each expert; equal on all peers
  window: jax.Array  # int32 []: rows per round, of one pair (padded) or of one receiver (ragged)
  num_rounds: jax.Array  # int32 []


class Plan(NamedTuple):
  """Routes of one layer's slots; saved by the forward pass and replayed by the backward pass."""

  expert_ids: jax.Array  # int32 [S]
  route: RowOrder | Crossing  # straight to rows where all experts are here, else to peers first


class Ragged(NamedTuple):
  """The slices that one round sends to the experts, and back."""

  there: Slices
  back: Slices


class Round(NamedTuple):
  """What one round moves, and the rows at the experts."""

  number: jax.Array  # int32 []
  order: RowOrder  # of this device's slots, or of the buffer that it received
  # What is sent: the slot in each row of the padded buffer, int32 [P * C], S where empty.
  sent: jax.Array | Ragged | None


def local_experts(exchange: Exchange) -> int:
  """Return the number of experts on one device."""
  return exchange.num_experts // exchange.num_peers


def buffer_rows(num_slots: int, exchange: Exchange) -> int:
  """Return the rows of one round's buffer: those that a device receives, over all peers."""
  parts = exchange.chunks
  if exchange.transport is Transport.PADDED:
    parts *= exchange.num_peers
  rows = -(-int(exchange.buffer * num_slots) // parts)
  return rows * (parts // exchange.chunks)


def alignment(num_slots: int, exchange: Exchange) -> int:
  """Return the row alignment of groups at the experts."""
  per_round = -(-num_slots // exchange.chunks)
  return row_alignment(exchange.implementation, per_round, local_experts(exchange))


def make_plan(expert_ids_S: jax.Array, exchange: Exchange) -> Plan:
  """Plan where each slot goes. Expert `num_experts` is nobody: such slots do not travel."""
  num_slots, num_peers = expert_ids_S.shape[0], exchange.num_peers
  if exchange.axis is None:
    order = order_rows(expert_ids_S, exchange.num_experts, alignment(num_slots, exchange))
    return Plan(expert_ids_S, order)
  order = order_rows(expert_ids_S, exchange.num_experts, 1)
  counts = jax.lax.all_gather(order.group_sizes, exchange.axis)
  sizes_PP, capacity = _pair_sizes(counts), buffer_rows(num_slots, exchange)
  if exchange.transport is Transport.PADDED:
    fullest, capacity = sizes_PP.max(), capacity // num_peers
  else:
    fullest = sizes_PP.sum(0).max()
  rounds = jnp.maximum(exchange.chunks, -(-fullest // capacity))
  crossing = Crossing(order.slot_of_row, order.row_of_slot, counts, -(-fullest // rounds), rounds)
  return Plan(expert_ids_S, crossing)


def _pair_sizes(counts: jax.Array) -> jax.Array:
  """Return int32 [P, P]: the slots of the first peer for all experts of the second."""
  num_peers = counts.shape[0]
  return counts.reshape(num_peers, num_peers, -1).sum(2)


def _before(sizes: jax.Array, axis: int) -> jax.Array:
  """Return what stands before each element along an axis: the sum of those before it."""
  return jnp.cumsum(sizes, axis) - sizes


def make_round(plan: Plan, number: jax.Array, exchange: Exchange) -> Round:
  """Return the routes of round `number`; without an exchange there is one round."""
  route, num_slots = plan.route, plan.expert_ids.shape[0]
  if isinstance(route, RowOrder):
    return Round(number, route, None)
  assert exchange.axis is not None
  make = _padded_round if exchange.transport is Transport.PADDED else _ragged_round
  me, mine = jax.lax.axis_index(exchange.axis), local_experts(exchange)
  counts_PE = jax.lax.dynamic_slice_in_dim(route.counts, me * mine, mine, 1)
  received, sent = make(route, counts_PE, number, me, buffer_rows(num_slots, exchange))
  return Round(number, order_rows(received, mine, alignment(num_slots, exchange)), sent)


def _padded_round(
  route: Crossing, counts_PE: jax.Array, number: jax.Array, me: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
  """Return the experts of the received rows, E where empty, and the slots to send."""
  num_peers = counts_PE.shape[0]
  sizes_P = _pair_sizes(route.counts)[me]
  num_slots = route.slot_of_place.shape[0]
  row = jnp.arange(num_rows // num_peers)
  rank = jnp.where(row < route.window, number * route.window + row, num_slots)
  ends = jnp.cumsum(counts_PE, 1)
  received = (rank[None, :, None] >= ends[:, None, :]).sum(2, dtype=jnp.int32)
  place = jnp.where(rank < sizes_P[:, None], _before(sizes_P, 0)[:, None] + rank, num_slots)
  slots = route.slot_of_place.at[place].get(mode="fill", fill_value=num_slots)
  return received.reshape(-1), slots.reshape(-1)


def _ragged_round(
  route: Crossing, counts_PE: jax.Array, number: jax.Array, me: jax.Array, num_rows: int
) -> tuple[jax.Array, Ragged]:
  """Return the experts of the received rows, E where empty, and the slices to send.

  All that a device ever receives stands in one long list, sorted by sender; a round takes the next
  window of it.
  """
  mine = counts_PE.shape[1]
  sizes_PP = _pair_sizes(route.counts)
  first = number * route.window
  at_sender, at_receiver = _before(sizes_PP, 1), _before(sizes_PP, 0)
  low = jnp.clip(first - at_receiver, 0, sizes_PP)
  high = jnp.clip(first + route.window - at_receiver, 0, sizes_PP)
  sizes = high - low
  at_sender = at_sender + low
  at_receiver = jnp.where(sizes > 0, at_receiver + low - first, 0)
  there = Slices(at_sender[me], sizes[me], at_receiver[me], sizes[:, me])
  back = Slices(at_receiver[:, me], sizes[:, me], at_sender[:, me], sizes[me])
  row = jnp.arange(num_rows)
  ends = jnp.cumsum(counts_PE.reshape(-1))
  passed = (first + row[:, None] >= ends).sum(1, dtype=jnp.int32)
  is_filled = (row < route.window) & (passed < ends.shape[0])
  return jnp.where(is_filled, passed % mine, mine), Ragged(there, back)


def _take(
  values: jax.Array, index: jax.Array, exchange: Exchange, is_alone: bool = True
) -> jax.Array:
  """Gather rows, or numbers; an index past the end gives zeros.

  Numbers, and what is not alone, are XLA's to fuse.
  """
  is_kernels = is_alone and values.ndim == 2
  choice = exchange.implementation if is_kernels else Implementation.XLA
  return take_rows(values, index, implementation=choice)


def to_experts(
  values: jax.Array,
  plan: Plan,
  this: Round,
  exchange: Exchange,
  per_token: int = 1,
  *,
  is_alone: bool = True,
) -> jax.Array:
  """Return [R, ...]: the values of the slots in expert order; unused rows are unspecified.

  Args:
    values: [S // per_token, ...], one per slot, or one per token with `per_token` = K.
    plan: of the layer. this: the round. exchange: static.
    per_token: slots per value.
    is_alone: whether a product reads the rows as they are; otherwise XLA fuses the gather with what
      the caller does to them.
  """
  route = plan.route
  if isinstance(route, RowOrder):
    return _take(values, this.order.slot_of_row // per_token, exchange, is_alone)
  assert exchange.axis is not None
  if isinstance(this.sent, Ragged):
    sorted_values = _take(values, route.slot_of_place // per_token, exchange)
    rows = buffer_rows(plan.expert_ids.shape[0], exchange)
    empty = jnp.zeros((rows, *values.shape[1:]), values.dtype)
    there = this.sent.there
    received = transport.send(sorted_values, empty, there, exchange.axis, exchange.transport)
  else:
    assert this.sent is not None
    buffer = _take(values, this.sent // per_token, exchange)
    buffer = buffer.reshape(exchange.num_peers, -1, *values.shape[1:])
    received = transport.swap(buffer, exchange.axis).reshape(-1, *values.shape[1:])
  return _take(received, this.order.slot_of_row, exchange, is_alone)


def to_home(
  rows: jax.Array,
  plan: Plan,
  this: Round,
  exchange: Exchange,
  so_far: jax.Array | None,
  *,
  is_alone: bool = False,
) -> jax.Array:
  """Return [S, ...]: each slot's row; slots of other rounds keep `so_far`. See `settle`.

  `is_alone`: as in `to_experts`, said of the slots.
  """
  route = plan.route
  if isinstance(route, RowOrder):
    return _take(rows, this.order.row_of_slot, exchange, is_alone)
  sent = _take(rows, this.order.row_of_slot, exchange)
  assert exchange.axis is not None
  if isinstance(this.sent, Ragged):
    if so_far is None:
      so_far = jnp.zeros((plan.expert_ids.shape[0], *rows.shape[1:]), rows.dtype)
    return transport.send(sent, so_far, this.sent.back, exchange.axis, exchange.transport)
  buffer = sent.reshape(exchange.num_peers, -1, *rows.shape[1:])
  back = transport.swap(buffer, exchange.axis).reshape(-1, *rows.shape[1:])
  capacity = back.shape[0] // exchange.num_peers
  peer = plan.expert_ids // local_experts(exchange)
  sizes_P = _pair_sizes(route.counts)[jax.lax.axis_index(exchange.axis)]
  first = _before(sizes_P, 0) + this.number * route.window
  offset = route.place_of_slot - first[jnp.minimum(peer, exchange.num_peers - 1)]
  here = (offset >= 0) & (offset < route.window) & (peer < exchange.num_peers)
  place = jnp.where(here, peer * capacity + offset, back.shape[0])
  values = _take(back, place, exchange, is_alone)
  if so_far is None:
    return values
  return jnp.where(here.reshape(-1, *(1,) * (rows.ndim - 1)), values, so_far)


def settle(values: jax.Array, plan: Plan, exchange: Exchange) -> jax.Array:
  """Return the sums of `to_home` over all rounds, [S, ...], by slot; 0 for nobody's."""
  is_padded = exchange.transport is Transport.PADDED
  if isinstance(plan.route, RowOrder) or is_padded:
    return values
  return _take(values, plan.route.place_of_slot, exchange, is_alone=False)
