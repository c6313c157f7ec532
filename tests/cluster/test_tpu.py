import pytest

from mfjax.cluster import tpu


@pytest.mark.parametrize(
  ("text", "chips", "hosts", "chips_per_host", "label"),
  [
    ("v4:2x2x4", 16, 4, 4, "tpu-v4-podslice"),
    ("v5e:2x4", 8, 1, 8, "tpu-v5-lite-podslice"),
    ("v5e:4x4", 16, 4, 4, "tpu-v5-lite-podslice"),
    ("v5e:16x16", 256, 64, 4, "tpu-v5-lite-podslice"),
    ("v5p:2x2x1", 4, 1, 4, "tpu-v5p-slice"),
    ("v5p:4x4x8", 128, 32, 4, "tpu-v5p-slice"),
    ("v6e:1x1", 1, 1, 1, "tpu-v6e-slice"),
    ("tpu7x:4x4x4", 64, 16, 4, "tpu7x"),
  ],
)
def test_slices(text, chips, hosts, chips_per_host, label):
  found = tpu.parse_slice(text)
  assert str(found) == text
  assert (found.chips, found.hosts, found.chips_per_host) == (chips, hosts, chips_per_host)
  assert found.type.gke_accelerator == label


@pytest.mark.parametrize("kind", tpu.TPU_TYPES.values(), ids=str)
def test_hosts_of_every_topology_have_equal_chips(kind):
  for topology in kind.topologies:
    found = tpu.parse_slice(f"{kind.name}:{topology}")
    assert found.hosts * found.chips_per_host == found.chips
    assert found.chips_per_host in (1, 4, 8)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("v5e:4x5", "'v5e:4x5': v5e has no topology '4x5'; known: 1x1, 2x2, 2x4, 4x4"),
    ("v5p:4x4", "known: 2x2x1, .* such as 4x4x4 or 4x4x8, up to 6,144 chips"),
    ("v5p:8x4x4", "no topology '8x4x4'"),  # The same slice is 4x4x8.
    ("v5p:4x4x6", "no topology"),
    ("v4:16x16x20", "no topology .* up to 4,096 chips"),
    ("v6e:4x4x4", "no topology '4x4x4'; known: 1x1"),
    ("v9:4x4", "no TPU type 'v9'; known types, .* v4:2x4x4, v5e:16x16, v5p:2x4x4, v6e:16x16"),
    ("v5e", "write TYPE:TOPOLOGY; known types"),
    ("", "write TYPE:TOPOLOGY"),
  ],
)
def test_unknown_slices_are_refused_with_the_known_ones(text, message):
  with pytest.raises(ValueError, match=message):
    tpu.parse_slice(text)
