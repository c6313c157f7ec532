"""Exchange tokens or gather weights: decided per kind of expert, by what its links would take.

The time of a layer's transfers (`mfjax/communication.py`) of one microbatch, one after the other.
Each axis of the mesh owns a dimension of the torus (two ports of a TPU; its ring closes), or shares
a switch (GPUs of one host; beyond 8 devices, their network):

    gathers and scatters    bytes sent / bandwidth of the axes together
    exchange, torus         bytes of all peers / 4 / bandwidth: a row's way is a quarter of the ring
    exchange, switch        bytes sent / bandwidth

Routing is taken as even. Latency, contention and overlap with computing are left out.
"""

import dataclasses
import math
from collections.abc import Mapping

from mfjax import communication, devices, transport
from mfjax.communication import Collective, ExpertKind, Transfer
from mfjax.config import MeshConfig, Placement, RunConfig
from mfjax.devices import DeviceFacts

_PORTS_PER_AXIS = 2
_GPUS_PER_HOST = 8
# A switch of no great speed: on it the bytes alone decide.
_UNKNOWN = DeviceFacts(name="unknown", kinds=(), bf16_flops=0.0, ici_bandwidth=10e9)


@dataclasses.dataclass(frozen=True)
class Choice:
  """How one kind of expert is placed, and the seconds per layer and microbatch of both ways.

  `exchange` is None where it is not possible: no devices to exchange with, or unequal shares.
  """

  kind: ExpertKind
  exchange: float | None
  gather: float


def resolve(
  config: RunConfig, axis_sizes: Mapping[str, int], platform: str, device_kind: str
) -> MeshConfig:
  """Return the mesh's config with transport and placements decided.

  Args:
    config: of the run. axis_sizes: of its mesh.
    platform: 'cpu', 'gpu' or 'tpu'. device_kind: of its devices, as JAX calls it.

  Raises:
    ValueError: the platform cannot do the transport; names what can.
  """
  mesh = dataclasses.replace(
    config.mesh, transport=transport.resolve(config.mesh.transport, platform)
  )
  attention, ff = choices(dataclasses.replace(config, mesh=mesh), axis_sizes, device_kind)
  return dataclasses.replace(
    mesh, attention_placement=attention.kind.placement, ff_placement=ff.kind.placement
  )


def choices(config: RunConfig, axis_sizes: Mapping[str, int], device_kind: str) -> list[Choice]:
  """Return how each kind of expert is placed, AUTO decided; the transport is resolved."""
  kinds = communication.expert_kinds(config.model, config.mesh)
  return [_choose(config, kind, axis_sizes, _facts(device_kind)) for kind in kinds]


def _facts(device_kind: str) -> DeviceFacts:
  facts = devices.of_kind(device_kind)
  return facts if facts is not None and facts.ici_bandwidth is not None else _UNKNOWN


def _choose(
  config: RunConfig, kind: ExpertKind, axis_sizes: Mapping[str, int], facts: DeviceFacts
) -> Choice:
  def cost(placement: Placement) -> float:
    placed = dataclasses.replace(kind, placement=placement)
    transfers = transfers_of(config, placed, axis_sizes)
    return sum(seconds(t, axis_sizes, facts) for t in transfers)

  gather, peers = cost(Placement.FSDP), axis_sizes["expert"]
  possible = peers > 1 and kind.num_experts % peers == 0
  exchange = cost(Placement.EXPERT) if possible else None
  placement = kind.placement
  if placement is Placement.AUTO:
    exchanges = exchange is not None and exchange < gather
    placement = Placement.EXPERT if exchanges else Placement.FSDP
  return Choice(dataclasses.replace(kind, placement=placement), exchange, gather)


def report(config: RunConfig, axis_sizes: Mapping[str, int], device_kind: str) -> list[str]:
  """Return a line per kind of expert of a resolved config: its placement, and what links take."""
  return [_line(choice, config, device_kind) for choice in choices(config, axis_sizes, device_kind)]


def _line(choice: Choice, config: RunConfig, device_kind: str) -> str:
  mesh, way = config.mesh, "weights gathered"
  if choice.kind.placement is Placement.EXPERT and choice.exchange is not None:
    way = f"tokens exchanged ({mesh.transport.value}, {mesh.exchange_chunks} chunks)"
  facts = _facts(device_kind)
  links = f"{facts.name}'s links" if facts.kinds else "links of 10 GB/s (unknown device)"
  exchange = "not possible" if choice.exchange is None else f"{choice.exchange * 1e3:.3g} ms"
  return (
    f"{choice.kind.name} experts: {way}; a layer and microbatch by {links}: "
    f"exchange {exchange}, gather {choice.gather * 1e3:.3g} ms"
  )


def transfers_of(
  config: RunConfig, kind: ExpertKind, axis_sizes: Mapping[str, int]
) -> list[Transfer]:
  """Return what one layer's experts of a kind send for one microbatch of a run."""
  shards = math.prod(axis_sizes.values()) * config.train.microbatches
  return communication.layer_transfers(
    kind,
    tokens=config.data.batch_rows * config.data.sequence_length // shards,
    axis_sizes=axis_sizes,
    mesh=config.mesh,
    model=config.model,
    remat=config.train.remat,
  )


def seconds(transfer: Transfer, axis_sizes: Mapping[str, int], facts: DeviceFacts) -> float:
  """Return the seconds that a transfer's links take; the formulas are the module's."""
  assert facts.ici_bandwidth is not None
  if facts.ici_ports == 1:
    # `expert` is the innermost axis of the mesh: its devices are neighbours.
    inner = ("fsdp", "expert") if "fsdp" in transfer.axes else ("expert",)
    span = math.prod(axis_sizes[axis] for axis in inner)
    network = facts.dcn_bandwidth if span > _GPUS_PER_HOST else None
    return transfer.sent_bytes / (network or facts.ici_bandwidth)
  num_axes = sum(axis_sizes[axis] > 1 for axis in transfer.axes)
  share = min(1.0, num_axes * _PORTS_PER_AXIS / facts.ici_ports)
  bandwidth = facts.ici_bandwidth * share
  if transfer.collective in (Collective.ALL_TO_ALL, Collective.RAGGED_ALL_TO_ALL):
    # All that peers exchange, the part that stays included, is peers / (peers - 1) of what is sent.
    exchanged = transfer.sent_bytes * transfer.peers / (transfer.peers - 1)
    return exchanged * transfer.peers / 4 / bandwidth
  return transfer.sent_bytes / bandwidth
