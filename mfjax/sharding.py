"""The device mesh, the rules from logical axes to mesh axes, and how weights are gathered.

Three mesh axes always exist: `data`, `fsdp`, `expert` (size 1 when unused). Batches are sharded
over all three. What is not expert-parallel shards its d_model over (fsdp, expert) jointly; vectors
and the routers' last matrices are replicated.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mfjax.config import DataConfig, MeshConfig, ModelConfig, Placement

AXES = ("data", "fsdp", "expert")
WEIGHT_AXES = ("fsdp", "expert")
BATCH = P(AXES)

Axes = tuple[str | None, ...]


def resolve_axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
  """Return the size of each mesh axis for this number of devices.

  Raises:
    ValueError: the axes do not multiply to the number of devices; names a size that works.
  """
  sizes = config.axis_sizes
  fixed = math.prod(size for size in sizes.values() if size != -1)
  free = [axis for axis, size in sizes.items() if size == -1]
  if free and num_devices % fixed == 0:
    return sizes | {free[0]: num_devices // fixed}
  if fixed == num_devices and not free:
    return sizes
  given = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
  works = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
  raise ValueError(
    f"mesh {given} does not fit {num_devices} devices: set one axis to -1 and choose the others "
    f"among the divisors {works}"
  )


def check_divisible(
  model: ModelConfig,
  mesh: MeshConfig,
  data: DataConfig,
  microbatches: int,
  sizes: Mapping[str, int],
) -> None:
  """Raise ValueError, naming the axis and a size that works, unless every sharded size divides."""
  batch_shards = math.prod(sizes.values()) * microbatches
  if data.batch_rows % batch_shards:
    raise ValueError(
      f"data.batch_rows={data.batch_rows} is not divisible by data*fsdp*expert*microbatches="
      f"{batch_shards}: data.batch_rows={_next_multiple(data.batch_rows, batch_shards)} works"
    )
  checks: list[tuple[str, int, tuple[str, ...]]] = [("model.d_model", model.d_model, WEIGHT_AXES)]
  for kind, placement, count in (
    ("attention", mesh.attention_placement, model.num_attention_experts),
    ("ff", mesh.ff_placement, model.num_ff_experts),
  ):
    if placement is Placement.EXPERT:
      checks.append((f"model.num_{kind}_experts", count, ("expert",)))
  for name, value, axes in checks:
    size = math.prod(sizes[axis] for axis in axes)
    if value % size:
      what = "*".join(axes)
      raise ValueError(
        f"{name}={value} is not divisible by the mesh's {what}={size}: {name}="
        f"{_next_multiple(value, size)} works, or mesh {what}={math.gcd(value, size)}"
      )


def _next_multiple(value: int, of: int) -> int:
  return -(-value // of) * of


def slices(devices: Sequence[jax.Device], num_slices: int | None = None) -> list[list[jax.Device]]:
  """Return the devices of each slice: what a fast network (ICI) joins.

  Args:
    devices: all of them.
    num_slices: how many equal parts to cut the devices into, by process, where they do not know
      their `slice_index` themselves (virtual CPU devices). By default, devices that do not know it
      are one slice.

  Raises:
    ValueError: the slices are not equal in size.
  """
  found: dict[int, list[jax.Device]] = {}
  for device in devices:
    found.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
  parts = [found[index] for index in sorted(found)]
  if num_slices is not None and len(parts) == 1 and len(devices) % num_slices == 0:
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    size = len(devices) // num_slices
    parts = [ordered[i : i + size] for i in range(0, len(devices), size)]
  sizes = [len(part) for part in parts]
  if len(set(sizes)) > 1 or num_slices not in (None, len(parts)):
    wanted = "slices of equal size" if num_slices is None else f"{num_slices} equal slices"
    raise ValueError(f"the devices form slices of {sizes} devices: {wanted} are needed")
  return parts


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device], num_slices: int | None = None
) -> Mesh:
  """Return the mesh of these devices, with explicit axes: a wrong sharding fails at trace time.

  Over several slices (see `slices`) the outer part of `data` spans them, over the data-centre
  network; `fsdp` and `expert` stay inside a slice.

  Raises:
    ValueError: the axes do not fit the devices, or `data` cannot span the slices. GPU hosts, which
      JAX calls slices too, may share the other axes: their network is not that much slower.
  """
  sizes = resolve_axis_sizes(config, len(devices))
  shape = tuple(sizes[axis] for axis in AXES)
  parts = slices(devices, num_slices)
  if sizes["data"] % len(parts) and devices[0].platform != "gpu":
    given = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    raise ValueError(
      f"mesh {given} has no data axis over its {len(parts)} slices: make data a multiple of "
      f"{len(parts)}, and fsdp x expert a divisor of the {len(parts[0])} devices of a slice"
    )
  if sizes["data"] % len(parts):
    parts = [list(devices)]
  inner = (sizes["data"] // len(parts), *shape[1:])
  # An axis of 32 devices on 16 x 16 chips must share a dimension of the torus with another axis.
  blocks = [
    mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True) for part in parts
  ]
  return Mesh(np.concatenate(blocks), AXES, axis_types=(AxisType.Explicit,) * 3)


def compiler_mesh(mesh: Mesh) -> Mesh:
  """Return the same mesh with automatic axes: the compiler chooses inside (initialisation)."""
  return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def spec(axes: Axes, config: MeshConfig) -> P:
  """Return the partition of a parameter with these logical axes; AUTO, undecided, as gathered."""
  rules: dict[str | None, str | tuple[str, ...] | None] = {"d_model": WEIGHT_AXES}
  for kind, placement in (("attention", config.attention_placement), ("ff", config.ff_placement)):
    exchanged = placement is Placement.EXPERT
    rules[f"{kind}_experts"] = "expert" if exchanged else None
    rules[f"{kind}_d_model"] = "fsdp" if exchanged else WEIGHT_AXES
  return P(*(rules.get(axis) for axis in axes))


def shardings(mesh: Mesh, specs: Any) -> Any:
  """Return the tree of NamedShardings for a tree of PartitionSpecs."""
  return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))


def gathered(weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Return a weight in the compute dtype, whole on every device (cast first: half the bytes)."""
  weight = weight.astype(dtype)
  return jax.sharding.reshard(weight, P(*(None,) * weight.ndim))


def device_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Put this process's rows of a global batch [rows, T] on its devices, sharded by row."""
  sharding = NamedSharding(mesh, BATCH)
  return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}
