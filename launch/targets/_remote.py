"""What the targets on other machines share: flags, and the tools that they need."""

import pathlib
import shutil

from absl import flags

JOB_NAME = flags.DEFINE_string("job_name", "mfjax", "Name of the job on its cluster.")
OUT = flags.DEFINE_string("out", None, "File that also gets what runs, or would run.")
GRACE_SECONDS = flags.DEFINE_integer(
  "grace_seconds",
  120,
  "Time to save a checkpoint between SIGTERM and the end of the machine.",
  lower_bound=1,
)


def show(text: str, printed: bool) -> None:
  """Print `text` if `printed`, and write it to --out."""
  if printed:
    print(text, end="" if text.endswith("\n") else "\n")
  if OUT.value:
    path = pathlib.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def require(tool: str) -> None:
  """Raise ValueError if the program `tool` is not there."""
  if shutil.which(tool) is None:
    raise ValueError(
      f"{tool} is not on this machine's PATH: install it or launch from a machine that has it; "
      "--dry_run shows what would run"
    )


def pairs(flag: str, values: list[str]) -> tuple[tuple[str, str], ...]:
  """Return NAME=VALUE texts as pairs.

  Raises:
    ValueError: one has no =.
  """
  split = [value.partition("=") for value in values]
  for name, equals, value in split:
    if not name or not equals:
      raise ValueError(f"--{flag}={name}{equals}{value}: write NAME=VALUE")
  return tuple((name, value) for name, _, value in split)
