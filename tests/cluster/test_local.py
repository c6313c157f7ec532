"""Jobs of several real processes on this machine: same losses, stops, faults, disagreement.

Show 1, 3 and 10 of the cluster milestone; each test takes up to a minute on two cores.
"""

import dataclasses
import functools
import os
import pathlib
import random
import re
import signal
import time

import pytest

from mfjax.config import CheckpointConfig, ClusterConfig, DataConfig, EvalConfig, MeshConfig
from tests.cluster.jobs import Job, kill_all, make_config, make_data

pytestmark = pytest.mark.cluster

STEPS = 6
LONG = 60  # Long enough to be hit in its middle.


@pytest.fixture(autouse=True)
def nothing_stays():
  yield
  kill_all()


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


@pytest.mark.parametrize(
  ("processes", "devices"), [(4, 2), (2, 4), pytest.param(8, 1, marks=pytest.mark.slow)]
)
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


@pytest.mark.slow
def test_sigterm_to_one_rank_saves_one_step_and_the_resumed_run_is_bitwise_the_same(
  data, cache, tmp_path
):
  config = make_config(data, steps=20, mesh=MeshConfig())
  undisturbed = Job(config, tmp_path / "undisturbed", cache, 2, 2).run()
  job = Job(config, tmp_path / "w", cache, 2, 2, AFTER_BATCH_6).start()
  job.await_step(4)
  os.kill(job.pid(1), signal.SIGTERM)
  assert job.wait() == 75, job.all_logs()
  last = job.losses()[-1][0]
  assert job.checkpoints()[-1] == last < 20
  for rank in range(2):
    assert re.search(r"\[1/\S+\] was asked to stop by SIGTERM", job.log(rank))
  job.run()
  assert f"resuming after step {last}" in job.log(0)
  assert job.losses() == undisturbed.losses()


AFTER_BATCH_6 = """
import time
from mfjax.data.pipeline import TrainStream

usual, taken = TrainStream.__next__, []

def next_batch(self):
  taken.append(None)
  if len(taken) > 6:
    time.sleep(1)  # The test asks for the stop meanwhile.
  return usual(self)

TrainStream.__next__ = next_batch
"""

# From here on with a step of one line: what happens between processes does not depend on the model.


@dataclasses.dataclass
class Jobs:
  """Makes jobs of the tiny step, and one that nothing happens to."""

  data: pathlib.Path
  cache: pathlib.Path
  directory: pathlib.Path

  def make(self, workdir, processes=4, extra="", flags=(), steps=LONG, **sections):
    config = make_config(self.data, steps=steps, mesh=MeshConfig(), **sections)
    return Job(config, workdir, self.cache, processes, 1, TINY_STEP + extra, flags)

  @functools.cached_property
  def undisturbed(self):
    return self.make(self.directory / "w").run().losses()


TINY_STEP = """
from tests.cluster import tiny_step

tiny_step.install()
"""


@pytest.fixture(scope="module")
def jobs(data, cache, tmp_path_factory):
  return Jobs(data, cache, tmp_path_factory.mktemp("undisturbed"))


def test_signals_to_the_launcher_reach_the_job_and_end_it(jobs, tmp_path):
  job = jobs.make(tmp_path / "w", processes=2, flags=("--max_restarts=3",)).start()
  job.await_step(3)
  job.process.send_signal(signal.SIGTERM)
  assert job.wait() == 75, job.all_logs()
  assert job.checkpoints()[-1] == job.losses()[-1][0] < LONG


@pytest.mark.parametrize(
  ("rank", "number", "reasons"),
  [
    (3, signal.SIGKILL, ("are unhealthy", "was ended by SIGKILL")),
    (0, signal.SIGKILL, ("lost the coordinator", "distributed service detected fatal errors")),
    (1, signal.SIGSTOP, ("are unhealthy", "was ended by")),
  ],
)
def test_survivors_of_a_fault_end_with_the_reason_and_the_job_goes_on(
  jobs, tmp_path, rank, number, reasons
):
  job = jobs.make(tmp_path / "w").start()
  job.await_checkpoint()
  os.kill(job.pid(rank), number)
  began = time.monotonic()
  assert job.wait() not in (0, 2)
  assert time.monotonic() - began < 60
  for survivor in set(range(4)) - {rank}:
    assert any(reason in job.log(survivor) for reason in reasons), job.all_logs()
  job.run()
  assert "resuming after step" in job.log(0)
  assert job.losses() == jobs.undisturbed


@pytest.mark.slow
def test_a_job_killed_at_random_moments_is_restarted_until_it_is_done(jobs, tmp_path):
  chance, kills, steps = random.Random(0), 20, 200
  checkpoints = CheckpointConfig(every=2)
  job = jobs.make(
    tmp_path / "w", steps=steps, flags=("--max_restarts=2",), checkpoint=checkpoints
  ).start()
  for number in range(1, kills + 1):
    job.await_checkpoint(after=job.newest_checkpoint())
    time.sleep(chance.uniform(0, 0.5))  # Mostly into the next save.
    os.kill(job.pid(chance.randrange(4)), signal.SIGKILL)
    job.await_start(number + 1)
  assert job.wait() == 0, job.all_logs()
  undisturbed = jobs.make(tmp_path / "undisturbed", steps=steps).run()
  assert job.losses() == undisturbed.losses()


@pytest.mark.slow
def test_a_packed_mixture_is_the_same_stream_on_4_2_1_and_8_processes(cache, tmp_path):
  domains = ("numbers", "words")
  data = make_data(tmp_path / "corpus", domains=domains)
  mixture = DataConfig(
    path=str(data), sequence_length=32, batch_rows=8, mixture=(("numbers", 1.0), ("words", 2.0))
  )
  jobs = Jobs(data, cache, tmp_path / "undisturbed")
  job = None
  for processes, until in ((4, 12), (2, 24), (1, 36), (8, LONG)):
    job = jobs.make(tmp_path / "w", processes=processes, data=mixture).start()
    if until < LONG:
      job.await_step(until)
      if processes > 1:
        os.kill(job.pid(processes - 1), signal.SIGTERM)
      else:
        job.process.send_signal(signal.SIGTERM)
      assert job.wait() == 75, job.all_logs()
      assert until <= job.losses()[-1][0] < until + 12
  assert job.wait() == 0, job.all_logs()
  undisturbed = jobs.make(tmp_path / "other", data=mixture).run()
  assert job.losses() == undisturbed.losses()
  assert len({loss for _, loss in job.losses()}) == LONG


ON_RANK_1_AT_BATCH_5 = """
import os, time
from mfjax.data.pipeline import TrainStream

if os.environ["MFJAX_PROCESS_ID"] == "1":
  paced, taken = TrainStream.__next__, []

  def next_batch(self):
    taken.append(None)
    if len(taken) == 5:
      {what}
    return paced(self)

  TrainStream.__next__ = next_batch
"""


def test_an_exception_of_one_rank_ends_all_at_once_and_is_in_every_log(jobs, tmp_path):
  extra = ON_RANK_1_AT_BATCH_5.format(what="raise MemoryError('no room for the batch')")
  job = jobs.make(tmp_path / "w", extra=extra).start()
  assert job.wait() == 1, job.all_logs()
  assert "Traceback" in job.log(1)
  assert "this process failed and ends the job: MemoryError: no room for the batch" in job.log(1)
  for rank in (0, 2, 3):
    assert re.search(r"\[1/\S+\] failed and ended the job: MemoryError: no room", job.log(rank))


def test_a_hang_shows_all_stacks_and_last_steps_and_ends_with_its_own_code(jobs, tmp_path):
  extra = ON_RANK_1_AT_BATCH_5.format(what="time.sleep(10**6)")
  cluster = ClusterConfig(watchdog_timeout=30, heartbeat_timeout=60)
  job = jobs.make(tmp_path / "w", extra=extra, cluster=cluster).start()
  assert job.wait() == 76, job.all_logs()
  for rank in range(4):
    assert "most recent call first" in job.log(rank)
    for other in range(4):
      assert f"last step of each process: [{other}/" in job.log(rank)
  assert "in next_batch" in job.log(1)
  assert "no step for 30 s" in job.all_logs()


ON_RANK_2 = """
import os

if os.environ["MFJAX_PROCESS_ID"] == "2":
  from_dict = RunConfig.from_dict

  class RunConfig:
    def from_dict(values):
      values["{section}"]["{name}"] = {value!r}
      return from_dict(values)
"""


@pytest.mark.parametrize("kind", ["config", "data"])
def test_a_rank_that_differs_is_named_by_all_before_anything_is_written(jobs, tmp_path, kind):
  if kind == "config":
    extra = ON_RANK_2.format(section="optimizer", name="learning_rate", value=1.0)
    named = "another config than the others (optimizer.learning_rate 1.0 != 0.0003)"
  else:
    other = make_data(tmp_path / "other", count=150)
    extra = ON_RANK_2.format(section="data", name="path", value=str(other))
    named = "another data than the others"
  job = jobs.make(tmp_path / "w", extra=extra)
  assert job.start().wait() == 2, job.all_logs()
  for rank in range(4):
    assert "the processes do not agree: [2/" in job.log(rank)
    assert named in job.log(rank)
  assert [path.name for path in job.workdir.iterdir()] == ["logs"]
