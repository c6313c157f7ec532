import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfjax import layers, sharding
from mfjax.router import _unit
from tests import tiny

MESHES = [tiny.mesh(), tiny.mesh(data=2, fsdp=2, expert=2)]


def placed(mesh, x, spec):
  return jax.device_put(x, jax.NamedSharding(mesh, spec))


@pytest.mark.parametrize("config", MESHES, ids=["one", "eight"])
def test_gradient_of_a_frequent_token_is_summed_in_float32(config):
  size = int(np.prod(list(config.axis_sizes.values())))
  mesh = sharding.make_mesh(config, jax.devices()[:size])
  tokens = np.zeros((8, 1024), np.int32)  # A bf16 sum of equal terms stops at 256 of them.
  with jax.set_mesh(mesh):
    table = placed(mesh, np.ones((4, 8), np.float32), sharding.P(None, sharding.WEIGHT_AXES))
    ids = placed(mesh, tokens, sharding.BATCH)
    loss = lambda table: (0.01 * layers.embed(table, ids, jnp.bfloat16)).sum()  # noqa: E731
    gradient = np.asarray(jax.jit(jax.grad(loss))(table))
  np.testing.assert_allclose(gradient[0], 0.01 * tokens.size, rtol=1e-2)
  assert (gradient[1:] == 0).all()


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("config", MESHES, ids=["one", "eight"])
def test_linear_keeps_float32_sums_of_bf16_products(config, is_sharded):
  size = int(np.prod(list(config.axis_sizes.values())))
  mesh = sharding.make_mesh(config, jax.devices()[:size])
  rng = np.random.default_rng(0)
  x, w = rng.standard_normal((8, 64, 16)), rng.standard_normal((16, 4))
  x, w = np.asarray(jnp.asarray(x, jnp.bfloat16)), np.asarray(w, np.float32)
  dy = np.asarray(jnp.asarray(rng.standard_normal((8, 64, 4)), jnp.bfloat16))
  spec = sharding.P(sharding.WEIGHT_AXES if is_sharded else None, None)
  with jax.set_mesh(mesh):
    args = placed(mesh, x, sharding.BATCH), placed(mesh, w, spec)
    y, pull = jax.vjp(lambda x, w: layers.linear(x, w, is_sharded=is_sharded), *args)
    dx, dw = pull(placed(mesh, dy.astype(np.float32), sharding.BATCH))
  rounded = np.asarray(jnp.asarray(w, jnp.bfloat16), np.float32)
  x, dy = x.astype(np.float32), dy.astype(np.float32)
  np.testing.assert_allclose(y, x @ rounded, rtol=1e-5, atol=1e-5)
  # Equal beyond bf16's 8 bits: neither the products' sum nor the devices' was rounded to it.
  np.testing.assert_allclose(dw, np.einsum("bti,bto->io", x, dy), rtol=1e-4, atol=1e-4)
  assert dw.dtype == jnp.float32
  assert dx.dtype == jnp.bfloat16
  np.testing.assert_allclose(dx.astype(jnp.float32), dy @ rounded.T, rtol=1e-2, atol=1e-2)


def test_unit_vectors_and_their_gradient_at_zero():
  x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
  np.testing.assert_allclose(_unit(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
  assert np.isfinite(jax.grad(lambda x: _unit(x)[:, 0].sum())(x)).all()


def plain_norm(x, weight, bias, eps):
  """Normalise float64 rows in two passes."""
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps) * weight + bias


def plain_norm_gradients(x, weight, eps, dy):
  rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + eps)
  normed = (x - x.mean(-1, keepdims=True)) * rstd
  slope = (dy * weight * normed).mean(-1, keepdims=True)
  dx = rstd * (dy * weight - (dy * weight).mean(-1, keepdims=True) - normed * slope)
  return dx, (dy * normed).sum((0, 1)), dy.sum((0, 1))


# All elements far from zero; the first, which the variance is taken relative to, far from the rest.
@pytest.mark.parametrize(("offset", "first"), [(0, 0), (100, 0), (0, 3000)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("config", MESHES, ids=["one", "eight"])
def test_layer_norm_and_its_gradients(config, dtype, offset, first):
  size, eps = int(np.prod(list(config.axis_sizes.values()))), 1e-5
  mesh = sharding.make_mesh(config, jax.devices()[:size])
  rng = np.random.default_rng(0)
  draw = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), dtype))  # noqa: E731
  x, dy = (draw(8, 96, 64) + np.asarray(offset, dtype)), draw(8, 96, 64)
  x[:, :, 0] += first
  weight, bias = rng.standard_normal((2, 64)).astype(np.float32)
  with jax.set_mesh(mesh):
    vectors = [placed(mesh, v, sharding.P(None)) for v in (weight, bias)]
    norm = functools.partial(layers._layer_norm, eps)
    y, pull = jax.vjp(jax.jit(norm), placed(mesh, x, sharding.BATCH), *vectors)
    gradients = jax.jit(pull)(placed(mesh, dy, sharding.BATCH))
  x, dy = x.astype(np.float64), dy.astype(np.float64)
  expected = plain_norm_gradients(x, weight.astype(np.float64), eps, dy)
  results = zip((y, *gradients), (plain_norm(x, weight, bias, eps), *expected), strict=True)
  for index, (got, want) in enumerate(results):
    is_rounded = dtype == jnp.bfloat16 and index < 2  # y and dx; sums over tokens stay float32.
    assert got.dtype == (dtype if index < 2 else jnp.float32)
    error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    assert error < (4e-3 if is_rounded else 3e-5), index
