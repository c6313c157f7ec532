"""A whole model on one device: forward pass and train step, with random weights and tokens.

Routing is real: routers are as initialised, and how uneven they turn out is reported. Every row is
one document. The forward pass stops before lm_head and holds its weights in the compute dtype, as a
program that serves the model would; the train step is the one that `mfjax train` runs.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mfjax import metrics, model, sharding, train_step
from mfjax.bench import breakdown
from mfjax.bench.breakdown import Part
from mfjax.config import MeshConfig, RunConfig
from mfjax.model import Execution

_TRACED_CALLS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """Rows of a batch; a train step goes through them in so many microbatches (0: forward only)."""

  rows: int
  microbatches: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelTiming:
  """What one setting takes; seconds and FLOPs are of one call."""

  setting: Setting
  sequence_length: int
  seconds: float
  flops: float
  compiled_bytes: int  # arguments, results and temporaries, by the compiler's account
  peak_bytes: int  # the device's peak so far; of the process, where devices keep no account
  imbalance: float  # picks of a layer's fullest expert over the mean, mean over layers and kinds

  @property
  def tokens_per_second(self) -> float:
    return self.setting.rows * self.sequence_length / self.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Breakdown:
  """What the calls of one setting spend their seconds on."""

  setting: Setting
  parts: tuple[Part, ...]


def single_device(config: RunConfig, device: jax.Device) -> tuple[RunConfig, Mesh]:
  """Return the run with its mesh shrunk to one device, resolved for it, and that mesh.

  Raises:
    ValueError: a kernel does not exist.
  """
  mesh = sharding.make_mesh(MeshConfig(), [device])
  return train_step.resolve(_with_rows(config, 1, 1), mesh), mesh


def _with_rows(config: RunConfig, rows: int, microbatches: int) -> RunConfig:
  return dataclasses.replace(
    config,
    mesh=MeshConfig(),
    data=dataclasses.replace(config.data, batch_rows=rows),
    train=dataclasses.replace(config.train, microbatches=microbatches),
  )


def measure(
  config: RunConfig, mesh: Mesh, settings: Sequence[Setting], repeats: int
) -> Iterator[ModelTiming | Breakdown]:
  """Time each setting, then break it down: forward passes, then, with their weights gone, steps.

  Args:
    config, mesh: from `single_device`. settings: what to time. repeats: calls of which the median
      counts.

  Raises:
    ValueError: rows do not divide into microbatches.
  """
  for setting in settings:
    if setting.microbatches and setting.rows % setting.microbatches:
      raise ValueError(
        f"{setting.rows} rows do not divide into {setting.microbatches} microbatches"
      )
  forwards = [setting for setting in settings if not setting.microbatches]
  steps = [setting for setting in settings if setting.microbatches]
  length = config.data.sequence_length
  training_flops = metrics.flops_per_token(config.model, length)
  if forwards:
    forward, params = _forward(config, mesh), _compute_params(config, mesh)
    lm_head_flops = 2 * config.model.d_model * config.model.vocab_size
    for setting in forwards:
      runner = _Runner(forward, params, _batch(config, mesh, setting.rows), mesh)
      yield from _measure(setting, length, training_flops / 3 - lm_head_flops, runner, repeats)
    del params, runner
  if steps:
    state = train_step.init_state(config, mesh)
    for setting in steps:
      run = _with_rows(config, setting.rows, setting.microbatches)
      step = train_step.make_train_step(run, mesh)
      runner = _Runner(step, state, _batch(config, mesh, setting.rows), mesh, is_step=True)
      yield from _measure(setting, length, training_flops, runner, repeats)
      state = runner.state


def _compute_params(config: RunConfig, mesh: Mesh) -> Any:
  """Return random parameters in the compute dtype."""
  specs = model.param_specs(config.model, config.mesh)

  def init() -> Any:
    params = model.init_params(config.model, jax.random.key(config.train.seed))
    return jax.tree.map(lambda x: x.astype(config.model.compute_dtype.value), params)

  # As train_step.init_state: the compiler spreads the random numbers.
  placed = sharding.shardings(sharding.compiler_mesh(mesh), specs)
  return jax.device_put(jax.jit(init, out_shardings=placed)(), sharding.shardings(mesh, specs))


def _forward(config: RunConfig, mesh: Mesh) -> Any:
  """Return (params, batch) -> (hidden, metrics), jitted."""
  execution = Execution(mesh=config.mesh, kernels=config.kernels)

  def forward(params: Any, batch: Any) -> Any:
    tokens, segments = batch["tokens"], batch["segment_ids"]
    hidden, sums, _ = model.apply(params, config.model, execution, tokens, segments)
    return hidden, {"router": {"attention": sums.attention._asdict(), "ff": sums.ff._asdict()}}

  return train_step.in_mesh(jax.jit(forward), mesh)


def _batch(config: RunConfig, mesh: Mesh, rows: int) -> dict[str, jax.Array]:
  """Return random tokens on the device, each row one document."""
  length = config.data.sequence_length
  ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, length + 1), np.int32)
  segments = np.ones((rows, length), np.int32)
  batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "segment_ids": segments}
  return sharding.device_batch(mesh, batch)


class _Runner:
  """A function (state, batch) -> (result, metrics), compiled; a step's result is its new state."""

  def __init__(
    self, function: Any, state: Any, batch: Any, mesh: Mesh, *, is_step: bool = False
  ) -> None:
    self.state, self.batch, self.is_step = state, batch, is_step
    self.lowered = function.lower(state, batch)
    self.compiled = self.lowered.compile()
    self.platform = mesh.devices.flat[0].platform
    self.metrics: Any = None

  def run(self, count: int = 1) -> None:
    """Call it and wait for the last call."""
    for _ in range(count):
      result, self.metrics = self.compiled(self.state, self.batch)
      if self.is_step:
        self.state = result
    jax.block_until_ready((result, self.metrics))

  def seconds(self, repeats: int) -> float:
    """Return the median seconds of a call."""
    self.run(2)
    samples = []
    for _ in range(repeats):
      start = time.perf_counter()
      self.run()
      samples.append(time.perf_counter() - start)
    return statistics.median(samples)

  def parts(self, seconds: float) -> tuple[Part, ...]:
    """Return what a call's time goes to; what is run from here on is the traceable program."""
    self.compiled = breakdown.traceable(self.compiled, self.lowered, self.platform)
    self.run()
    traced = breakdown.measure(
      self.compiled, lambda: self.run(_TRACED_CALLS), _TRACED_CALLS, seconds
    )
    return tuple(traced)


def _measure(
  setting: Setting, length: int, flops_per_token: float, runner: _Runner, repeats: int
) -> Iterator[ModelTiming | Breakdown]:
  seconds = runner.seconds(repeats)
  memory = runner.compiled.memory_analysis()
  peak = metrics.peak_memory(list(runner.batch["tokens"].devices()))[1]
  yield ModelTiming(
    setting=setting,
    sequence_length=length,
    seconds=seconds,
    flops=setting.rows * length * flops_per_token,
    compiled_bytes=0
    if memory is None
    else memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes,
    peak_bytes=peak,
    imbalance=_imbalance(jax.device_get(runner.metrics)["router"]),
  )
  yield Breakdown(setting=setting, parts=runner.parts(seconds))


def _imbalance(router: Any) -> float:
  """Return picks of a layer's fullest expert over the mean, mean over layers and kinds."""
  shares = [metrics.router_load(sums)["share"] for sums in router.values()]
  return float(np.mean([(share.max(-1) * share.shape[-1]).mean() for share in shares]))
