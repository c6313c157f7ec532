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
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  device_address_bits: 64
  ecc_enabled: true
  name: "NVIDIA H200"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


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
  topology = topologies.get_topology_desc(
    platform="cuda", target_config=H200, topology=f"1x1x{num_gpus}"
  )
  return Mesh(np.array(topology.devices).reshape((num_gpus,)), axis_names)


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
