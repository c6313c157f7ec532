"""Compile the very train step and evaluation step for a mesh of devices that are not here.

The programs are `train_step.make_train_step` and `evaluate.make_eval_step` themselves, lowered from
abstract arrays on a mesh of `jax.experimental.topologies` devices. Kernels are those of that mesh's
platform. The compiler's own figures tell what a device must hold.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mfjax import sharding, train_step
from mfjax.collectives import Collective, Place, collectives
from mfjax.config import RunConfig
from mfjax.evaluate import make_eval_step

TRAIN, EVALUATION = "train step", "evaluation step"
_KERNELS = re.compile(
  r'custom_call_target="(tpu_custom_call|mosaic_gpu[\w.]*|__gpu\$xla\.gpu\.mosaic\w*)"'
)
# How libtpu says that a program, its arguments included, is too large for the device.
_EXCEEDED = re.compile(
  r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"
  r"|Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"
)
_VMEM = re.compile(r"Used ([\d.]+[KMG]) of ([\d.]+[KMG]) vmem")
_KERNEL = re.compile(r"/(\w+)/pallas_call")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per device of one kind at the program's peak."""

  kind: str
  bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """One compiled program, per device.

  `memory` adds up to `peak_bytes`: the compiler's own peak, and what the device holds beside this
  program. Where the compiler refused for lack of memory, that is what it would have used and
  `limit_bytes` what it had; kernels and collectives are not known then. Otherwise `limit_bytes` is
  None.
  """

  name: str
  memory: tuple[Memory, ...]
  peak_bytes: int
  limit_bytes: int | None
  num_kernels: int
  collectives: tuple[Collective, ...]
  lower_seconds: float
  compile_seconds: float
  compile_cpu_seconds: float


def places(mesh: Mesh, num_slices: int, dimensions: Sequence[int]) -> list[Place]:
  """Return where each of the mesh's devices is, in the mesh's order.

  Args:
    mesh: of one machine or several slices.
    num_slices: of the mesh's devices.
    dimensions: chips along each dimension of a slice; empty if a switch joins all.
  """
  devices = list(mesh.devices.flat)
  parts = sharding.slices(devices, num_slices)
  slice_of = {device.id: index for index, part in enumerate(parts) for device in part}
  return [
    Place(slice_of[device.id], tuple(device.coords[: len(dimensions)]) if dimensions else ())
    for device in devices
  ]


def abstract_batch(config: RunConfig, mesh: Mesh, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Return a batch of `rows` rows as jax.ShapeDtypeStructs with shardings."""
  shape = (rows, config.data.sequence_length)
  spec = NamedSharding(mesh, sharding.BATCH)
  names = ("tokens", "targets", "segment_ids")
  return {name: jax.ShapeDtypeStruct(shape, np.int32, sharding=spec) for name in names}


def compile_train_step(config: RunConfig, mesh: Mesh, where: Sequence[Place]) -> Program:
  """Compile the train step of a resolved config; see `_compile`."""
  state = train_step.abstract_state(config, mesh)
  batch = abstract_batch(config, mesh, config.data.batch_rows)
  gradients = _bytes_per_device(state["params"]) // 4 * _num_bytes(config)
  others = {name: value for name, value in state.items() if name != "params"}
  held = {
    "parameters": _bytes_per_device(state["params"]),
    "optimizer state": _bytes_per_device(others),
    "batch": _bytes_per_device(batch),
  }
  step = train_step.make_train_step(config, mesh)
  return _compile(TRAIN, step, (state, batch), held, {"gradients": gradients}, where)


def _num_bytes(config: RunConfig) -> int:
  return jax.numpy.dtype(config.optimizer.gradient_dtype.value).itemsize


def compile_eval_step(config: RunConfig, mesh: Mesh, where: Sequence[Place]) -> Program:
  """Compile the evaluation step with the rows that training gives it; see `_compile`.

  The optimizer's state stays on the device meanwhile: it is part of the peak.
  """
  state = train_step.abstract_state(config, mesh)
  batch = abstract_batch(config, mesh, config.data.batch_rows // config.train.microbatches)
  beside = {"optimizer state": _bytes_per_device(state["optimizer"])}
  held = {
    "parameters": _bytes_per_device(state["params"]),
    "batch": _bytes_per_device(batch),
  }
  step = make_eval_step(config, mesh)
  return _compile(EVALUATION, step, (state["params"], batch), held, {}, where, beside)


def _bytes_per_device(tree: Any) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def _compile(
  name: str,
  function: Any,
  arguments: tuple[Any, ...],
  held: Mapping[str, int],
  shown: Mapping[str, int],
  where: Sequence[Place],
  beside: Mapping[str, int] | None = None,
) -> Program:
  """Compile a program and read its memory and collectives.

  Args:
    name: for people. function, arguments: lowered.
    held: bytes of the arguments by kind, from their shapes.
    shown: parts of the temporary memory that shapes give, at most what there is.
    where: of the mesh's devices. beside: what the device holds beside this program.

  Raises:
    ValueError: the compiler refuses for another reason than the device's memory.
  """
  beside = beside or {}
  began = time.perf_counter()
  lowered = function.lower(*arguments)
  lowered_at, cpu = time.perf_counter(), time.process_time()
  try:
    compiled = lowered.compile()
    limit, text = None, compiled.as_text()
    statistics = compiled.memory_analysis()
    peak = statistics.peak_memory_in_bytes
    padding = statistics.argument_size_in_bytes - sum(held.values())
  except jax.errors.JaxRuntimeError as error:
    peak, limit = _exceeded(error, name)
    text, padding = "", 0
  took, cpu = time.perf_counter() - lowered_at, time.process_time() - cpu
  kinds = dict(held) | {"padding of their layouts": padding}
  rest = peak - sum(kinds.values())
  for kind, size in shown.items():
    kinds[kind] = min(size, rest)
    rest -= kinds[kind]
  kinds |= {"activations and buffers": rest} | dict(beside)
  return Program(
    name=name,
    memory=tuple(Memory(kind, size) for kind, size in kinds.items() if size),
    peak_bytes=sum(kinds.values()),
    limit_bytes=limit,
    num_kernels=len(_KERNELS.findall(text)),
    collectives=tuple(collectives(text, where)) if text else (),
    lower_seconds=lowered_at - began,
    compile_seconds=took,
    compile_cpu_seconds=cpu,
  )


def _exceeded(error: Exception, name: str) -> tuple[int, int]:
  """Return (bytes wanted, bytes there are) from a compiler's refusal for lack of memory."""
  message = str(error)
  if found := _EXCEEDED.search(message):
    used, used_unit, limit, limit_unit = (group for group in found.groups() if group)
    return int(float(used) * _UNITS[used_unit]), int(float(limit) * _UNITS[limit_unit])
  first = " ".join(message.split())
  if vmem := _VMEM.search(message):
    kernel = _KERNEL.search(message)
    which = f"kernel {kernel[1]}" if kernel else "largest kernel"
    raise ValueError(
      f"the {which} of the {name} needs {vmem[1]} of vector memory (VMEM), and this TPU gives it "
      f"{vmem[2]}: choose another target, or another kernels.stick_breaking or grouped_matmul"
    ) from error
  raise ValueError(f"the compiler refuses the {name}: {first[:500]}") from error
