"""What a run measures: parameters, FLOPs, throughput and its ceiling, expert load, memory.

L: layers, N: experts of one kind, T: sequence length. Everything here runs on the host; the meter
is given metrics that were already fetched from the devices.
"""

import collections
import contextlib
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mfjax.config import DType, Gate, ModelConfig
from mfjax.devices import of_kind

# An expert is dead in a log interval if it got less than this part of its balanced share 1/N.
DEAD_SHARE = 0.01

ROUTER_KINDS = ("attention", "ff")
_STEP_SCALARS = (
  *("loss", "cross_entropy", "z_loss", "aux_loss"),
  *("gradient_norm", "learning_rate"),
)


def _router_weights(model: ModelConfig, num_experts: int) -> int:
  if model.gate is Gate.LINEAR:
    return model.d_model * num_experts
  return model.d_gate * (model.d_model + num_experts)


def _router_parameters(model: ModelConfig, num_experts: int) -> int:
  others = {Gate.MLP: model.d_gate, Gate.LINEAR: 0, Gate.GMM: 1}  # Bias; none; temperature.
  return _router_weights(model, num_experts) + others[model.gate]


def _count_parameters(
  model: ModelConfig, attention_experts: int, ff_experts: int
) -> dict[str, int]:
  """Count parameters by part if each layer holds so many experts; routers keep all their rows."""
  layers, d_model = model.num_layers, model.d_model
  kv = 0 if model.identity_kv else 2 * (d_model + 1) * model.d_attention
  return {
    "embedding": model.vocab_size * d_model,
    "attention_experts": layers * attention_experts * 2 * d_model * model.d_attention,
    "attention_routers": layers * _router_parameters(model, model.num_attention_experts),
    "key_value": layers * kv,
    "ff_experts": layers * ff_experts * 2 * d_model * model.d_ff,
    "ff_routers": layers * _router_parameters(model, model.num_ff_experts),
    "layer_norms": layers * 4 * d_model,
    "final_norm": 2 * d_model,
    "lm_head": model.vocab_size * d_model,
  }


def total_parameters(model: ModelConfig) -> dict[str, int]:
  """Return the number of parameters by part; padding of the vocabulary is not counted."""
  return _count_parameters(model, model.num_attention_experts, model.num_ff_experts)


def active_parameters(model: ModelConfig) -> dict[str, int]:
  """Return the parameters that one token uses, by part: top-k experts, and no embedding table.

  `final_norm` and `lm_head` lie outside the blocks; the rest is 'active in blocks'.
  """
  counts = _count_parameters(model, model.attention_top_k, model.ff_top_k)
  del counts["embedding"]  # A lookup, not a product.
  return counts


def flops_of_routers(model: ModelConfig) -> int:
  """Return the forward FLOPs per token of one layer's two routers."""
  counts = (model.num_attention_experts, model.num_ff_experts)
  return 2 * sum(_router_weights(model, count) for count in counts)


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
  """Return the FLOPs of forward and backward per trained token, recomputation not counted.

  Matrix products of the active parameters (top-k experts, routers, keys and values, lm_head), two
  FLOPs per weight, and attention's two products for each picked expert over the causal half of a
  row, (T + 1) / 2 keys on average: rows are taken as one document, as is usual. The backward pass
  costs twice the forward.
  """
  experts = (
    2 * model.d_model * (model.attention_top_k * model.d_attention + model.ff_top_k * model.d_ff)
  )
  routers = flops_of_routers(model) / 2
  kv = 0 if model.identity_kv else 2 * model.d_model * model.d_attention
  attention = 2 * model.attention_top_k * model.d_attention * (sequence_length + 1) / 2
  lm_head = model.d_model * model.vocab_size
  forward = 2 * (model.num_layers * (experts + routers + kv + attention) + lm_head)
  return 3 * forward


@dataclasses.dataclass(frozen=True)
class Peak:
  """FLOP/s of one device that count as full utilisation, and where the figure is from."""

  flops_per_second: float
  source: str


def device_peak(devices: Sequence[jax.Device], dtype: DType) -> Peak:
  """Return the published bf16 peak of these devices, or a measured ceiling if none is known."""
  kind = devices[0].device_kind
  facts = of_kind(kind)
  if facts is not None:
    return Peak(facts.bf16_flops, f"published dense bf16 peak of {kind}")
  local = [device for device in devices if device.process_index == jax.process_index()]
  ceiling = matmul_ceiling(local, dtype)
  return Peak(ceiling, f"{dtype.value} matmul measured on this {kind}")


def matmul_ceiling(
  devices: Sequence[jax.Device], dtype: DType, budget_seconds: float = 0.5
) -> float:
  """Measure the best matmul FLOP/s of one device while all are busy.

  Virtual CPU devices share cores, so each must be measured with the others at work.
  Squares grow from 512 until the time budget is used up.
  """
  matmul = jax.jit(jnp.matmul)
  best, size, start = 0.0, 512, time.perf_counter()
  while time.perf_counter() - start < budget_seconds and size <= 8192:
    ones = np.ones((size, size), jnp.dtype(dtype.value))
    operands = [jax.device_put(ones, device) for device in devices]
    jax.block_until_ready([matmul(x, x) for x in operands])  # Compiles.
    for _ in range(3):
      began = time.perf_counter()
      jax.block_until_ready([matmul(x, x) for x in operands])
      seconds = time.perf_counter() - began
      best = max(best, 2 * size**3 / seconds)
      if time.perf_counter() - start + 8 * seconds > budget_seconds:  # The next size would not fit.
        return best
    size *= 2
  return best


def peak_memory(devices: Sequence[jax.Device]) -> tuple[str, int]:
  """Return ('device_memory_peak_bytes', the fullest device's peak so far).

  Where the platform keeps no such count (CPU): ('host_memory_peak_bytes', peak resident bytes).
  """
  stats = [device.memory_stats() or {} for device in devices]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  if peaks:
    return "device_memory_peak_bytes", max(peaks)
  resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return "host_memory_peak_bytes", resident * (1 if sys.platform == "darwin" else 1024)


def router_load(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Turn one kind's router sums over any number of tokens into its load, per layer.

  Args:
    sums: picks [L, N], prob_sum [L, N], entropy_sum [L] (nats) and tokens [] or [L].

  Returns:
    share [L, N] of picks; entropy [L] of the mean router and mutual_information [L] between expert
    and token, in nats; dead [L], the number of experts below DEAD_SHARE / N of the picks. Without
    any token: NaN, and no expert is dead.
  """
  picks, prob_sum, entropy_sum, tokens = (
    np.asarray(sums[name], np.float64) for name in ("picks", "prob_sum", "entropy_sum", "tokens")
  )
  with np.errstate(invalid="ignore"):  # 0 / 0 without tokens.
    mean_router = prob_sum / tokens[..., None]
    share = picks / picks.sum(-1, keepdims=True)
    mean_entropy = entropy_sum / tokens
  logs = np.log(mean_router, out=np.zeros_like(mean_router), where=mean_router > 0)
  entropy = -(mean_router * logs).sum(-1)
  return {
    "share": share,
    "entropy": entropy,
    "mutual_information": entropy - mean_entropy,
    "dead": (share < DEAD_SHARE / picks.shape[-1]).sum(-1),
  }


class Meter:
  """Collects the metrics of steps and the time spent, and makes one record per log interval.

  The loss, its parts, the gradient norm and the learning rate are the logged step's own, so that a
  resumed run logs the same numbers; counts, router sums and times cover the interval.
  """

  def __init__(
    self,
    flops_per_token: float,
    num_devices: int,
    peak: Peak,
    *,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self._flops_per_token = flops_per_token
    self._num_devices = num_devices
    self.peak = peak
    self._clock = clock
    self._last: Mapping[str, Any] = {}
    self.restart()

  def restart(self) -> None:
    """Begin a new interval now."""
    self._began = self._clock()
    self._seconds: dict[str, float] = collections.defaultdict(float)
    self.num_steps = 0
    self._tokens = 0.0
    self._skipped = 0
    self._router: dict[str, dict[str, np.ndarray]] = {}

  @contextlib.contextmanager
  def timed(self, section: str) -> Iterator[None]:
    """Count the time inside as `input`, `checkpoint` or `pause` (not part of training at all)."""
    began = self._clock()
    try:
      yield
    finally:
      self._seconds[section] += self._clock() - began

  def add(self, metrics: Mapping[str, Any]) -> None:
    """Add one step's fetched metrics, as train_step returns them."""
    self._last = metrics
    self.num_steps += 1
    self._tokens += float(metrics["tokens"])
    self._skipped += int(metrics["skipped"])
    for kind in ROUTER_KINDS:
      totals = self._router.setdefault(kind, {})
      for name, value in metrics["router"][kind].items():
        # A skipped step's sums may be NaN.
        sums = np.where(metrics["skipped"], 0.0, np.asarray(value, np.float64))
        totals[name] = totals.get(name, 0.0) + sums

  def record(self, step: int) -> dict[str, Any]:
    """Return the interval's record and begin the next one.

    Times are seconds per step: `input` and `checkpoint` are what the loop waited for data and for
    copies to be taken, `step` is the rest, the wait for the devices.
    """
    trained = self._clock() - self._began - self._seconds["pause"]
    steps, tokens_per_second = max(self.num_steps, 1), self._tokens / max(trained, 1e-9)
    waits = {name: self._seconds[name] / steps for name in ("input", "checkpoint")}
    per_device = tokens_per_second / self._num_devices
    record: dict[str, Any] = {
      "step": step,
      **{name: float(self._last[name]) for name in _STEP_SCALARS},
      "tokens": int(self._tokens),
      "skipped": self._skipped,
      "tokens_per_second": tokens_per_second,
      "tokens_per_second_per_device": per_device,
      "mfu": per_device * self._flops_per_token / self.peak.flops_per_second,
      "mfu_of": self.peak.source,
      "seconds_step": trained / steps - sum(waits.values()),
      **{f"seconds_{name}": seconds for name, seconds in waits.items()},
      "router": {kind: router_load(self._router[kind]) for kind in ROUTER_KINDS},
    }
    self.restart()
    return record


def bits_per_byte(nats: float, num_bytes: int) -> float:
  """Convert the total nats of a text, end-of-text included, to bits per raw UTF-8 byte."""
  return nats / math.log(2) / num_bytes


def byte_entropy(histogram: Sequence[int]) -> float:
  """Return the order-0 entropy in bits per byte of a text with these counts of byte values."""
  counts = np.asarray(histogram, np.float64)
  shares = counts[counts > 0] / counts.sum()
  return float(-(shares * np.log2(shares)).sum())
