"""The training loop: steps, metrics one step late, evaluation, checkpoints, stop requests.

The loop waits for the devices only to stay one step ahead of them: step n + 1 is dispatched and the
batch after it is on its way before the metrics of step n are read.
"""

import contextlib
import dataclasses
import logging
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from mfjax import (
  checkpoint,
  compiler_options,
  evaluate,
  held_out,
  metrics,
  placement,
  plot,
  sharding,
  storage,
  train_step,
)
from mfjax.cluster.session import Session
from mfjax.cluster.stop import Exit
from mfjax.config import OnSaveError, RunConfig
from mfjax.data.index import DataIndex, open_index
from mfjax.data.pipeline import TrainStream
from mfjax.data.tokenizer import load_tokenizer
from mfjax.workdir import absolute, check_config, write_config
from mfjax.writers import Writer, open_writers

_LOG = logging.getLogger(__name__)

Stream = Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]


class TrainingFailedError(Exception):
  """The run cannot go on; the message says why, which checkpoint is good and how to go on."""


def open_data(config: RunConfig) -> DataIndex:
  """Open the prepared data and hold it against the model; no device is touched.

  Raises:
    ValueError: the data is missing or damaged, or its vocabulary is not the model's.
  """
  index = open_index(config.data.path)
  if index.vocab_size != config.model.vocab_size:
    raise ValueError(
      f"config.model.vocab_size={config.model.vocab_size}, but the tokenizer of "
      f"{config.data.path} has {index.vocab_size} tokens: "
      f"--config.model.vocab_size={index.vocab_size} fits"
    )
  return index


def train(
  config: RunConfig,
  workdir: epath.PathLike,
  *,
  session: Session,
  resume_command: str,
  allow_config_change: bool = False,
) -> Exit:
  """Train until `train.steps`, from the workdir's newest good checkpoint if it has one.

  Every process of a run calls this with its own session, and all take the same way through it: what
  decides about it is the same on all of them.

  Args:
    session: asked after every step whether to stop; then the run saves a checkpoint and returns.
    resume_command: what a person types to go on, for messages.
    allow_config_change: go on although the model, data, optimizer or loss were changed.

  Raises:
    ValueError: data, workdir, config and processes do not fit together.
    TrainingFailedError: too many non-finite steps in a row, or a checkpoint or metrics could not be
      saved.
  """
  workdir, index = absolute(workdir), open_data(config)
  check_config(workdir, config, allow=allow_config_change)
  session.agree(config, index)  # No process has written into the workdir before all have seen it.
  if jax.process_count() != session.process.count:  # Each would stop by itself: a deadlock.
    raise ValueError(
      f"JAX runs in {jax.process_count()} processes and the session in {session.process.count}: "
      "open it with mfjax.cluster.session.open_session"
    )
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  config = train_step.resolve(config, mesh)
  abstract_state = train_step.abstract_state(config, mesh)
  with contextlib.ExitStack() as stack:
    checkpointer = checkpoint.Checkpointer(workdir, config.checkpoint, config)
    stack.enter_context(_closing(checkpointer, resume_command))
    start = checkpointer.restore(abstract_state) or _fresh(config, mesh)
    stream = TrainStream(
      index,
      config.data,
      seed=config.train.seed,
      own_rows=sharding.process_rows(mesh, config.data.batch_rows),
      state=start.data_state or None,
    )
    stack.enter_context(contextlib.closing(stream))
    if session.process.is_first:  # Not before: a mistake must not lay down the workdir's config.
      write_config(workdir, config)
    writer = open_writers(workdir, config.train, start.step, session.process)
    stack.enter_context(contextlib.closing(writer))
    run = _Run(config, workdir, index, mesh, checkpointer, writer, session, resume_command, start)
    return run.go(stream)


@contextlib.contextmanager
def _closing(checkpointer: checkpoint.Checkpointer, resume_command: str) -> Iterator[None]:
  """Close `checkpointer` at the end; a save that fails then never hides what ended the run."""
  ended_well = False
  try:
    yield
    ended_well = True
  finally:
    try:
      checkpointer.close()
    except checkpoint.CheckpointSaveError as error:
      if ended_well:
        raise TrainingFailedError(f"{error}. To go on: {resume_command}") from error
      _LOG.error("%s", error)


def _fresh(config: RunConfig, mesh: jax.sharding.Mesh) -> checkpoint.Restored:
  state = train_step.init_state(config, mesh)
  return checkpoint.Restored(step=0, state=state, data_state={})


TrainStep = Callable[[Any, dict[str, jax.Array]], tuple[Any, Any]]


class _Batch(NamedTuple):
  arrays: dict[str, jax.Array]
  data_state: dict[str, Any]  # Resumes after this batch.


class _Run:
  """One process's run: the state of the training and everything that watches it."""

  def __init__(
    self,
    config: RunConfig,
    workdir: epath.Path,
    index: DataIndex,
    mesh: jax.sharding.Mesh,
    checkpointer: checkpoint.Checkpointer,
    writer: Writer,
    session: Session,
    resume_command: str,
    start: checkpoint.Restored,
  ):
    self.config, self.workdir, self.index, self.mesh = config, workdir, index, mesh
    self.checkpointer, self.writer = checkpointer, writer
    self.session, self.resume_command = session, resume_command
    self.step, self.state, self.data_state = start.step, start.state, start.data_state
    self.first_step = start.step
    self.meter = metrics.Meter(
      metrics.flops_per_token(config.model, config.data.sequence_length),
      mesh.size,
      metrics.device_peak(list(mesh.devices.flat), config.model.compute_dtype),
    )
    self.eval_step = evaluate.make_eval_step(config, mesh)
    self.unread: tuple[int, Any] | None = None  # The newest step and its metrics, on the devices.
    self.read_step, self.skipped_in_a_row = start.step, 0
    self.trace: str | None = None  # The directory of a trace that is being taken.

  def go(self, stream: Stream) -> Exit:
    """Train and finish, or stop on request."""
    self._introduce()
    try:
      done = self._train_steps(stream)
      self._read_metrics()
    finally:
      self._stop_trace()
    self._check_health()
    if done and self._finish():
      return Exit.FINISHED
    return self._interrupt()

  def _train_steps(self, stream: Stream) -> bool:
    """Train to the last step or the end of the data (then True), or to a stop request (False)."""
    if self.step >= self.config.train.steps:
      self.writer.say(
        f"already finished: step {self.step} of train.steps={self.config.train.steps}"
      )
      return True
    upcoming = self._next_batch(stream)
    if upcoming:
      step_fn = self._compile(upcoming)
    while upcoming and self.step < self.config.train.steps:
      if self._must_stop():
        return False
      self._trace_if_due()
      with (
        jax.transfer_guard("disallow"),
        jax.profiler.StepTraceAnnotation("train", step_num=self.step),
      ):
        self.state, step_metrics = step_fn(self.state, upcoming.arrays)
      self.step, self.data_state = self.step + 1, upcoming.data_state
      upcoming = self._next_batch(stream)  # While the devices work.
      self._read_metrics(then=(self.step, step_metrics))
      self._check_health()
      if upcoming and self._due(self.config.evaluate.every):
        self._evaluate(self.config.evaluate.max_tokens)
      if upcoming and self._due(self.config.checkpoint.every):
        self._save()
    if self.step < self.config.train.steps:
      self.writer.say(f"the data ended after step {self.step} (data.on_end=stop)")
    return True

  def _must_stop(self) -> bool:
    """Note that the run goes on; return whether all processes stop here."""
    self.session.step(self.step)
    return self.session.stop.poll() is not None

  def _compile(self, batch: _Batch) -> TrainStep:
    began = time.perf_counter()
    step_fn: Any = train_step.make_train_step(self.config, self.mesh)
    compiled: TrainStep = step_fn.lower(self.state, batch.arrays).compile()
    self.writer.say(f"compiled the train step in {time.perf_counter() - began:.1f} s")
    # The first collective connects the processes, and gloo gives up on one that compiles for
    # 30 seconds longer than the others.
    self.session.meet("compiled")
    self.meter.restart()
    return compiled

  def _next_batch(self, stream: Stream) -> _Batch | None:
    """Return the next batch, on its way to the devices, or None at the end of the data."""
    with self.meter.timed("input"):
      item = next(stream, None)
    if item is None:
      return None
    batch, data_state = item
    wanted = {name: rows for name, rows in batch.items() if name != "domain_ids"}
    return _Batch(sharding.device_batch(self.mesh, wanted), data_state)

  def _due(self, every: int) -> bool:
    """Whether something periodic falls on this step; after the last step `_finish` does all."""
    return every > 0 and self.step % every == 0 and self.step < self.config.train.steps

  def _read_metrics(self, then: tuple[int, Any] | None = None) -> None:
    """Wait for the unread step and take in its metrics; `then` is the next unread one."""
    unread, self.unread = self.unread, then
    if unread is None:
      return
    self.read_step, device_metrics = unread
    values = jax.device_get(device_metrics)
    self.meter.add(values)
    self.skipped_in_a_row = int(values["skipped_in_a_row"])
    self.writer.progress(self.read_step)
    if self.read_step % self.config.train.log_every == 0:
      self._log(self.read_step)

  def _log(self, step: int) -> None:
    memory, peak_bytes = metrics.peak_memory(self.mesh.local_devices)
    self._write(self.meter.record(step) | {memory: peak_bytes})

  def _write(self, record: dict[str, Any]) -> None:
    """Log a record; a disk that cannot take it is to the run what a failed save is."""
    with self._save_errors():
      try:
        self.writer.log(record)
      except BrokenPipeError:  # Nobody reads the terminal's lines any more: no fault of a disk.
        raise
      except OSError as error:
        raise checkpoint.CheckpointSaveError(
          f"the metrics of step {record['step']} could not be written: {error}"
        ) from error

  def _check_health(self) -> None:
    """Raise TrainingFailedError after too many skipped steps or, as configured, a failed save."""
    with self._save_errors():
      self.checkpointer.check()
    if self.skipped_in_a_row >= self.config.train.max_skipped_steps:
      with self._save_errors(OnSaveError.CONTINUE):
        self.checkpointer.wait()
      raise TrainingFailedError(
        f"{self.skipped_in_a_row} steps in a row, up to step {self.read_step}, had a non-finite "
        "loss or gradient and were skipped (train.max_skipped_steps). "
        f"{self._last_good()}. The same config and data will fail again: lower "
        "optimizer.learning_rate or look at the data; "
        f"then, with --allow_config_change, to go on: {self.resume_command}"
      )

  def _last_good(self) -> str:
    steps = self.checkpointer.complete_steps()
    if not steps:
      return "No checkpoint was saved yet"
    return f"The last good checkpoint is {self.workdir / 'checkpoints' / str(steps[0])}"

  @contextlib.contextmanager
  def _save_errors(self, on_error: OnSaveError | None = None) -> Iterator[None]:
    """Turn a failed save into the end of the run or into a warning, as configured."""
    try:
      yield
    except checkpoint.CheckpointSaveError as error:
      if (on_error or self.config.checkpoint.on_save_error) is OnSaveError.STOP:
        raise TrainingFailedError(
          f"{error}. {self._last_good()}. To go on: {self.resume_command}"
        ) from error
      self._warn(f"{error}; training goes on (checkpoint.on_save_error)")

  def _warn(self, text: str) -> None:
    """Say what went wrong on this process, be it the first or not."""
    if self.session.process.is_first:
      self.writer.say(f"warning: {text}")
    else:
      _LOG.warning("%s", text)

  def _save(self) -> None:
    """Save this step in the background, unless it was skipped: the last good one stays newest."""
    self._read_metrics()  # Before the step's checkpoint exists its metrics are written.
    if self.skipped_in_a_row:
      return
    with self.meter.timed("checkpoint"):
      with self._save_errors():
        self.checkpointer.wait()
      with self._save_errors():
        self.checkpointer.save(self.step, self.state, self.data_state, force=True)

  def _save_and_wait(self) -> None:
    """Save this step and wait for it; a run that ends here must not lose it."""
    with self._save_errors():
      self.checkpointer.wait()
    with self._save_errors(OnSaveError.STOP):
      self.checkpointer.save(self.step, self.state, self.data_state, force=True)
      self.checkpointer.wait()

  def _evaluate(self, max_tokens: int) -> dict[str, held_out.DomainLoss] | None:
    """Evaluate and log the held-out losses; return None if a stop request cut it short.

    One bounded by `max_tokens` is always finished: no resumed run would make up for it.
    """
    self._read_metrics()
    with self.meter.timed("pause"):
      losses = held_out.evaluate_domains(
        self.eval_step,
        self.state["params"],
        self.index,
        self.mesh,
        rows=self.config.data.batch_rows // self.config.train.microbatches,
        sequence_length=self.config.data.sequence_length,
        max_tokens=max_tokens,
        stopped=lambda: self._must_stop() and not max_tokens,
      )
    if losses:
      by_domain = {domain: dataclasses.asdict(loss) for domain, loss in losses.items()}
      self._write({"step": self.step, "evaluation": by_domain})
    return losses

  def _trace_if_due(self) -> None:
    """Start or stop the profiler's trace before this step, counted from this process's first."""
    profile, done = self.config.profile, self.step - self.first_step
    if profile.num_steps and done == profile.start_step:
      self._read_metrics()
      if self.session.process.is_first:  # One host's trace says enough.
        remote = storage.is_remote(self.workdir)  # The profiler writes local files only.
        self.trace = tempfile.mkdtemp(prefix="mfjax-profile-") if remote else str(self._profile())
        jax.profiler.start_trace(self.trace)
    elif profile.num_steps and done == profile.start_step + profile.num_steps:
      self._read_metrics()
      self._stop_trace()

  def _stop_trace(self) -> None:
    trace, self.trace = self.trace, None
    if trace is None:
      return
    with self.meter.timed("pause"):
      jax.profiler.stop_trace()
      if storage.is_remote(self.workdir):
        storage.upload(pathlib.Path(trace), self._profile())
        shutil.rmtree(trace)
    self.writer.say(f"wrote a profile: xprof --logdir={self._profile()} shows it")

  def _profile(self) -> epath.Path:
    return self.workdir / "profile"

  def _finish(self) -> bool:
    """Save, evaluate all held-out text, sample, plot; return False if a stop request came."""
    if self.meter.num_steps:
      self._log(self.step)
    self._save_and_wait()
    losses = self._evaluate(max_tokens=0)
    if losses is None:
      return False
    self.writer.say(f"\n{held_out.table(losses)}\n" if losses else "no text is held out")
    if losses and self.config.evaluate.sample_tokens:
      self._sample()
    if self.session.process.is_first:
      self._say_where(plot.draw(self.workdir))
    return True

  def _sample(self) -> None:
    prompt, text = held_out.continuation(
      self.state["params"], self.config, self.mesh, self.index, load_tokenizer(self.index.path)
    )
    self.writer.say(f"--- held-out text\n{prompt}\n--- sampled continuation\n{text}\n---")

  def _say_where(self, plots: list[epath.Path]) -> None:
    self.writer.say(f"checkpoint   {self.workdir / 'checkpoints' / str(self.step)}")
    if self.config.train.tensorboard:
      self.writer.say(f"TensorBoard  {self.workdir / 'tensorboard'}")
    for path in plots:
      self.writer.say(f"plot         {path}")

  def _introduce(self) -> None:
    """Say what runs where, from which step, and what full utilisation means."""
    model, devices = self.config.model, self.mesh.devices.flat
    total, active = metrics.total_parameters(model), metrics.active_parameters(model)
    axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
    self.writer.say(
      f"{sum(total.values()):,} parameters, {sum(active.values()):,} active per token; "
      f"mesh {axes} of {devices[0].device_kind}"
    )
    kernels = self.config.kernels
    self.writer.say(
      f"kernels: grouped_matmul {kernels.grouped_matmul.value}, "
      f"stick_breaking {kernels.stick_breaking.value}"
    )
    for line in placement.report(self.config, self.mesh.shape, devices[0].device_kind):
      self.writer.say(line)
    options = compiler_options.options(devices[0].platform, kernels.compiler_preset)
    if options:
      self.writer.say(f"compiler options: {compiler_options.as_text(options)}")
    self.writer.say(
      f"MFU is relative to {self.meter.peak.flops_per_second / 1e12:.4g} TFLOP/s per device "
      f"({self.meter.peak.source})"
    )
    origin = f"resuming after step {self.step}" if self.step else "starting at step 0"
    self.writer.say(f"{origin} in {self.workdir}")

  def _interrupt(self) -> Exit:
    """Save what was trained and say how to go on."""
    request = self.session.stop.request
    assert request is not None
    self.writer.say(f"{request.value}: saving step {self.step}")
    self._save_and_wait()
    self.writer.say(
      f"stopped after step {self.step}, saved in {self.workdir / 'checkpoints'}; "
      f"to go on: {self.resume_command}"
    )
    return request
