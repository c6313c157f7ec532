"""Compare two checkpoints, each a workdir or a PyTorch directory: tensors, then logits.

  mfjax verify A B [--step_a=N] [--step_b=N]

Tensors are equal if they are the same bits once the wider of two dtypes is rounded to the narrower.
Logits are JAX's for a workdir and those of mfjax's own modelling file for a directory (which needs
torch and transformers: `pip install 'mfjax[hf]'`), in float32, on the same random tokens. Exit code
0: the same model; 1: not; 2: one of them cannot be read.
"""

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from launch import _conversion
from mfjax.hf.verify import verify

_STEP_A = flags.DEFINE_integer("step_a", None, "Step of A. Default: the newest good one.")
_STEP_B = flags.DEFINE_integer("step_b", None, "Step of B. Default: the newest good one.")
_PARITY_TOKENS = flags.DEFINE_integer(
  "parity_tokens", 256, "Tokens to compare logits on; 0: leave it out.", lower_bound=0
)
_JSON = flags.DEFINE_string("json", None, "File to write the figures to as well.")


def main(argv: Sequence[str]) -> int:
  """Compare as the flags say and print the verdict."""
  a, b = _conversion.positional(argv, "A", "B")
  with _conversion.converting():
    verdict = verify(
      a,
      b,
      step_a=_STEP_A.value,
      step_b=_STEP_B.value,
      num_tokens=_PARITY_TOKENS.value,
      report=_conversion.reporter(),
    )
  for line in verdict.lines():
    print(line)
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(verdict.to_dict(), indent=2) + "\n")
  print("equal" if verdict.is_equal else "different")
  return 0 if verdict.is_equal else _conversion.DIFFERENT
