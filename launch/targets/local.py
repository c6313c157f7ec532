"""Run a command as several processes on this machine.

mfjax launch local --num_processes=4 --devices_per_process=2 -- train --config=quickstart ...
"""

from collections.abc import Sequence

from absl import flags

from launch.targets import flags as shared

_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 2, "Processes to start.", lower_bound=1)


def run(command: Sequence[str]) -> int:
  """Run `command` and return its exit code."""
  print(command, shared.DRY_RUN.value, _NUM_PROCESSES.value)
  return 0
