"""The loop, with a step of one line in place of the model: order, resume, stops and failures.

Batch n holds the token n + 1 everywhere. The step adds it to `w`, so that `w` and the losses tell
which batches were trained on, in which order. A negative token makes the loss NaN.
"""

import contextlib
import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mfjax import checkpoint, held_out, metrics, train, writers
from mfjax.cluster.session import Session
from mfjax.cluster.stop import StopSignal
from mfjax.config import (
  CheckpointConfig,
  DataConfig,
  EvalConfig,
  ModelConfig,
  OnSaveError,
  OptimizerConfig,
  ProfileConfig,
  RunConfig,
  TrainConfig,
)

ROWS, LENGTH = 8, 4
COMMAND = "mfjax train --config=test --workdir=w"


def make_config(*, steps=6, checkpoint_every=2, evaluate_every=0, **sections):
  train_config = {"steps": steps, "log_every": 1, "max_skipped_steps": 3, "tensorboard": False}
  values = {
    "model": ModelConfig(
      vocab_size=64, d_model=8, num_layers=2, num_heads=2, d_attention=8, d_ff=8,
      num_attention_experts=2, num_ff_experts=2, d_gate=2,
    ),
    "data": DataConfig(path="data", sequence_length=LENGTH, batch_rows=ROWS),
    "optimizer": OptimizerConfig(warmup_steps=0),
    "train": TrainConfig(**train_config),
    "evaluate": EvalConfig(every=evaluate_every),
    "checkpoint": CheckpointConfig(every=checkpoint_every),
  }  # fmt: skip
  return RunConfig(**values | sections)


class FakeStream:
  """Counts; `bad` batches give a NaN loss, `length` ends the data."""

  bad: frozenset[int] = frozenset()
  length = 1000

  def __init__(self, index, config, *, seed, own_rows, state):
    self.position = state["position"] if state else 0
    self.closed = False

  def __iter__(self):
    return self

  def __next__(self):
    if self.position >= self.length:
      raise StopIteration
    self.position += 1
    token = -1 if self.position in self.bad else self.position
    batch = {
      name: np.full((ROWS, LENGTH), token, np.int32)
      for name in ("tokens", "targets", "segment_ids", "domain_ids")
    }
    return batch, {"position": self.position}

  def close(self):
    self.closed = True


def replicated(mesh, shape, dtype):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def abstract_state(config, mesh):
  return {
    "params": {"w": replicated(mesh, (3,), jnp.float32)},
    "optimizer": {"m": replicated(mesh, (3,), jnp.float32)},
    "step": replicated(mesh, (), jnp.int32),
    "skipped": replicated(mesh, (), jnp.int32),
  }


def init_state(config, mesh):
  abstract = abstract_state(config, mesh)
  return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract)


def make_train_step(config, mesh):
  def step(state, batch):
    token = jnp.max(batch["tokens"]).astype(jnp.float32)
    skipped = token < 0
    w = jnp.where(skipped, state["params"]["w"], 0.9 * state["params"]["w"] + token)
    in_a_row = jnp.where(skipped, state["skipped"] + 1, 0)
    loss = jnp.where(skipped, jnp.nan, w[0])
    load = {
      "picks": jnp.ones((2, 2)),
      "prob_sum": jnp.ones((2, 2)),
      "entropy_sum": jnp.zeros(2),
      "tokens": jnp.float32(2),
    }
    scalars = ("loss", "cross_entropy", "z_loss", "aux_loss", "gradient_norm", "learning_rate")
    step_metrics = {
      **dict.fromkeys(scalars, loss),
      "tokens": jnp.float32(ROWS * LENGTH),
      "skipped": skipped.astype(jnp.float32),
      "skipped_in_a_row": in_a_row,
      "router": {"attention": load, "ff": load},
    }
    optimizer = {"m": state["optimizer"]["m"] + 1}
    new = {"params": {"w": w}, "optimizer": optimizer, "step": state["step"] + 1}
    return new | {"skipped": in_a_row}, step_metrics

  return jax.jit(step, donate_argnums=0)


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
  """Put the one-line step, counting data and a fixed evaluation in place of the real rooms."""
  step = types.SimpleNamespace(
    resolve=lambda config, mesh: config,
    abstract_state=abstract_state,
    init_state=init_state,
    make_train_step=make_train_step,
  )
  index = types.SimpleNamespace(vocab_size=64, tokenizer="bytes", path="data")
  evaluation = types.SimpleNamespace(make_eval_step=lambda config, mesh: None)
  losses = {"code": held_out.DomainLoss(1.5, 2.0, 4.5, 10, 10)}
  monkeypatch.setattr(train, "train_step", step)
  monkeypatch.setattr(train, "evaluate", evaluation)
  monkeypatch.setattr(train, "TrainStream", type("Stream", (FakeStream,), {}))
  monkeypatch.setattr(train, "open_index", lambda path: index)
  monkeypatch.setattr(train.held_out, "evaluate_domains", lambda *args, **kwargs: losses)
  monkeypatch.setattr(train.plot, "draw", lambda workdir: [workdir / "plots" / "loss.png"])
  monkeypatch.setattr(train.metrics, "device_peak", lambda *args: metrics.Peak(1e12, "test"))


def run(config, workdir, stop=None, **options):
  """Train and return the exit and what was printed."""
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    stop = stop or StopSignal()
    outcome = train.train(
      config, workdir, session=Session(stop=stop), resume_command=COMMAND, **options
    )
  return outcome, output.getvalue()


def logged(workdir, key="loss"):
  """Return {step: value} of the train records."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  steps = [record["step"] for record in records if key in record]
  assert len(steps) == len(set(steps))
  return {record["step"]: record[key] for record in records if key in record}


def saved_steps(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def stop_before_batch(monkeypatch, number, stop, request):
  """Ask for a stop while batch `number` is being read, that is after `number - 1` dispatches."""

  def read(self):
    if self.position + 1 == number:
      stop.request = request
    return FakeStream.__next__(self)

  monkeypatch.setattr(train.TrainStream, "__next__", read)


def test_trains_evaluates_saves_and_says_where(tmp_path):
  outcome, output = run(make_config(), tmp_path)
  assert outcome is train.Exit.FINISHED
  assert list(logged(tmp_path)) == [1, 2, 3, 4, 5, 6]
  assert list(logged(tmp_path, "evaluation")) == [6]
  assert saved_steps(tmp_path) == [2, 4, 6]
  assert "starting at step 0" in output
  assert "byte entropy" in output
  for path in ("checkpoints/6", "plots/loss.png"):
    assert str(tmp_path / path) in output


def test_log_interval_and_remainder(tmp_path):
  config = make_config(steps=7, train=TrainConfig(steps=7, log_every=3, tensorboard=False))
  run(config, tmp_path)
  assert list(logged(tmp_path)) == [3, 6, 7]
  assert logged(tmp_path, "tokens") == {3: 96, 6: 96, 7: 32}


def test_evaluates_on_schedule(tmp_path):
  run(make_config(evaluate_every=2), tmp_path)
  assert list(logged(tmp_path, "evaluation")) == [2, 4, 6]


@pytest.mark.parametrize(
  ("request_", "name"), [(train.Exit.INTERRUPTED, "SIGINT"), (train.Exit.PREEMPTED, "SIGTERM")]
)
def test_stop_saves_the_step_and_resume_goes_on(tmp_path, monkeypatch, request_, name):
  undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
  config = make_config(checkpoint_every=100)
  run(config, undisturbed)
  stop = StopSignal()
  with monkeypatch.context() as patch:
    stop_before_batch(patch, 4, stop, request_)
    outcome, output = run(config, stopped, stop)
  assert outcome is request_
  assert saved_steps(stopped) == [3]
  assert name in output
  assert f"stopped after step 3, saved in {stopped / 'checkpoints'}; to go on: {COMMAND}" in output
  outcome, output = run(config, stopped)
  assert outcome is train.Exit.FINISHED
  assert "resuming after step 3" in output
  assert logged(stopped) == logged(undisturbed)


def test_resume_after_a_crash_rewrites_later_lines(tmp_path, monkeypatch):
  undisturbed, crashed = tmp_path / "undisturbed", tmp_path / "crashed"
  config = make_config(steps=8, checkpoint_every=4)
  run(config, undisturbed)
  with monkeypatch.context() as patch:

    def read(self):
      if self.position == 7:
        raise MemoryError
      return FakeStream.__next__(self)

    patch.setattr(train.TrainStream, "__next__", read)
    with pytest.raises(MemoryError):
      run(config, crashed)
  assert list(logged(crashed)) == [1, 2, 3, 4, 5]  # Steps 6 and 7 were dispatched, not read.
  run(config, crashed)
  assert logged(crashed) == logged(undisturbed)


def test_a_finished_run_is_only_evaluated(tmp_path, monkeypatch):
  run(make_config(), tmp_path)
  before = (tmp_path / "metrics.jsonl").read_text()
  monkeypatch.setattr(train.train_step, "make_train_step", None)
  outcome, output = run(make_config(), tmp_path)
  assert outcome is train.Exit.FINISHED
  assert "already finished" in output
  assert "byte entropy" in output
  assert (tmp_path / "metrics.jsonl").read_text() == before


def test_end_of_data_ends_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(train.TrainStream, "length", 5)
  outcome, output = run(make_config(), tmp_path)
  assert outcome is train.Exit.FINISHED
  assert "the data ended after step 5" in output
  assert saved_steps(tmp_path)[-1] == 5
  outcome, output = run(make_config(), tmp_path)
  assert outcome is train.Exit.FINISHED
  assert "resuming after step 5" in output


def test_the_last_step_of_the_data_is_evaluated_once(tmp_path, monkeypatch):
  evaluated, losses = [], train.held_out.evaluate_domains()

  def evaluate(*args, max_tokens, **kwargs):
    evaluated.append(max_tokens)
    return losses

  monkeypatch.setattr(train.held_out, "evaluate_domains", evaluate)
  monkeypatch.setattr(train.TrainStream, "length", 4)
  run(make_config(evaluate_every=2), tmp_path)
  assert list(logged(tmp_path, "evaluation")) == [2, 4]
  assert evaluated == [EvalConfig().max_tokens, 0]


@pytest.mark.parametrize(("max_tokens", "evaluated"), [(100, [2]), (0, [])])
def test_a_stop_request_cuts_only_an_unbounded_evaluation_short(
  tmp_path, monkeypatch, max_tokens, evaluated
):
  stop, losses = StopSignal(), train.held_out.evaluate_domains()

  def evaluate(*args, stopped, **kwargs):
    stop.request = train.Exit.PREEMPTED
    return None if stopped() else losses

  monkeypatch.setattr(train.held_out, "evaluate_domains", evaluate)
  config = make_config(evaluate=EvalConfig(every=2, max_tokens=max_tokens))
  outcome, _ = run(config, tmp_path, stop)
  assert outcome is train.Exit.PREEMPTED
  assert saved_steps(tmp_path) == [2]
  assert list(logged(tmp_path, "evaluation")) == evaluated


def test_isolated_bad_steps_are_counted_and_passed(tmp_path, monkeypatch):
  monkeypatch.setattr(train.TrainStream, "bad", frozenset({2, 3, 5}))
  outcome, _ = run(make_config(), tmp_path)
  assert outcome is train.Exit.FINISHED
  assert logged(tmp_path, "skipped") == {1: 0, 2: 1, 3: 1, 4: 0, 5: 1, 6: 0}
  assert logged(tmp_path)[2] is None
  assert saved_steps(tmp_path) == [4, 6]  # Step 2 was skipped: nothing new to save.


def test_bad_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(train.TrainStream, "bad", frozenset(range(5, 100)))
  with pytest.raises(train.TrainingFailedError) as caught:
    run(make_config(steps=50), tmp_path)
  assert "3 steps in a row, up to step 7," in str(caught.value)
  assert str(tmp_path / "checkpoints" / "4") in str(caught.value)
  assert COMMAND in str(caught.value)
  assert saved_steps(tmp_path) == [2, 4]


class FailingCheckpointer(checkpoint.Checkpointer):
  """A disk that is full at step 2 only, and on which an incomplete step 2 stays."""

  def save(self, step, *args, **kwargs):
    if step == 2:
      self._path(step).mkdir(parents=True)
      raise checkpoint.CheckpointSaveError("step 2 could not be saved: no space left")
    return super().save(step, *args, **kwargs)


def test_failed_save_stops_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(train.checkpoint, "Checkpointer", FailingCheckpointer)
  with pytest.raises(train.TrainingFailedError, match=r"no space left.*To go on: mfjax train"):
    run(make_config(), tmp_path)


def test_failed_save_is_a_warning_if_configured(tmp_path, monkeypatch):
  monkeypatch.setattr(train.checkpoint, "Checkpointer", FailingCheckpointer)
  config = make_config(checkpoint=CheckpointConfig(every=2, on_save_error=OnSaveError.CONTINUE))
  outcome, output = run(config, tmp_path)
  assert outcome is train.Exit.FINISHED
  assert "warning: step 2 could not be saved" in output
  assert saved_steps(tmp_path) == [4, 6]


def test_a_failed_last_save_always_fails_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(train.checkpoint, "Checkpointer", FailingCheckpointer)
  config = make_config(
    steps=2, checkpoint=CheckpointConfig(every=2, on_save_error=OnSaveError.CONTINUE)
  )
  with pytest.raises(train.TrainingFailedError, match="No checkpoint was saved yet"):
    run(config, tmp_path)


@pytest.mark.parametrize("evaluate_every", [0, 2])
@pytest.mark.parametrize("policy", OnSaveError)
def test_metrics_that_cannot_be_written(tmp_path, monkeypatch, policy, evaluate_every):
  log = writers.JsonlWriter.log

  def full(self, record):
    if record["step"] == 2 and ("evaluation" in record) == (evaluate_every > 0):
      raise OSError(28, "No space left on device")
    log(self, record)

  monkeypatch.setattr(writers.JsonlWriter, "log", full)
  config = make_config(
    evaluate_every=evaluate_every, checkpoint=CheckpointConfig(every=2, on_save_error=policy)
  )
  if policy is OnSaveError.STOP:
    with pytest.raises(
      train.TrainingFailedError, match=r"of step 2 could not .*No space.*To go on"
    ):
      run(config, tmp_path)
    return
  outcome, output = run(config, tmp_path)
  assert outcome is train.Exit.FINISHED
  assert "warning: the metrics of step 2 could not be written" in output
  assert list(logged(tmp_path))[-4:] == [3, 4, 5, 6]


class FailingCloseCheckpointer(checkpoint.Checkpointer):
  def close(self):
    super().close()
    raise checkpoint.CheckpointSaveError("step 4 could not be saved")


def test_a_save_that_fails_on_the_way_out(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(train.checkpoint, "Checkpointer", FailingCloseCheckpointer)
  with pytest.raises(train.TrainingFailedError, match=r"step 4 could not .*To go on: mfjax train"):
    run(make_config(), tmp_path / "alone")
  assert caplog.text == ""
  fail_at_batch(monkeypatch, 5)
  with pytest.raises(MemoryError):
    run(make_config(), tmp_path / "after another error")
  assert "step 4 could not be saved" in caplog.text


def fail_at_batch(monkeypatch, number):
  def read(self):
    if self.position + 1 == number:
      raise MemoryError
    return FakeStream.__next__(self)

  monkeypatch.setattr(train.TrainStream, "__next__", read)


def test_metrics_are_read_after_the_next_step_is_dispatched(tmp_path, monkeypatch):
  events = []
  device_get = jax.device_get

  class Recorded:
    def __init__(self, step_fn):
      self.step_fn = step_fn

    def lower(self, *args):
      self.step_fn = self.step_fn.lower(*args)
      return self

    def compile(self):
      self.step_fn = self.step_fn.compile()
      return self

    def __call__(self, state, batch):
      events.append("dispatch")
      return self.step_fn(state, batch)

  def read(tree):
    if isinstance(tree, dict) and "skipped_in_a_row" in tree:
      events.append("read")
    return device_get(tree)

  monkeypatch.setattr(
    train.train_step, "make_train_step", lambda *args: Recorded(make_train_step(*args))
  )
  monkeypatch.setattr(train.jax, "device_get", read)
  off = ProfileConfig(start_step=2, num_steps=0)
  run(make_config(steps=4, checkpoint_every=100, profile=off), tmp_path)
  assert events == ["dispatch", *["dispatch", "read"] * 3, "read"]


def test_no_implicit_transfer_in_the_step(tmp_path, monkeypatch):
  monkeypatch.setattr(train.sharding, "device_batch", lambda mesh, batch: batch)
  with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
    run(make_config(), tmp_path)


def test_profile_of_some_steps(tmp_path):
  outcome, output = run(make_config(profile=ProfileConfig(start_step=1, num_steps=2)), tmp_path)
  assert outcome is train.Exit.FINISHED
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  assert f"xprof --logdir={tmp_path / 'profile'}" in output


def test_profile_of_a_run_that_ends_before_it_does(tmp_path):
  run(make_config(steps=2, profile=ProfileConfig(start_step=1, num_steps=100)), tmp_path)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_profile_of_a_run_that_fails(tmp_path, monkeypatch):
  fail_at_batch(monkeypatch, 5)
  with pytest.raises(MemoryError):
    run(make_config(profile=ProfileConfig(start_step=1, num_steps=100)), tmp_path)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_several_processes_need_a_session_of_as_many(tmp_path, monkeypatch):
  monkeypatch.setattr(train.jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="JAX runs in 2 processes and the session in 1"):
    run(make_config(), tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_only_what_the_step_reads_goes_to_the_devices(tmp_path, monkeypatch):
  sent, device_batch = set(), train.sharding.device_batch

  def send(mesh, batch):
    sent.update(batch)
    return device_batch(mesh, batch)

  monkeypatch.setattr(train.sharding, "device_batch", send)
  run(make_config(), tmp_path)
  assert sent == {"tokens", "targets", "segment_ids"}


def test_vocabulary_is_checked_before_any_device_is_touched(tmp_path, monkeypatch):
  monkeypatch.setattr(train.jax, "devices", lambda: pytest.fail("a device was touched"))
  model = ModelConfig(vocab_size=65)
  with pytest.raises(ValueError, match=r"vocab_size=65.* 64 .*--config\.model\.vocab_size=64"):
    run(make_config(model=model), tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_another_config_in_the_workdir_is_refused(tmp_path):
  run(make_config(steps=2), tmp_path)
  changed = make_config(steps=2, optimizer=OptimizerConfig(learning_rate=1.0, warmup_steps=0))
  with pytest.raises(ValueError, match="learning_rate"):
    run(changed, tmp_path)
  outcome, _ = run(changed, tmp_path, allow_config_change=True)
  assert outcome is train.Exit.FINISHED
