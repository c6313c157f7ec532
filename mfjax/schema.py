"""What makes a frozen dataclass a configuration: typed fields, checks, and a plain form.

Errors are `ValueError`s that name the field, the value and what would do.
"""

import dataclasses
import difflib
import enum
import math
import typing
from collections.abc import Mapping
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Return {'model.d_ff': 2048, ...} for a nested dict from `to_dict`."""
  leaves: dict[str, Any] = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      leaves |= flatten(value, f"{prefix}{key}.")
    else:
      leaves[prefix + key] = value
  return leaves


def unknown_name(name: str, known: typing.Iterable[str], what: str) -> str:
  """Return a sentence about an unknown name, with the nearest known ones."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  if not near:  # A right leaf name under the wrong section.
    near = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]][:1]
  hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
  return f"unknown {what} {name!r}: {hint}"


def coerce(value: Any, kind: Any, name: str) -> Any:
  """Return `value` as type `kind` (bool, int, float, str, enum, tuple of pairs, or config).

  Raises:
    ValueError: the value is not of that type; names the field, the value and what is expected.
  """
  if isinstance(kind, type) and issubclass(kind, enum.Enum):
    if isinstance(value, kind):
      return value
    if value in [member.value for member in kind]:
      return kind(value)
    choices = [member.value for member in kind]
    raise ValueError(f"{name}={value!r}: {unknown_name(str(value), choices, 'choice')}")
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    try:
      value = float(value)
    except OverflowError as error:
      raise ValueError(f"{name} has {value.bit_length()} bits: give a finite number") from error
  if kind is float and isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f"{name}={value!r} must be a finite number")
  if typing.get_origin(kind) is tuple:
    return _coerce_pairs(value, name)
  expected = typing.get_origin(kind) or kind
  if not isinstance(value, expected) or (kind is int and isinstance(value, bool)):
    raise ValueError(f"{name}={value!r} has type {type(value).__name__}: give a {kind.__name__}")
  return value


def _coerce_pairs(value: Any, name: str) -> tuple[tuple[str, float], ...]:
  pairs = value.items() if isinstance(value, Mapping) else value
  try:
    if isinstance(pairs, str):  # The empty one would pass for no pairs.
      raise TypeError("text is no sequence of pairs")
    return tuple((coerce(k, str, name), coerce(v, float, name)) for k, v in pairs)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{name}={value!r}: give (domain, share) pairs") from error


def _field_types(cls: type) -> dict[str, Any]:
  hints = typing.get_type_hints(cls)
  return {f.name: hints[f.name] for f in dataclasses.fields(typing.cast(Any, cls))}


def to_plain(value: Any) -> Any:
  """Return a config as JSON-able nested dicts; enums become their values."""
  if dataclasses.is_dataclass(value):
    return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, enum.Enum):
    return value.value
  if isinstance(value, tuple):
    return [to_plain(item) for item in value]
  return value


def from_plain(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
  """Build a config class from `to_plain`'s form; `prefix` is put before names in errors.

  Raises:
    ValueError: an unknown field (with the nearest known one) or a value that does not fit.
  """
  kinds = _field_types(cls)
  if not isinstance(values, Mapping):
    raise ValueError(f"{prefix.rstrip('.')}={values!r}: expected fields {', '.join(kinds)}")
  built: dict[str, Any] = {}
  for name, value in values.items():
    if name not in kinds:
      raise ValueError(unknown_name(prefix + str(name), [prefix + k for k in kinds], "field"))
    is_config = dataclasses.is_dataclass(kinds[name])
    built[name] = (
      from_plain(kinds[name], value, f"{prefix}{name}.")
      if is_config
      else coerce(value, kinds[name], prefix + name)
    )
  try:
    return cls(**built)
  except ValueError as error:
    raise ValueError(f"{prefix}{error}" if prefix else str(error)) from error


def positive(owner: object, *names: str) -> None:
  """Raise ValueError unless these fields are above zero."""
  for name in names:
    value = getattr(owner, name)
    if value <= 0:
      raise ValueError(f"{name}={value} must be positive")


def not_negative(owner: object, *names: str) -> None:
  """Raise ValueError if one of these fields is below zero."""
  for name in names:
    value = getattr(owner, name)
    if value < 0:
      raise ValueError(f"{name}={value} must not be negative")


def fraction(owner: object, *names: str) -> None:
  """Raise ValueError unless these fields are at least 0 and below 1."""
  for name in names:
    value = getattr(owner, name)
    if not 0 <= value < 1:
      raise ValueError(f"{name}={value} must be at least 0 and below 1")


class Checked:
  """Checks every field's type before a config's own rules run."""

  def __post_init__(self) -> None:
    for field, kind in _field_types(type(self)).items():
      object.__setattr__(self, field, coerce(getattr(self, field), kind, field))
    self._validate()

  def _validate(self) -> None:
    pass
