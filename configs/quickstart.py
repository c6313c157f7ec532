"""A ModuleFormer of 2.6M parameters on bytes of Python's own standard library, minutes on a CPU.

The first command makes the corpus on this machine, the second trains; again, it resumes.

  mfjax prepare --corpus=stdlib --out=quickstart_data
  mfjax train --config=quickstart --workdir=runs/quickstart
"""

from mfjax.config import (
  CheckpointConfig,
  DataConfig,
  DType,
  EvalConfig,
  ModelConfig,
  OptimizerConfig,
  Remat,
  RunConfig,
  TrainConfig,
)


def get_config() -> RunConfig:
  """Return the run."""
  return RunConfig(
    model=ModelConfig(
      vocab_size=257,  # Bytes and end-of-text.
      d_model=128,
      num_layers=4,
      num_heads=2,
      d_attention=128,
      d_ff=256,
      num_attention_experts=4,
      num_ff_experts=8,
      attention_top_k=2,
      ff_top_k=2,
      d_gate=64,
      compute_dtype=DType.FLOAT32,
    ),
    data=DataConfig(path="quickstart_data", sequence_length=256, batch_rows=32),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    train=TrainConfig(steps=500, remat=Remat.NONE),
    evaluate=EvalConfig(every=250, max_tokens=100_000, sample_tokens=200),
    checkpoint=CheckpointConfig(every=250),
  )
