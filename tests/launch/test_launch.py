"""`mfjax launch`: targets, what is refused, and what the local target would run."""

import pathlib
import shlex
import sys

import pytest


def test_help_of_a_target_shows_its_docstring_and_flags(mfjax):
  outcome = mfjax("launch", "local", "--help")
  assert outcome.code == 0
  for text in ("as several processes on this machine", "--devices_per_process", "--max_restarts"):
    assert text in outcome.out


def test_help_needs_no_target(mfjax):
  outcome = mfjax("launch", "--help")
  assert outcome.code == 0
  assert "mfjax launch TARGET [FLAGS] -- COMMAND ..." in outcome.out


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ((), "name a target first, as in `mfjax launch local ...`; known: "),
    (("--dry_run", "local", "--", "train"), "name a target first"),
    (("lokal", "--", "train"), "unknown target 'lokal'; known: "),
    (("local",), "the command is missing: write it after --"),
    (("local", "train", "--config=quickstart"), "the command is missing: write it after --"),
    (("local", "--"), "the command is missing"),
    (("local", "--num_proceses=2", "--", "train"), "did you mean '--num_processes'?"),
    (("local", "--num_processes=0", "--", "train"), "num_processes"),
    (("local", "--", "prepare"), "has no local --workdir for the logs: give launch --logs=DIR"),
    (("local", "--", "train", "--workdir=gs://b/w"), "give launch --logs=DIR"),
  ],
)
def test_mistakes_are_one_sentence(mfjax, args, message):
  outcome = mfjax("launch", *args)
  assert outcome.code == 2
  assert outcome.err.startswith("mfjax launch: error: ")
  assert message in outcome.err
  assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("args", [(), ("lokal", "--", "train")])
def test_known_targets_are_listed(mfjax, args):
  assert "local" in mfjax("launch", *args).err.partition("known: ")[2].split(", ")[0]


def test_a_dry_run_prints_what_would_run_and_runs_nothing(mfjax, monkeypatch, tmp_path):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=5 --xla_other=1")
  flags = ("--num_processes=3", "--devices_per_process=2", "--dry_run")
  outcome = mfjax("launch", "local", *flags, "--", "train", "--config=quickstart", "--workdir=w w")
  assert outcome.code == 0
  lines = outcome.out.splitlines()
  assert len(lines) == 3
  for rank, line in enumerate(lines):
    words = shlex.split(line)
    settings = dict(word.partition("=")[::2] for word in words[: words.index(sys.executable)])
    assert settings["MFJAX_PROCESS_ID"] == str(rank)
    assert settings["MFJAX_NUM_PROCESSES"] == "3"
    assert settings["JAX_PLATFORMS"] == "cpu"
    assert settings["XLA_FLAGS"] == "--xla_other=1 --xla_force_host_platform_device_count=2"
    assert int(settings["NPROC"]) >= 4
    assert words[words.index("launch.main") :][:4] == [
      "launch.main", "train", "--config=quickstart", "--workdir=w w",
    ]  # fmt: skip
    assert str(tmp_path / "w w" / "logs" / f"rank_{rank}.log") in words
  assert not list(tmp_path.iterdir())


def test_logs_go_where_they_are_wanted(mfjax, tmp_path):
  outcome = mfjax("launch", "local", "--logs=l", "--dry_run", "--", "train", "--workdir=gs://b/w")
  assert str(tmp_path / "l" / "rank_0.log") in outcome.out


ENDS = "import os, sys, time; rank = int(os.environ['MFJAX_PROCESS_ID']); {what}"


@pytest.fixture
def launch_python(mfjax, monkeypatch):
  """A function that runs Python code in place of `mfjax`, on three processes."""

  def run(what, *flags):
    code = ENDS.format(what=what)
    import launch.targets.local as local

    def workers(command, logs, coordinator, usual=local.workers):
      return [
        local.local.Worker((sys.executable, "-c", code), worker.settings, worker.log)
        for worker in usual(command, logs, coordinator)
      ]

    monkeypatch.setattr(local, "workers", workers)
    monkeypatch.setattr(local, "_GRACE_SECONDS", 1.0)
    monkeypatch.setattr(local, "_begin_logs", lambda started, attempt: None)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    return mfjax("launch", "local", "--num_processes=3", "--logs=l", *flags, "--", "train")

  return run


def test_every_process_has_a_log_and_the_first_is_shown(launch_python):
  outcome = launch_python("print('I am', rank)")
  assert outcome.code == 0
  logs = [pathlib.Path("l", f"rank_{rank}.log").read_text() for rank in range(3)]
  assert logs == ["I am 0\n", "I am 1\n", "I am 2\n"]


def test_the_first_failure_ends_the_others_and_is_the_jobs(launch_python):
  outcome = launch_python("rank == 1 and sys.exit('I fail') or time.sleep(60)")
  assert outcome.code == 1
  assert "I fail" in outcome.err
  for rank in (0, 2):
    log = pathlib.Path("l", f"rank_{rank}.log").read_text()
    assert log.startswith("mfjax launch: process 1 ended with exit code 1; ")


def test_a_signal_counts_as_shells_have_it(launch_python):
  assert launch_python("rank == 2 and os.kill(os.getpid(), 9); time.sleep(0.1)").code == 137
