import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mfjax import router, sharding
from mfjax.config import Gate, MeshConfig
from mfjax.layers import parameter
from mfjax.router import Router
from tests import tiny

NUM, TOP_K = 8, 3


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
    yield


def route(gate=Gate.MLP, sample_top_k=0, key=None, tokens=400):
  config = dataclasses.replace(
    tiny.MODEL, gate=gate, sample_top_k=sample_top_k, attention_top_k=3, ff_top_k=3
  )
  layer = Router(NUM, TOP_K, config, nnx.Rngs(params=0))
  if gate is not Gate.LINEAR:  # Placed by the sharding rules, as training has it.
    w1 = jax.sharding.reshard(layer.w1[...], sharding.P(sharding.WEIGHT_AXES, None))
    layer.w1 = parameter(w1, ("d_model", None))
  x = jax.random.normal(jax.random.key(1), (2, tokens, config.d_model))
  x = jax.sharding.reshard(x, sharding.BATCH)
  is_token = jax.sharding.reshard(jnp.ones((2, tokens), bool).at[1, -7:].set(False), sharding.BATCH)
  routing, sums = layer(x, is_token, key)
  probs = np.asarray(jax.nn.softmax(layer._logits(x, None)))
  return routing, sums, probs, np.asarray(is_token)


@pytest.mark.parametrize("gate", Gate)
def test_top_k_of_the_softmax_with_raw_probabilities(gate):
  routing, sums, probs, is_token = route(gate)
  best = np.argsort(-probs, axis=-1)[..., :TOP_K]
  ids = np.asarray(routing.expert_ids)
  np.testing.assert_array_equal(ids[is_token], best[is_token])
  assert (ids[~is_token] == NUM).all()
  weights = np.asarray(routing.combine_weights)
  expected = np.take_along_axis(probs, best, -1)
  np.testing.assert_allclose(weights[is_token], expected[is_token], rtol=1e-6)
  assert (weights[~is_token] == 0).all()
  entropy = -(probs * np.log(probs)).sum(-1)[is_token].sum()
  np.testing.assert_allclose(sums.entropy_sum, entropy, rtol=1e-5)
  np.testing.assert_allclose(sums.prob_sum, probs[is_token].sum(0), rtol=1e-5)
  np.testing.assert_allclose(sums.picks, np.bincount(best[is_token].ravel(), minlength=NUM))


def test_sampled_top_k_keeps_the_best_and_draws_the_rest_by_probability():
  routing, _, probs, is_token = route(sample_top_k=2, key=jax.random.key(5), tokens=4000)
  ids = np.asarray(routing.expert_ids)[is_token]
  probs = probs[is_token]
  np.testing.assert_array_equal(ids[:, 0], probs.argmax(-1))
  assert all(len(set(row)) == TOP_K for row in ids)
  assert (ids[:, 1:] != np.argsort(-probs, -1)[:, 1:TOP_K]).any()
  # The first draw's frequencies are the probabilities among the rest.
  rest = probs + 1e-6
  rest[np.arange(len(ids)), ids[:, 0]] = 0
  expected = (rest / rest.sum(-1, keepdims=True)).sum(0)
  counts = np.bincount(ids[:, 1], minlength=NUM)
  assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())


def test_without_a_key_nothing_is_sampled():
  routing, _, probs, is_token = route(sample_top_k=2)
  best = np.argsort(-probs, axis=-1)[..., :TOP_K]
  np.testing.assert_array_equal(np.asarray(routing.expert_ids)[is_token], best[is_token])


def test_choices_are_those_of_top_k_also_between_equals():
  scores = jax.random.randint(jax.random.key(0), (3, 50, 16), 0, 5).astype(jnp.float32)
  for count in (1, 2, 5):
    expected = jax.lax.top_k(scores, count)[1]
    np.testing.assert_array_equal(router._largest(scores, count), expected)
  assert router._largest(scores, 0).shape == (3, 50, 0)


def plain_gate(logits, ids, is_token):
  log_probs = jax.nn.log_softmax(logits)
  probs = jnp.exp(log_probs)
  chosen = jax.nn.one_hot(ids, logits.shape[-1])
  kept = jnp.where(is_token[..., None], probs, 0)
  square = jnp.where(is_token, jnp.square(jax.nn.logsumexp(logits, axis=-1)), 0).sum()
  sums = kept.sum((0, 1)), chosen.sum((0, 1, 2)), -(kept * log_probs).sum(), square
  return jnp.einsum("btn,btkn->btk", probs, chosen, precision="highest"), sums


def test_gate_has_the_values_and_gradients_of_the_plain_formulas():
  keys = jax.random.split(jax.random.key(1), 3)
  logits = 3 * jax.random.normal(keys[0], (2, 9, 8))
  is_token = jnp.arange(9)[None] < jnp.array([[9], [6]])
  ids = jnp.where(is_token[..., None], router._largest(logits, 2), 8)
  (value, back), (expected, plain_back) = (
    jax.vjp(lambda x, f=f: f(x, ids, is_token), logits) for f in (router._gate, plain_gate)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), value, expected)
  slopes = jax.tree.map(lambda x: jax.random.normal(keys[1], x.shape), expected)
  np.testing.assert_allclose(back(slopes)[0], plain_back(slopes)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_activation_has_the_gradients_of_gelu(dtype, tolerance):
  keys = jax.random.split(jax.random.key(2), 3)
  z, d_out = (2 * jax.random.normal(key, (2, 64, 16), dtype) for key in keys[:2])
  bias = jax.random.normal(keys[2], (16,))
  value, back = jax.vjp(router._activation, z, bias)
  plain_gelu = functools.partial(jax.nn.gelu, approximate=False)
  z, d_out = z.astype(jnp.float32), d_out.astype(jnp.float32)
  expected, plain = jax.vjp(lambda z, b: plain_gelu(z + b), z, bias)
  assert value.dtype == dtype
  np.testing.assert_allclose(value.astype(jnp.float32), expected, rtol=tolerance, atol=1e-6)
  for name, a, b in zip(("z", "bias"), back(d_out.astype(dtype)), plain(d_out), strict=True):
    worst = jnp.abs(a - b).max() / jnp.abs(b).max()
    assert worst < tolerance, (name, worst)
