"""What one process tells all others at any time: to stop, that it failed, that it hangs.

Notices have numbers, and every process reads them in their order. A thread waits for the next one
in the coordinator, which answers when it is posted: nothing is polled.
"""

import dataclasses
import enum
import json
from collections.abc import Callable

from mfjax.cluster.processes import Process
from mfjax.cluster.store import Store

_WAIT_SECONDS = 3600.0  # Then it waits again.


class Kind(enum.Enum):
  """What a notice says."""

  STOP = "stop"
  FAILED = "failed"
  HUNG = "hung"
  CLOSED = "closed"


@dataclasses.dataclass(frozen=True)
class Notice:
  """One process's word to all; `code` is the exit code that it asks for."""

  kind: Kind
  sender: Process
  text: str = ""
  code: int = 0


class Board:
  """The notices of a job."""

  def __init__(self, store: Store, process: Process):
    self._store, self._process = store, process
    self._next = 0

  def post(self, kind: Kind, text: str = "", code: int = 0) -> None:
    """Tell all processes, this one included."""
    sender = [self._process.index, self._process.count, self._process.host]
    written = json.dumps({"kind": kind.value, "sender": sender, "text": text, "code": code})
    number = self._next
    while not self._store.set(f"notices/{number}", written):
      number += 1

  def watch(self, receive: Callable[[Notice], None]) -> None:
    """Pass every notice to `receive` until the job is closed.

    Raises:
      StoreLostError: the coordinator is gone.
    """
    while True:
      try:
        record = json.loads(self._store.get(f"notices/{self._next}", _WAIT_SECONDS))
      except TimeoutError:
        continue
      self._next += 1
      kind, sender = Kind(record["kind"]), Process(*record["sender"])
      if kind is Kind.CLOSED:
        return
      receive(Notice(kind, sender, record["text"], record["code"]))
