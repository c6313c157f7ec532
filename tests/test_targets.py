"""Names of machines that are not here, and meshes over their slices."""

import dataclasses

import pytest

from mfjax import devices, sharding, targets
from mfjax.config import MeshConfig


@pytest.mark.parametrize(
  "text",
  [
    *("v4:4x4x4", "v5e:4x4", "v5e:16x16", "v5p:4x4x8", "v5p:8x8x16", "v6e:16x16", "v5e:1x1"),
    *("tpu7x:2x2x1", "tpu7x:4x4x4", "h100:1", "h200:8"),
  ],
)
def test_known_targets(text):
  target = targets.parse(text, 2)
  assert str(target) == f"2 x {text}"
  assert target.facts.memory_bytes
  assert target.facts.memory_bandwidth
  assert target.facts.ici_bandwidth


@pytest.mark.parametrize(
  ("text", "what"),
  [
    ("v7:4x4", "unknown target 'v7'"),
    ("", "unknown target ''"),
    ("v5e", "v5e needs a topology"),
    ("v5e:4x4x4", "v5e has no topology '4x4x4'"),
    ("v5e:3x3", "v5e has no topology '3x3'"),
    ("v5p:4x4", "v5p has no topology '4x4'"),
    ("v5p:8x4x4", "v5p has no topology '8x4x4'"),
    ("v5p:64x64x64", "v5p has no topology '64x64x64'"),
    ("h200:16", "h200 has no topology '16'"),
  ],
)
def test_unknown_ones_list_the_known(text, what):
  with pytest.raises(ValueError, match="known targets: v5e, v6e with .*v5p.*h200") as raised:
    targets.parse(text)
  assert what in str(raised.value)
  assert len(str(raised.value).splitlines()) == 1


def test_number_of_slices_is_positive():
  with pytest.raises(ValueError, match="--num_slices=0: give at least 1"):
    targets.parse("v5e:4x4", 0)


def test_a_missing_compiler_names_the_extra(monkeypatch):
  monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'mfjax\[tpu\]'"):
    targets.parse("v5e:4x4").make_devices()
  with pytest.raises(ValueError, match=r"pip install 'mfjax\[cuda\]'"):
    targets.parse("h200:8").make_devices()


def test_every_device_kind_belongs_to_one_device():
  kinds = [kind for facts in devices.DEVICES for kind in facts.kinds]
  assert len(set(kinds)) == len(kinds)
  assert devices.of_kind("TPU v5 lite").name == "v5e"
  assert devices.of_kind("TPU v5").name == "v5p"
  assert devices.of_kind("cpu") is None


# Slices -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
  id: int
  platform: str
  process_index: int
  slice_index: int | None
  device_kind: str = "toy"


def _devices(count, slices=None, platform="cpu"):
  return [
    Device(i, platform, i // 4, None if slices is None else i * slices // count)
    for i in range(count)
  ]


def test_data_spans_slices_and_the_other_axes_stay_inside_one():
  devices = _devices(16, slices=2)
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, expert=2), devices[::-1])
  assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "expert": 2}
  slices = [{device.slice_index for device in group.flat} for group in mesh.devices]
  assert slices == [{0}, {0}, {1}, {1}]


def test_devices_that_do_not_know_their_slice_are_cut_by_process():
  mesh = sharding.make_mesh(MeshConfig(fsdp=4), _devices(16), num_slices=2)
  ids = [{device.id for device in group.flat} for group in mesh.devices]
  assert ids == [set(range(i, i + 4)) for i in (0, 4, 8, 12)]


def test_slices_without_a_data_axis_are_refused():
  message = "no data axis over its 2 slices: make data a multiple of 2, and fsdp x expert a divisor"
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(MeshConfig(data=1, fsdp=16), _devices(16, slices=2))


def test_hosts_of_gpus_may_share_the_other_axes():
  devices = _devices(16, slices=2, platform="gpu")
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=16), devices)
  assert dict(mesh.shape) == {"data": 1, "fsdp": 16, "expert": 1}


def test_unequal_slices_are_refused():
  with pytest.raises(ValueError, match=r"slices of \[8, 4\] devices"):
    sharding.slices(_devices(16, slices=2)[:12])
  with pytest.raises(ValueError, match="3 equal slices are needed"):
    sharding.slices(_devices(16), num_slices=3)
