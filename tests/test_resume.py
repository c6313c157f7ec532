"""Runs that are stopped, killed or moved to another mesh go on as if nothing had happened.

Everything is real here: data, model, optimizer, checkpoints, evaluation, plots, processes.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mfjax import sharding, train, train_step
from mfjax.checkpoint import Checkpointer
from mfjax.cluster.session import Session
from mfjax.cluster.stop import StopSignal
from mfjax.config import (
  CheckpointConfig,
  DataConfig,
  DType,
  EvalConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TrainConfig,
)
from mfjax.data.prepare import PrepareOptions, prepare
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """Compiles what the runs of this module have in common once."""
  settings = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield {name.upper(): str(value) for name, value in settings.items()}
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  directory = tmp_path_factory.mktemp("corpus")
  (directory / "text").mkdir()
  for number in range(100):
    (directory / "text" / f"{number}.txt").write_text(f"{number} times {number} " * 10)
  inputs = (("numbers", str(directory / "text")),)
  prepare(PrepareOptions(out=str(directory / "data"), inputs=inputs, validation_fraction=0.1))
  return RunConfig(
    model=ModelConfig(
      vocab_size=257, d_model=8, num_layers=1, num_heads=2, d_attention=8, d_ff=8,
      num_attention_experts=2, num_ff_experts=2, d_gate=4, compute_dtype=DType.FLOAT32,
    ),
    data=DataConfig(path=str(directory / "data"), sequence_length=32, batch_rows=8),
    optimizer=OptimizerConfig(warmup_steps=1),
    train=TrainConfig(steps=4, log_every=1),
    evaluate=EvalConfig(every=2, sample_tokens=4),
    checkpoint=CheckpointConfig(every=100),
  )  # fmt: skip


def run(config, workdir, stop=None):
  stop = stop or StopSignal()
  return train.train(config, workdir, session=Session(stop=stop), resume_command="mfjax train ...")


def last_checkpoint(config, workdir):
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  checkpointer = Checkpointer(workdir, config.checkpoint, config)
  restored = checkpointer.restore(train_step.abstract_state(train_step.resolve(config, mesh), mesh))
  checkpointer.close()
  return restored


def logged(workdir):
  """Return (step, loss, held-out loss) of every line of the metrics, in their order."""
  records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [(r["step"], r.get("loss"), r.get("evaluation")) for r in records]


def test_two_and_two_steps_are_four(config, cache, tmp_path, monkeypatch, capsys):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert run(config, whole) is train.Exit.FINISHED
  output = capsys.readouterr().out
  assert "sampled continuation" in output
  for path in ("plots/loss.png", "plots/expert_load.png", "tensorboard", "checkpoints/4"):
    assert str(whole / path) in output
    assert (whole / path).exists()

  stop = StopSignal()

  class Stopping(train.TrainStream):
    """Asks for a stop while batch 3 is read: step 2 is the last."""

    batches = 0

    def __next__(self):
      self.batches += 1
      if self.batches == 3:
        stop.request = train.Exit.PREEMPTED
      return super().__next__()

  with monkeypatch.context() as patch:
    patch.setattr(train, "TrainStream", Stopping)
    assert run(config, parts, stop) is train.Exit.PREEMPTED
  assert last_checkpoint(config, parts).step == 2
  assert run(config, parts) is train.Exit.FINISHED

  first, second = last_checkpoint(config, whole), last_checkpoint(config, parts)
  assert first.step == second.step == 4
  assert first.data_state == second.data_state
  jax.tree.map(np.testing.assert_array_equal, first.state, second.state)
  train_only = [record for record in logged(whole) if record[1] is not None]
  assert [record for record in logged(parts) if record[1] is not None] == train_only


def start(config, workdir, cache):
  """Start `mfjax train` on one device, as a process of its own."""
  path = workdir.parent / "run.py"
  path.write_text(
    "from mfjax.config import RunConfig\n\n"
    f"def get_config():\n  return RunConfig.from_dict({config.to_dict()!r})\n"
  )
  flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
  return subprocess.Popen(
    [sys.executable, "-m", "launch.main", "train", f"--config={path}", f"--workdir={workdir}"],
    env=os.environ | cache | flags,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def steps_of(process):
  """Yield the first step and each one trained, as the process prints them."""
  for line in process.stdout:
    if match := re.match(r"starting at step (\d+)|resuming after step (\d+)|step +(\d+)/", line):
      yield int(match[match.lastindex])


@pytest.mark.parametrize(
  "num_kills", [pytest.param(2), pytest.param(10, marks=pytest.mark.slow)], ids=str
)
def test_a_run_killed_at_random_moments_ends_with_the_same_losses(
  config, cache, tmp_path, num_kills
):
  config = dataclasses.replace(
    config,
    train=TrainConfig(steps=15 * (num_kills + 1), log_every=1, tensorboard=False),
    checkpoint=CheckpointConfig(every=1),  # So that nearly every moment is one of a save.
    evaluate=EvalConfig(every=10),
  )
  undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
  process = start(config, undisturbed, cache)
  output, _ = process.communicate()
  assert process.returncode == 0, output

  random_moment, begun = random.Random(num_kills), []
  for _ in range(num_kills):
    process = start(config, killed, cache)
    steps = steps_of(process)
    begun.append(next(steps))
    for _ in itertools.islice(steps, random_moment.randint(3, 12)):
      pass
    time.sleep(random_moment.uniform(0, 0.03))  # A step and its save take about 0.02 s.
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it was killed"
  process = start(config, killed, cache)
  begun.append(next(steps_of(process)))
  output, _ = process.communicate()
  assert process.returncode == 0, output
  assert begun == sorted(begun)
  assert begun[-1] > 0
  assert logged(killed) == logged(undisturbed)


def test_a_checkpoint_goes_on_on_another_mesh(tmp_path):
  steps, more = 3, 20
  batches = tiny.batches(steps + more)

  def make_run(mesh: MeshConfig) -> tuple[tiny.Run, Checkpointer]:
    made = tiny.Run(tiny.run_config(mesh=mesh, train=TrainConfig(steps=steps + more)))
    return made, Checkpointer(tmp_path, CheckpointConfig(), made.config)

  first, writer = make_run(tiny.mesh(data=2, fsdp=2, expert=2))
  first.train(batches[:steps])
  writer.save(steps, first.state, {}, force=True)
  writer.close()
  expected = tiny.losses(first.train(batches[steps:]))

  second, reader = make_run(tiny.mesh(fsdp=4))
  restored = reader.restore(train_step.abstract_state(second.config, second.mesh))
  reader.close()
  second.state = restored.state
  assert len(second.state["params"]["lm_head"].sharding.device_set) == 4
  np.testing.assert_allclose(tiny.losses(second.train(batches[steps:])), expected, rtol=1e-5)
