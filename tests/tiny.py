"""A model small enough to compile in seconds, its batches, and training runs over any mesh."""

from typing import Any

import jax
import numpy as np

from mfjax import sharding, train_step
from mfjax.config import (
  DataConfig,
  DType,
  Init,
  LossConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TrainConfig,
)

ROWS, LENGTH, VOCAB = 16, 24, 300
MODEL = ModelConfig(
  vocab_size=VOCAB,
  d_model=32,
  num_layers=2,
  d_attention=32,
  d_ff=48,
  num_attention_experts=8,
  num_ff_experts=16,
  d_gate=16,
  init=Init.TRUNCATED_NORMAL,
  compute_dtype=DType.FLOAT32,
)


def run_config(**sections: Any) -> RunConfig:
  """Return a tiny run; keyword arguments replace whole sections."""
  defaults = {
    "model": MODEL,
    "data": DataConfig(sequence_length=LENGTH, batch_rows=ROWS),
    "train": TrainConfig(steps=20),
    "optimizer": OptimizerConfig(warmup_steps=2, learning_rate=3e-3),
    "loss": LossConfig(aux_weight=0.1, z_weight=1e-3, chunk_tokens=40),
  }
  return RunConfig(**(defaults | sections))


def batches(count: int, rows: int = ROWS) -> list[dict[str, np.ndarray]]:
  """Return batches of random tokens with two documents a row and some padding."""
  rng = np.random.default_rng(0)
  made = []
  for _ in range(count):
    ids = rng.integers(0, VOCAB, (rows, LENGTH + 1)).astype(np.int32)
    segments = np.ones((rows, LENGTH), np.int32)
    segments[:, 17:] = 2
    segments[rows // 3, 20:] = 0
    made.append({"tokens": ids[:, :-1], "targets": ids[:, 1:], "segment_ids": segments})
  return made


class Run:
  """A tiny training run on the first devices of this process."""

  def __init__(self, config: RunConfig) -> None:
    sizes = config.mesh.axis_sizes
    sizes = {axis: 1 if size == -1 else size for axis, size in sizes.items()}
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    self.mesh = sharding.make_mesh(config.mesh, devices)
    self.config = train_step.resolve(config, self.mesh)
    self.state = train_step.init_state(self.config, self.mesh)
    self.step = train_step.make_train_step(self.config, self.mesh)

  def train(self, made: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Train on these batches; return each step's metrics on the host."""
    history = []
    for batch in made:
      self.state, metrics = self.step(self.state, sharding.device_batch(self.mesh, batch))
      history.append(jax.device_get(metrics))
    return history


def losses(history: list[dict[str, Any]]) -> np.ndarray:
  return np.array([float(metrics["loss"]) for metrics in history])


def mesh(data: int = 1, fsdp: int = 1, expert: int = 1, **placements: Any) -> MeshConfig:
  return MeshConfig(data=data, fsdp=fsdp, expert=expert, **placements)
