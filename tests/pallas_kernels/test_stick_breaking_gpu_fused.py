import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.stick_breaking import gpu, gpu_fused, gpu_tiles
from tests.pallas_kernels import gpu_target
from tests.pallas_kernels.test_stick_breaking_gpu import (
  assert_equals_oracle,
  relative_error,
  segments_of,
  shapes_of,
  value_and_gradients,
)


def sizes_of(num_queries, num_keys, slots=1, heads=1):
  return gpu_tiles.Sizes(
    batch=1,
    num_queries=num_queries,
    num_keys=num_keys,
    num_heads=slots * heads,
    num_kv_heads=heads,
    dim=64,
    dtype=jnp.bfloat16,
  )


def visited_by(kind, sizes, seed=0):
  """Return blocks [1, n, tiles, 2] that the forward pass could have visited."""
  rng = np.random.default_rng(seed)
  tiles = sizes.tiles(64)
  last_query = np.minimum((np.arange(tiles) + 1) * 64, sizes.num_queries) - 1
  end = np.broadcast_to((sizes.history + last_query) // 64 + 1, (1, sizes.num_heads, tiles))
  first = np.zeros_like(end)
  if kind == "early exits":
    first = np.maximum(end - rng.integers(1, 4, end.shape), 0)
  if kind == "documents":
    first = end - 1 - (end - 1) % 3
  if kind == "holes":
    first = rng.integers(0, end + 1)
    end = np.where(rng.random(end.shape) < 0.3, first, rng.integers(first, end + 1))
  return jnp.asarray(np.stack([first, end], -1), jnp.int32)


def steps_of(walk, sizes):
  """Return (step, slot, tile, block) of all that warpgroups compute, and flags of each pair."""
  found, step = [], 0
  num_windows = walk.visits.shape[2] * sizes.num_kv_heads // sizes.num_heads
  flags = {}
  for index in range(walk.visits.shape[2]):
    slot, window = index // num_windows, index % num_windows * gpu_fused.WINDOW
    for pair in range(*np.asarray(walk.pairs)[0, 0, index]):
      word = int(walk.visits[0, 0, index, pair])
      if not word:
        continue
      visit = gpu_fused.Visit.unpacked(jnp.int32(word))
      flags.setdefault(pair, []).append((bool(visit.is_first), bool(visit.is_last)))
      for t in range(int(visit.steps)):
        tile = int(visit.high) - 1 - t
        for side in range(2):
          if int(visit.lows[side]) <= tile < int(visit.highs[side]):
            found.append((step + t, slot, window + tile, 2 * pair + side))
      step += int(visit.steps)
  return found, flags


@pytest.mark.parametrize("kind", ["causal", "early exits", "documents", "holes"])
@pytest.mark.parametrize("lengths", [(512, 512), (640, 640), (1, 200), (150, 391), (1100, 1100)])
@pytest.mark.parametrize("slots", [1, 2])
def test_walk_visits_everything_once_and_keeps_warpgroups_apart(kind, lengths, slots):
  sizes = sizes_of(*lengths, slots)
  visited = visited_by(kind, sizes)
  walk = gpu_fused.walk_of(visited, sizes)
  steps, flags = steps_of(walk, sizes)

  places = [place for _, *place in steps]
  assert len(places) == len(set(map(tuple, places)))
  last_seen = {}
  tiles = np.asarray(walk.tiles)[0]
  for step, slot, tile, block in steps:
    first, end, _ = tiles[slot, tile]
    if first <= block < end:
      before, when = last_seen.get((slot, tile), (first - 1, -np.inf))
      assert block == before + 1  # From left to right, without a gap.
      assert (
        step == when if block % 2 and block > first else step >= when + gpu_fused._QUERY_SLOTS + 1
      )
      last_seen[slot, tile] = block, step
  for slot, tile in np.ndindex(*tiles.shape[:2]):
    assert last_seen[slot, tile][0] == tiles[slot, tile, 1] - 1
    first, end = np.asarray(visited)[0, slot, tile]
    assert tiles[slot, tile, 2] == (end > first)
    if end > first:
      np.testing.assert_array_equal(tiles[slot, tile, :2], [first, end])

  # Every pair is written once, by its last visit.
  assert sorted(flags) == list(range(walk.visits.shape[3]))
  for visits in flags.values():
    assert [first for first, _ in visits] == [True] + [False] * (len(visits) - 1)
    assert [last for _, last in visits] == [False] * (len(visits) - 1) + [True]


def test_plain_causal_attention_has_no_idle_steps():
  sizes = sizes_of(512, 512)
  walk = gpu_fused.walk_of(visited_by("causal", sizes), sizes)
  visits = [gpu_fused.Visit.unpacked(word) for word in walk.visits[0, 0, 0]]
  assert [int(visit.steps) for visit in visits] == [8, 6, 4, 2]


def test_choice_follows_how_many_blocks_run_at_once():
  assert gpu.fills(2 * gpu.MULTIPROCESSORS)
  assert gpu.fills(128)
  assert not gpu.fills(64)
  assert not gpu.fills(gpu.MULTIPROCESSORS + 1)


def test_wider_heads_are_refused():
  q, k, v, *segments = (jnp.ones(x.shape, x.dtype) for x in shapes_of(8, 8, 1, 128))
  with pytest.raises(NotImplementedError, match="64 wide, not 128"):
    gpu.attention(q, k, v, tuple(segments), 1.0, fused_backward=True)


fused_value_and_gradients = functools.partial(value_and_gradients, fused=True)


@gpu_target.needs_cuda_plugin
@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "slots"), [((384, 384), 1), ((600, 700), 2)])
def test_kernel_compiles_without_spills_or_serialized_products(lengths, slots):
  shapes = shapes_of(*lengths, slots, 64)
  report = gpu_target.compile_kernel(fused_value_and_gradients, *shapes, shapes[0])
  # JAX 0.10 spills a few scalars of the loop over pairs; GPUs run a newer one.
  report.assert_efficient(spilled_bytes=40 if jax.__version_info__ < (0, 11) else 0)
  assert "stick_breaking_gradients" in report.text
  assert "stick_breaking_dq" not in report.text


@gpu_target.needs_gpu
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["one", "packed", "mixed", "cache"])
@pytest.mark.parametrize(
  ("lengths", "slots", "heads"),
  [((256, 256), 1, 2), ((150, 391), 2, 2), ((1, 450), 1, 2), ((1100, 1100), 1, 1),
   ((520, 700), 2, 1)],
)  # fmt: skip
def test_gradients_equal_the_oracle(lengths, slots, heads, kind, scale):
  assert_equals_oracle(shapes_of(*lengths, slots, 64, heads), kind, scale, fused=True)


@gpu_target.needs_gpu
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_gradients_are_those_of_two_kernels_and_the_same_each_time(eps):
  # More thread blocks than the device runs at once, of several passes.
  q, k, v, *_ = shapes_of(1100, 1100, 1, 64, heads=80)
  q, k, v, d_out = (
    jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate((q, k, v, q))
  )
  segments = segments_of("packed", 2, 1100, 1100)
  fused, two = (
    jax.jit(functools.partial(value_and_gradients, eps=eps, fused=fused)) for fused in (True, False)
  )
  found, expected = (function(q, k, v, *segments, d_out) for function in (fused, two))
  for ours, theirs in zip(found, expected, strict=True):
    assert relative_error(ours, theirs) <= 1e-3
  for _ in range(3):
    for ours, again in zip(found, fused(q, k, v, *segments, d_out), strict=True):
      np.testing.assert_array_equal(ours, again)
