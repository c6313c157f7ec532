"""Types of cloud TPUs: their topologies, hosts, and what Google's services call them.

Source: Google Cloud's documentation, "TPU configurations" and "About TPUs in GKE".
"""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuType:
  """A generation of TPUs as it can be ordered.

  `topologies` are its slices; `cubes_up_to` is above 0 where AxBxC of multiples of 4 in ascending
  order can be ordered too, up to that many chips. `accelerator_type` begins the type's names in the
  TPU API, which knows those of two dimensions by name and chips (v5litepod-16) and those of three
  by type and topology; None: GKE alone has it.
  """

  name: str
  topologies: tuple[str, ...]
  cubes_up_to: int = 0
  gke_accelerator: str
  accelerator_type: str | None
  runtime_version: str | None


_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")

TPU_TYPES = {
  kind.name: kind
  for kind in (
    TpuType(
      name="v4",
      topologies=_3D,
      cubes_up_to=4096,
      gke_accelerator="tpu-v4-podslice",
      accelerator_type="v4",
      runtime_version="tpu-ubuntu2204-base",
    ),
    TpuType(
      name="v5e",
      topologies=_2D,
      gke_accelerator="tpu-v5-lite-podslice",
      accelerator_type="v5litepod",
      runtime_version="v2-alpha-tpuv5-lite",
    ),
    TpuType(
      name="v5p",
      topologies=_3D,
      cubes_up_to=6144,
      gke_accelerator="tpu-v5p-slice",
      accelerator_type="v5p",
      runtime_version="v2-alpha-tpuv5",
    ),
    TpuType(
      name="v6e",
      topologies=_2D,
      gke_accelerator="tpu-v6e-slice",
      accelerator_type="v6e",
      runtime_version="v2-alpha-tpuv6e",
    ),
    TpuType(
      name="tpu7x",
      topologies=_3D,
      cubes_up_to=9216,
      gke_accelerator="tpu7x",
      accelerator_type=None,
      runtime_version=None,
    ),
  )
}

_SINGLE_HOST_CHIPS = 8  # v5e and v6e 2x4 are one machine of eight chips.
_MULTI_HOST_CHIPS = 4  # Every host of a larger slice, and of every slice in three dimensions.


@dataclasses.dataclass(frozen=True)
class TpuSlice:
  """One slice of a TPU type, such as v5p in 4x4x8."""

  type: TpuType
  topology: str

  @property
  def chips(self) -> int:
    """Return the number of chips."""
    return math.prod(_sides(self.topology))

  @property
  def chips_per_host(self) -> int:
    """Return the number of chips that one host drives."""
    flat = self.topology.count("x") == 1
    single = _SINGLE_HOST_CHIPS if flat else _MULTI_HOST_CHIPS
    return self.chips if self.chips <= single else _MULTI_HOST_CHIPS

  @property
  def hosts(self) -> int:
    """Return the number of hosts, each of which runs one process."""
    return self.chips // self.chips_per_host

  def __str__(self) -> str:
    return f"{self.type.name}:{self.topology}"


def parse_slice(text: str) -> TpuSlice:
  """Return the slice that `text` names, such as 'v5e:4x4'.

  Raises:
    ValueError: an unknown type or topology; the message lists the known ones.
  """
  name, colon, topology = text.partition(":")
  if name not in TPU_TYPES or not colon:
    examples = ", ".join(f"{kind.name}:{kind.topologies[-1]}" for kind in TPU_TYPES.values())
    problem = f"there is no TPU type {name!r}" if colon else "write TYPE:TOPOLOGY"
    raise ValueError(f"{text!r}: {problem}; known types, each with a topology: {examples}")
  kind = TPU_TYPES[name]
  if topology not in kind.topologies and not _is_cube(topology, kind.cubes_up_to):
    raise ValueError(f"{text!r}: {name} has no topology {topology!r}; known: {_known(kind)}")
  return TpuSlice(kind, topology)


def _sides(topology: str) -> list[int]:
  return [int(side) for side in topology.split("x")]


def _is_cube(topology: str, up_to: int) -> bool:
  if not up_to or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){2}", topology):
    return False
  sides = _sides(topology)
  whole = all(side % 4 == 0 for side in sides)
  return whole and sides == sorted(sides) and math.prod(sides) <= up_to


def _known(kind: TpuType) -> str:
  known = ", ".join(kind.topologies)
  if not kind.cubes_up_to:
    return known
  return (
    f"{known}, and AxBxC of multiples of 4 in ascending order, such as 4x4x4 or 4x4x8, up to "
    f"{kind.cubes_up_to:,} chips"
  )
