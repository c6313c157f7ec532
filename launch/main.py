"""Run `mfjax COMMAND`: find the command, parse its flags, turn a user's mistake into a sentence.

A command is a module of this package with a docstring and `main(argv) -> int | None`, where `argv`
is the program's name and the positional arguments. Only the command that runs is imported. One that
has parts of its own has `part(arguments) -> module | None` as well: it imports the part that the
arguments name, whose flags and docstring then count as the command's.
"""

import ast
import functools
import importlib
import importlib.metadata
import os
import pathlib
import re
import select
import sys
import textwrap
import types
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

import launch
from mfjax.schema import unknown_name
from mfjax.storage import CLIENTS, GCS_OPTIONS

FLAGS = flags.FLAGS
USAGE_ERROR = 2
_INTERRUPTED = 130  # As shells have it.
_NOT_COMMANDS = {"main", "flags"}
# What libraries read from the environment, where the user has not set it.
_ENVIRONMENT = {
  "FSSPEC_GCS": GCS_OPTIONS,
  # JAX takes 0.75 of a GPU's memory; a large batch needs the rest as well. What is left is for
  # CUDA's and NCCL's own buffers. The compiler is told as much (mfjax/compiler_options.py).
  "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
}
_OVERRIDE = re.compile(r"--?config\.(?!FIELD=)")
_HELP = {"-h", "-help", "--help"}


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command that `argv` (the program's arguments; default: `sys.argv[1:]`) names.

  Returns the exit code, or raises SystemExit with it. A ValueError, OSError or
  NotImplementedError of a command becomes one sentence and exit code 2; `-v=1` shows its traceback
  as well.
  """
  args = list(sys.argv[1:] if argv is None else argv)
  try:
    code = _dispatch(args)
    sys.stdout.flush()
  except BrokenPipeError:  # `mfjax ... | head`: Python would complain again when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except KeyboardInterrupt:  # While libraries are imported, too: that takes seconds.
    code = _fail("mfjax", "interrupted", code=_INTERRUPTED)
    if argv is None:  # At once: Python's own end can crash while XLA's threads compute.
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
  return code


def _dispatch(args: list[str]) -> int:
  if not args or args[0] in _HELP:
    print(_overview(), file=sys.stdout if args else sys.stderr)
    return 0 if args else USAGE_ERROR
  if args[0] == "--version":
    print(f"mfjax {_version()}")
    return 0
  if args[0].startswith("-"):
    return _fail("mfjax", f"{args[0]} comes before a command: write mfjax COMMAND {args[0]}")
  name = args[0].replace("-", "_")
  if name not in commands():
    return _fail("mfjax", unknown_name(args[0], commands(), "command"))
  for variable, value in _ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  command = importlib.import_module(f"launch.{name}")
  program, described = f"mfjax {args[0]}", command
  if hasattr(command, "part"):
    try:
      part = command.part(args[1:])
    except ValueError as error:
      return _fail(program, str(error))
    described = part or command
  if _HELP.intersection(args[: args.index("--")] if "--" in args else args):
    print(_command_help(program, described))
    return 0
  app.run(
    functools.partial(_run, program, command),
    argv=[program, *args[1:]],
    flags_parser=functools.partial(_parse, program),
  )
  raise AssertionError("app.run does not return")


def _run(program: str, command: types.ModuleType, argv: list[str]) -> int:
  try:
    code = command.main(argv) or 0
    sys.stdout.flush()
    return code
  except OSError as error:
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
      raise
    logging.debug("%s failed", program, exc_info=True)
    named = error.filename is not None and error.strerror is not None
    return _fail(program, f"{error.filename}: {error.strerror}" if named else str(error))
  except Exception as error:
    bucket = type(error).__module__.partition(".")[0] in CLIENTS
    if not bucket and not isinstance(error, ValueError | NotImplementedError):
      raise
    logging.debug("%s failed", program, exc_info=True)
    return _fail(program, str(error))


def _stdout_is_closed() -> bool:
  poll = select.poll()
  poll.register(sys.stdout.fileno(), select.POLLOUT)
  return any(event & select.POLLERR for _, event in poll.poll(0))


def _fail(program: str, message: str, code: int = USAGE_ERROR) -> int:
  print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
  return code


def _parse(program: str, argv: Sequence[str]) -> list[str]:
  """Return the program's name and the positional arguments; set the flags."""
  end = argv.index("--") if "--" in argv else len(argv)
  before = [
    _OVERRIDE.sub("--config.FIELD=", arg, count=1) if "config.FIELD" in FLAGS else arg
    for arg in argv[:end]
  ]
  FLAGS.set_gnu_getopt(True)  # Flags may follow positional arguments.
  try:
    positional = FLAGS([*before, *argv[end:]])
    if FLAGS["verbosity"].using_default_value:
      logging.set_verbosity(logging.WARNING)  # At absl.app's choice, INFO, Orbax fills screens.
    return positional
  except flags.UnrecognizedFlagError as error:
    known = [f"--{flag.name}" for flag in _command_flags()]
    message = unknown_name(f"--{error.flagname}", known, "flag")
  except flags.Error as error:
    message = str(error)
  raise SystemExit(_fail(program, message))


def commands() -> dict[str, str]:
  """Return {command: first line of its docstring}, without importing a command."""
  found = {}
  for directory in launch.__path__:
    for file in pathlib.Path(directory).glob("[!_]*.py"):
      if file.stem not in _NOT_COMMANDS:
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.stem] = docstring.partition("\n")[0]
  return found


def _version() -> str:
  try:
    return importlib.metadata.version("mfjax")
  except importlib.metadata.PackageNotFoundError:  # A checkout that was never installed.
    return "(not installed)"


def _overview() -> str:
  lines = [f"  {name:<10} {summary}" for name, summary in sorted(commands().items())]
  return "\n".join(
    [
      "usage: mfjax COMMAND [FLAGS]",
      "",
      "Train, extend and prune ModuleFormer language models.",
      "",
      "commands:",
      *lines,
      "",
      "`mfjax COMMAND --help` explains a command; `mfjax --version` prints the version.",
    ]
  )


def _command_flags() -> list[flags.Flag[Any]]:
  by_module = FLAGS.flags_by_module_dict()  # No other command was imported.
  own = [flag for name, found in by_module.items() if name.startswith("launch.") for flag in found]
  return sorted(own, key=lambda flag: flag.name)


def _command_help(program: str, command: types.ModuleType) -> str:
  lines = [f"usage: {program} [FLAGS]", "", (command.__doc__ or "").strip(), "", "flags:"]
  for flag in _command_flags():
    default = f" Default: {flag.default}." if flag.default not in (None, "", []) else ""
    indent = " " * 6
    purpose = (flag.help or "").partition(";\n")[0]  # absl adds a clause to repeatable flags.
    text = f"{purpose}{default}"
    name = f"[no]{flag.name}" if flag.boolean else flag.name
    lines += [
      f"  --{name}",
      textwrap.fill(text, 94, initial_indent=indent, subsequent_indent=indent),
    ]
  if "config.FIELD" in FLAGS:
    from launch import flags as shared

    lines += ["", "config fields and their defaults:", shared.fields_help()]
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main())
