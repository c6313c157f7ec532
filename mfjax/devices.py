"""What one device can do, by its published figures: the only such table.

A device is what JAX calls one: a TPU chip, half a tpu7x chip, a GPU. Sources:

TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read on 2026-11-25. ICI is half of the
bidirectional figure per chip; v4 states none, so its all-reduce bandwidth per pod (1.1 PB/s) over
4,096 chips stands in, which is how the other generations' figures relate too. DCN: v5e 6.4 Tb/s per
pod of 256, v5p 50 and v6e and tpu7x 100 Gb/s per chip; v4 states none.
NVIDIA: data sheets of A100, H100 (SXM, PCIe, NVL), H200 and HGX B200. FLOP/s are half of 'with
sparsity', NVLink is half of the bidirectional figure, memory is what the driver reports, and the
network is one 400 Gb/s port for each GPU as in DGX H100 and H200. `None`: no single figure.
"""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceFacts:
  """Published figures of one device; bandwidths in bytes per second, one way.

  `kinds` are beginnings of `jax.Device.device_kind`. `ici` is the link inside a slice (ICI, NVLink)
  over all ports together; `ici_ports` 1 means a switch that gives a device its whole bandwidth.
  """

  name: str
  kinds: tuple[str, ...]
  bf16_flops: float
  memory_bytes: int | None = None
  memory_bandwidth: float | None = None
  ici_bandwidth: float | None = None
  ici_ports: int = 1
  dcn_bandwidth: float | None = None

  @property
  def platform(self) -> str:
    """Return 'gpu' or 'tpu'."""
    return "gpu" if any(kind.startswith("NVIDIA") for kind in self.kinds) else "tpu"


DEVICES = (
  DeviceFacts(
    name="v4",
    kinds=("TPU v4",),
    bf16_flops=275e12,
    memory_bytes=32 * _GIB,
    memory_bandwidth=1200e9,
    ici_bandwidth=1.1e15 / 4096,
    ici_ports=6,
  ),
  DeviceFacts(
    name="v5e",
    kinds=("TPU v5 lite", "TPU v5e"),
    bf16_flops=197e12,
    memory_bytes=16 * _GIB,
    memory_bandwidth=819e9,
    ici_bandwidth=400e9 / 2,
    ici_ports=4,
    dcn_bandwidth=6.4e12 / 8 / 256,
  ),
  DeviceFacts(
    name="v5p",
    kinds=("TPU v5", "TPU v5p"),
    bf16_flops=459e12,
    memory_bytes=95 * _GIB,
    memory_bandwidth=2765e9,
    ici_bandwidth=1200e9 / 2,
    ici_ports=6,
    dcn_bandwidth=50e9 / 8,
  ),
  DeviceFacts(
    name="v6e",
    kinds=("TPU v6 lite", "TPU v6e"),
    bf16_flops=918e12,
    memory_bytes=32 * _GIB,
    memory_bandwidth=1638e9,
    ici_bandwidth=800e9 / 2,
    ici_ports=4,
    dcn_bandwidth=100e9 / 8,
  ),
  DeviceFacts(
    name="tpu7x",
    kinds=("TPU7x",),
    bf16_flops=2307e12 / 2,
    memory_bytes=192 * _GIB // 2,
    memory_bandwidth=7380e9 / 2,
    ici_bandwidth=1200e9 / 2 / 2,
    ici_ports=6,
    dcn_bandwidth=100e9 / 8 / 2,
  ),
  DeviceFacts(
    name="h100",
    kinds=("NVIDIA H100",),
    bf16_flops=989.4e12,
    memory_bytes=85_014_020_096,
    memory_bandwidth=3352e9,
    ici_bandwidth=900e9 / 2,
    dcn_bandwidth=400e9 / 8,
  ),
  DeviceFacts(
    name="h200",
    kinds=("NVIDIA H200",),
    bf16_flops=989.4e12,
    memory_bytes=151_397_597_184,
    memory_bandwidth=4800e9,
    ici_bandwidth=900e9 / 2,
    dcn_bandwidth=400e9 / 8,
  ),
  DeviceFacts(name="a100", kinds=("NVIDIA A100",), bf16_flops=312e12),
  DeviceFacts(name="h100_pcie", kinds=("NVIDIA H100 PCIe",), bf16_flops=756e12),
  DeviceFacts(name="h100_nvl", kinds=("NVIDIA H100 NVL",), bf16_flops=835e12),
  DeviceFacts(name="b200", kinds=("NVIDIA B200",), bf16_flops=2250e12),
)


def of_kind(device_kind: str) -> DeviceFacts | None:
  """Return the facts of a `device_kind`, by its longest known beginning; None if unknown."""
  found = [
    (len(prefix), facts)
    for facts in DEVICES
    for prefix in facts.kinds
    if device_kind.startswith(prefix)
  ]
  return max(found, key=lambda pair: pair[0])[1] if found else None


def of_name(name: str) -> DeviceFacts:
  """Return the facts of the device that the table calls `name`."""
  return next(facts for facts in DEVICES if facts.name == name)
