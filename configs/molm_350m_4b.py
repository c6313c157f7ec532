"""MoLM-350M-4B: 4.1B parameters, about 350M active per token; 300B tokens, 3M a step.

  mfjax train --config=molm_350m_4b --workdir=runs/molm_350m_4b --config.data.path=DIR

DIR is what `mfjax prepare` wrote with the CodeGen tokenizer. 16 devices hold the run; more devices
join the data axis.
"""

from mfjax.config import (
  CheckpointConfig,
  DataConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TrainConfig,
)


def get_config() -> RunConfig:
  """Return the run."""
  sequence_length, batch_rows = 2048, 1536
  return RunConfig(
    model=ModelConfig(
      vocab_size=50295,
      d_model=1024,
      num_layers=24,
      num_heads=1,
      d_attention=1024,
      d_ff=2048,
      num_attention_experts=16,
      num_ff_experts=32,
      attention_top_k=2,
      ff_top_k=2,
      d_gate=256,
    ),
    mesh=MeshConfig(data=-1, fsdp=16),
    data=DataConfig(path="data/pile", sequence_length=sequence_length, batch_rows=batch_rows),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    train=TrainConfig(steps=300_000_000_000 // (sequence_length * batch_rows), microbatches=4),
    checkpoint=CheckpointConfig(every=1000, keep_last=3, keep_every=10_000),
  )
