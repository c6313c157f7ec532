"""The one-way import rule, and that an import has no side effect."""

import ast
import functools
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("pallas_kernels", "mfjax", "launch", "configs")

# Which packages a package may import from.
BELOW = {
  "pallas_kernels": {"pallas_kernels"},
  "mfjax": {"mfjax", "pallas_kernels"},
  "configs": {"configs", "mfjax"},
  "launch": {"launch", "configs", "mfjax", "pallas_kernels"},
}

# A batch's way through mfjax: a module reaches none of its own row and none of a later one.
CHAIN = (
  {"schema"},
  {"config"},
  {"sharding"},
  {"layers"},
  {"router", "dispatch"},
  {"experts"},
  {"attention"},
  {"model"},
  {"losses"},
  {"train_step"},
  {"train"},
)
# Files that an export carries: they run on torch, beside each other, and know nothing of mfjax.
CARRIED = {"mfjax.hf.configuration_moduleformer", "mfjax.hf.modeling_moduleformer"}
RANK = {f"mfjax.{name}": rank for rank, names in enumerate(CHAIN) for name in names}


@functools.cache
def _modules() -> dict[str, ast.Module]:
  """Return {'mfjax.config': its syntax tree} of the whole project."""
  found = {}
  for package in PACKAGES:
    for file in sorted((ROOT / package).rglob("*.py")):
      name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
      if name in CARRIED:
        continue
      found[name] = ast.parse(file.read_text(encoding="utf-8"))
  return found


def _imported_names(tree: ast.Module) -> set[str]:
  """Return all dotted names that a module imports, also inside functions."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "relative imports hide what is imported"
      names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
  return names


@functools.cache
def _imports(module: str) -> frozenset[str]:
  """Return the project's modules that `module` imports."""
  names = _imported_names(_modules()[module])
  imported = {name for name in names if name in _modules()}
  # `from mfjax import config` imports the package only to reach into it.
  used = {n for n in imported if any(other.startswith(f"{n}.") for other in imported)}
  return frozenset(imported - used - {module})


@functools.cache
def _reached(module: str) -> frozenset[str]:
  """Return every module that importing `module` runs, itself left out unless in a cycle."""
  reached: set[str] = set()
  frontier = set(_imports(module))
  while frontier:
    reached |= frontier
    frontier = {name for seen in frontier for name in _imports(seen)} - reached
  return frozenset(reached)


@pytest.mark.parametrize("module", sorted(CARRIED))
def test_carried_files_import_nothing_of_mfjax(module):
  tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
  names = {name.partition(".")[0] for node in ast.walk(tree) for name in _absolute(node)}
  assert not names & set(PACKAGES)


def _absolute(node: ast.AST) -> list[str]:
  if isinstance(node, ast.Import):
    return [alias.name for alias in node.names]
  return [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []


@pytest.mark.parametrize("module", _modules())
def test_imports_point_one_way(module):
  assert module not in _reached(module), "an import cycle"
  packages = {name.partition(".")[0] for name in _imports(module)}
  assert packages <= BELOW[module.partition(".")[0]]
  if module in RANK:
    later = {name for name in _reached(module) if RANK.get(name, -1) >= RANK[module]}
    assert not later


@pytest.mark.parametrize(
  "module", [name for name in _modules() if name.startswith(("mfjax", "pallas_kernels"))]
)
def test_library_reads_no_flags_environment_or_default_device(module):
  tree = _modules()[module]
  names = _imported_names(tree)
  assert not {n for n in names if n.startswith(("absl.flags", "absl.app", "ml_collections"))}
  names |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
  forbidden = {"os.environ", "os.getenv", "jax.default_backend", "jax.config"}
  assert not names & forbidden


IMPORT_ALL = """
import importlib, os, sys
import jax, jax.experimental.pallas.mosaic_gpu, tensorboardX  # Both set variables of their own.
from absl.testing import flagsaver
environment, options = dict(os.environ), dict(jax.config.values)
for module in sys.argv[1:]:
  with flagsaver.flagsaver():  # Each command has a process, and so flags, of its own.
    importlib.import_module(module)
assert dict(os.environ) == environment, "an import changed the environment"
assert dict(jax.config.values) == options, "an import changed JAX's configuration"
try:
  jax.devices()
except RuntimeError:
  print("no import touched a device")
"""


def test_importing_touches_no_device_environment_or_configuration():
  # With an unknown platform, the first touch of a device raises.
  done = subprocess.run(
    [sys.executable, "-c", IMPORT_ALL, *_modules()],
    env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "no import touched a device\n"
