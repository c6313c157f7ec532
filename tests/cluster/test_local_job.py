"""Processes end with their launcher, however it ends."""

import os
import pathlib
import signal
import subprocess
import sys
import time

from mfjax.cluster.local import Ending, newest_checkpoint

ROOT = pathlib.Path(__file__).parent.parent.parent
LAUNCHER = """
import os, pathlib, sys
from mfjax.cluster.local import LocalJob, Worker

code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
logs = [pathlib.Path(sys.argv[1], str(rank)) for rank in range(3)]
workers = [Worker((sys.executable, "-c", code), {}, log) for log in logs]
LocalJob(workers, os.environ, sys.stdout.buffer, 1.0).run()
"""


def test_workers_die_with_a_launcher_that_is_killed(tmp_path):
  launcher = subprocess.Popen(
    [sys.executable, "-c", LAUNCHER, str(tmp_path)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.DEVNULL,
  )
  logs = [tmp_path / str(rank) for rank in range(3)]
  _await(lambda: all(log.exists() and log.read_text().strip() for log in logs))
  pids = [int(log.read_text()) for log in logs]
  assert all(_runs(pid) for pid in pids)
  launcher.send_signal(signal.SIGKILL)
  launcher.wait()
  _await(lambda: not any(_runs(pid) for pid in pids))


def _runs(pid):
  try:
    return "State:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
  except FileNotFoundError:
    return False


def _await(condition):
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_endings_say_how_and_count_as_shells_have_it():
  assert str(Ending(2, -9)) == "process 2 was ended by SIGKILL"
  assert (Ending(2, -9).exit_code, Ending(1, 75).exit_code) == (137, 75)
  assert str(Ending(1, 75)) == "process 1 ended with exit code 75"


def test_the_newest_checkpoint_is_found(tmp_path):
  assert newest_checkpoint(None) == newest_checkpoint(tmp_path) == -1
  for name in ("5", "10", "15.orbax-checkpoint-tmp", "20.replaced"):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
  assert newest_checkpoint(tmp_path) == 10
