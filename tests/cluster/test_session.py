"""Two real processes without a model: how one's failure, hang and stop reach the other."""

import dataclasses
import logging
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import pytest

from mfjax.cluster import local, session
from mfjax.cluster.processes import LabelFormatter, Process

ROOT = pathlib.Path(__file__).parent.parent.parent
WORKER = """
import logging, sys, time
import jax
from mfjax.cluster import session
from mfjax.cluster.processes import LabelFormatter, Process
from mfjax.cluster.start import Coordinates
from mfjax.cluster.stop import Exit
from mfjax.config import ClusterConfig

rank = int(sys.argv[2])
handler = logging.StreamHandler()
handler.setFormatter(LabelFormatter(Process.here(rank, 2), logging.Formatter()))
logging.basicConfig(handlers=[handler])
jax.config.update("jax_enable_preemption_service", False)
config = ClusterConfig(watchdog_timeout={watchdog}, initialization_timeout=60)
with session.open_session(config, Coordinates(sys.argv[1], 2, rank)) as job:
  for step in range(1, 6000):
    job.step(step)
    if step == 5:
      time.sleep(rank)
      job.meet("here")
      print("met at", time.time(), flush=True)
    if job.stop.poll():
      print("stopped by", job.stop.request, flush=True)
      break
    time.sleep(0.01)
    if step == 20 and rank == {rank}:
      {what}
print("left", flush=True)
"""


@dataclasses.dataclass
class Outcome:
  """How the two processes ended; `seconds` is how far apart."""

  codes: list[int]
  logs: list[str]
  seconds: float


def run(rank, what, watchdog=600):
  """Run two processes of which one does something at its step 20."""
  code = WORKER.format(rank=rank, what=what, watchdog=watchdog)
  address = f"127.0.0.1:{local.free_port()}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", code, address, str(rank)],
      env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for rank in range(2)
  ]
  logs, ends = [], []
  for process in processes:
    logs.append(process.communicate(timeout=120)[0])
    ends.append(time.monotonic())
  return Outcome([p.returncode for p in processes], logs, ends[1] - ends[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_is_in_both_logs_and_both_are_gone_at_once(rank):
  outcome = run(rank, "raise RuntimeError('no luck')")
  assert outcome.codes == [1, 1], outcome.logs
  assert outcome.seconds < 5
  assert re.search(
    rf"\[{rank}/\S+\] this process failed and ends the job: RuntimeError: no luck",
    outcome.logs[rank],
  )
  assert "Traceback" in outcome.logs[rank]
  other = 1 - rank
  assert re.search(
    rf"\[{other}/\S+\] \[{rank}/\S+\] failed and ended the job: RuntimeError: no luck",
    outcome.logs[other],
  )
  assert "left" not in outcome.logs[other]


def test_a_users_mistake_is_a_sentence_without_traceback_and_exit_code_2():
  outcome = run(1, "raise ValueError('no such data')")
  assert outcome.codes == [2, 2], outcome.logs
  assert "failed and ended the job: ValueError: no such data" in outcome.logs[0]
  assert not any("Traceback" in log for log in outcome.logs)


def test_processes_meet_and_a_stop_asked_of_one_ends_both_well():
  outcome = run(1, "job.stop.ask(Exit.PREEMPTED)")
  assert outcome.codes == [0, 0], outcome.logs
  for log in outcome.logs:
    assert re.search(r"\[1/\S+\] was asked to stop by SIGTERM", log)
    assert "stopped by Exit.PREEMPTED" in log
    assert "left" in log
  first, second = (float(re.search(r"met at ([\d.]+)", log)[1]) for log in outcome.logs)
  assert abs(first - second) < 0.5, "one came a second later, and the other waited"


def test_a_hang_shows_the_stacks_and_last_steps_of_both_and_ends_them_with_76():
  outcome = run(1, "time.sleep(600)", watchdog=2)
  assert outcome.codes == [76, 76], outcome.logs
  assert "no step for 2 s (config.cluster.watchdog_timeout)" in outcome.logs[1]
  assert re.search(r"\[1/\S+\] hangs: no step for 2 s", outcome.logs[0])
  for log in outcome.logs:
    assert 'File "<string>"' in log
    assert re.search(r"last step of each process: \[1/\S+\] step 20, \d+ s ago", log)
    assert re.search(r"last step of each process: \[0/\S+\] step \d+, 0 s ago", log)


@pytest.mark.parametrize(
  ("error", "code"),
  [
    (ValueError("a mistake"), 2),
    (FileNotFoundError("no data"), 2),
    (RuntimeError("a bug"), 1),
    (ConnectionError("lost"), 1),
    (TimeoutError("late"), 1),
    (ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"), 1),
  ],
)
def test_exit_codes(error, code):
  assert session._code(error) == code


def test_errors_of_the_runtime_may_be_anothers_fault():
  lost = jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer")
  try:
    raise RuntimeError("the save failed") from lost
  except RuntimeError as error:
    assert session._may_be_anothers(error)
  assert session._may_be_anothers(ValueError("UNKNOWN: Gloo all-reduce failed"))
  assert not session._may_be_anothers(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory"))
  assert not session._may_be_anothers(ValueError("a mistake"))


def test_log_lines_begin_with_rank_and_host():
  formatter = LabelFormatter(Process(2, 4, "hostc"), logging.Formatter("%(levelname)s %(message)s"))
  record = logging.LogRecord("x", logging.ERROR, "f", 1, "broken", (), None)
  assert formatter.format(record) == "[2/hostc] ERROR broken"
