"""Write a checkpoint as a Hugging Face directory, and prove that it is the same model.

  mfjax export WORKDIR OUT [--step=N] [--dtype=bfloat16]

OUT gets safetensors, config, tokenizer, a modelling file of mfjax's own and a model card:
`AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)` loads it. What was written is
read back and compared with the checkpoint, tensor by tensor; with torch and transformers installed
(`pip install 'mfjax[hf]'`) the logits are compared too. OUT/parity.json has the figures. OUT
appears when all of it is complete and equal. Exit code 1: what was written differs (nothing is
left); 2: the workdir, the disk or OUT cannot be used.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from launch import _conversion
from mfjax.hf.export import DTYPES, export
from mfjax.hf.verify import DifferenceError

_STEP = flags.DEFINE_integer("step", None, "Step to export. Default: the newest good one.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "", ["", *DTYPES], "Of the weights on disk. Default: what the model computes in."
)
_PARITY_TOKENS = flags.DEFINE_integer(
  "parity_tokens", 256, "Tokens to compare logits on; 0: leave it out.", lower_bound=0
)


def main(argv: Sequence[str]) -> int:
  """Export as the flags say and print what came of it."""
  workdir, out = _conversion.positional(argv, "WORKDIR", "OUT")
  if "://" in out:
    raise ValueError(f"{out} is no local directory: export to a disk and copy from there")
  target = pathlib.Path(out).expanduser().absolute()
  with _conversion.converting():
    try:
      exported = export(
        workdir,
        target,
        step=_STEP.value,
        dtype=_DTYPE.value,
        num_tokens=_PARITY_TOKENS.value,
        report=_conversion.reporter(),
      )
    except DifferenceError as error:
      print(f"mfjax export: error: the export differs: {error}", file=sys.stderr)
      return _conversion.DIFFERENT
  for line in exported.verdict.lines():
    print(line)
  for note in exported.notes:
    print(f"note      {note}")
  print(
    f"exported  step {exported.step} in {exported.dtype}, {exported.num_bytes / 1e9:.2f} GB, "
    f"to {target}"
  )
  return 0
