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
  transfers = _weights(kind, local, axes, axis_sizes, width, remat)
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
  """Return the exchanges of rows; `D` and `F` below are a row of d_model and of the inner width."""
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
  buffer = buffer_rows(slots, exchange) * mesh.exchange_chunks
  d_row, f_row = kind.d_model * width, kind.inner * width

  def transfer(what: str, row: int, phase: Phase, home: bool = False) -> Transfer:
    # The ragged operand on the way there is every slot once, for each chunk.
    rows, collective = buffer, Collective.ALL_TO_ALL
    sent = buffer * (peers - 1) // peers
    if mesh.transport is not Transport.PADDED:
      rows = buffer if home else slots * mesh.exchange_chunks
      collective, sent = Collective.RAGGED_ALL_TO_ALL, slots * (peers - 1) // peers
    if mesh.transport is Transport.RAGGED_STAND_IN:
      collective, sent = Collective.ALL_GATHER, rows * (peers - 1)
    return Transfer(what, collective, ("expert",), peers, phase, rows * row, sent * row)

  if kind.name == "ff":
    forward = [("x", d_row, False), ("y", d_row, True)]
    again = forward[:1]
    backward = [("x", d_row, False), ("dy", d_row, False), ("p", _FLOAT32_BYTES, False)]
    backward += [("dp", _FLOAT32_BYTES, True), ("dx", d_row, True)]
  else:
    forward = [("x", d_row, False), ("q", f_row, True), ("o", f_row, False), ("y", d_row, True)]
    again = forward
    backward = [("x", d_row, False), ("dq", f_row, False), ("dx", d_row, True)]
    backward += [("dy", d_row, False), ("po", f_row, False), ("do", f_row, True)]
  if remat is not Remat.FULL:
    again = []
  counts = kind.num_experts * 4
  made = [
    Transfer(
      "counts",
      Collective.ALL_GATHER,
      ("expert",),
      peers,
      Phase.FORWARD,
      counts,
      counts * (peers - 1),
    )
  ]
  made += [transfer(what, row, Phase.FORWARD, home) for what, row, home in forward]
  made += [transfer(f"{what} again", row, Phase.BACKWARD, home) for what, row, home in again]
  made += [transfer(what, row, Phase.BACKWARD, home) for what, row, home in backward]
  return made


def _weights(
  kind: ExpertKind,
  local: int,
  axes: tuple[str, ...],
  axis_sizes: Mapping[str, int],
  width: int,
  remat: Remat,
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

  again = {"ff": ["w_in"], "attention": ["w_in", "w_out"]}[kind.name]
  return [
    *(gather(name, Phase.FORWARD) for name in ("w_in", "w_out")),
    *(gather(f"{name} again", Phase.BACKWARD) for name in again if remat is Remat.FULL),
    *(gather(name, Phase.BACKWARD) for name in ("w_in", "w_out")),
    *(scatter(f"gradient of {name}") for name in ("w_in", "w_out")),
  ]
