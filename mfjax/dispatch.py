"""Who goes where: tokens' choices to rows sorted by expert, and back, also across devices.

Everything here runs inside a shard_map, on one device's tokens. A slot is one choice of one token:
slot = token * K + choice. Devices along the `expert` axis own equal, contiguous ranges of experts.
Slots travel in rounds through a buffer of a fixed number of rows per peer; the fullest pair of
devices decides how many rounds there are, so that nothing is dropped and memory does not grow with
skew. Values are moved by gathers only, in both directions: no scatter of values, no atomics.

Shapes: S slots, R rows at the experts (groups aligned, see `pallas_kernels.grouped_matmul`),
E experts of this device, P devices along the axis, C buffer rows per peer.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import group_starts, row_alignment
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


def take(values: jax.Array, index: jax.Array) -> jax.Array:
  """Gather rows; an index past the end gives zeros."""
  return values.at[index].get(mode="fill", fill_value=0)


@dataclasses.dataclass(frozen=True)
class Exchange:
  """How one kind of expert is reached: the mesh axis to cross (None: all experts are here)."""

  num_experts: int
  implementation: Implementation
  axis: str | None
  num_peers: int
  buffer: float


class Crossing(NamedTuple):
  """Where this device's slots go among its peers."""

  slot_by_peer: jax.Array  # int32 [S]: slots sorted by the peer that owns their expert
  first_by_peer: jax.Array  # int32 [P + 1]
  position: jax.Array  # int32 [S]: place among the slots that go to the same peer
  peer: jax.Array  # int32 [S]; P for nobody
  num_rounds: jax.Array  # int32 []


class Plan(NamedTuple):
  """Routes of one layer's slots; saved by the forward pass and replayed by the backward pass."""

  expert_ids: jax.Array  # int32 [S]
  route: RowOrder | Crossing  # straight to rows where all experts are here, else to peers first


class Round(NamedTuple):
  """What one round moves: which slot sits in each buffer row, and the rows at the experts."""

  number: jax.Array  # int32 []
  slot_of_buffer: jax.Array | None  # int32 [P * C], S where empty; None without an exchange
  order: RowOrder


def local_experts(exchange: Exchange) -> int:
  """Return the number of experts on one device."""
  return exchange.num_experts // exchange.num_peers


def buffer_rows(num_slots: int, exchange: Exchange) -> int:
  """Return C: rows that a device sends to one peer in one round."""
  return -(-int(exchange.buffer * num_slots) // exchange.num_peers)


def alignment(num_slots: int, exchange: Exchange) -> int:
  """Return the row alignment of groups at the experts."""
  return row_alignment(exchange.implementation, num_slots, local_experts(exchange))


def make_plan(expert_ids_S: jax.Array, exchange: Exchange) -> Plan:
  """Plan where each slot goes. Expert `num_experts` is nobody: such slots do not travel."""
  num_slots = expert_ids_S.shape[0]
  if exchange.axis is None:
    order = order_rows(expert_ids_S, exchange.num_experts, alignment(num_slots, exchange))
    return Plan(expert_ids_S, order)
  peer = expert_ids_S // local_experts(exchange)
  peers = order_rows(peer, exchange.num_peers, 1)
  first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(peers.group_sizes)])
  position = peers.row_of_slot - first[jnp.minimum(peer, exchange.num_peers - 1)]
  rounds = -(-peers.group_sizes.max() // buffer_rows(num_slots, exchange))
  rounds = jnp.maximum(1, jax.lax.pmax(rounds, exchange.axis))
  return Plan(expert_ids_S, Crossing(peers.slot_of_row, first, position, peer, rounds))


def make_round(plan: Plan, number: jax.Array, exchange: Exchange) -> Round:
  """Return the routes of round `number`; without an exchange there is one round."""
  route = plan.route
  if isinstance(route, RowOrder):
    return Round(number, None, route)
  num_slots, num_peers = plan.expert_ids.shape[0], exchange.num_peers
  capacity = buffer_rows(num_slots, exchange)
  place = route.first_by_peer[:-1, None] + number * capacity + jnp.arange(capacity)
  filled = place < route.first_by_peer[1:, None]
  slots = route.slot_by_peer[jnp.minimum(place, num_slots - 1)]
  slot_of_buffer = jnp.where(filled, slots, num_slots).reshape(-1)
  mine, nobody = local_experts(exchange), exchange.num_experts
  ids = plan.expert_ids.at[slot_of_buffer].get(mode="fill", fill_value=nobody)
  local_ids = jnp.where(ids < nobody, ids % mine, mine)
  received = _swap(local_ids.reshape(num_peers, -1), exchange).reshape(-1)
  order = order_rows(received, mine, alignment(num_slots, exchange))
  return Round(number, slot_of_buffer, order)


def to_experts(values: jax.Array, this: Round, exchange: Exchange, per_token: int = 1) -> jax.Array:
  """Return [R, ...]: the values of the slots in expert order; unused rows are unspecified.

  Args:
    values: [S // per_token, ...], one per slot, or one per token with `per_token` = K.
    this: the round. exchange: static.
    per_token: slots per value.
  """
  if this.slot_of_buffer is None:
    return take(values, this.order.slot_of_row // per_token)
  buffer = take(values, this.slot_of_buffer // per_token)
  buffer = buffer.reshape(exchange.num_peers, -1, *values.shape[1:])
  received = _swap(buffer, exchange).reshape(-1, *values.shape[1:])
  return take(received, this.order.slot_of_row)


def to_home(
  rows: jax.Array, plan: Plan, this: Round, exchange: Exchange, so_far: jax.Array | None
) -> jax.Array:
  """Return [S, ...]: each slot's row, 0 for nobody's; slots of other rounds keep `so_far`."""
  route = plan.route
  if isinstance(route, RowOrder):
    return take(rows, this.order.row_of_slot)
  sent = take(rows, this.order.row_of_slot).reshape(exchange.num_peers, -1, *rows.shape[1:])
  back = _swap(sent, exchange).reshape(-1, *rows.shape[1:])
  capacity = back.shape[0] // exchange.num_peers
  offset = route.position - this.number * capacity
  here = (offset >= 0) & (offset < capacity) & (route.peer < exchange.num_peers)
  values = take(back, jnp.where(here, route.peer * capacity + offset, back.shape[0]))
  if so_far is None:
    return values
  return jnp.where(here.reshape(-1, *(1,) * (rows.ndim - 1)), values, so_far)


def _swap(buffer: jax.Array, exchange: Exchange) -> jax.Array:
  """Send buffer[p] to peer p; the result's p-th part came from peer p."""
  return jax.lax.all_to_all(buffer, exchange.axis, 0, 0)
