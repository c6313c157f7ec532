"""Draw a run's loss curves and expert load as PNG files.

  mfjax plot WORKDIR [--out=DIRECTORY]

Reads WORKDIR/metrics.jsonl, of a finished or a running training, and writes loss.png and
expert_load.png.
"""

from collections.abc import Sequence

from absl import flags

from mfjax import plot

_OUT = flags.DEFINE_string("out", None, "Directory of the PNG files; WORKDIR/plots if not given.")


def main(argv: Sequence[str]) -> None:
  """Draw the plots of the workdir that `argv[1]` names and print where they are."""
  if len(argv) != 2:
    raise ValueError("give one workdir: mfjax plot WORKDIR [--out=DIRECTORY]")
  for path in plot.draw(argv[1], _OUT.value):
    print(path)
