"""Machines to compile for that are not here: `v5p:4x4x8`, `h200:8`, and several slices of them.

libtpu knows every TPU topology and the CUDA plugin compiles for any GPU that is described to it, so
that a topology's devices make a mesh to lower and compile for, never to run on.
"""

import dataclasses
import importlib.util
import math
import re
from typing import Any

import jax
from jax.experimental import topologies

from mfjax import devices

# Topologies that Cloud TPU offers, by the shape of its pods; of 3D pods also any `_fits_3d`.
_SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_MOST_CHIPS = {"v4": 4096, "v5p": 8960, "tpu7x": 9216}
_GPUS_OF_A_HOST = (1, 2, 4, 8)

_2D = ("v5e", "v6e")
_3D = tuple(_MOST_CHIPS)
_GPUS = ("h100", "h200")

# What the compiler asks of a GPU, as a Hopper reports it (`xla::GpuTargetConfigProto`).
_HOPPER = """
gpu_device_info {{
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
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  device_address_bits: 64
  ecc_enabled: true
  name: "NVIDIA {name}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
  """A machine: `num_slices` times `topology` (`4x4x8` chips, or `8` GPUs of one host)."""

  name: str
  topology: str
  num_slices: int

  def __str__(self) -> str:
    times = f"{self.num_slices} x " if self.num_slices > 1 else ""
    return f"{times}{self.name}:{self.topology}"

  @property
  def facts(self) -> devices.DeviceFacts:
    return devices.of_name(self.name)

  @property
  def is_gpu(self) -> bool:
    return self.name in _GPUS

  @property
  def dimensions(self) -> tuple[int, ...]:
    """Chips along each dimension of a slice; empty for GPUs, which a switch connects."""
    return () if self.is_gpu else tuple(map(int, self.topology.split("x")))

  def make_devices(self) -> list[jax.Device]:
    """Return the machine's devices, for compilation alone.

    Raises:
      ValueError: the compiler is not installed.
      RuntimeError: libtpu refuses the topology.
    """
    package, extra = ("jax_cuda13_plugin", "cuda") if self.is_gpu else ("libtpu", "tpu")
    if importlib.util.find_spec(package) is None:
      raise ValueError(
        f"--target={self.name}:{self.topology}: the compiler is missing: "
        f"pip install 'mfjax[{extra}]'"
      )
    if self.is_gpu:
      shape = f"{self.num_slices}x1x{self.topology}"
      made = topologies.get_topology_desc(
        platform="cuda", target_config=_gpu_config(self.facts), topology=shape
      )
      return list(made.devices)
    options: dict[str, Any] = {}
    if self.num_slices > 1:
      options["num_slices"] = self.num_slices
    if self.name == "v4":
      options["chip_config_name"] = "megacore"  # One device per chip, as JAX runs a v4.
    if self.topology == "1x1":
      options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{self.name}:{self.topology}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def _gpu_config(facts: devices.DeviceFacts) -> str:
  bandwidth = int(facts.memory_bandwidth or 0)
  return _HOPPER.format(name=facts.name.upper(), memory=facts.memory_bytes, bandwidth=bandwidth)


def known() -> str:
  """Return one sentence that lists the targets and their topologies."""
  return (
    f"known targets: {', '.join(_2D)} with {', '.join(_SHAPES_2D)}; {', '.join(_3D)} with "
    f"{', '.join(_SMALL_3D)} or AxBxC, multiples of 4 in rising order (v5p:4x4x8); "
    f"{', '.join(_GPUS)} with {', '.join(map(str, _GPUS_OF_A_HOST))} GPUs (h200:8)"
  )


def parse(text: str, num_slices: int = 1) -> Target:
  """Return the target that `text` names, such as `v5p:4x4x8`.

  Raises:
    ValueError: an unknown target or topology; lists the known ones.
  """
  name, _, topology = text.partition(":")
  if name not in (*_2D, *_3D, *_GPUS):
    raise ValueError(f"--target={text}: unknown target {name!r}; {known()}")
  if num_slices < 1:
    raise ValueError(f"--num_slices={num_slices}: give at least 1")
  if name in _2D:
    fits = topology in _SHAPES_2D
  elif name in _3D:
    fits = topology in _SMALL_3D or _fits_3d(topology, _MOST_CHIPS[name])
  else:
    fits = topology in map(str, _GPUS_OF_A_HOST)
  if not fits:
    what = f"has no topology {topology!r}" if topology else "needs a topology"
    raise ValueError(f"--target={text}: {name} {what}; {known()}")
  return Target(name, topology, num_slices)


def _fits_3d(topology: str, most_chips: int) -> bool:
  if not re.fullmatch(r"\d+x\d+x\d+", topology):
    return False
  sizes = [int(size) for size in topology.split("x")]
  multiples = all(size > 0 and size % 4 == 0 for size in sizes)
  return multiples and sizes == sorted(sizes) and math.prod(sizes) <= most_chips
