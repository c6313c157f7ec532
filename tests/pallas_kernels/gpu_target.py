"""Compile for an H200 on a machine without one, and read what the assembler says of kernels."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from mfjax import targets


def needs_cuda_plugin(test: Callable[..., None]) -> Callable[..., None]:
  """Mark a test that compiles for a GPU; skip it where the compiler is missing."""
  skip = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs a compiler for GPUs: pip install 'mfjax[cuda]'",
  )
  return pytest.mark.target(skip(test))


needs_gpu = pytest.mark.skipif(
  os.environ.get("JAX_PLATFORMS") == "cpu" or jax.devices()[0].platform != "gpu",
  reason="runs on a GPU only (JAX_PLATFORMS=cuda)",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What ptxas says of the compiled Mosaic GPU kernels, and the program's text."""

  registers: tuple[int, ...]  # Per kernel, at launch (before set_max_registers).
  spilled_bytes: int
  serialized: tuple[str, ...]  # Warnings C7512 and C7514: wgmma is serialized.
  text: str

  def assert_efficient(self, spilled_bytes: int = 0) -> None:
    """Fail unless there is a kernel that spills no more than that and serializes no wgmma."""
    assert self.registers, "no Mosaic GPU kernel was compiled"
    assert self.spilled_bytes <= spilled_bytes, f"{self.spilled_bytes} bytes are spilled"
    assert not self.serialized, self.serialized


@functools.cache
def mesh(num_gpus: int = 1, axis_names: tuple[str, ...] = ("x",)) -> Mesh:
  """Return a mesh of H200s that programs can be compiled for, not run on."""
  devices = targets.Target("h200", str(num_gpus), 1).make_devices()
  return Mesh(np.array(devices).reshape((num_gpus,)), axis_names)


def compile_kernel(function: Callable[..., object], *shapes: jax.ShapeDtypeStruct) -> Report:
  """Compile `function` of arrays of these shapes for one H200 and report on its kernels.

  A kernel that this process has compiled before comes from Mosaic's cache, about which the
  assembler says nothing: compile each kernel once.
  """
  sharding = NamedSharding(mesh(), jax.P())
  arguments = [
    jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding) for shape in shapes
  ]
  with tempfile.TemporaryDirectory() as directory:
    with _dump_to(directory), jax.set_mesh(mesh()):
      compiled = jax.jit(function).lower(*arguments).compile()
    log = "\n".join(path.read_text() for path in sorted(pathlib.Path(directory).glob("*.ptxas")))
  return Report(
    registers=tuple(int(count) for count in re.findall(r"Used (\d+) registers", log)),
    spilled_bytes=sum(
      int(count) for count in re.findall(r"stack frame, (\d+) bytes spill stores", log)
    ),
    serialized=tuple(line for line in log.splitlines() if re.search(r"C7512|C7514", line)),
    text=compiled.as_text(),
  )


@contextlib.contextmanager
def _dump_to(directory: str) -> Iterator[None]:
  variables = {"MOSAIC_GPU_DUMP_TO": directory, "MOSAIC_GPU_DUMP_PTXAS": "1"}
  saved = {name: os.environ.get(name) for name in variables}
  os.environ.update(variables)
  try:
    yield
  finally:
    for name, value in saved.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value
