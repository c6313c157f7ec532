"""What a step must take at least, from what it computes, moves in memory and sends.

    step >= max(compute, memory, ICI, DCN) of the layers and the loss + memory of the optimizer

The optimizer comes after the last gradient, since the gradient's norm is needed first. Compute is
exact for the model's matrix products; memory is an estimate of the passes over activations and
weights; communication is that of the compiled program. No kernel reaches its ceiling, so a real
step takes longer: the share of the peak that follows is an upper bound.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax.numpy as jnp

from mfjax import dispatch, metrics, routing
from mfjax.collectives import Collective
from mfjax.config import Placement, Remat, RunConfig
from mfjax.devices import DeviceFacts
from mfjax.dispatch import Exchange

_FLOAT32_BYTES = 4
# Reads and writes per slot of a pass in units of one row of (d_model, inner): forward, backward.
# Feed-forward: gather, product with GELU (two results), product, gather back, sum; then gathers of
# x and dy, gradient of GELU (two results), both weights' gradients, product, gather back, sum.
_FF_ROWS = ((7, 3), (11, 6))
# Attention: gather, project, gather, core, gather, project, gather, sum; about twice that backward.
_ATTENTION_ROWS = ((7, 8), (14, 16))
_RESIDUAL_ROWS = (10, 20)  # Per token and layer: two norms, two sums, the residual.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """Seconds of a step, each alone, and what follows; None where a figure of the device lacks."""

  compute: float
  memory: float
  optimizer: float
  ici: float
  dcn: float | None
  model_flops: float
  peak_flops: float

  @property
  def bound(self) -> str:
    """Return the largest part: 'compute', 'memory', 'ICI' or 'DCN'."""
    parts = {"compute": self.compute, "memory": self.memory, "ICI": self.ici, "DCN": self.dcn or 0}
    return max(parts, key=lambda name: parts[name])

  @property
  def at_least(self) -> float:
    """Return the seconds of a step if all of it overlaps that can."""
    return max(self.compute, self.memory, self.ici, self.dcn or 0) + self.optimizer

  @property
  def without_overlap(self) -> float:
    """Return the seconds if communication hides behind nothing."""
    return max(self.compute, self.memory) + self.ici + (self.dcn or 0) + self.optimizer

  @property
  def mfu_at_most(self) -> float:
    return self.model_flops / self.peak_flops / self.at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
  """One kind of expert on a device: sizes, and what routing makes of them."""

  inner: int
  slots_per_token: int
  local_experts: int
  peers: int
  excess: float  # Rows computed on the fullest device, over the slots of a device.


def roofline(
  config: RunConfig,
  num_devices: int,
  axis_sizes: dict[str, int],
  facts: DeviceFacts,
  sent: Iterable[Collective],
  histogram: routing.Histogram | None = None,
) -> Roofline:
  """Return the bounds of one train step of a resolved config.

  Args:
    config: resolved. num_devices, axis_sizes: of its mesh. facts: of one device.
    sent: the compiled step's collectives.
    histogram: routing; None is balanced. Skew slows the fullest device of an exchange, which the
      others wait for, and adds rounds; where each device holds all experts it changes little.
  """
  assert facts.memory_bandwidth is not None
  histogram = histogram or routing.balanced(config.model)
  tokens = config.data.batch_rows * config.data.sequence_length // num_devices
  kinds = {name: _kind(config, axis_sizes, name, histogram) for name in metrics.ROUTER_KINDS}
  ici, dcn = communication(sent, facts, _extra_rounds(config, axis_sizes, histogram))
  flops = metrics.flops_per_token(config.model, config.data.sequence_length)
  return Roofline(
    compute=tokens * _flops(config, kinds) / facts.bf16_flops,
    memory=_layer_bytes(config, tokens, kinds) / facts.memory_bandwidth,
    optimizer=_optimizer_bytes(config, axis_sizes) / facts.memory_bandwidth,
    ici=ici,
    dcn=dcn,
    model_flops=tokens * flops,
    peak_flops=facts.bf16_flops,
  )


def assumptions(config: RunConfig, facts: DeviceFacts) -> list[str]:
  """Return what the bounds rest on, a sentence each."""
  again = {
    Remat.NONE: "computes nothing again",
    Remat.SELECTIVE: "computes no product again",
    Remat.FULL: "computes the attention layer and half of the feed-forward layer again",
  }[config.train.remat]
  dcn = "unknown" if facts.dcn_bandwidth is None else f"{facts.dcn_bandwidth / 1e9:.4g} GB/s"
  link = f"{(facts.ici_bandwidth or 0) / 1e9:.4g} GB/s over {facts.ici_ports} ports"
  if facts.ici_ports == 1:
    link = f"{(facts.ici_bandwidth or 0) / 1e9:.4g} GB/s through a switch"
  return [
    f"{facts.name}: {facts.bf16_flops / 1e12:.4g} TFLOP/s bf16, "
    f"{(facts.memory_bandwidth or 0) / 1e9:.4g} GB/s memory, ICI {link} one way, DCN {dcn}",
    "every product runs at the device's peak, memory and links at their published bandwidth",
    f"remat={config.train.remat.value} {again}; attention's backward computes its scores again",
    "attention works on the causal half of rows of one document; groups of rows fill whole tiles",
    "memory traffic is an estimate: passes over activations and weights, each pass once",
    "a group that spans d dimensions of the torus uses 2 d ports, in rings that wrap around",
    "compute, memory, ICI and DCN overlap completely in layers and loss; the optimizer follows",
  ]


def communication(
  sent: Iterable[Collective], facts: DeviceFacts, extra_rounds: float
) -> tuple[float, float | None]:
  """Return the seconds of a step on ICI and on DCN, one collective after the other on each.

  Args:
    sent: of the step. facts: of one device.
    extra_rounds: how often the exchange's loop of unknown length runs, on average.
  """
  assert facts.ici_bandwidth is not None
  ici = dcn = 0.0
  for one in sent:
    times = one.count * (extra_rounds if one.dynamic else 1)
    ports = facts.ici_ports if facts.ici_ports == 1 else 2 * max(one.dimensions, 1)
    bandwidth = facts.ici_bandwidth * min(1.0, ports / facts.ici_ports)
    ici += times * one.ici_bytes / bandwidth
    dcn += times * one.dcn_bytes
  if not dcn:
    return ici, 0.0
  return ici, dcn / facts.dcn_bandwidth if facts.dcn_bandwidth else None


def _kind(
  config: RunConfig, axis_sizes: dict[str, int], name: str, histogram: routing.Histogram
) -> _Kind:
  model, mesh = config.model, config.mesh
  count, top_k, inner, placement = {
    "attention": (
      *(model.num_attention_experts, model.attention_top_k, model.d_attention),
      mesh.attention_placement,
    ),
    "ff": (model.num_ff_experts, model.ff_top_k, model.d_ff, mesh.ff_placement),
  }[name]
  peers = axis_sizes["expert"] if placement is Placement.EXPERT else 1
  axis = "expert" if peers > 1 else None
  exchange = Exchange(
    count, config.kernels.grouped_matmul, axis, peers, config.mesh.exchange_buffer
  )
  rows = config.data.batch_rows // (math.prod(axis_sizes.values()) * config.train.microbatches)
  slots = rows * config.data.sequence_length * top_k
  excess = routing.computed_rows(histogram[name], slots, peers, dispatch.alignment(slots, exchange))
  return _Kind(
    inner=inner,
    slots_per_token=top_k,
    local_experts=count // peers,
    peers=peers,
    excess=excess,
  )


def _extra_rounds(
  config: RunConfig, axis_sizes: dict[str, int], histogram: routing.Histogram
) -> float:
  """Return the exchange's rounds beyond its chunks, per layer, over the kinds that exchange."""
  mesh = config.mesh
  extra = [
    routing.extra_rounds(
      histogram[name], axis_sizes["expert"], mesh.exchange_buffer, mesh.exchange_chunks
    )
    for name, placement in zip(
      metrics.ROUTER_KINDS, (mesh.attention_placement, mesh.ff_placement), strict=True
    )
    if placement is Placement.EXPERT
  ]
  return sum(extra) / len(extra) if extra else 0.0


def _flops(config: RunConfig, kinds: dict[str, _Kind]) -> float:
  """Return the FLOPs per token of what a device computes: unused rows and recomputation too."""
  model, remat = config.model, config.train.remat
  keys = (config.data.sequence_length + 1) / 2
  products = {
    name: 2 * 2 * model.d_model * kind.inner * kind.slots_per_token * kind.excess
    for name, kind in kinds.items()
  }
  core = 2 * 2 * model.attention_top_k * model.d_attention * keys
  gate = metrics.flops_of_routers(model)
  kv = 0 if model.identity_kv else 2 * 2 * model.d_model * model.d_attention
  forward = sum(products.values()) + core + gate + kv
  again = {
    Remat.NONE: 0.0,
    Remat.SELECTIVE: 0.0,
    Remat.FULL: products["attention"] + products["ff"] / 2 + core + gate + kv,
  }[remat]
  lm_head = 2 * model.d_model * model.padded_vocab_size
  return model.num_layers * (3 * forward + core / 2 + again) + 3 * lm_head


def _layer_bytes(config: RunConfig, tokens: int, kinds: dict[str, _Kind]) -> float:
  """Return the bytes that layers and loss read and write per step on one device (an estimate)."""
  model, train = config.model, config.train
  width = jnp.dtype(model.compute_dtype.value).itemsize
  passes = (1 + (train.remat is Remat.FULL), 1)
  rows = {"attention": _ATTENTION_ROWS, "ff": _FF_ROWS}
  per_token = float(model.d_model) * sum(
    n * times for n, times in zip(_RESIDUAL_ROWS, passes, strict=True)
  )
  weights = 0.0
  for name, kind in kinds.items():
    for (outer, inner), times in zip(rows[name], passes, strict=True):
      row = outer * model.d_model + inner * kind.inner
      per_token += times * kind.slots_per_token * kind.excess * row
    elements = 2 * kind.local_experts * model.d_model * kind.inner
    # Gathered or cast: written and read in each pass; gradients written and read in float32.
    weights += elements * (2 * width * (passes[0] + 1) + 2 * _FLOAT32_BYTES)
  layers = model.num_layers * (tokens * per_token * width + train.microbatches * weights)
  # Logits: written once, read three times in float32; their gradient written once, read twice.
  logits = tokens * model.padded_vocab_size * (4 * _FLOAT32_BYTES + 3 * width)
  return layers + logits


def _optimizer_bytes(config: RunConfig, axis_sizes: dict[str, int]) -> float:
  """Return the bytes of the update and of accumulating gradients per step on one device."""
  shards = axis_sizes["fsdp"] * axis_sizes["expert"]
  elements = sum(metrics.total_parameters(config.model).values()) / shards
  sizes = {
    name: jnp.dtype(getattr(config.optimizer, f"{name}_dtype").value).itemsize
    for name in ("gradient", "first_moment", "second_moment")
  }
  update = 2 * (_FLOAT32_BYTES + sizes["first_moment"] + sizes["second_moment"])
  update += 2 * sizes["gradient"]  # The norm, then the update.
  count = config.train.microbatches
  accumulate = count * (2 * sizes["gradient"] + _FLOAT32_BYTES) if count > 1 else 0
  return elements * (update + accumulate)
