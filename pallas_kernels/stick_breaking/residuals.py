"""What a kernel keeps for its gradients, under one name for rematerialisation policies."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

SAVED = "stick_breaking"


def named(residuals: Any) -> Any:
  """Return the tree with every array named `SAVED`.

  The barrier keeps XLA from writing a kernel's result straight into a scan's stack of residuals:
  where the result is used beside that, it would run the kernel twice.
  """
  return jax.tree.map(lambda x: checkpoint_name(jax.lax.optimization_barrier(x), SAVED), residuals)
