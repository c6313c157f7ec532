"""`mfjax train`: exit codes, and what signals do."""

import importlib
import signal
import subprocess
import sys

import pytest

from mfjax.cluster.stop import Exit
from mfjax.train import TrainingFailedError, train

LISTEN = """
import hashlib, sys, time
from launch import train
stop = train.StopSignal()
train.listen(stop)
print("ready", flush=True)
if sys.argv[1] == "in C":
  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # Minutes, and no bytecode in between.
while stop.request is None:
  time.sleep(0.01)
sys.exit(train.EXIT_CODES[stop.request])
"""


@pytest.fixture
def run(mfjax, monkeypatch):
  """A function that runs `mfjax train` with `train` in place of the loop; no signal is touched."""
  monkeypatch.setattr(signal, "set_wakeup_fd", lambda descriptor: None)
  monkeypatch.setattr(signal, "signal", lambda number, handler: None)

  def run(train, *args):
    monkeypatch.setattr("mfjax.train.train", train)
    return mfjax("train", "--config=quickstart", "--workdir=w", *args)

  return run


@pytest.mark.parametrize(
  ("ended", "code"), [(Exit.FINISHED, 0), (Exit.INTERRUPTED, 0), (Exit.PREEMPTED, 75)]
)
def test_exit_codes(run, ended, code):
  assert run(lambda *args, **kwargs: ended).code == code


def test_a_failed_run_is_one_sentence_and_exit_code_1(run):
  def fail(*args, **kwargs):
    raise TrainingFailedError("10 steps in a row were skipped")

  outcome = run(fail)
  assert outcome.code == 1
  assert outcome.err == "mfjax train: error: 10 steps in a row were skipped\n"


def test_missing_data_is_one_sentence_before_a_device_is_touched(run, monkeypatch, tmp_path):
  monkeypatch.setattr("jax.devices", lambda: pytest.fail("a device was touched"))
  outcome = run(train, "--config.data.path=missing")
  assert outcome.code == 2
  assert "missing" in outcome.err
  assert "Traceback" not in outcome.err
  assert not (tmp_path / "w").exists()


def test_number_of_devices_is_only_for_a_dry_run(run):
  outcome = run(lambda *args, **kwargs: Exit.FINISHED, "--num_devices=8")
  assert outcome.code == 2
  assert "--num_devices is for --dry_run" in outcome.err


VIRTUAL = "--xla_force_host_platform_device_count="


@pytest.mark.parametrize(
  ("environment", "threads"),
  [
    ({}, None),
    ({"XLA_FLAGS": f"{VIRTUAL}1"}, None),
    ({"XLA_FLAGS": f"--xla_a=1 {VIRTUAL}8"}, "16"),
    ({"XLA_FLAGS": f"{VIRTUAL}2 {VIRTUAL}64 --xla_a=1"}, "128"),
    ({"XLA_FLAGS": f"{VIRTUAL}8", "NPROC": "3"}, "3"),
  ],
)
def test_virtual_devices_get_two_threads_each(mfjax, environment, threads, monkeypatch):
  monkeypatch.setattr("os.cpu_count", lambda: 4)
  importlib.import_module("launch.train").size_thread_pool(environment)
  assert environment.get("NPROC") == threads


def start_listening(where):
  process = subprocess.Popen(
    [sys.executable, "-c", LISTEN, where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "ready\n"
  return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 75)])
def test_first_signal_asks_to_stop(number, code):
  process = start_listening("in Python")
  process.send_signal(number)
  _, error = process.communicate(timeout=60)
  assert process.returncode == code
  assert f"{number.name}: finishing the step and saving" in error


def test_second_signal_exits_at_once_even_while_a_compiler_runs():
  process = start_listening("in C")
  process.send_signal(signal.SIGINT)
  process.stderr.readline()
  assert "again to exit at once" in process.stderr.readline()
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=20)
  assert process.returncode == 128 + signal.SIGTERM
