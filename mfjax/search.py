"""Layouts of a run on a machine, ranked by estimate, and what to change when one does not fit.

The estimates are those of `mfjax train --dry_run` for memory and of `mfjax/roofline.py` for time,
on collectives reckoned from the shapes. They choose what is compiled; a verdict needs the compiler.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from mfjax import communication, describe, placement, roofline, sharding
from mfjax.collectives import Collective, bytes_sent
from mfjax.config import DType, Placement, Remat, RunConfig
from mfjax.devices import DeviceFacts

_FLOAT32_BYTES = 4
_CHEAPEST_FIRST = (Remat.NONE, Remat.SELECTIVE, Remat.FULL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """A layout and its estimates per device."""

  config: RunConfig
  axis_sizes: dict[str, int]
  memory_bytes: int
  seconds: float

  @property
  def flags(self) -> str:
    """Return the overrides that choose this layout."""
    values: dict[str, Any] = {f"mesh.{axis}": size for axis, size in self.axis_sizes.items()}
    values |= {
      "train.microbatches": self.config.train.microbatches,
      "train.remat": self.config.train.remat.value,
    }
    return " ".join(f"--config.{name}={value}" for name, value in values.items())


def candidates(
  config: RunConfig, facts: DeviceFacts, num_devices: int, num_slices: int, longest: int
) -> list[Candidate]:
  """Return every layout whose sizes divide, fastest first by estimate.

  Mesh axes are divisors of a slice, microbatches powers of two. The batch stays what it is.

  Args:
    config: with its kernels resolved. facts: of one device.
    num_devices, num_slices: of the machine. longest: chips along the longest dimension of a slice.
  """
  found = [
    candidate
    for changed, sizes in _layouts(config, num_devices, num_slices)
    if (candidate := _estimate(changed, sizes, facts, num_slices, longest)) is not None
  ]
  return sorted(found, key=lambda candidate: (candidate.seconds, candidate.memory_bytes))


def _layouts(
  config: RunConfig, num_devices: int, num_slices: int
) -> Iterator[tuple[RunConfig, dict[str, int]]]:
  per_slice = num_devices // num_slices
  divisors = [n for n in range(1, per_slice + 1) if per_slice % n == 0]
  placed = {config.mesh.attention_placement, config.mesh.ff_placement}
  exchanges = placed != {Placement.FSDP}
  microbatches = [1 << power for power in range(config.data.batch_rows.bit_length())]
  for fsdp in divisors:
    for expert in divisors if exchanges else [1]:
      if per_slice % (fsdp * expert):
        continue
      sizes = {"data": num_devices // (fsdp * expert), "fsdp": fsdp, "expert": expert}
      for count in microbatches:
        if config.data.batch_rows % (num_devices * count):
          break
        for remat in _CHEAPEST_FIRST:
          yield _changed(config, sizes, count, remat), sizes


def _changed(config: RunConfig, sizes: dict[str, int], count: int, remat: Remat) -> RunConfig:
  return dataclasses.replace(
    config,
    mesh=dataclasses.replace(
      config.mesh, data=sizes["data"], fsdp=sizes["fsdp"], expert=sizes["expert"]
    ),
    train=dataclasses.replace(config.train, microbatches=count, remat=remat),
  )


def _estimate(
  config: RunConfig, sizes: dict[str, int], facts: DeviceFacts, num_slices: int, longest: int
) -> Candidate | None:
  mesh = placement.resolve(config, sizes, facts.platform, facts.kinds[0])
  placed = dataclasses.replace(config, mesh=mesh)
  try:
    sharding.check_divisible(placed.model, mesh, placed.data, placed.train.microbatches, sizes)
  except ValueError:
    return None
  sent = reckoned_collectives(placed, sizes, num_slices, longest)
  bounds = roofline.roofline(placed, math.prod(sizes.values()), sizes, facts, sent)
  return Candidate(
    config=config, axis_sizes=sizes, memory_bytes=memory(placed, sizes), seconds=bounds.at_least
  )


def memory(config: RunConfig, sizes: dict[str, int]) -> int:
  """Return the dry run's bytes per device, gradients of a microbatch and all."""
  params = describe.parameters(config, sizes)
  return sum(kind.bytes for kind in describe.memory(config, params, sizes))


def reckoned_collectives(
  config: RunConfig, sizes: dict[str, int], num_slices: int, longest: int
) -> list[Collective]:
  """Return the large collectives of a step by the shapes alone: weights, gradients, exchanges.

  Compilers do more and less: they may sum whole gradients where a part would do.
  """
  shape, micro = config.model, config.train.microbatches
  whole = math.prod(sizes[axis] for axis in sharding.WEIGHT_AXES)
  found = []

  def add(kind: str, times: int, operand: int, group: int, slices: int = 1) -> None:
    inner = group // slices
    ici, dcn = bytes_sent(kind, operand, group, slices)
    found.append(
      Collective(
        kind=kind,
        count=times,
        dynamic=False,
        operand_bytes=operand,
        group_size=group,
        slices=slices,
        ici_bytes=ici,
        dcn_bytes=dcn,
        dimensions=0 if inner == 1 else 1 if inner <= longest else 2,
        source="",
      )
    )

  for kind in communication.expert_kinds(shape, config.mesh):
    for transfer in placement.transfers_of(config, kind, sizes):
      times = micro * shape.num_layers
      add(transfer.collective.value, times, transfer.buffer_bytes, transfer.peers)
  head = shape.padded_vocab_size * shape.d_model
  if whole > 1:  # lm_head and the embedding.
    width = jnp.dtype(shape.compute_dtype.value).itemsize
    add("all-gather", 2 * micro, head * width // whole, whole)
    add("reduce-scatter", 2 * micro, head * _FLOAT32_BYTES, whole)
  if sizes["data"] > 1:
    own = sum(p.elements_per_device for p in describe.parameters(config, sizes))
    add("all-reduce", micro, own * _FLOAT32_BYTES, sizes["data"], num_slices)
  return found


def remedies(config: RunConfig, sizes: dict[str, int], num_slices: int) -> list[tuple[str, int]]:
  """Return [(flags, bytes per device that they save by estimate)], the largest saving first."""
  before = memory(config, sizes)
  per_slice = math.prod(sizes.values()) // num_slices
  changes: dict[str, RunConfig] = {}

  def train(**values: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **values))

  for remat in _CHEAPEST_FIRST[_CHEAPEST_FIRST.index(config.train.remat) + 1 :]:
    changes[f"--config.train.remat={remat.value}"] = train(remat=remat)
  for factor in (2, 4, 8):
    count = config.train.microbatches * factor
    if config.data.batch_rows % (math.prod(sizes.values()) * count) == 0:
      changes[f"--config.train.microbatches={count}"] = train(microbatches=count)
  if config.optimizer.gradient_dtype is DType.FLOAT32:
    changes["--config.optimizer.gradient_dtype=bfloat16"] = dataclasses.replace(
      config, optimizer=dataclasses.replace(config.optimizer, gradient_dtype=DType.BFLOAT16)
    )
  chunk = config.loss.chunk_tokens // 4
  if chunk >= 128:
    changes[f"--config.loss.chunk_tokens={chunk}"] = dataclasses.replace(
      config, loss=dataclasses.replace(config.loss, chunk_tokens=chunk)
    )
  saved = [(flags, before - memory(changed, sizes)) for flags, changed in changes.items()]
  for fsdp in (2 * sizes["fsdp"], 4 * sizes["fsdp"]):
    wider = sizes | {"fsdp": fsdp, "data": sizes["data"] * sizes["fsdp"] // fsdp}
    fits = per_slice % (fsdp * sizes["expert"]) == 0 and wider["data"] % num_slices == 0
    if fits and wider["data"] and config.model.d_model % (fsdp * sizes["expert"]) == 0:
      saved.append((f"--config.mesh.fsdp={fsdp}", before - memory(config, wider)))
  return sorted(((f, s) for f, s in saved if s > 0), key=lambda pair: -pair[1])


def shortlist(found: Sequence[Candidate], limit_bytes: int, count: int) -> list[Candidate]:
  """Return the first `count` candidates that fit by estimate, one for each mesh and remat pair.

  The dry run's estimate may be off by some percent either way, so layouts up to 5 % above the limit
  are tried: the compiler decides.
  """
  chosen: list[Candidate] = []
  seen = set()
  for candidate in found:
    key = (*candidate.axis_sizes.values(), candidate.config.train.remat)
    if candidate.memory_bytes <= 1.05 * limit_bytes and key not in seen:
      seen.add(key)
      chosen.append(candidate)
  return chosen[:count]
