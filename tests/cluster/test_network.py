"""Four hosts of which one loses its network: all end with the reason, and the run goes on."""

import json
import os
import subprocess
import sys
import time

import pytest

from mfjax.config import MeshConfig
from tests.cluster import jobs, network_lab

MISSING = network_lab.missing()
pytestmark = [
  pytest.mark.cluster,
  pytest.mark.skipif(bool(MISSING), reason=MISSING or "all there"),
]

STEPS, PORT = 60, 7070
REASONS = ("are unhealthy", "lost the coordinator", "distributed service detected fatal errors")
TINY_STEP = "from tests.cluster import tiny_step\n\ntiny_step.install()\n"


class Run:
  """A run of four hosts; started again, it goes on."""

  def __init__(self, hosts, directory, data):
    config = jobs.make_config(data, steps=STEPS, mesh=MeshConfig())
    self.hosts, self.workdir, self.file = hosts, directory / "w", directory / "run.py"
    self.directory, self.starts = directory, 0
    self.file.write_text(
      f"from mfjax.config import RunConfig\n{TINY_STEP}\n"
      f"def get_config():\n  return RunConfig.from_dict({config.to_dict()!r})\n"
    )

  def start(self):
    self.starts += 1
    variables = {
      "JAX_PLATFORMS": "cpu",
      "NPROC": "16",
      "PYTHONPATH": str(jobs.ROOT),
      "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    self.processes = []
    for rank, host in enumerate(self.hosts):
      words = [
        sys.executable, "-u", "-m", "launch.main", "train", f"--config={self.file}",
        f"--workdir={self.workdir}", f"--coordinator_address={self.hosts[0].name}:{PORT}",
        f"--num_processes={len(self.hosts)}", f"--process_id={rank}",
      ]  # fmt: skip
      with self.log(rank).open("w") as log:
        self.processes.append(
          host.start(words, os.environ | variables, stdout=log, stderr=subprocess.STDOUT)
        )
    return self

  def log(self, rank):
    return self.directory / f"{self.starts}-{rank}.log"

  def logs(self):
    return "\n".join(f"=== {r}\n{self.log(r).read_text()}" for r in range(len(self.hosts)))

  def await_checkpoint(self):
    deadline = time.monotonic() + 300
    while not any((self.workdir / "checkpoints").glob("*/digests.json")):
      assert time.monotonic() < deadline, self.logs()
      assert all(process.poll() is None for process in self.processes), self.logs()
      time.sleep(0.05)

  def wait(self, seconds):
    deadline = time.monotonic() + seconds
    try:
      for process in self.processes:
        process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
      raise AssertionError(f"a process is left after {seconds} s:\n{self.logs()}") from None
    finally:
      self.kill()
    return [process.returncode for process in self.processes]

  def kill(self):
    for process in self.processes:
      process.kill()
      process.wait()

  def losses(self):
    path = self.workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return jobs.make_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def hosts():
  with network_lab.network(4) as made:
    yield made


@pytest.fixture(scope="module")
def undisturbed(hosts, data, tmp_path_factory):
  run = Run(hosts, tmp_path_factory.mktemp("undisturbed"), data).start()
  assert run.wait(300) == [0] * 4, run.logs()
  return run.losses()


@pytest.mark.parametrize(
  ("break_off", "mend"),
  [
    pytest.param("cut", "heal", id="cut link", marks=pytest.mark.slow),
    pytest.param("drop", "undrop", id="dropped packets"),
  ],
)
def test_a_lost_network_ends_all_hosts_with_the_reason(
  undisturbed, hosts, data, tmp_path, break_off, mend
):
  run = Run(hosts, tmp_path, data).start()
  try:
    run.await_checkpoint()
    getattr(hosts[2], break_off)()
    try:
      codes = run.wait(60)
    finally:
      getattr(hosts[2], mend)()
  finally:
    run.kill()
  assert not {0, 2} & set(codes), run.logs()
  for rank in range(4):
    assert any(reason in run.log(rank).read_text() for reason in REASONS), run.logs()
  assert run.losses()[-1][0] < STEPS
  run.start()
  assert run.wait(300) == [0] * 4, run.logs()
  assert "resuming after step" in run.log(0).read_text()
  assert run.losses() == undisturbed
