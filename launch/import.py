"""Begin a run from PyTorch weights: published MoLM checkpoints, or what `mfjax export` wrote.

  mfjax import DIR WORKDIR [--config=finetune.py] [--dtype=float32]

DIR holds config.json and safetensors or pickled tensors (those need torch: `pip install
'mfjax[hf]'`), in one file or in shards. WORKDIR becomes a workdir whose step 0 is these parameters:
`mfjax train --config=... --workdir=WORKDIR` goes on from there with an optimizer that begins anew.
Give the --config that you will train with, or train with --allow_config_change. What was written is
read back and compared. Exit code 1: it differs (nothing is left); 2: DIR, the disk or WORKDIR
cannot be used.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from launch import _conversion
from launch import flags as shared
from mfjax.hf.export import DTYPES
from mfjax.hf.import_checkpoint import import_checkpoint
from mfjax.hf.verify import DifferenceError

_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", list(DTYPES), "Of the checkpoint; `train` reads float32 alone."
)
_NUM_DEVICES = flags.DEFINE_integer(
  "num_devices",
  None,
  "Devices of the mesh that the chunks on disk are cut for; any mesh can read them. Default: the "
  "product of the config's fixed mesh axes.",
  lower_bound=1,
)


def main(argv: Sequence[str]) -> int:
  """Import as the flags say and print what came of it."""
  directory, workdir = _conversion.positional(argv, "DIR", "WORKDIR")
  given = flags.FLAGS["config"].value or flags.FLAGS["config.FIELD"].value
  run_config = shared.run_config() if given else None
  if "://" in workdir:
    raise ValueError(f"{workdir} is no local directory: import to a disk and copy from there")
  target = pathlib.Path(workdir).expanduser().absolute()
  with _conversion.converting():
    try:
      imported = import_checkpoint(
        pathlib.Path(directory),
        target,
        run_config=run_config,
        num_devices=_NUM_DEVICES.value,
        dtype=_DTYPE.value,
        report=_conversion.reporter(),
      )
    except DifferenceError as error:
      print(f"mfjax import: error: the import differs: {error}", file=sys.stderr)
      return _conversion.DIFFERENT
  for line in imported.verdict.lines():
    print(line)
  print(f"imported  {imported.num_bytes / 1e9:.2f} GB in {_DTYPE.value} to {target}, as step 0")
  return 0
