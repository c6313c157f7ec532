"""When a job that ended is started again, and after what pause."""

import dataclasses
import logging
import threading
from collections.abc import Callable

from mfjax.cluster import exit_codes

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class RestartPolicy:
  """At most `max_restarts` in a row without progress, each after twice the pause of the last."""

  max_restarts: int
  first_pause: float = 2.0
  longest_pause: float = 60.0
  _restarts: int = 0

  def pause(self, code: int, *, progressed: bool) -> float | None:
    """Return the seconds to wait before the next start after exit `code`, or None to give up.

    `progressed`: the job saved a checkpoint that the previous start had not. Everything but success
    and a user's mistake is worth another try: preemption, a hang, a crash.
    """
    if code in (exit_codes.FINISHED, exit_codes.USAGE):
      return None
    if progressed:
      self._restarts = 0
    if self._restarts == self.max_restarts:
      return None
    self._restarts += 1
    return min(self.first_pause * 2 ** (self._restarts - 1), self.longest_pause)


def run_with_restarts(
  run: Callable[[int], int],
  policy: RestartPolicy,
  newest_checkpoint: Callable[[], int],
  stopped: threading.Event,
) -> int:
  """Run a job, again after its failures as the policy says, and return its last exit code.

  Args:
    run: runs the n-th start of the job, counted from 1, and returns its exit code.
    newest_checkpoint: returns the step of the newest checkpoint, -1 without any.
    stopped: set once a person or the machine wants the job to end: it is not started again.
  """
  start = 1
  while True:
    before = newest_checkpoint()
    code = run(start)
    pause = policy.pause(code, progressed=newest_checkpoint() > before)
    if pause is None or stopped.is_set():
      return code
    _LOG.warning("the job ended with exit code %d: starting again in %.0f s", code, pause)
    if stopped.wait(pause):
      return code
    start += 1
