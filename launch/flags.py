"""Flags that commands share: the run's config with typed overrides, and its working directory.

Importing this module registers `--config`, `--config.FIELD` and `--workdir`. The overrides are
not `ml_collections.config_flags`: it answers an unknown field with a traceback and cannot override
lists such as the mixture.
"""

import dataclasses
import enum
import pathlib
import textwrap
import traceback
import typing
from collections.abc import Callable, Iterable
from typing import Any

from absl import flags

import configs
from mfjax.config import RunConfig
from mfjax.schema import flatten, unknown_name
from mfjax.storage import check_access

_CONFIG = flags.DEFINE_string(
  "config", None, "The run: a Python file with get_config(), or a name in configs/ (quickstart)."
)
_OVERRIDES = flags.DEFINE_multi_string(
  "config.FIELD", [], "Set one field, as in --config.model.d_ff=4096. May be repeated."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run: checkpoints, metrics, plots. Created when missing."
)


def run_config() -> RunConfig:
  """Return the validated config that --config and its overrides name.

  Raises:
    ValueError: the flag is missing, the file is no config, or an override does not fit.
  """
  if not _CONFIG.value:
    raise ValueError("--config is missing: give a file or a name, such as --config=quickstart")
  return override(load_config(_CONFIG.value), _OVERRIDES.value)


def workdir() -> str:
  """Return the run's directory.

  Raises:
    ValueError: the flag is missing, or its bucket cannot be reached.
  """
  if not _WORKDIR.value:
    raise ValueError("--workdir is missing: give the run a directory, such as --workdir=runs/first")
  check_access(_WORKDIR.value, "--workdir")
  return _WORKDIR.value


def find_config(name: str) -> pathlib.Path:
  """Return the file that `name` means: a path, else a config of the installed package.

  `quickstart` and `configs/quickstart.py` are found from any directory.

  Raises:
    ValueError: there is no such file.
  """
  installed = pathlib.Path(configs.__file__).parent
  path = pathlib.Path(name)
  candidates = [path]
  if path.parent in (pathlib.Path(), pathlib.Path("configs")):
    file = path.stem + ".py" if path.suffix == ".py" else path.name + ".py"
    candidates += [pathlib.Path("configs", file), installed / file]
  for candidate in candidates:
    if candidate.is_file():
      return candidate
  if len(candidates) == 1:
    raise ValueError(f"--config={name}: there is no such file")
  known = [file.stem for file in installed.glob("[!_]*.py")]
  raise ValueError(f"--config={name}: {unknown_name(path.stem, known, 'config')}")


def load_config(name: str) -> RunConfig:
  """Run `get_config()` of the file that `name` means; see `find_config`.

  Raises:
    ValueError: the file is no Python, fails, or has no get_config() that returns a RunConfig.
  """
  path = find_config(name)
  # Not imported: an import would write __pycache__ beside the user's file.
  namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
  try:
    exec(compile(path.read_bytes(), path, "exec"), namespace)
    if not callable(namespace.get("get_config")):
      raise ValueError("it has no get_config() function: define one that returns a RunConfig")
    config = namespace["get_config"]()
  except SyntaxError as error:
    raise ValueError(f"{path}, line {error.lineno}: not valid Python: {error.msg}") from error
  except Exception as error:
    raise ValueError(f"{path}{_line_of(error, path)}: {_cause(error)}") from error
  if not isinstance(config, RunConfig):
    kind = type(config).__name__
    raise ValueError(f"{path}: get_config() returned a {kind}: return a mfjax.config.RunConfig")
  return config


def _line_of(error: Exception, path: pathlib.Path) -> str:
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == str(path)]
  return f", line {lines[-1]}" if lines else ""


def _cause(error: Exception) -> str:
  return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def override(config: RunConfig, assignments: Iterable[str]) -> RunConfig:
  """Return `config` with 'model.d_ff=4096'-like assignments applied, validated once at the end.

  Raises:
    ValueError: an unknown field (with the nearest known one), text that is not of the field's
      type, or values that do not fit together.
  """
  values = config.to_dict()
  kinds = _leaf_kinds(RunConfig)
  for assignment in assignments:
    name, equals, text = assignment.partition("=")
    if name not in kinds:
      raise ValueError(_unknown_field(name, kinds))
    if not equals:
      raise ValueError(f"config.{name} has no value: write --config.{name}=VALUE")
    section, _, leaf = name.rpartition(".")
    values[section][leaf] = _parse(text, kinds[name], f"config.{name}")
  return RunConfig.from_dict(values)


def _unknown_field(name: str, kinds: dict[str, Any]) -> str:
  inside = [field for field in kinds if field.startswith(f"{name}.")]
  if inside:
    return (
      f"config.{name} is a group of fields: set one of them, such as --config.{inside[0]}=VALUE"
    )
  return unknown_name(f"config.{name}", [f"config.{field}" for field in kinds], "field")


def _leaf_kinds(cls: type, prefix: str = "") -> dict[str, Any]:
  """Return {'model.d_ff': int, ...} for a config class."""
  kinds: dict[str, Any] = {}
  for name, kind in typing.get_type_hints(cls).items():
    if dataclasses.is_dataclass(kind):
      kinds |= _leaf_kinds(typing.cast(type, kind), f"{prefix}{name}.")
    else:
      kinds[prefix + name] = kind
  return kinds


_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

_PARSERS: dict[type, tuple[str, Callable[[str], Any]]] = {
  bool: ("true or false", lambda text: _BOOLEANS[text.lower()]),
  int: ("an integer", int),
  float: ("a number", float),
  str: ("text", str),
}


def _parse(text: str, kind: Any, name: str) -> Any:
  if typing.get_origin(kind) is tuple:
    return _parse_pairs(text, name)
  if issubclass(kind, enum.Enum):
    return text  # RunConfig.from_dict knows the choices.
  expected, parser = _PARSERS[kind]
  try:
    return parser(text)
  except (ValueError, KeyError) as error:
    raise ValueError(f"{name}={text!r}: give {expected}") from error


def _parse_pairs(text: str, name: str) -> list[tuple[str, float]]:
  pairs = [item.rpartition("=") for item in text.split(",")] if text else []
  try:
    return [(domain, float(share)) for domain, _, share in pairs]
  except ValueError as error:
    raise ValueError(
      f"{name}={text!r}: give domains and shares, such as code=0.7,prose=0.3"
    ) from error


def fields_help() -> str:
  """Return one line per config field: its name, default and type, under its group's purpose."""
  defaults = flatten(RunConfig().to_dict())
  lines = []
  for group, cls in typing.get_type_hints(RunConfig).items():
    summary = (cls.__doc__ or "").partition("\n\n")[0]
    lines += ["", *textwrap.wrap(summary, 98)]
    for name, kind in _leaf_kinds(cls, f"{group}.").items():
      default = "" if defaults[name] == [] else defaults[name]
      lines.append(f"  {f'--config.{name}={default}':<48} {_kind_name(kind)}")
  return "\n".join(lines)


def _kind_name(kind: Any) -> str:
  if typing.get_origin(kind) is tuple:
    return "DOMAIN=SHARE,..."
  if issubclass(kind, enum.Enum):
    return " | ".join(member.value for member in kind)
  return str(kind.__name__)
