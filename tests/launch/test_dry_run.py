"""`mfjax train --dry_run` as a user runs it: no data, no tokenizer, no device, nothing written."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def _mfjax(cwd: pathlib.Path, *args: str) -> subprocess.CompletedProcess[str]:
  # With an unknown platform, the first touch of a device raises.
  environment = {"JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
  return subprocess.run(
    [sys.executable, "-m", "launch.main", *args],
    env=os.environ | environment,
    cwd=cwd,
    capture_output=True,
    text=True,
  )


def test_dry_run_reports_and_touches_nothing(tmp_path):
  done = _mfjax(tmp_path, "train", "--config=configs/molm_350m_4b.py", "--dry_run", "--workdir=run")
  assert (done.returncode, done.stderr) == (0, "")
  assert "4,142,526,464" in done.stdout
  assert "mesh of 16 devices" in done.stdout
  assert not list(tmp_path.iterdir())


def test_number_of_devices_is_free(tmp_path):
  done = _mfjax(tmp_path, "train", "--config=molm_350m_4b", "--dry_run", "--num_devices=64")
  assert "mesh of 64 devices: data=4 x fsdp=16 x expert=1" in done.stdout


@pytest.mark.parametrize(
  ("args", "text"),
  [
    (("--config=molm_350m_4b", "--config.mesh.fsdp=7"), "batch_rows=1536 is not divisible by"),
    (("--config=molm_350m_4b", "--config.model.dff=7"), "did you mean 'config.model.d_ff'?"),
    (("--config=molm_350m_4b", "--num_devices=63"), "does not fit 63 devices"),
    (("--config=molm_350m_4b", "--num_devices=0"), "--num_devices=0"),
    (("--config=molm_350m_4b", "extra"), "extra"),
  ],
)
def test_malformed_dry_run_is_one_sentence(tmp_path, args, text):
  done = _mfjax(tmp_path, "train", "--dry_run", *args)
  assert (done.returncode, done.stdout) == (2, "")
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert done.stderr.startswith("mfjax train: error: ")
  assert text in done.stderr
  assert not list(tmp_path.iterdir())
