"""Whether a run fits a machine that is not here: compiles its steps and gathers what they say."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Self

import jax
from jax.sharding import Mesh

from mfjax import ahead_of_time, search, sharding, train_step
from mfjax.ahead_of_time import Program
from mfjax.collectives import Collective
from mfjax.config import RunConfig
from mfjax.devices import DeviceFacts
from mfjax.roofline import Roofline, assumptions, roofline
from mfjax.routing import Histogram
from mfjax.search import Candidate
from mfjax.targets import Target

# Of a GPU's memory, what CUDA, cuBLAS, NCCL and the kernels' code take before the first array.
_GPU_RESERVE = 3 * 2**30
# JAX's share of a GPU's memory unless told otherwise.
_GPU_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Machine:
  """A target and its devices."""

  target: Target
  devices: tuple[jax.Device, ...]

  @classmethod
  def of(cls, target: Target) -> Self:
    """Make the target's devices; see `Target.make_devices` for what it raises."""
    return cls(target, tuple(target.make_devices()))

  @property
  def facts(self) -> DeviceFacts:
    return self.target.facts

  @property
  def memory_bytes(self) -> int:
    assert self.facts.memory_bytes is not None
    return self.facts.memory_bytes

  @property
  def limit_bytes(self) -> int:
    """Return what a program can have, as far as it is known before compiling."""
    return self.memory_bytes - (_GPU_RESERVE if self.target.is_gpu else 0)

  def mesh(self, config: RunConfig) -> Mesh:
    return sharding.make_mesh(config.mesh, self.devices, self.target.num_slices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What the compiler says of a run on a machine; bounds only where the train step compiled."""

  config: RunConfig
  machine: Machine
  axis_sizes: dict[str, int]
  programs: tuple[Program, ...]
  bounds: Roofline | None
  measured_bounds: Roofline | None
  assumptions: Sequence[str]
  remedies: Sequence[tuple[str, int]]

  @property
  def num_devices(self) -> int:
    return len(self.machine.devices)

  @property
  def peak_bytes(self) -> int:
    return max(program.peak_bytes for program in self.programs)

  @property
  def limit_bytes(self) -> int:
    limits = [program.limit_bytes for program in self.programs if program.limit_bytes]
    return min([self.machine.limit_bytes, *limits])

  @property
  def fits(self) -> bool:
    return self.peak_bytes <= self.limit_bytes

  @property
  def at_least(self) -> float | None:
    return self.bounds.at_least if self.bounds else None

  @property
  def notes(self) -> list[str]:
    """Return what must be set for the verdict to hold."""
    if self.fits and self.machine.target.is_gpu:
      share = self.peak_bytes / self.machine.memory_bytes
      if share > _GPU_SHARE:
        return [
          f"JAX takes {_GPU_SHARE:.0%} of a GPU's memory by default: set "
          f"XLA_PYTHON_CLIENT_MEM_FRACTION={math.ceil(share * 100 + 1) / 100:.2f} or more"
        ]
    return []

  def collective_rows(self) -> list[dict[str, Any]]:
    """Return the train step's collectives, summed by kind, link and group, the largest first."""

    def key(one: Collective) -> tuple[Any, ...]:
      return one.kind, one.links, one.group_size, one.dynamic

    rows = []
    for (kind, links, size, dynamic), group in itertools.groupby(
      sorted(self.programs[0].collectives, key=key), key
    ):
      members = list(group)
      rows.append(
        {
          "kind": kind,
          "link": links,
          "group_size": size,
          "per_round": dynamic,
          "times": sum(one.count for one in members),
          "operand_bytes": sum(one.count * one.operand_bytes for one in members),
          "sent_bytes": sum(one.count * (one.ici_bytes + one.dcn_bytes) for one in members),
        }
      )
    return sorted(rows, key=lambda row: -row["sent_bytes"])

  def sent_by_link(self) -> dict[str, float]:
    """Return the bytes that a device sends per step by link class, one round of each exchange."""
    certain = [one for one in self.programs[0].collectives if not one.dynamic]
    return {
      "ICI": sum(one.count * one.ici_bytes for one in certain),
      "DCN": sum(one.count * one.dcn_bytes for one in certain),
    }

  def to_dict(self) -> dict[str, Any]:
    """Return the report as plain JSON-able values."""
    bounds = {"balanced": self.bounds, "measured": self.measured_bounds}
    return {
      "target": str(self.machine.target),
      "devices": self.num_devices,
      "mesh": self.axis_sizes,
      "config": self.config.to_dict(),
      "fits": self.fits,
      "limit_bytes": self.limit_bytes,
      "peak_bytes": self.peak_bytes,
      "programs": [
        {
          "name": program.name,
          "peak_bytes": program.peak_bytes,
          "memory": {kind.kind: kind.bytes for kind in program.memory},
          "pallas_kernels": program.num_kernels,
          "lower_seconds": program.lower_seconds,
          "compile_seconds": program.compile_seconds,
          "compile_cpu_seconds": program.compile_cpu_seconds,
        }
        for program in self.programs
      ],
      "collectives": self.collective_rows(),
      "sent_bytes": self.sent_by_link(),
      "bounds": {
        name: dataclasses.asdict(value)
        | {
          "bound": value.bound,
          "at_least": value.at_least,
          "without_overlap": value.without_overlap,
          "mfu_at_most": value.mfu_at_most,
        }
        for name, value in bounds.items()
        if value is not None
      },
      "assumptions": list(self.assumptions),
      "remedies": [{"flags": flags, "saves_bytes": saved} for flags, saved in self.remedies],
    }


def check(
  config: RunConfig,
  machine: Machine,
  *,
  evaluation: bool = True,
  histogram: Histogram | None = None,
) -> Report:
  """Compile a run's steps for a machine and return what they need.

  Args:
    config: the run. machine: where. evaluation: whether the evaluation step is compiled too.
    histogram: measured routing, for a second set of bounds.

  Raises:
    ValueError: the mesh or a size does not fit, or the compiler refuses a kernel.
  """
  mesh = machine.mesh(config)
  sizes = dict(mesh.shape)
  config = train_step.resolve(config, mesh)
  where = ahead_of_time.places(mesh, machine.target.num_slices, machine.target.dimensions)
  programs = [ahead_of_time.compile_train_step(config, mesh, where)]
  if evaluation:
    programs.append(ahead_of_time.compile_eval_step(config, mesh, where))
  sent, facts = programs[0].collectives, machine.facts
  bounds = measured = None
  if programs[0].limit_bytes is None:
    bounds = roofline(config, mesh.size, sizes, facts, sent)
    if histogram is not None:
      measured = roofline(config, mesh.size, sizes, facts, sent, histogram)
  return Report(
    config=config,
    machine=machine,
    axis_sizes=sizes,
    programs=tuple(programs),
    bounds=bounds,
    measured_bounds=measured,
    assumptions=assumptions(config, facts),
    remedies=search.remedies(config, sizes, machine.target.num_slices),
  )


def rank(config: RunConfig, machine: Machine) -> list[Candidate]:
  """Return the run's layouts on a machine, the fastest first by estimate."""
  platform = machine.devices[0].platform
  kernels = train_step.resolve_kernels(config.kernels, platform, config.model)
  config = dataclasses.replace(config, kernels=kernels)
  longest = max(machine.target.dimensions, default=len(machine.devices))
  return search.candidates(
    config, machine.facts, len(machine.devices), machine.target.num_slices, longest
  )


def shortlist(ranked: Sequence[Candidate], machine: Machine, count: int) -> list[Candidate]:
  """Return the first `count` layouts worth compiling.

  Raises:
    ValueError: no layout divides, or none comes near the device's memory.
  """
  if not ranked:
    raise ValueError(
      f"no layout of {len(machine.devices)} devices divides the batch and the model: choose "
      f"data.batch_rows as a multiple of {len(machine.devices)}"
    )
  chosen = search.shortlist(ranked, machine.limit_bytes, count)
  if not chosen:
    least = min(candidate.memory_bytes for candidate in ranked)
    raise ValueError(
      f"no layout fits {machine.target}: the smallest needs about {least / 2**30:.1f} GiB of "
      f"{machine.limit_bytes / 2**30:.1f} GiB on each device; use more devices or a smaller batch"
    )
  return chosen
