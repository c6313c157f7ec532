"""A run of four processes that takes seconds, for starts that are not `mfjax launch local`."""

import atexit
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

from mfjax.config import CheckpointConfig, MeshConfig
from tests.cluster import jobs

PROCESSES = 4
STEPS = 60
WHO_AM_I = [sys.executable, str(jobs.ROOT / "tests" / "cluster" / "who_am_i.py")]
SAID = [f"process {rank} of {PROCESSES} of a sum of 10.0" for rank in range(PROCESSES)]


@functools.cache
def _directory() -> pathlib.Path:
  made = tempfile.mkdtemp(prefix="mfjax-run-")
  atexit.register(shutil.rmtree, made, ignore_errors=True)
  return pathlib.Path(made)


@functools.cache
def _config() -> pathlib.Path:
  """Prepare the data and return the run's config file."""
  config = jobs.make_config(
    jobs.make_data(_directory()),
    steps=STEPS,
    mesh=MeshConfig(data=2, fsdp=2),
    checkpoint=CheckpointConfig(every=1000),
  )
  file = _directory() / "run.py"
  file.write_text(
    "from mfjax.config import RunConfig\n\n"
    f"def get_config():\n  return RunConfig.from_dict({config.to_dict()!r})\n"
  )
  return file


def mfjax(*words: str) -> list[str]:
  """Return the command line of an mfjax command."""
  return [sys.executable, "-m", "launch.main", *words]


def train(workdir: pathlib.Path) -> list[str]:
  """Return the command that trains in `workdir`, without `mfjax`."""
  return ["train", f"--config={_config()}", f"--workdir={workdir}"]


def environment(**variables: str) -> dict[str, str]:
  """Return what a process with one CPU device is started with."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "NPROC": "16",
    "PYTHONPATH": str(jobs.ROOT),
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(_directory() / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    **variables,
  }


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
  """Return the loss of every step, as logged."""
  return _job(workdir).losses()


@functools.cache
def undisturbed() -> list[tuple[int, float]]:
  """Run four processes on this machine, once, and return their losses."""
  workdir = _directory() / "undisturbed"
  launch = ["launch", "local", f"--num_processes={PROCESSES}", "--", *train(workdir)]
  done = subprocess.run(
    mfjax(*launch), env=environment(), capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  found = losses(workdir)
  shutil.rmtree(workdir)
  assert [step for step, _ in found] == list(range(1, STEPS + 1))
  return found


def _job(workdir: pathlib.Path) -> jobs.Job:
  nothing = jobs.make_config(workdir, steps=STEPS)
  return jobs.Job(nothing, workdir, _directory(), processes=PROCESSES, devices=1)


def said(output: str) -> list[str]:
  """Return what processes of WHO_AM_I said, by rank: SAID if all is well.

  mpirun may join lines of several processes.
  """
  return sorted(re.findall(r"process \d+ of \d+ of a sum of \d+\.\d", output))


def wait_until(
  condition: Callable[[], bool], seconds: float, what: str, describe: Callable[[], str]
) -> None:
  """Wait for a condition; fail with `what` and a description when it does not come."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, f"{what} did not come in {seconds:.0f} s: {describe()}"
    time.sleep(0.3)


def read_all(files: Iterable[pathlib.Path]) -> str:
  """Return the ends of log files, for messages of failed tests."""
  return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files if file.is_file())
