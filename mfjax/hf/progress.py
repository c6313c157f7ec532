"""Progress of work that is counted in bytes."""

import dataclasses
import threading
import time
from collections.abc import Callable

Report = Callable[["Progress"], None]


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far one stage of a conversion is."""

  stage: str
  done: int
  total: int
  seconds: float

  @property
  def seconds_left(self) -> float | None:
    return self.seconds / self.done * (self.total - self.done) if self.done else None


class Stage:
  """Counts one stage's bytes, from any thread, and reports each addition."""

  def __init__(self, name: str, total: int, report: Report) -> None:
    self._name, self._total, self._report = name, total, report
    self._done, self._began = 0, time.perf_counter()
    self._cancelled = False
    self._lock = threading.Lock()

  def cancel(self) -> None:
    """Let the work end at its next addition."""
    self._cancelled = True

  def add(self, num_bytes: int) -> None:
    """Count `num_bytes` more.

    Raises:
      RuntimeError: the work was cancelled.
    """
    if self._cancelled:
      raise RuntimeError(f"{self._name} was cancelled")
    with self._lock:
      self._done += num_bytes
      seconds = time.perf_counter() - self._began
      self._report(Progress(self._name, self._done, self._total, seconds))


def silent(_: Progress) -> None:
  """Report nothing."""
