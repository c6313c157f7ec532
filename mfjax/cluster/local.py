"""Real processes on this machine, each with devices of its own: a cluster in small.

The first process that fails ends the others: they are given time to log why, then killed. All are
killed with the launcher, however that ends.
"""

import dataclasses
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import BinaryIO

LOGS = "logs"  # Directory in a workdir, written to before the run begins.

_LOG = logging.getLogger(__name__)

# What a new process does first: asks the kernel to kill it when the launcher, whose id is the first
# argument, dies. Not a `preexec_fn`, which is not safe in a process with threads.
_GUARD = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
  sys.exit("the launcher is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
_TAIL_LINES = 15
_KILLED_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Ending:
  """How a process ended: `code` as `subprocess` has it, negative after a signal."""

  rank: int
  code: int

  def __str__(self) -> str:
    if self.code >= 0:
      return f"process {self.rank} ended with exit code {self.code}"
    return f"process {self.rank} was ended by {signal.Signals(-self.code).name}"

  @property
  def exit_code(self) -> int:
    """Return the code as shells have it."""
    return self.code if self.code >= 0 else 128 - self.code


@dataclasses.dataclass(frozen=True)
class Worker:
  """A process to start: what is run, what is set in its environment, where its output goes."""

  command: tuple[str, ...]
  settings: Mapping[str, str]
  log: pathlib.Path


def free_port() -> int:
  """Return a port of this machine that no one listens at now."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return int(probe.getsockname()[1])


class LocalJob:
  """Workers that run at the same time; rank 0's output is shown on `terminal` as well."""

  def __init__(
    self,
    workers: Sequence[Worker],
    environment: Mapping[str, str],
    terminal: BinaryIO,
    grace_seconds: float,
  ):
    """Take the workers, by rank.

    Args:
      environment: what workers inherit; their own settings go on top.
      grace_seconds: how long the others may go on once one has failed.
    """
    self._workers, self._environment, self._terminal = workers, environment, terminal
    self._grace = grace_seconds
    self._changed = threading.Condition()
    self._endings: list[Ending] = []
    self._processes: list[subprocess.Popen[bytes]] = []
    self._copier: threading.Thread | None = None

  def run(self) -> Ending:
    """Start all workers and wait for their end; return the first failure, or rank 0's success."""
    try:
      for worker in self._workers:
        self._processes.append(self._start(worker))
      for rank, process in enumerate(self._processes):
        threading.Thread(target=self._await, args=(rank, process), daemon=True).start()
      self._await_endings(None)
      if failure := self._failure():
        self._end_others(failure)
    finally:
      self._kill()
    if self._copier is not None:
      self._copier.join(_KILLED_SECONDS)
    return self._failure() or Ending(0, 0)

  def signal(self, number: int) -> None:
    """Pass a signal on to every worker that runs; all of them would stop for the first one."""
    for process in self._processes:
      if process.poll() is None:
        process.send_signal(number)

  def _start(self, worker: Worker) -> subprocess.Popen[bytes]:
    worker.log.parent.mkdir(parents=True, exist_ok=True)
    is_first = not self._processes
    with worker.log.open("ab") as log:
      process = subprocess.Popen(
        (sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), *worker.command),
        env={**self._environment, **worker.settings},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if is_first else log,
        stderr=subprocess.STDOUT,
        process_group=0,  # The terminal's Ctrl-C reaches the launcher alone, which passes it on.
      )
    if is_first:
      assert process.stdout is not None
      self._copier = threading.Thread(target=self._copy, args=(process.stdout, worker.log))
      self._copier.daemon = True
      self._copier.start()
    return process

  def _copy(self, output: BinaryIO, path: pathlib.Path) -> None:
    shown = True
    with output, path.open("ab", buffering=0) as log:
      for line in output:
        log.write(line)
        try:
          if shown:
            self._terminal.write(line)
            self._terminal.flush()
        except OSError:  # No one reads it any more; the log goes on.
          shown = False

  def _await(self, rank: int, process: subprocess.Popen[bytes]) -> None:
    code = process.wait()
    with self._changed:
      self._endings.append(Ending(rank, code))
      self._changed.notify_all()

  def _failure(self) -> Ending | None:
    return next((ending for ending in self._endings if ending.code), None)

  def _await_endings(self, timeout: float | None) -> bool:
    """Wait until all have ended or, without a time limit, one has failed."""

    def over() -> bool:
      failed = timeout is None and self._failure() is not None
      return failed or len(self._endings) == len(self._workers)

    with self._changed:
      return self._changed.wait_for(over, timeout)

  def _end_others(self, failure: Ending) -> None:
    """Let the others say why they end; kill those that do not end."""
    _LOG.error("%s", failure)
    if self._await_endings(self._grace):
      return
    ended = {ending.rank for ending in self._endings}
    for rank, worker in enumerate(self._workers):
      if rank not in ended:
        text = f"mfjax launch: {failure}; process {rank} went on for {self._grace:.0f} s: killed"
        _LOG.error("%s", text.partition(": ")[2])
        with worker.log.open("a") as log:
          log.write(text + "\n")

  def _kill(self) -> None:
    for process in self._processes:
      if process.poll() is None:
        process.kill()
    for process in self._processes:
      process.wait()


def last_lines(path: pathlib.Path) -> str:
  """Return the end of a log."""
  try:
    lines = path.read_text(errors="replace").splitlines()
  except FileNotFoundError:
    return ""
  return "\n".join(lines[-_TAIL_LINES:])


def newest_checkpoint(workdir: pathlib.Path | None) -> int:
  """Return the newest step that a workdir has a directory for, or -1."""
  if workdir is None or not (workdir / "checkpoints").is_dir():
    return -1
  steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal()]
  return max(steps, default=-1)
