"""What several processes cost: at the start, under two seconds; per step, under a percent."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from mfjax.cluster import local, notices, stop, watchdog
from mfjax.cluster.processes import Process
from tests.cluster.fake_store import FakeStore
from tests.cluster.jobs import make_data

ROOT = pathlib.Path(__file__).parent.parent.parent
FASTEST_STEP_SECONDS = 0.005  # Below a device's step of any model that is worth several processes.


def test_a_step_costs_less_than_a_percent():
  store, process = FakeStore(), Process(0, 2)
  board = notices.Board(store, process)
  asked = stop.AgreedStop(store, process, lambda request: board.post(notices.Kind.STOP))
  dog, count = watchdog.Watchdog(600, lambda: None), 20_000
  dog.start()
  began = time.perf_counter()
  for step in range(count):
    dog.step(step)
    asked.poll()
  seconds = (time.perf_counter() - began) / count
  dog.close()
  print(f"{seconds * 1e6:.2f} us a step")
  assert seconds < 0.01 * FASTEST_STEP_SECONDS


AGREE = """
import pathlib, sys, time
import jax
from mfjax.cluster import session
from mfjax.cluster.start import Coordinates
from mfjax.config import RunConfig
from mfjax.data.index import open_index

jax.config.update("jax_enable_preemption_service", False)
config, index = RunConfig(), open_index(sys.argv[3])
with session.open_session(config.cluster, Coordinates(sys.argv[1], 2, int(sys.argv[2]))) as job:
  job.agree(RunConfig(), index)  # The processes have waited for each other.
  began = time.perf_counter()
  session.agreement.source_digest.cache_clear()
  session.agreement.check(
    session.CoordinatorStore(), job.process, session.agreement.facts(config, index), 60,
    name="again",
  )
  seconds = time.perf_counter() - began
  print(seconds)
"""


@pytest.mark.cluster
def test_the_checks_before_the_first_step_take_less_than_a_second(tmp_path):
  data, address = make_data(tmp_path), f"127.0.0.1:{local.free_port()}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", AGREE, address, str(rank), str(data)],
      env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
      stdout=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  seconds = [float(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
  print(f"agreement {seconds}")
  assert max(seconds) < 1


@pytest.mark.cluster
@pytest.mark.slow
def test_the_launcher_takes_less_than_a_second(tmp_path):
  def measure(*command):
    before = os.times()
    subprocess.run(
      [sys.executable, "-m", "launch.main", *command],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      check=True,
      stdout=subprocess.DEVNULL,
    )
    after = os.times()  # Processor time: other work on the machine does not count.
    spent = after.children_user + after.children_system
    return spent - before.children_user - before.children_system

  local_job = ("launch", "local", "--num_processes=1", f"--logs={tmp_path}", "--")
  alone = min(measure("--version") for _ in range(3))
  launched = min(measure(*local_job, "--version") for _ in range(3))
  print(f"launched {launched:.2f} s, alone {alone:.2f} s")
  assert launched - alone < 1
