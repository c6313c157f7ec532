"""The collectives of a compiled program, read from its text: kind, bytes, devices, how often.

What counts is what the compiler made, not what the program asked for: it may turn a reduce-scatter
into an all-reduce, or merge several. Loops multiply by their trip count. A loop whose length
depends on data (the exchange's later rounds) is counted for one iteration and marked.

Bytes are what one device sends with the usual ring algorithms, n devices a group, B its operand:
all-gather (n-1) B, reduce-scatter and all-to-all (n-1)/n B, all-reduce twice that, permute B. A
group over several slices works inside each, over ICI, and among one device of each, over DCN.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

KINDS = (
  *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
  *("collective-permute", "collective-broadcast"),
)
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|async_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(
  r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"\breplica_groups=(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_PAIRS = re.compile(r"\bsource_target_pairs=\{(\{.*?\})\}")
_MESH_GROUPS = re.compile(
  r"\breplica_groups=mesh\[([^\]]*)\]"
  r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_MESH_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\((\d+)\)(\d+))?,?")
# libtpu writes one collective into every fusion that it runs beside; this custom call begins it.
_CHAIN, _ASYNC_START = "chain_id=", 'custom_call_target="AsyncCollectiveStart"'
# Between slices libtpu hands data to the hosts: a send for each collective.
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  arguments: str
  attributes: str
  is_root: bool


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a device is: its slice, and its coordinates there (empty where a switch joins all)."""

  slice: int
  coordinates: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """One collective instruction of a step.

  `count`: how often a step runs it (`dynamic`: one iteration of a loop of unknown length).
  `operand_bytes`: one device's, once. `ici_bytes`, `dcn_bytes`: what a device sends, once.
  `dimensions`: dimensions of the torus that a group spans inside its slice. `source`: the operation
  of the program that it came from.
  """

  kind: str
  count: int
  dynamic: bool
  operand_bytes: int
  group_size: int
  slices: int
  ici_bytes: float
  dcn_bytes: float
  dimensions: int
  source: str

  @property
  def links(self) -> str:
    """Return the link class: ICI, DCN or both."""
    if self.slices == 1:
      return "ICI"
    return "DCN" if self.group_size == self.slices else "ICI+DCN"


def collectives(text: str, places: Sequence[Place]) -> list[Collective]:
  """Return the collectives of an optimised HLO module.

  Args:
    text: `compiled.as_text()`.
    places: of each partition, in the order of the mesh's devices.

  Raises:
    ValueError: a notation of groups that is not known.
  """
  computations, entry = parse(text)
  found = []
  for name, (count, dynamic) in _executions(computations, entry).items():
    lines = computations[name]
    shapes = {line.name: line.shape for line in lines}
    starts = any(_ASYNC_START in line.attributes for line in lines)
    for line in lines:
      kind = line.opcode.removesuffix("-start")
      between_slices = _TRANSFER.search(line.attributes) if line.opcode == "send" else None
      if between_slices:
        kind = between_slices[1].lower().replace("_", "-")
      if kind not in KINDS or (_CHAIN in line.attributes and not starts):
        continue
      # What else these take are buffers to write to, offsets and sizes.
      is_single = between_slices or kind in ("collective-permute", "ragged-all-to-all")
      operands = line.operands[:1] if is_single else line.operands
      size = sum(num_bytes(shapes[operand]) for operand in operands)
      if between_slices:
        group = slices = _num_slices(line.attributes)
        dimensions = 0
      else:
        group, slices, dimensions = _group(line.attributes, tuple(places))
      ici, dcn = bytes_sent(kind, size, group, slices)
      source = _OP_NAME.search(line.attributes)
      found.append(
        Collective(
          kind=kind,
          count=count,
          dynamic=dynamic,
          operand_bytes=size,
          group_size=group,
          slices=slices,
          ici_bytes=ici,
          dcn_bytes=dcn,
          dimensions=dimensions,
          source=source[1] if source else "",
        )
      )
  return found


def bytes_sent(kind: str, operand: int, group: int, slices: int) -> tuple[float, float]:
  """Return (ICI, DCN) bytes that one device of a group sends; see the module's docstring."""
  inner = group // slices
  if kind == "collective-permute":
    return (operand, 0.0) if slices == 1 else (0.0, operand)
  if kind == "collective-broadcast":
    return (operand, 0.0) if slices == 1 else (operand, operand / inner)
  share_inner, share_outer = (inner - 1) / inner, (slices - 1) / slices
  if kind == "all-gather":
    # Each device's part crosses to the other slices once, and spreads there.
    return operand * (inner - 1) * slices, operand * (slices - 1)
  if kind == "reduce-scatter":
    return operand * share_inner, operand / inner * share_outer
  if kind == "all-reduce":
    return 2 * operand * share_inner, 2 * operand / inner * share_outer
  return operand / slices * share_inner, operand * share_outer


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Return {computation: its instructions} of a module's text, and the entry's name."""
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if heading := _COMPUTATION.match(line):
      current = computations.setdefault(heading[2], [])
      entry = heading[2] if heading[1] else entry
    elif line.startswith("}"):
      current = None
    elif current is not None and (start := _INSTRUCTION.match(line)):
      current.append(_instruction(line, start))
  return computations, entry


def _instruction(line: str, start: re.Match[str]) -> Instruction:
  end = _closing(line, start.end()) if line[start.end()] == "(" else line.index(" ", start.end())
  opening = line.index("(", end)
  closing = _closing(line, opening)
  return Instruction(
    name=start[2],
    shape=line[start.end() : end],
    opcode=line[end:opening].strip(),
    operands=tuple(_NAME.findall(line[opening:closing])),
    arguments=line[opening:closing],
    attributes=line[closing:],
    is_root=bool(start[1]),
  )


def _closing(line: str, opening: int) -> int:
  """Return the place after the parenthesis that closes the one at `opening`."""
  depth = 0
  for place in range(opening, len(line)):
    depth += {"(": 1, ")": -1}.get(line[place], 0)
    if not depth:
      return place + 1
  raise ValueError(f"unbalanced parentheses in the compiled program: {line[:200]}")


def num_bytes(shape: str) -> int:
  """Return the bytes of a shape such as 'bf16[16,32]{1,0}' or of a tuple of them."""
  total = 0
  for dtype, sizes in _ARRAY.findall(shape):
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
    total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
  return total


def _executions(
  computations: dict[str, list[Instruction]], entry: str
) -> dict[str, tuple[int, bool]]:
  """Return {computation: (how often a step runs it, whether inside a loop of unknown length)}."""
  runs: dict[str, tuple[int, bool]] = {}

  def visit(name: str, count: int, dynamic: bool) -> None:
    before, was_dynamic = runs.get(name, (0, False))
    runs[name] = before + count, was_dynamic or dynamic
    for line in computations[name]:
      if line.opcode.endswith(("-done", "-update")):
        continue
      trips: int | None = 1
      if line.opcode == "while":
        trips = _trip_count(line, computations)
      for called in _called(line):
        visit(called, count * (1 if trips is None else trips), dynamic or trips is None)

  visit(entry, 1, False)
  return runs


def _called(line: Instruction) -> Iterator[str]:
  yield from _CALLED.findall(line.attributes)
  for listed, single in _BRANCHES.findall(line.attributes):
    yield from _NAME.findall(listed) if listed else [single]


def _trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
  """Return a loop's trip count: as noted, else what a counter from 0 is compared with; or None."""
  if noted := _TRIP_COUNT.search(loop.attributes):
    return int(noted[1])
  condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes)
  lines = computations[condition[1]] if condition else []
  root = next((line for line in lines if line.is_root), None)
  if root is None or root.opcode not in ("compare", "fusion"):
    return None
  limits = [
    int(line.arguments[1:-1])
    for line in lines
    if line.opcode == "constant" and line.name in root.operands and line.shape.startswith("s32[]")
  ]
  return limits[0] if len(limits) == 1 else None


def _num_slices(attributes: str) -> int:
  """Return how many slices a transfer joins, from '{1,2}x{0:3}' or '{1:2}x{0:3}'."""
  found = _SLICES.search(attributes)
  if found is None:
    raise ValueError(f"a transfer between slices is not understood: {attributes[:300]}")
  ranges = [[int(end) for end in part.split(":")] for part in found[1].split(",")]
  return sum(part[-1] - part[0] + 1 for part in ranges)


@functools.cache
def _group(attributes: str, places: tuple[Place, ...]) -> tuple[int, int, int]:
  """Return (devices, slices, dimensions of the torus) of the widest group of a collective."""
  groups = _groups(attributes, len(places))
  size, slices, dimensions = 1, 1, 0
  for group in groups:
    members = [places[device] for device in group]
    size = max(size, len(group))
    slices = max(slices, len({place.slice for place in members}))
    inside = [place.coordinates for place in members if place.slice == members[0].slice]
    spans = sum(len(set(values)) > 1 for values in zip(*inside, strict=True))
    dimensions = max(dimensions, spans)
  return size, slices, dimensions


def _groups(attributes: str, num_devices: int) -> list[list[int]]:
  if pairs := _PAIRS.search(attributes):
    ids = [int(number) for number in re.findall(r"\d+", pairs[1])]
    return [ids[i : i + 2] for i in range(0, len(ids), 2)]
  if mesh := _MESH_GROUPS.search(attributes):
    return _mesh_groups(*mesh.groups(), num_devices=num_devices)
  found = _GROUPS.search(attributes)
  if found is None:
    raise ValueError(f"a collective's groups are not understood: {attributes[:200]}")
  text = found[1]
  if text == "{}":
    return [list(range(num_devices))]
  if text.startswith("{{"):
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
  shape, dims, order = re.fullmatch(  # type: ignore[union-attr]
    r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
  ).groups()
  return _iota(num_devices, dims, order).reshape(_integers(shape)).tolist()


def _iota(num_devices: int, dims: str, order: str | None) -> np.ndarray:
  """Return the devices in the order of '[2,4]T(1,0)'."""
  ids = np.arange(num_devices).reshape(_integers(dims))
  return ids.transpose(_integers(order)) if order else ids


def _mesh_groups(
  axes: str, dims: str | None, order: str | None, names: str, *, num_devices: int
) -> list[list[int]]:
  """Return the groups of `mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}`.

  Its devices differ along 'y' alone. `'x':(2)2` is the part of 'x' of size 2 inside its outer 2.
  """
  sizes = {name: int(size) for name, size, *_ in _MESH_AXIS.findall(axes)}
  shape: list[int] = []
  chosen: list[int] = []
  parts = {name: (outer, size) for name, _, outer, size in _MESH_AXIS.findall(names)}
  for name, whole in sizes.items():
    outer, size = (int(part or 0) for part in parts.get(name, ("", "")))
    if size:
      chosen.append(len(shape) + 1)
      shape += [outer, size, whole // outer // size]
    else:
      chosen += [len(shape)] if name in parts else []
      shape.append(whole)
  if math.prod(shape) != num_devices or not parts.keys() <= sizes.keys():
    raise ValueError(f"a collective's groups are not understood: mesh[{axes}] {{{names}}}")
  ids = _iota(num_devices, dims or str(num_devices), order).reshape(shape)
  rest = [axis for axis in range(len(shape)) if axis not in chosen]
  return ids.transpose(rest + chosen).reshape(-1, math.prod(shape[i] for i in chosen)).tolist()


def _integers(text: str) -> list[int]:
  return [int(number) for number in text.split(",")]
