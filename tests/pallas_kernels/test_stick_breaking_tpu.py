import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # Where found races are kept.
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from pallas_kernels.stick_breaking import reference, tpu
from tests.pallas_kernels import tpu_target

# Several groups of keys in each sublane's run: of one in float32, of four in bfloat16.
SMALL = {
  "float32": tpu.Tiling(block_q=32, block_k=32),
  "bfloat16": tpu.Tiling(block_q=32, block_k=64),
}
STRICT = pltpu.InterpretParams(
  detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}

# (queries, keys, slots, heads, width), values are keys, type, factor of q and k.
CASES = {
  "ragged": ((150, 150, 1, 2, 16), False, "float32", 4.0),
  "history_and_slots": ((50, 133, 3, 1, 16), False, "float32", 1.0),
  "slots_share_values": ((90, 90, 2, 1, 16), True, "float32", 1.0),
  "bfloat16": ((128, 128, 2, 1, 64), False, "bfloat16", 4.0),
  "bfloat16_shares_values": ((40, 70, 2, 2, 64), True, "bfloat16", 1.0),
}


def draw(sizes, dtype, factor=1.0, seed=0):
  """Return q, k, v, the output's weights and the keys' segments of two sequences."""
  num_queries, num_keys, slots, heads, width = sizes
  rng = np.random.default_rng(seed)

  def array(*shape, factor=1.0):
    return jnp.asarray(factor * rng.standard_normal(shape), dtype)

  q = array(2, num_queries, slots, heads, width, factor=factor)
  k = array(2, num_keys, heads, width, factor=factor)
  v = array(2, num_keys, heads, width)
  weights = array(*q.shape)
  segments = np.ones((2, num_keys), np.int32)
  segments[0, num_keys // 3 :] = 2
  segments[1, : num_keys // 5] = 0
  segments[1, -2:] = 0
  return q, k, v, weights, jnp.asarray(segments)


def expect(q, k, v, q_segments, k_segments):
  position = jnp.arange(q.shape[1]) + k.shape[1] - q.shape[1]
  allowed = jnp.arange(k.shape[1])[None, :] <= position[:, None]
  allowed = allowed & (q_segments[:, :, None] == k_segments[:, None, :])
  allowed = allowed & (k_segments > 0)[:, None, :]
  return reference.attention(q, k, v, allowed, q.shape[-1] ** -0.5)


@functools.partial(jax.jit, static_argnames=("interpret", "eps"))
def attend(q, k, v, q_segments, k_segments, *, interpret=True, eps=0.0):
  scale = q.shape[-1] ** -0.5
  tiling = SMALL.get(q.dtype.name) if interpret else None
  segments = (q_segments, k_segments)
  return tpu.attention(q, k, v, segments, scale, eps=eps, tiling=tiling, interpret=interpret)


def with_gradients(function, arrays, weights):
  """Return the output and the gradients with respect to `arrays`."""

  @jax.jit
  def run(*arrays):
    out, pull = jax.vjp(function, *arrays)
    return out, *pull(weights.astype(out.dtype))

  return run(*arrays)


def check(actual, expected, tolerance):
  for x, y in zip(actual, expected, strict=True):
    x, y = (np.asarray(z.astype(jnp.float32)) for z in (x, y))
    np.testing.assert_allclose(x, y, atol=tolerance * max(1e-3, np.abs(y).max()), rtol=0)


def compare(sizes, shares_values, dtype, factor=1.0, **options):
  """Compare values and every gradient with the oracle's, in the oracle's scale."""
  q, k, v, weights, segments = draw(sizes, dtype, factor)
  segments = (segments[:, sizes[1] - sizes[0] :], segments)
  arrays = (q, k) if shares_values else (q, k, v)
  ours = with_gradients(lambda q, k, v=None: attend(q, k, v, *segments, **options), arrays, weights)
  oracle = with_gradients(
    lambda q, k, v=None: expect(q, k, k if v is None else v, *segments), arrays, weights
  )
  check(ours, oracle, TOLERANCE[dtype])
  return ours


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_oracle(case):
  compare(*CASES[case])


@pytest.mark.parametrize("case", ["history_and_slots"])
def test_no_race_and_no_uninitialised_read(case):
  sizes, *rest = CASES[case]
  compare(sizes, *rest, interpret=STRICT)
  assert not interpret_pallas_call.races.races_found


def test_gradients_of_keys_in_chunks(monkeypatch):
  # Two of the five blocks: the last chunk is cut by the end of the keys.
  monkeypatch.setattr(tpu, "_GRADIENT_BYTES", 2 * 4 * 2 * SMALL["float32"].block_k * 128)
  compare((70, 140, 1, 1, 16), False, "float32")


@pytest.mark.parametrize(
  ("slots", "heads", "dtype"), [(2, 1, "bfloat16"), (3, 2, "float32")], ids=["one", "many"]
)
def test_decode_against_caches_of_given_lengths(slots, heads, dtype):
  q, k, v, _, _ = draw((1, 200, slots, heads, 16), dtype, factor=2.0)
  v = None if heads == 1 else v
  lengths = jnp.asarray([[77], [200]])
  k_segments = (jnp.arange(200)[None, :] < lengths).astype(jnp.int32)
  args = (jnp.ones((2, 1), jnp.int32), k_segments)
  expected = expect(q, k, k if v is None else v, *args)
  check([attend(q, k, v, *args)], [expected], TOLERANCE[dtype])
  # The kernel that also saves what gradients need.
  out, _ = jax.jit(functools.partial(jax.vjp, lambda q: attend(q, k, v, *args)))(q)
  check([out], [expected], TOLERANCE[dtype])


def test_a_row_without_keys_gives_zeros():
  q, k, v, weights, segments = draw((40, 70, 1, 1, 16), "float32")
  args = (segments[:, 30:], jnp.zeros_like(segments))
  for x in with_gradients(lambda *qkv: attend(*qkv, *args), (q, k, v), weights):
    assert (x == 0).all()
  assert (attend(q[:, -1:], k, v, args[0][:, -1:], args[1]) == 0).all()


def test_other_documents_are_not_read():
  q, k, v, weights, _ = draw((128, 192, 1, 1, 16), "float32")
  k_segments = jnp.repeat(jnp.asarray([[1, 2, 3]] * 2, jnp.int32), 64, axis=1)
  args = (k_segments[:, 64:], k_segments)
  arrays = (q, *(x.at[:, :64].set(jnp.nan) for x in (k, v)))  # No query is in document 1.
  for x in with_gradients(lambda *qkv: attend(*qkv, *args), arrays, weights):
    assert np.isfinite(x).all()
  assert np.isfinite(attend(q[:, -1:], *arrays[1:], args[0][:, -1:], args[1])).all()


@pytest.mark.parametrize("num_queries", [256, 1])
def test_early_exit_leaves_out_what_weighs_less_than_eps(num_queries):
  eps = 1e-3
  q, k, v, weights, _ = draw((num_queries, 256, 1, 1, 16), "float32")
  q, k = jnp.abs(q), jnp.abs(k)  # Sticks are broken within a block or two.
  ones = jnp.ones((2, 256), jnp.int32)
  args = (ones[:, :num_queries], ones)
  arrays = (q, k, v)
  exact, *gradients = with_gradients(lambda *qkv: expect(*qkv, *args), arrays, weights)
  stopped = attend(*arrays, *args, eps=eps)
  assert jnp.abs(stopped - exact).max() <= eps * jnp.abs(v).max()
  lost = v.at[:, :32].set(jnp.nan)  # The last tile must not see the first block.
  assert np.isfinite(attend(q, k, lost, *args, eps=eps)[:, -1]).all()
  if num_queries > 1:
    ours = with_gradients(lambda *qkv: attend(*qkv, *args, eps=eps), arrays, weights)
    check(ours[1:], gradients, 20 * eps)


def test_many_weak_keys_lose_no_precision():
  # Half of the terms are below the last bit of 1 + 2^s: their sum must still count.
  length = 1024
  logits = np.random.default_rng(0).uniform(-16, -8, length)
  k = np.zeros((1, length, 1, 16), np.float32)
  k[0, :, 0, 0] = logits * 4  # sqrt(d).
  q = np.zeros((1, 40, 1, 1, 16), np.float32)
  q[..., 0] = 1
  ones = jnp.ones((1, length), jnp.int32)
  args = (jnp.asarray(q), jnp.asarray(k), jnp.ones_like(k), ones[:, :40], ones)
  out = attend(*args)
  expected = -np.expm1(-np.log1p(np.exp(k[0, :, 0, 0].astype(np.float64) / 4)).sum())
  np.testing.assert_allclose(out[0, -1, 0, 0, 0], expected, rtol=1e-6)


def test_other_dtypes_are_refused():
  q, k, v, _, segments = draw((8, 8, 1, 1, 16), "float16")
  with pytest.raises(NotImplementedError, match=r"got q float16.*use the xla implementation"):
    attend(q, k, v, segments, segments)


def program(length, width, slots, dtype, shares_values, gradients):
  """Return the kernel with its own tiling, and shapes, for tpu_target; arguments are strings."""
  length, width, slots = int(length), int(width), int(slots)
  q = jax.ShapeDtypeStruct((1, length, slots, 2, width), dtype)
  k = jax.ShapeDtypeStruct((1, length, 2, width), dtype)
  segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def run(q, k, v, segments):
    v = None if shares_values == "shared" else v
    return attend(q, k, v, segments, segments, interpret=False)

  def run_all(q, k, v, segments):
    out, pull = jax.vjp(lambda *qkv: run(*qkv, segments), q, k, v)
    return pull(out)

  return run_all if gradients == "gradients" else run, (q, k, k, segments)


COMPILED = {
  "v5e": ("16384", "128", "1", "bfloat16", "apart", "gradients"),
  "v5p": ("32768", "128", "1", "bfloat16", "apart", "gradients"),
  "v6e": ("2048", "64", "2", "bfloat16", "apart", "gradients"),
  "tpu7x": ("2048", "256", "1", "float32", "apart", "gradients"),
}


@tpu_target.needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", COMPILED)
def test_compiles(target):
  function, shapes = program(*COMPILED[target])
  tpu_target.compile_kernel(function, *shapes, target=target)


@tpu_target.needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("target", tpu_target.TOPOLOGIES)
def test_the_released_models_shape_compiles(target):
  # One head of width 1024, two slots, values are keys; at 16384 keys the gradients come in chunks.
  length = "16384" if target == "v5p" else "2048"
  function, shapes = program(length, "1024", "2", "bfloat16", "shared", "gradients")
  tpu_target.compile_kernel(function, *shapes, target=target)


@tpu_target.needs_libtpu
@pytest.mark.parametrize("target", tpu_target.TOPOLOGIES)
def test_decode_compiles(target):
  q = jax.ShapeDtypeStruct((4, 1, 2, 1, 1024), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((4, 2048, 1, 1024), jnp.bfloat16)
  segments = [jax.ShapeDtypeStruct((4, n), jnp.int32) for n in (1, 2048)]

  def run(q, k, *segments):
    return attend(q, k, None, *segments, interpret=False, eps=1e-4)

  tpu_target.compile_kernel(run, q, k, *segments, target=target)


def splash_program():
  """Return splash attention, values and gradients, at 512 x 512 tiles."""
  length, width = 4096, 128
  sizes = dict.fromkeys(
    (
      *("block_q", "block_kv", "block_kv_compute", "block_q_dq", "block_kv_dq"),
      *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
    ),
    512,
  )
  mask = splash_attention_mask.CausalMask((length, length))
  kernel = splash.make_splash_mha(
    splash_attention_mask.MultiHeadMask([mask] * 2),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash.BlockSizes(**sizes),
  )
  x = jax.ShapeDtypeStruct((2, length, width), jnp.bfloat16)

  def run(q, k, v):
    out, pull = jax.vjp(kernel, q, k, v)
    return pull(out)

  return run, (x, x, x)


@tpu_target.needs_libtpu
@pytest.mark.slow
def test_cycles_of_a_tile_beside_splash_attention():
  module = "tests.pallas_kernels.test_stick_breaking_tpu"

  def unmasked(program, *arguments):
    """Return cycles of one 512 x 512 tile in each kernel; the last body has no mask."""
    kernels = tpu_target.static_cycles(f"{module}:{program}", "v6e", *arguments)
    return {name: bodies[-1].cycles for name, bodies in kernels.items()}

  ours = unmasked("program", "4096", "128", "1", "bfloat16", "apart", "gradients")
  peer = unmasked("splash_program")
  forward = sum(cycles for name, cycles in ours.items() if "forward" in name)
  peer_forward = sum(cycles for name, cycles in peer.items() if "fwd" in name)
  assert len(ours) == 2
  assert len(peer) == 3
  assert 0 < forward <= 1.25 * peer_forward
  assert sum(ours.values()) <= 1.2 * sum(peer.values())
