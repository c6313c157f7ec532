"""MoLM-700M-8B: MoLM-350M-4B at twice the depth: 8.2B parameters, about 700M active per token.

  mfjax train --config=molm_700m_8b --workdir=runs/molm_700m_8b --config.data.path=DIR

DIR is what `mfjax prepare` wrote with the CodeGen tokenizer. 32 devices hold the run.
"""

import dataclasses

from configs import molm_350m_4b
from mfjax.config import RunConfig


def get_config() -> RunConfig:
  """Return the run."""
  base = molm_350m_4b.get_config()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, num_layers=48),
    mesh=dataclasses.replace(base.mesh, fsdp=32),
  )
