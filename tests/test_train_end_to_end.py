"""The loop with everything real: data, model, optimizer, checkpoints, evaluation, plots."""

import json

import jax
import numpy as np
import pytest

from mfjax import sharding, train, train_step
from mfjax.checkpoint import Checkpointer
from mfjax.config import (
  CheckpointConfig,
  DataConfig,
  DType,
  EvalConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TrainConfig,
)
from mfjax.data.prepare import PrepareOptions, prepare

pytestmark = pytest.mark.slow


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
  stop = stop or train.StopSignal()
  return train.train(config, workdir, stop=stop, resume_command="mfjax train ...")


def last_checkpoint(config, workdir):
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  checkpointer = Checkpointer(workdir, config.checkpoint, config)
  restored = checkpointer.restore(train_step.abstract_state(train_step.resolve(config, mesh), mesh))
  checkpointer.close()
  return restored


def logged(workdir):
  records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [(r["step"], r.get("loss"), r.get("evaluation")) for r in records]


def test_two_and_two_steps_are_four(config, tmp_path, monkeypatch, capsys):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert run(config, whole) is train.Exit.FINISHED
  output = capsys.readouterr().out
  assert "sampled continuation" in output
  for path in ("plots/loss.png", "plots/expert_load.png", "tensorboard", "checkpoints/4"):
    assert str(whole / path) in output
    assert (whole / path).exists()

  stop = train.StopSignal()

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
