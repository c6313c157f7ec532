"""Volumes: what one layer's experts send between devices, per microbatch, as a list to add up.

Every collective of `mfjax/experts.py` is one `Transfer`. Bytes are those of one device under
routing that one set of rounds (`exchange_chunks`) covers; more skew repeats the exchanges of its
rounds. Tests hold the list against compiled programs, for CPU and for TPU.
"""

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping

import jax.numpy as jnp

from mfjax.config import MeshConfig, ModelConfig, Placement, Remat, Transport
from mfjax.dispatch import Exchange, buffer_rows
from mfjax.sharding import WEIGHT_AXES
from pallas_kernels.implementation import Implementation

_FLOAT32_BYTES = 4


class Collective(enum.Enum):
  """What moves the bytes; the name of the operation in a compiled program."""

  ALL_TO_ALL = "all-to-all"
  RAGGED_ALL_TO_ALL = "ragged-all-to-all"
  ALL_GATHER = "all-gather"
  REDUCE_SCATTER = "reduce-scatter"


class Phase(enum.Enum):
  """The part of a step that a transfer belongs to."""

  FORWARD = "forward"
  BACKWARD = "backward"


@dataclasses.dataclass(frozen=True)
class Transfer:
  """One kind of collective of a layer.

  Attributes:
    what: which rows or weights.
    collective, axes, peers: the operation, the mesh axes that it crosses, their devices.
    phase: forward, or backward (with what it computes again).
    buffer_bytes: of the operands that a device gives to the operation; what a program allocates.
    sent_bytes: that leave the device, under even routing.
  """

  what: str
  collective: Collective
  axes: tuple[str, ...]
  peers: int
  phase: Phase
  buffer_bytes: int
  sent_bytes: int


@dataclasses.dataclass(frozen=True)
class ExpertKind:
  """One kind of expert of a model: `num_experts` pairs of d_model x inner and inner x d_model."""

  name: str
  num_experts: int
  top_k: int
  d_model: int
  inner: int
  placement: Placement


def expert_kinds(model: ModelConfig, mesh: MeshConfig) -> tuple[ExpertKind, ExpertKind]:
  """Return a model's kinds of expert and how the mesh places them: attention, ff."""
  attention = (model.num_attention_experts, model.attention_top_k, model.d_model, model.d_attention)
  ff = (model.num_ff_experts, model.ff_top_k, model.d_model, model.d_ff)
  return (
    ExpertKind("attention", *attention, mesh.attention_placement),
    ExpertKind("ff", *ff, mesh.ff_placement),
  )


def layer_transfers(
  kind: ExpertKind,
  *,
  tokens: int,
  axis_sizes: Mapping[str, int],
  mesh: MeshConfig,
  model: ModelConfig,
  remat: Remat,
) -> list[Transfer]:
  """Return what one layer's experts of one kind send, for one microbatch.

  Args:
    kind: with its placement resolved.
    tokens: of one device and microbatch.
    axis_sizes: of the mesh.
    mesh: with its transport resolved. model: for the compute dtype. remat: of the training.
  """
  assert kind.placement is not Placement.AUTO, "the config is not resolved"
  width = jnp.dtype(model.compute_dtype.value).itemsize
  exchanged = kind.placement is Placement.EXPERT and axis_sizes["expert"] > 1
  axes = ("fsdp",) if kind.placement is Placement.EXPERT else WEIGHT_AXES
  local = kind.num_experts // axis_sizes["expert"] if exchanged else kind.num_experts
  transfers = _weights(kind, local, axes, axis_sizes, width)
  if exchanged:
    transfers += _rows(kind, tokens, axis_sizes["expert"], mesh, width, remat)
  return transfers


def total(
  transfers: Iterable[Transfer], phase: Phase | None = None, axis: str | None = None
) -> int:
  """Return the bytes sent by one device, of all transfers or of a phase or mesh axis alone."""
  chosen = [t for t in transfers if phase in (None, t.phase) and (axis is None or axis in t.axes)]
  return sum(t.sent_bytes for t in chosen)


def _rows(
  kind: ExpertKind, tokens: int, peers: int, mesh: MeshConfig, width: int, remat: Remat
) -> list[Transfer]:
  """Return the exchanges of rows."""
  slots = tokens * kind.top_k
  exchange = Exchange(
    num_experts=kind.num_experts,
    implementation=Implementation.XLA,  # Any: buffers do not depend on it.
    axis="expert",
    num_peers=peers,
    buffer=mesh.exchange_buffer,
    transport=mesh.transport,
    chunks=mesh.exchange_chunks,
  )
  buffer, chunks = buffer_rows(slots, exchange), exchange.chunks

  def transfer(what: str, row: int, phase: Phase, home: bool = False) -> Transfer:
    rows, collective = chunks * buffer, Collective.ALL_TO_ALL
    if mesh.transport is Transport.RAGGED and row > _FLOAT32_BYTES:
      # The operand on the way there is every slot, for each chunk.
      rows, collective = chunks * (buffer if home else slots), Collective.RAGGED_ALL_TO_ALL
    elif mesh.transport is not Transport.PADDED:  # The stand-in: a whole operand to each peer.
      rows = chunks * peers * min(slots, buffer)
    sent = slots if collective is Collective.RAGGED_ALL_TO_ALL else rows
    sent = sent * (peers - 1) // peers
    return Transfer(what, collective, ("expert",), peers, phase, rows * row, sent * row)

  return [
    _counts(kind, peers),
    *(transfer(what, row, Phase.FORWARD, home) for what, row, home in _forward(kind, width)),
    *(
      transfer(what, row, Phase.BACKWARD, home) for what, row, home in _backward(kind, width, remat)
    ),
  ]


def _counts(kind: ExpertKind, peers: int) -> Transfer:
  size, axes = kind.num_experts * 4, ("expert",)
  sent = size * (peers - 1)
  return Transfer("counts", Collective.ALL_GATHER, axes, peers, Phase.FORWARD, size, sent)


def _forward(kind: ExpertKind, width: int) -> list[tuple[str, int, bool]]:
  """Return (what, bytes of a row, whether it comes home) of a forward pass."""
  d_row, f_row = kind.d_model * width, kind.inner * width
  if kind.name == "ff":
    return [("x", d_row, False), ("y", d_row, True)]
  return [("x", d_row, False), ("q", f_row, True), ("o", f_row, False), ("y", d_row, True)]


def _backward(kind: ExpertKind, width: int, remat: Remat) -> list[tuple[str, int, bool]]:
  """Return those of a backward pass: what is not kept of the forward pass, and gradients."""
  d_row, f_row = kind.d_model * width, kind.inner * width
  if kind.name == "ff":
    again = [("x", d_row, False)]
    gradients = [("dy", d_row, False), ("p", _FLOAT32_BYTES, False)]
    gradients += [("dp", _FLOAT32_BYTES, True), ("dx", d_row, True)]
  else:
    again = [("x", d_row, False), ("o", f_row, False)]
    if remat is Remat.FULL:
      again = _forward(kind, width)
    gradients = [("dy", d_row, False), ("p", _FLOAT32_BYTES, False), ("do", f_row, True)]
    gradients += [("dq", f_row, False), ("dx", d_row, True)]
  return gradients if remat is Remat.NONE else again + gradients


def _weights(
  kind: ExpertKind,
  local: int,
  axes: tuple[str, ...],
  axis_sizes: Mapping[str, int],
  width: int,
) -> list[Transfer]:
  """Return the gathers of both matrices and the scatters of their float32 gradients."""
  peers = math.prod(axis_sizes[axis] for axis in axes)
  if peers == 1:
    return []
  matrix = local * kind.d_model * kind.inner
  part = matrix * width // peers

  def gather(what: str, phase: Phase) -> Transfer:
    return Transfer(what, Collective.ALL_GATHER, axes, peers, phase, part, part * (peers - 1))

  def scatter(what: str) -> Transfer:
    whole = matrix * _FLOAT32_BYTES
    sent = whole * (peers - 1) // peers
    return Transfer(what, Collective.REDUCE_SCATTER, axes, peers, Phase.BACKWARD, whole, sent)

  # What full rematerialisation gathers again, the backward pass gathers anyway: one operation.
  return [
    *(gather(name, Phase.FORWARD) for name in ("w_in", "w_out")),
    *(gather(name, Phase.BACKWARD) for name in ("w_in", "w_out")),
    *(scatter(f"gradient of {name}") for name in ("w_in", "w_out")),
  ]
