"""A small ModuleFormer on Python's own standard library: two minutes on two cores.

The first command makes the corpus and its tokenizer on this machine, the second trains; run again,
it resumes.

  mfjax prepare --corpus=stdlib --train_bpe=2048 --out=quickstart_data
  mfjax train --config=quickstart --workdir=runs/quickstart
"""

from mfjax.config import (
  CheckpointConfig,
  DataConfig,
  DType,
  EvalConfig,
  Init,
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
      vocab_size=2048,
      d_model=160,
      num_layers=3,
      d_attention=160,
      d_ff=256,
      num_attention_experts=4,
      num_ff_experts=8,
      d_gate=32,
      init=Init.TRUNCATED_NORMAL,
      compute_dtype=DType.FLOAT32,
    ),
    data=DataConfig(path="quickstart_data", sequence_length=256, batch_rows=8),
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=30, final_fraction=0.02),
    train=TrainConfig(steps=250, remat=Remat.NONE),
    evaluate=EvalConfig(every=125, max_tokens=0, sample_tokens=100),
    checkpoint=CheckpointConfig(every=125),
  )
