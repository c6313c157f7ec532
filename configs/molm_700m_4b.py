"""MoLM-700M-4B: the tensors of MoLM-350M-4B, but four experts a token: about 700M active.

  mfjax train --config=molm_700m_4b --workdir=runs/molm_700m_4b --config.data.path=DIR

DIR is what `mfjax prepare` wrote with the CodeGen tokenizer.
"""

import dataclasses

from configs import molm_350m_4b
from mfjax.config import RunConfig


def get_config() -> RunConfig:
  """Return the run."""
  base = molm_350m_4b.get_config()
  model = dataclasses.replace(base.model, attention_top_k=4, ff_top_k=4)
  return dataclasses.replace(base, model=model)
