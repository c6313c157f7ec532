"""Configuration of a run: frozen dataclasses, validated when built, to and from JSON.

A run is one `RunConfig`. Components receive their own sub-config, never the root. Values that a
user gave and that cannot work raise `ValueError` with the field, the value and a remedy; nothing
here touches a device.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any, Self

from mfjax.schema import (
  Checked,
  flatten,
  fraction,
  from_plain,
  not_negative,
  positive,
  to_plain,
)
from pallas_kernels.implementation import Implementation


class DType(enum.Enum):
  """Number format of a computation or of a stored tensor."""

  FLOAT32 = "float32"
  BFLOAT16 = "bfloat16"


class Gate(enum.Enum):
  """How router logits are computed from the layer's input."""

  MLP = "mlp"
  LINEAR = "linear"
  GMM = "gmm"


class Init(enum.Enum):
  """Initialisation: as published, or truncated normal with fan-in scaling at every depth."""

  PUBLISHED = "published"
  TRUNCATED_NORMAL = "truncated_normal"


class Remat(enum.Enum):
  """What the backward pass recomputes.

  `none`: nothing. `selective`: what is cheap: norms and the routers' activation, but no product.
  `full`: everything but the layers' inputs.
  """

  NONE = "none"
  SELECTIVE = "selective"
  FULL = "full"


class AuxLoss(enum.Enum):
  """Auxiliary loss over the routers' statistics."""

  NONE = "none"
  MUTUAL_INFORMATION = "mutual_information"
  CONCENTRATION = "concentration"
  SWITCH = "switch"


class Statistics(enum.Enum):
  """Which estimate of the whole batch's router statistics a microbatch's gradient sees."""

  MICROBATCH = "microbatch"
  RUNNING = "running"
  EXACT = "exact"


class Placement(enum.Enum):
  """How one kind of expert is spread: tokens travel to experts, or weights are gathered.

  `auto`: what costs less by `mfjax/placement.py`, decided once, when a run is resolved.
  """

  AUTO = "auto"
  EXPERT = "expert"
  FSDP = "fsdp"


class Transport(enum.Enum):
  """How rows cross the `expert` axis; `auto` is the platform's, see `dispatch.resolve`.

  `padded`: all-to-all of equal parts. `ragged`: only the rows there are. `ragged_stand_in`: the
  same program for where ragged does not exist (CPU), with a wide padded one in its place.
  """

  AUTO = "auto"
  PADDED = "padded"
  RAGGED = "ragged"
  RAGGED_STAND_IN = "ragged_stand_in"


class Schedule(enum.Enum):
  """Learning rate after the linear warm-up."""

  COSINE = "cosine"
  WSD = "wsd"
  CONSTANT = "constant"


class RowFormat(enum.Enum):
  """How documents become rows: packed with segment ids, or concatenated and cut."""

  PACK = "pack"
  CONCATENATE = "concatenate"


class DataEnd(enum.Enum):
  """What happens when every document of a domain was seen."""

  REPEAT = "repeat"
  STOP = "stop"


class OnSaveError(enum.Enum):
  """What a failed checkpoint save (full disk) does to the run."""

  STOP = "stop"
  CONTINUE = "continue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
  """Shape of a ModuleFormer; defaults are MoLM-350M-4B."""

  vocab_size: int = 50295
  d_model: int = 1024
  num_layers: int = 24
  num_heads: int = 1
  d_attention: int = 1024
  d_ff: int = 2048
  num_attention_experts: int = 16
  num_ff_experts: int = 32
  attention_top_k: int = 2
  ff_top_k: int = 2
  gate: Gate = Gate.MLP
  d_gate: int = 256
  sample_top_k: int = 0
  embedding_dropout: float = 0.0
  residual_dropout: float = 0.0
  router_dropout: float = 0.0
  layer_norm_eps: float = 1e-5
  init: Init = Init.PUBLISHED
  init_std: float = 0.02
  compute_dtype: DType = DType.BFLOAT16

  def _validate(self) -> None:
    positive(self, "vocab_size", "d_model", "num_layers", "num_heads", "d_attention", "d_ff")
    positive(self, "num_attention_experts", "num_ff_experts", "attention_top_k", "ff_top_k")
    positive(self, "d_gate", "layer_norm_eps", "init_std")
    not_negative(self, "sample_top_k")
    fraction(self, "embedding_dropout", "residual_dropout", "router_dropout")
    for kind in ("attention", "ff"):
      top_k, num_experts = getattr(self, f"{kind}_top_k"), getattr(self, f"num_{kind}_experts")
      if top_k > num_experts:
        raise ValueError(
          f"{kind}_top_k={top_k} exceeds num_{kind}_experts={num_experts}: "
          f"choose {kind}_top_k of at most {num_experts}"
        )
      if self.sample_top_k > top_k:
        raise ValueError(
          f"sample_top_k={self.sample_top_k} exceeds {kind}_top_k={top_k}: "
          f"choose sample_top_k of at most {top_k}"
        )
    if self.d_attention % self.num_heads:
      most = min(self.num_heads, self.d_attention)
      works = max(n for n in range(1, most + 1) if self.d_attention % n == 0)
      raise ValueError(
        f"d_attention={self.d_attention} is not divisible by num_heads={self.num_heads}: "
        f"num_heads={works} works"
      )

  @property
  def identity_kv(self) -> bool:
    """True if keys and values are the layer's normalised input itself, without parameters."""
    return self.d_attention == self.d_model and self.num_heads == 1

  @property
  def is_random(self) -> bool:
    """True if a training step draws random numbers (dropout, sampled top k)."""
    dropouts = (self.embedding_dropout, self.residual_dropout, self.router_dropout)
    return self.sample_top_k > 0 or any(dropouts)

  @property
  def head_dim(self) -> int:
    return self.d_attention // self.num_heads

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the embedding and of lm_head in memory: vocab_size rounded up to 128."""
    return math.ceil(self.vocab_size / 128) * 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked):
  """Devices by axis (one may be -1: the remaining devices), and how experts are spread.

  `exchange_buffer`: rows of the exchange's buffers, in balanced shares. `exchange_chunks`: parts in
  which rows travel, so that one moves while another is computed.
  """

  data: int = -1
  fsdp: int = 1
  expert: int = 1
  attention_placement: Placement = Placement.AUTO
  ff_placement: Placement = Placement.AUTO
  transport: Transport = Transport.AUTO
  exchange_buffer: float = 1.5
  exchange_chunks: int = 2

  def _validate(self) -> None:
    for axis, size in self.axis_sizes.items():
      if size == 0 or size < -1:
        raise ValueError(f"{axis}={size} must be a positive number of devices, or -1 for the rest")
    if list(self.axis_sizes.values()).count(-1) > 1:
      raise ValueError(f"{self.axis_sizes}: only one mesh axis may be -1; give the others a size")
    if self.exchange_buffer < 1:
      raise ValueError(f"exchange_buffer={self.exchange_buffer} must be at least 1: 1.5 is usual")
    positive(self, "exchange_chunks")

  @property
  def axis_sizes(self) -> dict[str, int]:
    return {"data": self.data, "fsdp": self.fsdp, "expert": self.expert}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig(Checked):
  """Implementation of each operation that has a kernel, and the compiler's options.

  `stick_breaking_eps`: a kernel skips the keys to the left once less than this share of the stick
  is left to every query of a tile; 0 is exact. The error of an output is at most eps times max |v|.
  `compiler_preset`: compile the train step with the platform's options of `compiler_options.py`.
  """

  grouped_matmul: Implementation = Implementation.AUTO
  stick_breaking: Implementation = Implementation.AUTO
  stick_breaking_eps: float = 0.0
  compiler_preset: bool = True

  def _validate(self) -> None:
    fraction(self, "stick_breaking_eps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
  """Prepared data and how it becomes batches.

  `path` is a directory that `mfjax prepare` wrote. `mixture` maps domains to shares of tokens;
  empty means each domain's natural share.
  """

  path: str = ""
  mixture: tuple[tuple[str, float], ...] = ()
  sequence_length: int = 2048
  batch_rows: int = 512
  row_format: RowFormat = RowFormat.PACK
  on_end: DataEnd = DataEnd.REPEAT
  window_tokens: int = 4_194_304
  prefetch_batches: int = 2

  def _validate(self) -> None:
    positive(self, "sequence_length", "batch_rows", "window_tokens", "prefetch_batches")
    for domain, share in self.mixture:
      if not share > 0:
        raise ValueError(f"mixture gives domain {domain!r} the share {share}: it must be positive")
    names = [domain for domain, _ in self.mixture]
    for name in names:
      if names.count(name) > 1:
        raise ValueError(f"mixture names domain {name!r} twice: give each domain one share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(Checked):
  """Weights of the losses; `chunk_tokens` bounds the rows of logits that a device holds at once."""

  aux: AuxLoss = AuxLoss.MUTUAL_INFORMATION
  aux_weight: float = 0.01
  z_weight: float = 0.0
  statistics: Statistics = Statistics.RUNNING
  chunk_tokens: int = 2048

  def _validate(self) -> None:
    not_negative(self, "aux_weight", "z_weight")
    positive(self, "chunk_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
  """AdamW with a warm-up and a schedule over `TrainConfig.steps`.

  `clip_norm` 0: no clipping. With a bfloat16 `gradient_dtype` the sum over microbatches rounds
  after each of them.
  """

  learning_rate: float = 3e-4
  schedule: Schedule = Schedule.COSINE
  warmup_steps: int = 2000
  decay_fraction: float = 0.2
  final_fraction: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  gradient_dtype: DType = DType.FLOAT32
  first_moment_dtype: DType = DType.FLOAT32
  second_moment_dtype: DType = DType.FLOAT32

  def _validate(self) -> None:
    positive(self, "learning_rate", "eps")
    not_negative(self, "warmup_steps", "weight_decay", "clip_norm")
    fraction(self, "beta1", "beta2")
    for name in ("decay_fraction", "final_fraction"):
      value = getattr(self, name)
      if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
  """Length of the run and what one step does."""

  steps: int = 100_000
  microbatches: int = 1
  remat: Remat = Remat.FULL
  seed: int = 0
  max_skipped_steps: int = 10
  log_every: int = 10
  tensorboard: bool = True

  def _validate(self) -> None:
    positive(self, "steps", "microbatches", "max_skipped_steps", "log_every")
    not_negative(self, "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(Checked):
  """Held-out loss by domain, every `every` steps and at the end (0: at the end only).

  `max_tokens` bounds the predictions per domain while training, to whole documents (0: all); the
  last evaluation takes all. `sample_tokens` is the length of the continuation printed at the end.
  """

  every: int = 1000
  max_tokens: int = 1_000_000
  sample_tokens: int = 0

  def _validate(self) -> None:
    not_negative(self, "every", "max_tokens", "sample_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Checked):
  """When checkpoints are written and which are kept (`keep_every` 0: only the last ones)."""

  every: int = 1000
  keep_last: int = 3
  keep_every: int = 0
  on_save_error: OnSaveError = OnSaveError.STOP

  def _validate(self) -> None:
    positive(self, "every", "keep_last")
    not_negative(self, "keep_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig(Checked):
  """A JAX profiler trace of `num_steps` steps from `start_step` on (0 steps: no trace)."""

  start_step: int = 10
  num_steps: int = 0

  def _validate(self) -> None:
    not_negative(self, "start_step", "num_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig(Checked):
  """Time limits in seconds of a run on several processes.

  `initialization_timeout`: until all are connected. `heartbeat_timeout`: a process that is silent
  for so long is dead, and the others end. `shutdown_timeout`: how long finished processes wait for
  the last one. `watchdog_timeout`: without a step for so long (compilation, one batch of an
  evaluation and reading a checkpoint count too) all stacks are printed and the job ends; 0: never.
  """

  initialization_timeout: int = 300
  heartbeat_timeout: int = 10
  shutdown_timeout: int = 120
  watchdog_timeout: int = 1800

  def _validate(self) -> None:
    positive(self, "initialization_timeout", "heartbeat_timeout", "shutdown_timeout")
    not_negative(self, "watchdog_timeout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
  """Everything that defines a run."""

  model: ModelConfig = ModelConfig()
  mesh: MeshConfig = MeshConfig()
  kernels: KernelConfig = KernelConfig()
  data: DataConfig = DataConfig()
  loss: LossConfig = LossConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  evaluate: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  profile: ProfileConfig = ProfileConfig()
  cluster: ClusterConfig = ClusterConfig()

  def _validate(self) -> None:
    rows, microbatches = self.data.batch_rows, self.train.microbatches
    if rows % microbatches:
      raise ValueError(
        f"data.batch_rows={rows} is not divisible by train.microbatches={microbatches}: "
        f"data.batch_rows={math.ceil(rows / microbatches) * microbatches} works"
      )
    if self.optimizer.warmup_steps > self.train.steps:
      raise ValueError(
        f"optimizer.warmup_steps={self.optimizer.warmup_steps} exceeds train.steps="
        f"{self.train.steps}: choose at most {self.train.steps}"
      )

  def to_dict(self) -> dict[str, Any]:
    """Return a JSON-able nested dict; enums become their values."""
    return to_plain(self)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> Self:
    """Build a config from `to_dict`'s form; missing fields take their defaults.

    Raises:
      ValueError: an unknown field (with the nearest known one) or a value of the wrong type.
    """
    return from_plain(cls, values, "")

  def differences(self, other: Self) -> list[str]:
    """Return one 'field: mine != theirs' line per leaf that differs."""
    mine, theirs = flatten(self.to_dict()), flatten(other.to_dict())
    return [f"{k}: {mine[k]!r} != {theirs[k]!r}" for k in mine if mine[k] != theirs[k]]
