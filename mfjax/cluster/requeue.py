"""How jobs on other machines start again: what the scripts and manifests of launchers share.

A finished run is final, and so is exit code 2: config, data or workdir cannot be used, and that
would come again. Anything else may pass: preemption, a hang, a crash, a lost machine.
"""

from collections.abc import Iterable

from mfjax.cluster import exit_codes

FIRST_PAUSE = 10  # Seconds, doubled at every restart: a broken machine is not hammered.
LONGEST_PAUSE = 300


def pause(restarts: int) -> int:
  """Return the seconds to wait before another start, after `restarts` of them."""
  return min(FIRST_PAUSE << min(restarts, 10), LONGEST_PAUSE)


def shell_pause(restarts: str) -> str:
  """Return `pause` for a POSIX shell, of the arithmetic expression `restarts`."""
  longest_at = (LONGEST_PAUSE // FIRST_PAUSE).bit_length()
  return f"$(({restarts} < {longest_at} ? {FIRST_PAUSE} << ({restarts}) : {LONGEST_PAUSE}))"


def outcome(codes: Iterable[int]) -> int:
  """Return a job's exit code from its processes' codes: one that is final for all, else the worst.

  The peers of a process that gave up are lost or killed in consequence, and end with codes that
  alone would ask for a restart.
  """
  ends = list(codes)
  return exit_codes.USAGE if exit_codes.USAGE in ends else max(ends, default=exit_codes.FINISHED)


def is_final(code: int) -> bool:
  """Whether a job that ended so is not to be started again."""
  return code in (exit_codes.FINISHED, exit_codes.USAGE)
