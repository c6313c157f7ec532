"""Wide stick-breaking attention on Hopper: metadata, scans and products here, the rest on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.stick_breaking import (
  gpu_scan,
  gpu_wide,
  gpu_wide_products,
  gpu_wide_scan,
  gpu_wide_walk,
  reference,
)
from pallas_kernels.stick_breaking.gpu_wide_pipeline import CHUNK, HALF, ROWS, Tiling
from tests.pallas_kernels import gpu_target
from tests.pallas_kernels.test_stick_breaking_gpu import (
  Lanes,
  allowed_of,
  relative_error,
  segments_of,
)

try:
  from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams, force_gpu_interpret_mode
except ImportError:  # JAX 0.10.
  from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,
    force_gpu_interpret_mode,
  )

KINDS = ("one", "packed", "mixed", "cache")


def shapes_of(lengths, slots=2, heads=1, dim=384, batch=2):
  num_queries, num_keys = lengths
  q = jax.ShapeDtypeStruct((batch, num_queries, slots, heads, dim), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((batch, num_keys, heads, dim), jnp.bfloat16)
  return q, k


def draw(shapes, scale=1.0):
  """Return q, k, v and a gradient of the output, in bf16."""
  q, k = shapes
  keys = jax.random.split(jax.random.key(0), 4)
  scales = (scale, scale, 1, 1)
  return tuple(
    (s * jax.random.normal(key, x.shape)).astype(jnp.bfloat16)
    for key, x, s in zip(keys, (q, k, k, q), scales, strict=True)
  )


def padded_allowed(segments, shape):
  allowed = allowed_of(*segments)
  padding = ((0, 0), (0, shape.num_queries - allowed.shape[1]))
  return np.pad(allowed, (*padding, (0, shape.num_keys - allowed.shape[2])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(130, 130), (300, 300), (600, 1100), (20, 777)])
def test_visits_cover_what_is_visible_and_only_whole_chunks_are_not_masked(kind, lengths):
  shape = gpu_wide._shape(*shapes_of(lengths))
  segments = segments_of(kind, 2, *lengths)
  blocks = gpu_wide._blocks(shape, segments)
  firsts, masked = np.asarray(blocks.first), np.asarray(blocks.masked)
  halves = np.asarray(shape.visible_halves(np.arange(shape.num_q_tiles)))
  allowed = padded_allowed(segments, shape)
  for b, tile in np.ndindex(2, shape.num_q_tiles):
    positions = slice(tile * ROWS, min((tile + 1) * ROWS, lengths[0]))
    rows = allowed[b, positions].reshape(-1, shape.num_chunks, CHUNK)
    seen = np.flatnonzero(rows.any((0, 2)))
    first, other = firsts[b, 0, 2 * tile : 2 * tile + 2]
    assert first == other
    visible = halves[tile]
    assert first <= (visible - 1) // 2, "every tile visits something"
    if len(seen):
      assert first <= seen[0]
      last_key = np.flatnonzero(allowed[b, positions].any(0))[-1]
      assert last_key < visible * HALF
      if kind != "mixed":
        assert first == seen[0]
    for chunk in range(shape.num_chunks):
      if not masked[b, tile, chunk]:
        assert rows[:, chunk].all()
    if kind == "one" and lengths[0] == lengths[1]:
      assert not masked[b, tile, : tile * ROWS // CHUNK].any()


@pytest.mark.parametrize("lengths", [(300, 300), (600, 1100)])
def test_live_rows_are_those_that_visit(lengths):
  shape = gpu_wide._shape(*shapes_of(lengths, slots=3, heads=2))
  visible = np.asarray(shape.visible_halves(np.arange(shape.num_rows) // 3))
  rng = np.random.default_rng(0)
  first = rng.integers(0, (visible + 1) // 2, (2, 2, shape.num_rows)).astype(np.int32)
  order, count = map(np.asarray, gpu_wide._live_rows(shape, jnp.asarray(first)))
  for b, h, half in np.ndindex(2, 2, shape.num_halves):
    live = np.flatnonzero((2 * first[b, h] <= half) & (half < visible))
    assert count[b, h, half] == len(live)
    np.testing.assert_array_equal(order[b, h, half, : len(live)], live)


@pytest.mark.parametrize("num_keys", [HALF, CHUNK])
def test_a_lane_is_loaded_consecutive_keys(num_keys):
  keys = jnp.arange(2 * CHUNK).reshape(1, 2 * CHUNK, 1, 1)
  blocks = np.asarray(gpu_wide_walk.permuted(keys, num_keys))
  # As the copy writes them: (4, n, 2) becomes (n, 4, 2).
  shared = blocks.transpose(0, 2, 1, 3, 4).reshape(-1, num_keys // 8, 4, 2)
  own = shared.transpose(0, 2, 1, 3).reshape(-1, 4, num_keys // 4)
  np.testing.assert_array_equal(own, np.arange(2 * CHUNK).reshape(own.shape))


def row_gradients(logits, d_weights):
  """Return d_logits of rows [n, 2 * CHUNK], stick and gain at their ends, and the definition's."""
  num_rows = len(logits)
  beta, keep = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(logits))
  right = np.cumprod(keep[:, ::-1], axis=1)[:, ::-1]  # Left of each key.
  weights = beta * np.append(right[:, 1:], np.ones((num_rows, 1)), axis=1)
  g = weights * d_weights
  expected = 0.5 * (keep * g - beta * (np.cumsum(g, axis=1) - g))

  def lanes(x):
    return x.astype(np.float32).reshape(num_rows, 4, -1)

  stick = np.broadcast_to(right[:, :1].astype(np.float32) + np.float32(1e-30), (num_rows, 4))
  gain = np.zeros((num_rows, 4), np.float32)
  found = []
  for half in range(2):
    part = slice(half * CHUNK, (half + 1) * CHUNK)
    tile = lanes(weights[:, part])
    out = np.empty_like(tile)

    def load(i, tile=tile):
      return list(np.moveaxis(tile[:, :, 8 * i : 8 * i + 8], 2, 0))

    def store(i, values, out=out):
      out[:, :, 8 * i : 8 * i + 8] = np.stack(values, 2)

    own = list(np.moveaxis(lanes(d_weights[:, part]), 2, 0))
    stick, gain = gpu_wide_scan.d_logits(Lanes(), own, np.float32(0.5), stick, gain, load, store)
    found.append(out.reshape(num_rows, CHUNK))
  return np.concatenate(found, axis=1), stick, gain, expected, g.sum(1)


@pytest.mark.parametrize("spread", [1.0, 6.0, 40.0])
def test_gradients_of_a_row_equal_the_definition(spread):
  rng = np.random.default_rng(0)
  logits = spread * rng.standard_normal((16, 2 * CHUNK))
  found, stick, gain, expected, total = row_gradients(logits, rng.standard_normal(logits.shape))
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=3e-6)
  np.testing.assert_allclose(stick, np.ones((16, 4)), rtol=1e-5)
  np.testing.assert_allclose(gain, total[:, None] * np.ones(4), atol=1e-5)


def test_a_key_that_takes_nearly_all_has_an_exact_gradient():
  logits = np.full((16, 2 * CHUNK), -9.0)
  keys = 16 * np.arange(16) + 5
  logits[np.arange(16), keys] = np.linspace(9, 16, 16)
  d_weights = np.random.default_rng(0).standard_normal(logits.shape)
  found, *_, expected, _ = row_gradients(logits, d_weights)
  largest = np.arange(16), keys
  np.testing.assert_allclose(found[largest], expected[largest], rtol=1e-4)


def test_weights_of_a_run_of_64_keys_a_lane_equal_the_definition():
  rng = np.random.default_rng(1)
  logits = (4 * rng.standard_normal((16, CHUNK))).astype(np.float32)
  keep = 1 / (1 + np.exp(logits.astype(np.float64)))
  left = np.cumprod(keep[:, ::-1], axis=1)[:, ::-1]
  expected = (1 - keep) * np.append(left[:, 1:], np.ones((16, 1)), axis=1)
  own = list(np.moveaxis(logits.reshape(16, 4, 64), 2, 0))
  ones = np.ones((16, 4), np.float32)
  weights, stick = gpu_scan.weights(Lanes(), own, np.float32(np.log2(np.e)), ones)
  found = np.stack(weights, 2).reshape(16, CHUNK)
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-7)
  np.testing.assert_allclose(stick, left[:, :1] * ones, rtol=1e-4, atol=1e-30)


def interpreted_operands(dim=256):
  """Return sizes, weights up to the diagonal and NaN elsewhere, rows, keys and segments."""
  lengths = (256, 384)
  q, k = shapes_of(lengths, slots=1, dim=dim, batch=1)
  shape = gpu_wide._shape(q, k)
  rng = np.random.default_rng(0)
  # Keys from 256 on are a document of their own; the second tile sees nothing else.
  k_segments = jnp.asarray(1 + (np.arange(lengths[1]) >= 256)[None].astype(np.int32))
  segments = (k_segments[:, 128:], k_segments)
  blocks = gpu_wide._blocks(shape, segments)
  weights = np.full(shape.weights_shape, np.nan, np.float32)
  for row in range(shape.num_rows):
    first = int(blocks.first[0, 0, row]) * CHUNK
    end = int(shape.visible_halves(row)) * HALF
    positions = slice(row * ROWS, (row + 1) * ROWS)
    weights[0, 0, 0, positions, first:end] = rng.standard_normal((ROWS, end - first))
  rows, keys = (
    jnp.asarray(rng.standard_normal(x), jnp.bfloat16)
    for x in (q.shape, (1, shape.num_keys, 1, dim))
  )
  return shape, jnp.asarray(weights, jnp.bfloat16), rows, keys, blocks.first


def test_row_products_read_no_more_than_the_live_chunks():
  shape, weights, _, keys, first = interpreted_operands()
  with force_gpu_interpret_mode(InterpretGPUParams()):
    found = gpu_wide_products.row_products(shape, weights, keys, first, 2, Tiling())
  exact = np.nan_to_num(np.asarray(weights, np.float32))
  expected = np.einsum("bhsqt,bthd->bqshd", exact, np.asarray(keys, np.float32))
  assert relative_error(found, expected) <= 1e-2


@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="JAX 0.10 cannot interpret a transposed wgmma operand"
)
def test_key_products_add_the_live_rows_of_both_operands():
  shape, weights, rows, _, first = interpreted_operands()
  live = gpu_wide._live_rows(shape, first)
  operands = ((weights, 2 * weights), (rows, rows))
  with force_gpu_interpret_mode(InterpretGPUParams()):
    found = gpu_wide_products.key_products(shape, *operands, live, 2, Tiling())
  exact = np.nan_to_num(np.asarray(weights, np.float32))
  expected = 3 * np.einsum("bhsqt,bqshd->bthd", exact, np.asarray(rows, np.float32))
  assert relative_error(found, expected) <= 1e-2


class PlainScan:
  """What gpu_wide_scan does, as the interpreter can: columns and tiles in the order of keys."""

  @staticmethod
  def weigh(logits, stick, tile, *, scale, allowed=True):
    keep = jnp.where(allowed, jax.nn.sigmoid(-scale * logits), 1)
    left = jnp.cumprod(keep[:, ::-1], axis=1)[:, ::-1]
    right = jnp.concatenate([left[:, 1:], jnp.ones_like(left[:, :1])], axis=1)
    tile[...] = ((1 - keep) * right * stick[:, None]).astype(tile.dtype)
    return stick * left[:, 0]

  @staticmethod
  def weigh_masked(logits, stick, tile, q_segments, k_segments, ahead, *, scale):
    rows, keys = (jnp.arange(n) for n in logits.shape)
    allowed = keys <= rows[:, None] + ahead
    allowed = allowed & (q_segments[...][:, None] == k_segments[...])
    return PlainScan.weigh(logits, stick, tile, scale=scale, allowed=allowed)

  @staticmethod
  def differentiate(d_weights, stick, gain, tile, *, scale):
    weights = tile[...].astype(jnp.float32)
    sticks = stick[:, None] + jnp.cumsum(weights, axis=1)
    gains = gain[:, None] + jnp.cumsum(weights * d_weights, axis=1)
    tile[...] = (scale * weights * (d_weights - gains / sticks)).astype(tile.dtype)
    return sticks[:, -1], gains[:, -1]

  @staticmethod
  def initial_sticks(num_rows):
    del num_rows
    return lambda segments: jnp.where(segments[...] < 0, 0.0, 1.0)

  @staticmethod
  def load_rows(num_rows):
    del num_rows
    return lambda rows: rows[...]

  @staticmethod
  def store_rows(num_rows):
    del num_rows

    def store(values, rows):
      rows[...] = values

    return store

  @staticmethod
  def vote(num_rows, eps):
    del num_rows

    def vote(stick, votes):
      for i in range(4):
        votes[lax.axis_index("wg") * 4 + i] = jnp.all(stick < eps).astype(jnp.int32)

    return vote


def plain_products(walk, step, num_keys, wg, stages, barriers, meanwhile=None):
  """Do as _Walk.products, from the views that were loaded: the interpreter has no aliases."""
  rows_smem, (half_smem, chunk_smem, _) = stages
  full, free = barriers

  def body(i, acc):
    stage = lax.rem(step + i, gpu_wide_walk._NUM_STAGES)
    plgpu.barrier_wait(full.at[stage])
    keys = half_smem[2 * stage] if num_keys == HALF else chunk_smem[stage]
    rows = rows_smem[stage, pl.ds(wg * 64, 64)].astype(jnp.float32)
    acc = acc + rows @ keys.reshape(num_keys, 64).astype(jnp.float32).T
    if meanwhile is not None:
      pl.when(i == 1)(meanwhile)
    plgpu.barrier_arrive(free.at[stage])
    return acc

  return lax.fori_loop(0, walk.steps, body, jnp.zeros((64, num_keys), jnp.float32))


def plain_scratch():
  num_stages = gpu_wide_walk._NUM_STAGES
  shapes = (
    (num_stages, ROWS, 64),
    ((2 * num_stages, 4, HALF // 8, 2, 64), (num_stages, 4, CHUNK // 8, 2, 64), (8, 128)),
    ((4, 64, HALF), (2, 64, CHUNK)),
  )
  refs = jax.tree.map(
    lambda shape: plgpu.SMEM(shape, jnp.bfloat16),
    shapes,
    is_leaf=lambda x: isinstance(x[0], int),
  )
  return [*refs, *(plgpu.Barrier(num_arrivals=2, num_barriers=num_stages) for _ in range(2))]


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10 cannot interpret the walk")
@pytest.mark.parametrize(
  ("lengths", "slots", "borders", "eps", "tile_rows"),
  [((384, 640), 2, (300, 700), 0.0, 2), ((256, 700), 1, (0, 600), 1e-4, 2),
   ((300, 700), 1, (0, 600), 1e-4, 1)],
)  # fmt: skip
def test_walks_meet_every_barrier_and_touch_what_is_live(
  monkeypatch, lengths, slots, borders, eps, tile_rows
):
  monkeypatch.setattr(gpu_wide_walk, "scan", PlainScan)
  monkeypatch.setattr(gpu_wide_walk, "_walk_scratch", plain_scratch)
  monkeypatch.setattr(gpu_wide_walk, "_rows_of_zeros", lambda num_rows: jnp.zeros(num_rows))
  monkeypatch.setattr(gpu_wide_walk._Walk, "products", plain_products)
  num_queries, num_keys = lengths
  q, k, v, d_out = draw(shapes_of(lengths, slots=slots, batch=1))
  positions = np.arange(num_keys)[None]
  k_segments = np.where(positions < borders[1], 1 + (positions >= borders[0]), 0).astype(np.int32)
  segments = (jnp.asarray(k_segments[:, num_keys - num_queries :]), jnp.asarray(k_segments))
  shape, scale, tiling = gpu_wide._shape(q, k), 384**-0.5, Tiling(tile_rows=tile_rows)
  q_padded, k_padded, v_padded = gpu_wide._padded(q, k, v, shape)
  blocks = gpu_wide._blocks(shape, segments)
  with force_gpu_interpret_mode(InterpretGPUParams()):
    weights, sticks, first = gpu_wide_walk.weights(
      shape, q_padded, k_padded, *blocks, scale, eps, tiling
    )
    d_logits = gpu_wide_walk.d_logits(
      shape, gpu_wide._pad(d_out, shape.num_queries), v_padded, weights, sticks, first, scale,
      tiling,
    )  # fmt: skip
  if eps:
    assert (np.asarray(first) > np.asarray(blocks.first)).any()

  q, k, v, d_out = (np.asarray(x, np.float32)[0] for x in (q, k, v, d_out))
  scores = scale * np.einsum("qshd,thd->hsqt", q, k)
  keep = np.where(allowed_of(*segments), 1 / (1 + np.exp(scores)), 1)
  left = np.cumprod(keep[..., ::-1], axis=-1)[..., ::-1]
  expected = (1 - keep) * np.append(left[..., 1:], np.ones_like(left[..., :1]), axis=-1)
  g = expected * np.einsum("qshd,thd->hsqt", d_out, v)
  d_expected = scale * (g - (1 - keep) * np.cumsum(g, axis=-1))
  visible = np.asarray(shape.visible_halves(np.arange(shape.num_q_tiles)))
  for found, exact in ((weights, expected), (d_logits, d_expected)):
    written = np.zeros_like(exact)
    for row in range(shape.num_rows):
      tile, slot = divmod(row, slots)
      rows = slice(tile * ROWS, min((tile + 1) * ROWS, num_queries))
      keys = slice(int(first[0, 0, row]) * CHUNK, min(visible[tile] * HALF, num_keys))
      written[0, slot, rows, keys] = found[0, 0, slot, rows, keys]
    assert relative_error(written, exact) <= 5e-3


def definition(q, k, v, segments):
  """Return float32 [b, q, s, h, d]."""
  q, k, v = (np.asarray(x, np.float32) for x in (q, k, k if v is None else v))
  scores = np.einsum("bqshd,bthd->bshqt", q, k) * q.shape[-1] ** -0.5
  keep = np.where(allowed_of(*segments)[:, None, None], 1 / (1 + np.exp(scores)), 1)
  left = np.cumprod(keep[..., ::-1], axis=-1)[..., ::-1]
  right = np.append(left[..., 1:], np.ones_like(left[..., :1]), axis=-1)
  return np.einsum("bshqt,bthd->bqshd", (1 - keep) * right, v)


@pytest.mark.parametrize(("max_bytes", "own_values"), [(2**20, True), (2**18, False)])
def test_what_is_too_large_is_split(monkeypatch, max_bytes, own_values):
  lengths = (300, 400)
  q, k, v, _ = draw(shapes_of(lengths, slots=1, batch=3))
  v = v if own_values else None
  segments = segments_of("packed", 3, *lengths)
  held = []

  def attention(q, k, v, segments, options):
    held.append(2 * np.prod(gpu_wide._shape(q, k).weights_shape))
    return jnp.asarray(definition(q, k, v, segments))

  monkeypatch.setattr(gpu_wide, "_attention", attention)
  monkeypatch.setattr(gpu_wide, "MAX_WEIGHTS_BYTES", max_bytes)
  found = gpu_wide.attention(q, k, v, segments, 384**-0.5)
  assert len(held) > 1
  assert max(held) <= max_bytes
  np.testing.assert_allclose(found, definition(q, k, v, segments), rtol=1e-5, atol=1e-5)


def test_decoding_is_left_to_xla():
  q, k, v, _ = draw(shapes_of((1, 300)))
  segments = segments_of("cache", 2, 1, 300)
  for values in (v, None):
    found = gpu_wide.attention(q, k, values, segments, 384**-0.5)
    assert relative_error(found, definition(q, k, values, segments)) <= 1e-2


def test_what_the_kernel_cannot_do_is_named():
  ones = jnp.ones((1, 32), jnp.int32)
  q, k = jnp.ones((1, 32, 1, 1, 384)), jnp.ones((1, 32, 1, 384))
  with pytest.raises(NotImplementedError, match="takes bfloat16, not float32: use xla"):
    gpu_wide.attention(q, k, k, (ones, ones), 1.0)
  for dim in (256, 320):
    q, k = (jnp.ones((*x.shape[:-1], dim), jnp.bfloat16) for x in (q, k))
    with pytest.raises(NotImplementedError, match=f"not {dim}: use xla"):
      gpu_wide.attention(q, k, k, (ones, ones), 1.0)


def value_and_gradients(q, k, v, q_segments, k_segments, d_out, eps=0.0):
  def call(q, k, v):
    return gpu_wide.attention(q, k, v, (q_segments, k_segments), q.shape[-1] ** -0.5, eps=eps)

  out, gradients = jax.vjp(call, q, k, v)
  return out, *gradients(d_out)


@gpu_target.needs_cuda_plugin
@pytest.mark.slow
@pytest.mark.parametrize(
  ("lengths", "slots", "dim", "eps"),
  [((1024, 1024), 2, 1024, 0.0), ((150, 391), 3, 384, 1e-4)],
)
def test_kernels_compile_without_spills_or_serialized_products(lengths, slots, dim, eps):
  q, k = shapes_of(lengths, slots, 2, dim)
  segments = [jax.ShapeDtypeStruct((2, n), jnp.int32) for n in lengths]

  def function(q, k, *arrays):
    return value_and_gradients(q, k, None, *arrays, eps=eps)

  report = gpu_target.compile_kernel(function, q, k, *segments, q)
  report.assert_efficient()
  assert len(report.registers) == 5  # Weights, their gradients, two row products, key products.


CASES = {  # (queries, keys), slots, heads, dim.
  "molm": ((512, 512), 2, 1, 1024),
  "ragged": ((300, 300), 3, 2, 384),
  "history": ((130, 700), 1, 1, 512),
  "one_query": ((1, 450), 2, 1, 1024),
}


@gpu_target.needs_gpu
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_oracle(case, kind, scale):
  lengths, slots, heads, dim = CASES[case]
  q, k, v, d_out = draw(shapes_of(lengths, slots, heads, dim), scale)
  segments = segments_of(kind, 2, *lengths)
  found = jax.jit(value_and_gradients)(q, k, v, *segments, d_out)
  allowed = jnp.asarray(allowed_of(*segments))
  exact = [x.astype(jnp.float32) for x in (q, k, v)]
  out, gradients = jax.vjp(lambda *x: reference.attention(*x, allowed, dim**-0.5), *exact)
  for ours, expected in zip(found, (out, *gradients(d_out.astype(jnp.float32))), strict=True):
    assert np.isfinite(np.asarray(ours, np.float32)).all()
    assert relative_error(ours, expected) <= 1e-2


@gpu_target.needs_gpu
def test_keys_as_values_add_their_gradients():
  q, k, _, d_out = draw(shapes_of((400, 400), dim=512))
  segments = segments_of("packed", 2, 400, 400)
  out, dq, dk, _ = value_and_gradients(q, k, None, *segments, d_out)
  expected = value_and_gradients(q, k, k, *segments, d_out)
  np.testing.assert_array_equal(out, expected[0])
  np.testing.assert_array_equal(dq, expected[1])
  assert relative_error(dk, sum(x.astype(jnp.float32) for x in expected[2:])) <= 1e-2


@gpu_target.needs_gpu
@pytest.mark.parametrize("kind", ["one", "packed"])
def test_early_exit_stays_within_eps(kind):
  q, k, v, d_out = draw(shapes_of((1500, 1500), dim=512))
  segments = segments_of(kind, 2, 1500, 1500)
  exact, early = (
    jax.jit(functools.partial(value_and_gradients, eps=eps))(q, k, v, *segments, d_out)
    for eps in (0.0, 1e-5)
  )
  for ours, expected in zip(early, exact, strict=True):
    assert relative_error(ours, expected) <= 1e-3


@gpu_target.needs_gpu
def test_weights_computed_again_give_the_same_gradients(monkeypatch):
  q, k, v, d_out = draw(shapes_of((400, 400)))
  segments = segments_of("packed", 2, 400, 400)
  kept = value_and_gradients(q, k, v, *segments, d_out)
  monkeypatch.setattr(gpu_wide, "_KEPT_KEYS_PER_DIM", 0)
  again = value_and_gradients(q, k, v, *segments, d_out)
  for ours, expected in zip(again, kept, strict=True):
    np.testing.assert_array_equal(ours, expected)
