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
    self._lock = threading.Lock()

  def add(self, num_bytes: int) -> None:
    """Count `num_bytes` more."""
    with self._lock:
      self._done += num_bytes
      seconds = time.perf_counter() - self._began
      self._report(Progress(self._name, self._done, self._total, seconds))


def until(stop: threading.Event, report: Report) -> Report:
  """Return `report`, but one that raises RuntimeError once `stop` is set: so work ends early."""

  def report_or_end(progress: Progress) -> None:
    if stop.is_set():
      raise RuntimeError(f"{progress.stage} was stopped")
    report(progress)

  return report_or_end


def silent(_: Progress) -> None:
  """Report nothing."""
