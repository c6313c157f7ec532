"""Jobs of several real processes on this machine: same losses, stops, faults, disagreement.

Show 1, 3 and 10 of the cluster milestone; each test takes up to a minute on two cores.
"""

import os
import signal
import time

import pytest

from mfjax.config import ClusterConfig, EvalConfig
from tests.cluster.jobs import Job, make_config, make_data

pytestmark = pytest.mark.cluster

STEPS = 6
LONG = 60  # Long enough to be hit in its middle.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return make_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def config(data):
  return make_config(data, steps=STEPS, evaluate=EvalConfig(every=3))


@pytest.fixture(scope="module")
def one_process(config, cache, tmp_path_factory):
  return Job(config, tmp_path_factory.mktemp("one") / "w", cache, 1, 8).run()


@pytest.mark.parametrize(("processes", "devices"), [(4, 2), (2, 4), (8, 1)])
def test_losses_are_those_of_one_process(one_process, config, cache, tmp_path, processes, devices):
  job = Job(config, tmp_path / "w", cache, processes, devices).run()
  for mine, theirs in zip(job.losses(), one_process.losses(), strict=True):
    assert mine == pytest.approx(theirs, rel=1e-6)
  held_out = [
    [r["evaluation"] for r in j.records() if "evaluation" in r] for j in (job, one_process)
  ]
  assert len(held_out[0]) == 2
  for mine, theirs in zip(*held_out, strict=True):
    assert mine["numbers"] == pytest.approx(theirs["numbers"], rel=1e-6)
  assert all(f"[{rank}/" in job.log(rank) for rank in range(processes))
  assert "step" not in job.log(1).replace("steps", "")


@pytest.fixture(scope="module")
def long_config(data):
  return make_config(data, steps=LONG)


@pytest.fixture(scope="module")
def undisturbed(long_config, cache, tmp_path_factory):
  """Four processes that nothing happens to."""
  return Job(long_config, tmp_path_factory.mktemp("undisturbed") / "w", cache, 4, 1).run()


def test_sigterm_to_one_rank_saves_one_step_and_the_resumed_run_is_bitwise_the_same(
  undisturbed, long_config, cache, tmp_path
):
  job = Job(long_config, tmp_path / "w", cache, 4, 1).start()
  job.await_step(8)
  os.kill(job.pid(2), signal.SIGTERM)
  assert job.wait() == 75, job.all_logs()
  last = job.losses()[-1][0]
  assert last < LONG
  assert job.checkpoints()[-1] == last
  for rank in range(4):
    assert "was asked to stop by SIGTERM" in job.log(rank)
  job.run()
  assert f"resuming after step {last}" in job.log(0)
  assert job.losses() == undisturbed.losses()


def test_signals_to_the_launcher_reach_the_job(long_config, cache, tmp_path):
  job = Job(long_config, tmp_path / "w", cache, 2, 2, launch_flags=("--max_restarts=3",)).start()
  job.await_step(3)
  job.process.send_signal(signal.SIGINT)
  assert job.wait() == 0, job.all_logs()
  assert job.checkpoints()[-1] == job.losses()[-1][0] < LONG


@pytest.mark.parametrize(
  ("rank", "number", "reason"),
  [
    (3, signal.SIGKILL, "task:3|ended by SIGKILL"),
    (0, signal.SIGKILL, "lost the coordinator|distributed service detected fatal errors"),
    (1, signal.SIGSTOP, "task:1|ended by"),
  ],
)
def test_survivors_of_a_fault_end_and_the_job_goes_on(
  undisturbed, long_config, cache, tmp_path, rank, number, reason
):
  job = Job(long_config, tmp_path / "w", cache, 4, 1).start()
  job.await_step(8)
  os.kill(job.pid(rank), number)
  began = time.monotonic()
  assert job.wait() not in (0, 2)
  assert time.monotonic() - began < 60
  for survivor in set(range(4)) - {rank}:
    assert any(part in job.log(survivor) for part in reason.split("|")), job.all_logs()
  job.run()
  assert job.losses() == undisturbed.losses()


def test_a_killed_rank_is_restarted_by_the_launcher(undisturbed, long_config, cache, tmp_path):
  flags = ("--max_restarts=1",)
  job = Job(long_config, tmp_path / "w", cache, 4, 1, launch_flags=flags).start()
  job.await_step(8)
  os.kill(job.pid(1), signal.SIGKILL)
  assert job.wait() == 0, job.all_logs()
  assert "resuming after step" in job.log(0)
  assert job.losses() == undisturbed.losses()


ON_RANK_1_AT_BATCH_5 = """
import os, time
from mfjax.data.pipeline import TrainStream

if os.environ["MFJAX_PROCESS_ID"] == "1":
  usual, taken = TrainStream.__next__, []

  def next_batch(self):
    taken.append(None)
    if len(taken) == 5:
      {what}
    return usual(self)

  TrainStream.__next__ = next_batch
"""


def test_an_exception_of_one_rank_ends_all_at_once_and_is_in_every_log(data, cache, tmp_path):
  extra = ON_RANK_1_AT_BATCH_5.format(what="raise MemoryError('no room for the batch')")
  job = Job(make_config(data, steps=LONG), tmp_path / "w", cache, 4, 1, extra).start()
  job.await_step(3)
  began = time.monotonic()
  assert job.wait() == 1, job.all_logs()
  assert time.monotonic() - began < 10
  assert "Traceback" in job.log(1)
  assert "this process failed and ends the job: MemoryError: no room for the batch" in job.log(1)
  for rank in (0, 2, 3):
    log = job.log(rank)
    assert "failed and ended the job: MemoryError: no room for the batch" in log
    assert "[1/" in log


def test_a_hang_shows_all_stacks_and_last_steps_and_ends_with_its_own_code(data, cache, tmp_path):
  config = make_config(data, steps=LONG, cluster=ClusterConfig(watchdog_timeout=45))
  extra = ON_RANK_1_AT_BATCH_5.format(what="time.sleep(10**6)")
  job = Job(config, tmp_path / "w", cache, 4, 1, extra).start()
  assert job.wait() == 76, job.all_logs()
  for rank in range(4):
    log = job.log(rank)
    assert "Current thread" in log or "Thread 0x" in log
    for other in range(4):
      assert f"last step of each process: [{other}/" in log
  assert "in next_batch" in job.log(1)
  assert "no step for" in job.all_logs()


@pytest.mark.parametrize("what", ["config", "data"])
def test_a_rank_that_differs_is_named_by_all(data, cache, tmp_path, what):
  config = make_config(data, steps=STEPS)
  if what == "config":
    extra = """
import dataclasses, os

if os.environ["MFJAX_PROCESS_ID"] == "2":
  from_dict = RunConfig.from_dict

  class RunConfig:
    def from_dict(values):
      values["optimizer"]["learning_rate"] = 1.0
      return from_dict(values)
"""
    named = "another config than the others (optimizer.learning_rate 1.0 != 0.0003)"
  else:
    other = make_data(tmp_path / "other", count=150)
    extra = f"""
import os

if os.environ["MFJAX_PROCESS_ID"] == "2":
  from_dict = RunConfig.from_dict

  class RunConfig:
    def from_dict(values):
      values["data"]["path"] = {str(other)!r}
      return from_dict(values)
"""
    named = "another data than the others"
  job = Job(config, tmp_path / "w", cache, 4, 1, extra)
  assert job.start().wait() == 2, job.all_logs()
  for rank in range(4):
    assert "the processes do not agree: [2/" in job.log(rank)
    assert named in job.log(rank)
  assert not (job.workdir / "config.json").exists()
