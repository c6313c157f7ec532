import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.stick_breaking import (
  gpu,
  gpu_backward,
  gpu_blocks,
  gpu_copy,
  gpu_scan,
  gpu_tiles,
  reference,
)
from pallas_kernels.stick_breaking.gpu_tiles import Sizes
from tests.pallas_kernels import gpu_target

HEADS = 2


class Lanes:
  """gpu_scan.Lane over arrays [..., 4]: all four lanes at once."""

  def constant(self, value):
    return np.float32(value)

  def add(self, x, y):
    return x + y

  def multiply(self, x, y):
    return x * y

  def subtract_product(self, x, y, z):
    return x - y * z

  def minimum(self, x, y):
    return np.minimum(x, y)

  def exp2(self, x):
    return np.exp2(x)

  def reciprocal(self, x):
    return 1 / x

  def product_after(self, x):
    after = [x[..., lane + 1 :].prod(-1) for lane in range(4)]
    return np.stack(after, -1), np.broadcast_to(x.prod(-1, keepdims=True), x.shape)

  def sum_before(self, x):
    before = [x[..., :lane].sum(-1) for lane in range(4)]
    return np.stack(before, -1), np.broadcast_to(x.sum(-1, keepdims=True), x.shape)


def by_lane(block):
  """Split [rows, 64] into a lane's 16 values, each [rows, 4]."""
  return list(np.moveaxis(block.reshape(len(block), 4, 16), -1, 0))


def joined(values):
  return np.stack(values, -1).reshape(len(values[0]), 64)


@pytest.mark.parametrize("spread", [1.0, 6.0, 40.0])
def test_scan_of_a_block_equals_the_definition(spread):
  rng = np.random.default_rng(0)
  logits = (spread * rng.standard_normal((32, 64))).astype(np.float32)
  d_weights = rng.standard_normal((32, 64)).astype(np.float32)
  stick, prefix = rng.uniform(0, 1, (2, 32, 1)).astype(np.float32)
  lanes = [np.broadcast_to(x, (32, 4)) for x in (stick, prefix)]
  factor = np.float32(np.log2(np.e))

  keep = 1 / (1 + np.exp(logits.astype(np.float64)))
  right = np.cumprod(keep[:, :0:-1], axis=1)[:, ::-1]
  expected = stick * (1 - keep) * np.append(right, np.ones((32, 1)), axis=1)
  g = expected * d_weights
  expected_d = g - (1 - keep) * (prefix + np.cumsum(g, axis=1))

  values, left = gpu_scan.weights(Lanes(), by_lane(logits), factor, lanes[0])
  np.testing.assert_allclose(joined(values), expected, rtol=2e-4, atol=1e-7)
  np.testing.assert_allclose(left, stick * keep.prod(1, keepdims=True) * np.ones(4), atol=1e-7)

  again, d_logits, total = gpu_scan.gradients(
    Lanes(), by_lane(logits), by_lane(d_weights), factor, *lanes
  )
  np.testing.assert_allclose(joined(again), joined(values), rtol=1e-6)
  np.testing.assert_allclose(joined(d_logits), expected_d, rtol=2e-4, atol=2e-6)
  np.testing.assert_allclose(total, (prefix[:, 0] + g.sum(1))[:, None] * np.ones(4), atol=2e-6)


def test_copies_give_a_lane_consecutive_keys():
  keys = jnp.arange(2 * 128).reshape(2, 128, 1, 1)
  # As the copy writes them: (4, 8, 2) becomes (8, 4, 2).
  shared = np.asarray(gpu_copy.permutable(keys)).transpose(0, 2, 1, 3, 4, 5).reshape(4, 64)
  for block, lane in np.ndindex(4, 4):
    # wgmma leaves lane t of four the columns 8g + 2t and 8g + 2t + 1.
    columns = [8 * g + 2 * lane + b for g in range(8) for b in range(2)]
    np.testing.assert_array_equal(shared[block, columns], 64 * block + 16 * lane + np.arange(16))


def segments_of(kind, batch, num_queries, num_keys, seed=0):
  rng = np.random.default_rng(seed)
  k_segments = np.ones((batch, num_keys), np.int32)
  if kind == "packed":
    for row in k_segments:
      row[:] = 1 + np.searchsorted(np.sort(rng.choice(num_keys, 4)), np.arange(num_keys))
      row[-num_keys // 8 :] = 0
  if kind == "mixed":
    k_segments = rng.integers(0, 3, (batch, num_keys)).astype(np.int32)
  if kind == "cache":
    k_segments[:, num_keys // 3 : -num_queries] = 0
  return jnp.asarray(k_segments[:, num_keys - num_queries :]), jnp.asarray(k_segments)


def allowed_of(q_segments, k_segments):
  num_queries, num_keys = q_segments.shape[1], k_segments.shape[1]
  position = np.arange(num_queries)[:, None] + num_keys - num_queries
  allowed = np.arange(num_keys) <= position
  same = np.asarray(q_segments)[:, :, None] == np.asarray(k_segments)[:, None]
  return allowed & same & (np.asarray(k_segments) > 0)[:, None]


@pytest.mark.parametrize("kind", ["one", "packed", "mixed", "cache"])
@pytest.mark.parametrize("lengths", [(128, 128), (150, 391), (1, 300), (450, 450)])
@pytest.mark.parametrize("tile", [64, 128])
def test_ranges_hold_what_is_visible_and_plain_is_plain(kind, lengths, tile):
  num_queries, num_keys = lengths
  segments = segments_of(kind, 2, *lengths)
  covered = -(-num_keys // 128) * 128
  blocks = gpu_blocks.blocks_of(segments, tile, -(-num_queries // 128) * 128, covered)
  allowed = np.zeros((2, num_queries, covered), bool)
  allowed[:, :, :num_keys] = allowed_of(*segments)
  history = num_keys - num_queries
  for b, i in np.ndindex(2, -(-num_queries // tile)):
    first, last, plain_from = (int(x[b, i]) for x in (blocks.first, blocks.last, blocks.plain_from))
    rows = allowed[b, i * tile : (i + 1) * tile].reshape(-1, covered // 64, 64)
    seen = np.flatnonzero(rows.any((0, 2)))
    if len(seen):
      assert first <= seen[0]
      assert last >= seen[-1]
    if kind != "mixed" and len(seen):
      assert (first, last) == (seen[0], seen[-1])
    if kind == "one":
      assert plain_from == 0
    for j in range(0, len(rows), 64):  # Each warpgroup masks from its own diagonal on.
      diagonal = (history + i * tile + j + 1) // 64
      assert rows[j : j + 64, plain_from:diagonal].all()


def test_query_ranges_join_what_the_forward_pass_visited():
  sizes = Sizes(
    batch=1, num_queries=256, num_keys=256, num_heads=4, num_kv_heads=2, dim=64, dtype=jnp.bfloat16
  )
  visited = np.zeros((1, 4, 4, 2), np.int32)
  visited[..., 1] = np.arange(1, 5)  # All that is causal
  visited[:, :, :, 0] = [0, 0, 1, 3]  # but for early exits.
  visited[0, 2, 3, 0] = 2  # The second slot of head 0 stays longer.
  first, end = gpu_backward._query_ranges(jnp.asarray(visited), sizes, 2, 2)
  np.testing.assert_array_equal(first[0], [[0, 2], [0, 2]])
  np.testing.assert_array_equal(end[0], [[3, 4], [3, 4]])
  first, end = gpu_backward._query_ranges(jnp.asarray(visited), sizes, 4, 1)
  np.testing.assert_array_equal(first[0], [[0, 1, 2, 3], [0, 1, 2, 3]])
  np.testing.assert_array_equal(end[0], [[2, 3, 4, 4], [2, 3, 3, 4]])


def test_what_the_kernel_cannot_do_is_named():
  ones = jnp.ones((1, 8), jnp.int32)
  q, k = jnp.ones((1, 8, 1, 1, 64)), jnp.ones((1, 8, 1, 64))
  with pytest.raises(NotImplementedError, match="takes bfloat16, not float32: use xla"):
    gpu.attention(q, k, k, (ones, ones), 1.0)
  q, k = (x[..., :48].astype(jnp.bfloat16) for x in (q, k))
  with pytest.raises(NotImplementedError, match="not 48: use xla"):
    gpu.attention(q, k, k, (ones, ones), 1.0)


def shapes_of(num_queries, num_keys, slots, dim, heads=HEADS):
  q = jax.ShapeDtypeStruct((2, num_queries, slots, heads, dim), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((2, num_keys, heads, dim), jnp.bfloat16)
  segments = [jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (num_queries, num_keys)]
  return q, k, k, *segments


def value_and_gradients(q, k, v, q_segments, k_segments, d_out, eps=0.0, fused=None):
  def call(q, k, v):
    segments, scale = (q_segments, k_segments), q.shape[-1] ** -0.5
    return gpu.attention(q, k, v, segments, scale, eps=eps, fused_backward=fused)

  out, gradients = jax.vjp(call, q, k, v)
  return out, *gradients(d_out)


@gpu_target.needs_cuda_plugin
@pytest.mark.slow
@pytest.mark.parametrize(
  ("lengths", "slots", "dim", "eps"),
  [
    ((256, 256), 1, 64, 0.0),
    ((256, 256), 1, 128, 1e-3),
    ((150, 391), 2, 64, 1e-3),
    ((256, 256), 1, 256, 0.0),
  ],
)
def test_kernels_compile_without_spills_or_serialized_products(lengths, slots, dim, eps):
  shapes = shapes_of(*lengths, slots, dim)
  function = functools.partial(value_and_gradients, eps=eps)
  report = gpu_target.compile_kernel(function, *shapes, shapes[0])
  report.assert_efficient()
  assert report.text.count("mosaic_gpu") >= 3


@gpu_target.needs_cuda_plugin
@pytest.mark.slow
@pytest.mark.parametrize(
  ("heads", "consumers", "registers"),
  [(4, 4, gpu_tiles.HALF_CONSUMER_REGISTERS), (3, 2, gpu_tiles.CONSUMER_REGISTERS)],
)
def test_warpgroups_ask_for_no_more_registers_than_a_block_has(heads, consumers, registers):
  # A warpgroup that asks for more than the others leave waits for ever.
  def forward(q, k, v, q_segments, k_segments):
    return gpu.attention(q, k, v, (q_segments, k_segments), 0.125)

  report = gpu_target.compile_kernel(forward, *shapes_of(384, 384, 1, 64, heads))
  report.assert_efficient()
  (at_launch,) = report.registers
  producers = consumers // 2
  asked = consumers * registers + producers * gpu_tiles.PRODUCER_REGISTERS
  assert asked <= (consumers + producers) * at_launch


def relative_error(found, expected):
  found, expected = (np.asarray(x, np.float64) for x in (found, expected))
  return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


@gpu_target.needs_gpu
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["one", "packed", "mixed", "cache"])
@pytest.mark.parametrize(
  ("lengths", "slots", "heads", "dim"),
  [((256, 256), 1, 2, 64), ((500, 500), 1, 2, 128), ((150, 391), 2, 2, 64), ((1, 450), 2, 2, 128),
   ((300, 300), 1, 2, 256), ((320, 450), 1, 3, 64)],
)  # fmt: skip
def test_values_and_gradients_equal_the_oracle(lengths, slots, heads, dim, kind, scale):
  assert_equals_oracle(shapes_of(*lengths, slots, dim, heads), kind, scale, fused=False)


def assert_equals_oracle(shapes, kind, scale, fused):
  """Compare values and gradients of random operands of these shapes, q and k scaled."""
  q, k, v, q_segments, k_segments = shapes
  keys = jax.random.split(jax.random.key(0), 4)
  draws = [jax.random.normal(key, x.shape) for key, x in zip(keys, (q, k, v, q), strict=True)]
  q, k, v, d_out = (
    (x * s).astype(jnp.bfloat16) for x, s in zip(draws, (scale, scale, 1, 1), strict=True)
  )
  segments = segments_of(kind, 2, q_segments.shape[1], k_segments.shape[1])
  found = jax.jit(functools.partial(value_and_gradients, fused=fused))(q, k, v, *segments, d_out)

  allowed = jnp.asarray(allowed_of(*segments))
  exact = [x.astype(jnp.float32) for x in (q, k, v, d_out)]
  out, gradients = jax.vjp(
    lambda q, k, v: reference.attention(q, k, v, allowed, q.shape[-1] ** -0.5), *exact[:3]
  )
  for ours, oracle in zip(found, (out, *gradients(exact[3])), strict=True):
    assert np.isfinite(np.asarray(ours, np.float32)).all()
    assert relative_error(ours, oracle) <= 1e-2


@gpu_target.needs_gpu
def test_early_exit_stays_within_eps():
  q, k, v, *_ = shapes_of(2048, 2048, 1, 64)
  q, k, v = (
    jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate((q, k, v))
  )
  segments = segments_of("one", 2, 2048, 2048)
  exact, early = (
    jax.jit(functools.partial(value_and_gradients, eps=eps))(q, k, v, *segments, q)
    for eps in (0.0, 1e-4)
  )
  for ours, oracle in zip(early, exact, strict=True):
    assert relative_error(ours, oracle) <= 5e-3


@gpu_target.needs_gpu
def test_keys_as_values_add_their_gradients():
  q, k, *_ = shapes_of(200, 200, 2, 64)
  q, k = (jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate((q, k)))
  segments = segments_of("packed", 2, 200, 200)
  scale = 64**-0.5
  out, gradient = jax.vjp(lambda k: gpu.attention(q, k, None, segments, scale), k)
  both, gradients = jax.vjp(lambda k, v: gpu.attention(q, k, v, segments, scale), k, k)
  np.testing.assert_array_equal(out, both)
  assert relative_error(gradient(q)[0], sum(x.astype(jnp.float32) for x in gradients(q))) <= 1e-2
