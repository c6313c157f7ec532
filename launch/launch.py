"""Start a command on several processes: here, on a cluster or on cloud machines.

  mfjax launch TARGET [FLAGS] -- COMMAND ...
  mfjax launch local --num_processes=4 --devices_per_process=2 -- train --config=quickstart ...

COMMAND is what would follow `mfjax` on one machine, and is the same for every target. `mfjax launch
TARGET --help` explains a target and its flags; --dry_run prints or writes what would run, and runs
nothing.
"""

import importlib
import pathlib
import types
from collections.abc import Sequence

from launch import targets

_NOT_TARGETS = {"flags"}
_HELP = {"-h", "-help", "--help"}


def main(argv: Sequence[str]) -> int:
  """Run the command that follows `--` on the target that comes first; return its exit code."""
  name, command = argv[1], list(argv[2:])
  return importlib.import_module(f"launch.targets.{name}").run(command)


def part(arguments: Sequence[str]) -> types.ModuleType | None:
  """Import the target that `arguments` begin with: its flags are registered by that.

  Raises:
    ValueError: no target or an unknown one (lists the known ones), or no command after `--`.
  """
  own = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
  known = ", ".join(names())
  asks_help = bool(_HELP.intersection(own))
  if not own or own[0].startswith("-"):
    if asks_help:
      return None
    raise ValueError(f"name a target first, as in `mfjax launch local ...`; known: {known}")
  if own[0] not in names():
    raise ValueError(f"unknown target {own[0]!r}; known: {known}")
  if not asks_help and ("--" not in arguments or not arguments[len(own) + 1 :]):
    raise ValueError(
      "the command is missing: write it after --, as in -- train --config=quickstart"
    )
  return importlib.import_module(f"launch.targets.{own[0]}")


def names() -> list[str]:
  """Return the names of the targets, without importing one."""
  return sorted(
    file.stem
    for directory in targets.__path__
    for file in pathlib.Path(directory).glob("[!_]*.py")
    if file.stem not in _NOT_TARGETS
  )
