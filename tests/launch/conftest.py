"""Runs `mfjax` inside the test process, with a small command `probe` beside the real ones."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator

import pytest
from absl.testing import flagsaver

import launch
import launch.flags
from launch import main as launch_main

PROBE = '''"""Print one config field.

Its second paragraph explains.
"""

from absl import flags

from launch import flags as shared

_FIELD = flags.DEFINE_string("field", "d_ff", "Field of the model to print.")
_RAISE = flags.DEFINE_string("raise", "", "Exception to raise.")


def main(argv):
  if _RAISE.value:
    raise {"OSError": OSError(28, "No space left", "x/y"), "KeyError": KeyError("k"),
           "KeyboardInterrupt": KeyboardInterrupt(),
           "BrokenPipeError": BrokenPipeError("to a worker")}[_RAISE.value]
  print(getattr(shared.run_config().model, _FIELD.value), *argv[1:])
  return 7 if "seven" in argv else None
'''


@dataclasses.dataclass
class Outcome:
  """What a command line left behind."""

  code: int
  out: str
  err: str


@pytest.fixture
def mfjax(
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
  tmp_path_factory: pytest.TempPathFactory,
  tmp_path: pathlib.Path,
) -> Iterator[Callable[..., Outcome]]:
  """A function that runs a command line in the empty directory tmp_path."""
  commands = tmp_path_factory.mktemp("commands")
  (commands / "probe.py").write_text(PROBE)
  monkeypatch.setattr(launch, "__path__", [*launch.__path__, str(commands)])
  monkeypatch.setattr(sys, "dont_write_bytecode", True)
  monkeypatch.chdir(tmp_path)

  def run(*args: str) -> Outcome:
    try:
      code = launch_main.main(args)
    except SystemExit as stop:
      code = stop.code
    return Outcome(code, *capsys.readouterr())

  before = set(sys.modules)
  with flagsaver.flagsaver():  # Forgets the flags that commands register: so the commands must go.
    yield run
  for module in set(sys.modules) - before:
    if module.startswith("launch."):
      del sys.modules[module]
      vars(launch).pop(module.removeprefix("launch."), None)
