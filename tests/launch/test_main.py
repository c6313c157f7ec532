"""The `mfjax` command line: finding commands, help, exit codes, errors as one sentence."""

import os
import subprocess
import sys
import time

import pytest
from absl import logging

from configs import quickstart


def test_overview_lists_each_command_with_its_line(mfjax):
  outcome = mfjax("--help")
  assert outcome.code == 0
  assert "  probe      Print one config field." in outcome.out.splitlines()
  assert "flags" not in outcome.out.split()[3:]
  assert not outcome.err


def test_no_command_prints_the_overview_and_fails(mfjax):
  outcome = mfjax()
  assert (outcome.code, outcome.out) == (2, "")
  assert "commands:" in outcome.err


def test_command_help_explains_flags_and_config_fields(mfjax):
  outcome = mfjax("probe", "--config=absent.py", "--help")
  assert outcome.code == 0
  for text in (
    "Its second paragraph explains.",
    "--field\n      Field of the model to print. Default: d_ff.",
    "--workdir",
    "--config.model.d_ff=2048",
    "mlp | linear | gmm",
    "AdamW with a warm-up",
  ):
    assert text in outcome.out


def test_flags_may_follow_positional_arguments_and_stop_at_a_double_dash(mfjax):
  outcome = mfjax("probe", "a", "--config=quickstart", "--field=d_model", "--", "--config.x=1")
  d_model = quickstart.get_config().model.d_model
  assert (outcome.code, outcome.out, outcome.err) == (0, f"{d_model} a --config.x=1\n", "")


def test_exit_code_is_the_commands(mfjax):
  assert mfjax("probe", "seven", "--config=quickstart").code == 7


def test_unknown_command(mfjax):
  outcome = mfjax("prob")
  assert outcome.code == 2
  assert outcome.err == "mfjax: error: unknown command 'prob': did you mean 'probe'?\n"


def test_flag_before_the_command(mfjax):
  outcome = mfjax("--config=quickstart", "probe")
  assert outcome.code == 2
  assert "comes before a command" in outcome.err


def test_unknown_flag(mfjax):
  outcome = mfjax("probe", "--workdirr=x")
  assert outcome.code == 2
  assert outcome.err == (
    "mfjax probe: error: unknown flag '--workdirr': did you mean '--workdir'?\n"
  )


def test_file_error_is_one_sentence(mfjax):
  outcome = mfjax("probe", "--raise=OSError")
  assert (outcome.code, outcome.err) == (2, "mfjax probe: error: x/y: No space left\n")


def test_interrupt_is_one_sentence(mfjax):
  outcome = mfjax("probe", "--raise=KeyboardInterrupt")
  assert (outcome.code, outcome.err) == (130, "mfjax: error: interrupted\n")


def test_interrupt_of_an_import_is_one_sentence(mfjax, monkeypatch):
  def interrupt(name):
    raise KeyboardInterrupt

  monkeypatch.setattr("importlib.import_module", interrupt)
  outcome = mfjax("probe")
  assert (outcome.code, outcome.err) == (130, "mfjax: error: interrupted\n")


def test_programming_error_keeps_its_traceback(mfjax):
  with pytest.raises(KeyError):
    mfjax("probe", "--raise=KeyError")


def test_traceback_of_a_mistake_on_request(mfjax, caplog):
  mfjax("probe", "-v=1", "--config=absent.py")
  assert "ValueError: --config=absent.py" in caplog.text


@pytest.mark.parametrize(("args", "level"), [((), logging.WARNING), (("-v=0",), logging.INFO)])
def test_libraries_talk_only_on_request(mfjax, args, level):
  mfjax("probe", "--config=quickstart", *args)
  assert logging.get_verbosity() == level


def test_allocator_gets_most_of_the_memory_unless_the_user_says_how_much(mfjax, monkeypatch):
  variable = "XLA_PYTHON_CLIENT_MEM_FRACTION"
  monkeypatch.setenv(variable, "0.5")
  assert mfjax("tune", "--help").code == 0
  assert os.environ[variable] == "0.5"
  monkeypatch.delenv(variable)
  assert mfjax("tune", "--help").code == 0
  assert float(os.environ[variable]) == 0.92


def test_overview_needs_no_jax_and_half_a_second():
  code = (
    "import sys; from launch import main; main.main(['--help']); "
    "assert not {'jax', 'numpy', 'rich'} & set(sys.modules), 'heavy import'"
  )
  seconds = []
  for _ in range(3):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds.append(time.perf_counter() - start)
  assert min(seconds) < 0.5


@pytest.mark.parametrize(
  ("args", "first"),
  [("--help", "usage: mfjax train [FLAGS]"), ("--dry_run --config=quickstart", "config")],
)
def test_reader_that_closes_the_pipe_is_no_error(args, first):
  command = f"{sys.executable} -m launch.main train {args} | head -n 1"
  done = subprocess.run(command, shell=True, capture_output=True, text=True)
  assert (done.stdout, done.stderr) == (f"{first}\n", "")


def test_broken_pipe_elsewhere_is_an_error(mfjax, monkeypatch):
  monkeypatch.setattr(sys.stdout, "fileno", lambda: 2, raising=False)
  outcome = mfjax("probe", "--raise=BrokenPipeError")
  assert (outcome.code, outcome.err) == (2, "mfjax probe: error: to a worker\n")


def test_runs_as_a_module():
  command = [sys.executable, "-m", "launch.main", "--version"]
  done = subprocess.run(command, check=True, capture_output=True, text=True)
  assert done.stdout.startswith("mfjax ")
