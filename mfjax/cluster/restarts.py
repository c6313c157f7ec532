"""Which ends of a job are worth another start, and how long a launcher waits before it.

0 is a finished run. 1 (the run failed) and 2 (its configuration, data or workdir cannot be used)
would come again: they are final. Anything else may pass: preemption (75), a hang (76), a process
that was killed or lost its peers (above 128).
"""

from collections.abc import Iterable

FAILURES = (1, 2)
FIRST_DELAY = 10  # Seconds; doubled at every restart, so that a broken machine is not hammered.
LONGEST_DELAY = 300


def delay(restarts: int) -> int:
  """Return the seconds to wait before another start, after `restarts` of them."""
  return min(FIRST_DELAY * 2 ** min(restarts, 10), LONGEST_DELAY)


def shell_delay(restarts: str) -> str:
  """Return `delay` as an expression of a POSIX shell, of the variable or expression `restarts`."""
  steps = (LONGEST_DELAY // FIRST_DELAY).bit_length()  # Here the longest delay is reached.
  return f"$(({restarts} < {steps} ? {FIRST_DELAY} << ({restarts}) : {LONGEST_DELAY}))"


def outcome(codes: Iterable[int]) -> int:
  """Return the exit code of a job from its processes' codes: a failure of their own comes first.

  The peers of a process that failed are lost or killed in consequence, and end with codes that
  alone would ask for a restart.
  """
  ends = list(codes)
  failures = [code for code in ends if code in FAILURES]
  return failures[0] if failures else max(ends, default=0)
