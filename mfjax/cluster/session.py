"""One process's part in a job: what the training loop sees of the other processes.

A process that fails says why, tells the others, and is gone at once: they would wait for it in
their next collective. So do those that are told.
"""

import contextlib
import faulthandler
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NoReturn, Self

import jax

from mfjax.cluster import agreement, exit_codes
from mfjax.cluster.notices import Board, Kind, Notice
from mfjax.cluster.processes import Process
from mfjax.cluster.start import Coordinates, start
from mfjax.cluster.stop import AgreedStop, Exit, StopSignal
from mfjax.cluster.store import CoordinatorStore, Store, StoreLostError
from mfjax.cluster.watchdog import Watchdog
from mfjax.config import ClusterConfig, RunConfig
from mfjax.data.index import DataIndex

_LOG = logging.getLogger(__name__)

_TELL_SECONDS = 5.0
_HEARD_SECONDS = 2.0  # How long process 0, without which no one hears anything, waits to be heard.
_REPORT_SECONDS = 3.0
_POLL_SECONDS = 0.05  # Only while the job ends.
_FOREVER_SECONDS = 7 * 24 * 3600
_STATUS = re.compile("(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|UNKNOWN): ")
_USAGE_ERRORS = (ValueError, NotImplementedError, OSError)


class Session:
  """A process alone: nothing to agree on, and its errors are its own."""

  def __init__(self, process: Process | None = None, stop: StopSignal | None = None):
    self.process = process or Process()
    self.stop = stop or StopSignal()

  def agree(self, config: RunConfig, index: DataIndex) -> None:
    """Raise ValueError unless every process has this config, data and tokenizer, and our code."""

  def step(self, step: int) -> None:
    """Note that the loop goes on, `step` steps being done."""

  def meet(self, where: str) -> None:
    """Wait until every process has come to this place; each place once."""

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    """Leave the job."""


class ClusterSession(Session):
  """One of several processes. Leaving it with an error ends the process and the whole job."""

  def __init__(self, config: ClusterConfig, process: Process, store: Store):
    self._config, self._store = config, store
    self._board = Board(store, process)
    stop = AgreedStop(store, process, lambda asked: self._board.post(Kind.STOP, asked.value))
    super().__init__(process, stop)
    self._agreed_stop = stop
    self._watchdog = Watchdog(config.watchdog_timeout, self._hang)
    self._watcher = threading.Thread(target=self._watch, name="notices", daemon=True)
    self._ending = threading.Lock()

  def agree(self, config: RunConfig, index: DataIndex) -> None:
    mine, timeout = agreement.facts(config, index), self._config.initialization_timeout
    agreement.check(self._store, self.process, mine, timeout)

  def step(self, step: int) -> None:
    self._watchdog.step(step)

  def meet(self, where: str) -> None:
    # Who fails meanwhile says so, and who hangs is the watchdog's.
    self._store.barrier(where, self._config.watchdog_timeout or _FOREVER_SECONDS)

  def __enter__(self) -> Self:
    self._watcher.start()
    if self._config.watchdog_timeout:
      self._watchdog.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if error is not None:
      self._fail(error)
    try:
      self._store.barrier("closing", self._config.shutdown_timeout)
      self._watchdog.close()
      if self.process.is_first:
        self._board.post(Kind.CLOSED)
      self._watcher.join(_TELL_SECONDS)
      jax.distributed.shutdown()
    except (TimeoutError, ConnectionError, jax.errors.JaxRuntimeError) as lost:
      self._fail(lost)

  def _fail(self, error: BaseException) -> NoReturn:
    """Log the error, tell the others and end the process."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if _may_be_anothers(error):
      patience = self._config.heartbeat_timeout + _TELL_SECONDS
      _LOG.error(
        "step %d failed with %s; if another process is the cause it is named within %.0f s",
        self._watchdog.last_step, reason.partition("Additional GRPC")[0], patience,
      )  # fmt: skip
      time.sleep(patience)  # A notice, or JAX itself, ends this process before.
    code = _code(error)
    with self._ending:
      if code != exit_codes.USAGE:
        _LOG.error("%s", "".join(traceback.format_exception(error)))
      _LOG.error("this process failed and ends the job: %s", reason)
      self._tell(Kind.FAILED, reason, code)
      _end(code)

  def _tell(self, kind: Kind, text: str, code: int) -> None:
    """Post a notice; without process 0 no one hears it, so that one waits until it was heard."""

    def heard() -> bool:
      return len(self._store.under("heard")) >= self.process.count - 1

    with _bounded(_TELL_SECONDS, lambda: self._board.post(kind, text, code)):
      pass
    if self.process.is_first:
      _wait(heard, _HEARD_SECONDS)

  def _watch(self) -> None:
    """Follow the notices of all processes until the job is closed."""
    try:
      self._board.watch(self._receive)
    except StoreLostError as error:
      with self._ending:
        _LOG.error("lost the coordinator, process 0, or was given up by it: %s", error)
        _end(exit_codes.FAILED)

  def _receive(self, notice: Notice) -> None:
    if notice.kind is Kind.STOP:
      _LOG.warning("%s was asked to stop by %s", notice.sender.label, notice.text)
      self._agreed_stop.announced(Exit(notice.text))
    elif notice.sender == self.process:
      return
    elif notice.kind is Kind.FAILED:
      with self._ending:
        _LOG.error("%s failed and ended the job: %s", notice.sender.label, notice.text)
        self._store.set(f"heard/{self.process.index}", "")
        _end(notice.code)
    elif notice.kind is Kind.HUNG:
      with self._ending:
        _LOG.error("%s hangs: %s", notice.sender.label, notice.text)
        self._report_hang()

  def _hang(self) -> None:
    """Show where this process and the others are, and end the job."""
    with self._ending:
      text = f"no step for {self._watchdog.seconds_since_step():.0f} s"
      _LOG.error("%s (config.cluster.watchdog_timeout)", text)
      with _bounded(_TELL_SECONDS, lambda: self._board.post(Kind.HUNG, text, exit_codes.HUNG)):
        pass
      self._report_hang()

  def _report_hang(self) -> NoReturn:
    """Print all stacks and the last steps of all reachable processes, then end this one."""
    mine = f"step {self._watchdog.last_step}, {self._watchdog.seconds_since_step():.0f} s ago"
    with _bounded(
      _TELL_SECONDS,
      lambda: self._store.set(f"hung/{self.process.index}", f"{self.process.label} {mine}"),
    ):
      faulthandler.dump_traceback(sys.stderr.fileno())
    reports: dict[str, str] = {}

    def all_reported() -> bool:
      reports.update(self._store.under("hung"))
      return len(reports) >= self.process.count

    _wait(all_reported, _REPORT_SECONDS)
    for rank in range(self.process.count):
      said = reports.get(str(rank), f"[{rank}] does not answer")
      _LOG.error("last step of each process: %s", said)
    if self.process.is_first:
      time.sleep(_HEARD_SECONDS)  # The others ask this process.
    _end(exit_codes.HUNG)


def _code(error: BaseException) -> int:
  """Return the exit code: whether starting again could help."""
  lost = isinstance(error, (ConnectionError, TimeoutError)) or _may_be_anothers(error)
  is_users = isinstance(error, _USAGE_ERRORS) and not lost
  return exit_codes.USAGE if is_users else exit_codes.FAILED


def _may_be_anothers(error: BaseException | None) -> bool:
  """Whether an error looks like what the loss of another process does to this one."""
  while error is not None:
    # Of a collective that lost its peer, XLA makes a ValueError.
    if isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error)):
      return "RESOURCE_EXHAUSTED" not in str(error)
    error = error.__cause__
  return False


@contextlib.contextmanager
def _bounded(seconds: float, action: Callable[[], object]) -> Iterator[None]:
  """Do `action` beside the block, and wait at most `seconds` for it at its end."""

  def do() -> None:
    with contextlib.suppress(ConnectionError):  # The coordinator is gone: no one left to tell.
      action()

  thread = threading.Thread(target=do, name="last words", daemon=True)
  thread.start()
  yield
  thread.join(seconds)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
  """Wait until the condition holds, at most some seconds, while the coordinator may be gone."""
  met = threading.Event()

  def watch() -> None:
    while not met.is_set() and not condition():
      time.sleep(_POLL_SECONDS)
    met.set()

  with _bounded(0, watch):
    met.wait(seconds)
  met.set()


def _end(code: int) -> NoReturn:
  """End this process now: the normal way out waits for the other processes."""
  for handler in logging.getLogger().handlers:
    handler.flush()
  with contextlib.suppress(OSError, ValueError):
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(code)


def open_session(config: ClusterConfig, coordinates: Coordinates | None) -> Session:
  """Start this process's part of a job, or return the session of a process alone.

  Raises:
    StartError: the processes do not come together.
  """
  if coordinates is None:
    return Session()
  return ClusterSession(config, start(config, coordinates), CoordinatorStore())
