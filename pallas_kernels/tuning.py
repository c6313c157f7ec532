"""Tile sizes that were measured to be faster than a kernel's own choice.

The table beside this module, `tuned.json`, is written by `mfjax tune` and read at trace time:

    {device kind: {operation: {dtype: {shape: {tile field: size}}}}}

It holds an entry only where a measured tiling beat the kernel's default, which is computed from the
shape and always there. Sizes that vary from run to run (rows, groups, lengths) are looked up by the
next power of two; widths, which decide what tiles divide, must be equal. A kernel still has to
lower a row tile to what its alignment allows.
"""

import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Positions of a shape that are looked up by the next power of two: (m, k, n, g) and (q, t, s, d).
_BUCKETED = {"grouped_matmul": (0, 3), "stick_breaking": (0, 1)}

OPERATIONS = (
  *(
    f"grouped_matmul.{name}"
    for name in ("matmul", "transposed", "outer", "matmul_gelu", "matmul_gelu_backward")
  ),
  *("stick_breaking.forward", "stick_breaking.backward"),
)

PACKAGED = pathlib.Path(__file__).with_name("tuned.json")

Table = dict[str, dict[str, dict[str, dict[str, dict[str, int]]]]]


def lookup(
  operation: str, dtype: jax.typing.DTypeLike, shape: tuple[int, ...]
) -> dict[str, Any] | None:
  """Return the fields of the measured tiling for the mesh in context, or None.

  Args:
    operation: one of OPERATIONS.
    dtype: of the operands.
    shape: (m, k, n, g) of a grouped matmul, (q, t, s, d) of stick-breaking attention.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  kind = "" if device is None else device.device_kind
  found = _packaged().get(kind, {}).get(operation, {}).get(jnp.dtype(dtype).name, {})
  fields = found.get(shape_key(operation, shape))
  return None if fields is None else dict(fields)


def shape_key(operation: str, shape: tuple[int, ...]) -> str:
  """Return the table's name of a shape, such as '65536x1024x2048x32'."""
  bucketed = _BUCKETED[operation.partition(".")[0]]
  sizes = (1 << (n - 1).bit_length() if i in bucketed else n for i, n in enumerate(shape))
  return "x".join(map(str, sizes))


@functools.cache
def _packaged() -> Table:
  return read(PACKAGED)


def read(path: str | os.PathLike[str]) -> Table:
  """Return the table in a file; empty when there is no such file.

  Raises:
    ValueError: the file holds something else.
  """
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
  except FileNotFoundError:
    return {}
  try:
    table = json.loads(text)
    _check(table)
  except (ValueError, AttributeError) as error:
    raise ValueError(f"{path} is not a table of tilings: {error}") from error
  return table


def _check(table: Mapping[str, Any]) -> None:
  """Raise ValueError or AttributeError unless the table is nested as the module says."""
  for operations in table.values():
    for operation, dtypes in operations.items():
      if operation not in OPERATIONS:
        raise ValueError(f"unknown operation {operation!r}")
      for shapes in dtypes.values():
        for fields in shapes.values():
          if not all(isinstance(size, int) for size in fields.values()):
            raise ValueError(f"{fields!r} is not a dict of integers")


def updated(
  table: Table,
  device_kind: str,
  operation: str,
  dtype: jax.typing.DTypeLike,
  shape: tuple[int, ...],
  fields: Mapping[str, int] | None,
) -> Table:
  """Return a copy of the table with one entry set, or removed where `fields` is None."""
  table = json.loads(json.dumps(table))
  shapes = (
    table.setdefault(device_kind, {})
    .setdefault(operation, {})
    .setdefault(jnp.dtype(dtype).name, {})
  )
  key = shape_key(operation, shape)
  if fields is None:
    shapes.pop(key, None)
  else:
    shapes[key] = dict(fields)
  return table


def write(path: str | os.PathLike[str], table: Table) -> None:
  """Write the table at once: a reader sees the old or the new file, never a part of one."""
  path = pathlib.Path(path)
  beside = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    beside.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(beside, path)
  finally:
    beside.unlink(missing_ok=True)
