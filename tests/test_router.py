import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mfjax import sharding
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
  router = Router(NUM, TOP_K, config, nnx.Rngs(params=0))
  if gate is not Gate.LINEAR:  # Placed by the sharding rules, as training has it.
    w1 = jax.sharding.reshard(router.w1[...], sharding.P(sharding.WEIGHT_AXES, None))
    router.w1 = parameter(w1, ("d_model", None))
  x = jax.random.normal(jax.random.key(1), (2, tokens, config.d_model))
  x = jax.sharding.reshard(x, sharding.BATCH)
  is_token = jax.sharding.reshard(jnp.ones((2, tokens), bool).at[1, -7:].set(False), sharding.BATCH)
  routing, sums = router(x, is_token, key)
  probs = np.asarray(jax.nn.softmax(router._logits(x, None)))
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
