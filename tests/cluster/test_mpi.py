"""Processes started by a real Open MPI."""

import shutil
import subprocess

import pytest

from tests.cluster import tiny_run

MISSING = "" if shutil.which("mpirun") else "needs the Debian package openmpi-bin"
pytestmark = [
  pytest.mark.cluster,
  pytest.mark.skipif(bool(MISSING), reason=MISSING),
]


def mpirun(processes, *words):
  """Run `words` under mpirun, all on this machine, and return what came of it."""
  options = ["--allow-run-as-root", "--oversubscribe", "-n", str(processes)]
  options += ["--mca", "oob_tcp_if_include", "lo", "--mca", "btl", "self,vader"]
  return subprocess.run(
    ["mpirun", *options, *words],
    env=tiny_run.environment(),
    capture_output=True,
    text=True,
    timeout=600,
  )


def test_processes_find_each_other():
  done = mpirun(4, *tiny_run.WHO_AM_I)
  assert done.returncode == 0, done.stderr
  assert tiny_run.said(done.stdout) == tiny_run.SAID


def test_a_run_trains_to_the_losses_of_any_other_start(tmp_path):
  done = mpirun(4, *tiny_run.mfjax(*tiny_run.train(tmp_path / "run")))
  assert done.returncode == 0, done.stderr
  assert tiny_run.losses(tmp_path / "run") == tiny_run.undisturbed()
