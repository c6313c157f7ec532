"""Notices that no step was finished for too long, so that where it hangs can be shown."""

import threading
import time
from collections.abc import Callable


class Watchdog:
  """Calls `on_hang` once, from its own thread, when `step` was not called for `limit` seconds."""

  def __init__(self, limit: float, on_hang: Callable[[], None]):
    self.last_step = 0
    self._limit, self._on_hang = limit, on_hang
    self._last = time.monotonic()
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

  def start(self) -> None:
    """Begin to watch."""
    self._last = time.monotonic()
    self._thread.start()

  def step(self, step: int) -> None:
    """Note that the loop goes on, `step` steps being done; costs nothing."""
    self.last_step, self._last = step, time.monotonic()

  def seconds_since_step(self) -> float:
    """Return how long ago `step` was called."""
    return time.monotonic() - self._last

  def close(self) -> None:
    """Stop watching."""
    self._closed.set()

  def _run(self) -> None:
    while not self._closed.wait(max(self._limit - self.seconds_since_step(), 0.01)):
      if self.seconds_since_step() >= self._limit:
        self._on_hang()
        return
