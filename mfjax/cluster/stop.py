"""Requests to stop: of one process at once, of several at a point that they agree on.

A loop that all processes go through alike calls `poll` at the same points. Between requests a poll
costs nothing. When any process is asked to stop, each says how many polls it has behind it, and all
stop at the first poll that none of them has behind it: the loop waits for that only then.
"""

import enum
import threading
from collections.abc import Callable

from mfjax.cluster.processes import Process
from mfjax.cluster.store import Store, settle

_VOTE_SECONDS = 60.0


class Exit(enum.Enum):
  """How a run ended that did not fail."""

  FINISHED = "finished"
  INTERRUPTED = "SIGINT"
  PREEMPTED = "SIGTERM"


class StopSignal:
  """What was asked of one process alone: to end after the current step with this exit."""

  def __init__(self) -> None:
    self.request: Exit | None = None

  def ask(self, request: Exit) -> None:
    """Ask for a stop; from any thread."""
    self.request = request

  def poll(self) -> Exit | None:
    """Return the request that the loop must follow now, if there is one."""
    return self.request


class AgreedStop(StopSignal):
  """The same for several processes: `poll` returns the same request at the same poll on all."""

  def __init__(self, store: Store, process: Process, announce: Callable[[Exit], None]):
    """Begin with no request; `announce` tells all processes, this one too, of one asked here."""
    super().__init__()
    self._store, self._process, self._announce = store, process, announce
    self._changed = threading.Condition()
    self._polls = 0
    self._announced: Exit | None = None  # Known to this process; the poll may not be agreed yet.
    self._last_poll: int | None = None
    self._error: Exception | None = None

  def ask(self, request: Exit) -> None:
    self._announce(request)

  def announced(self, request: Exit) -> None:
    """Note that a process was asked to stop; agree with the others on the poll, in the background.

    The first announcement counts: all processes hear of them in the same order.
    """
    with self._changed:
      if self._announced is not None:
        return
      self._announced, polls = request, self._polls
    threading.Thread(target=self._vote, args=(polls,), name="stop vote", daemon=True).start()

  def _vote(self, polls: int) -> None:
    try:
      most = settle(self._store, self._process, "stop", polls, max, _VOTE_SECONDS)
    except (TimeoutError, ConnectionError) as error:
      with self._changed:
        self._error = error
        self._changed.notify_all()
      return
    with self._changed:
      self._last_poll = most + 1
      self._changed.notify_all()

  def poll(self) -> Exit | None:
    with self._changed:
      self._polls += 1
      if self._announced is None:
        return None
      self._changed.wait_for(lambda: self._last_poll is not None or self._error is not None)
      if self._error is not None:
        raise ConnectionError(f"the processes could not agree where to stop: {self._error}")
      assert self._last_poll is not None
      assert self._polls <= self._last_poll or self.request, "the processes poll differently"
      if self._polls == self._last_poll:
        self.request = self._announced
      return self.request
