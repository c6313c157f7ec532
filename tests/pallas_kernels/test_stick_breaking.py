import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import testing
from pallas_kernels.implementation import Implementation
from pallas_kernels.stick_breaking import api

SLOTS, HEADS, DIM = 2, 3, 8
PORTABLE = (Implementation.REFERENCE, Implementation.XLA)


def inputs(num_queries, num_keys, logit_scale=1.0, seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(logit_scale * rng.standard_normal(shape), jnp.float32)

  q = draw(2, num_queries, SLOTS, HEADS, DIM)
  k, v = draw(2, num_keys, HEADS, DIM), draw(2, num_keys, HEADS, DIM)
  k_segments = np.ones((2, num_keys), np.int32)
  k_segments[0, num_keys // 3 :] = 2
  k_segments[1, : num_keys // 5] = 0
  k_segments[1, -2:] = 0
  return q, k, v, jnp.asarray(k_segments[:, num_keys - num_queries :]), jnp.asarray(k_segments)


def literal(q, k, v, q_segments, k_segments):
  """Break the stick key by key, nearest first, as the definition reads."""
  out = np.zeros(q.shape)
  history = k.shape[1] - q.shape[1]
  for b, i, s, h in np.ndindex(q.shape[:4]):
    stick = 1.0
    for j in range(history + i, -1, -1):
      if k_segments[b, j] == 0 or k_segments[b, j] != q_segments[b, i]:
        continue
      beta = 1 / (1 + np.exp(-np.dot(q[b, i, s, h], k[b, j, h]) / np.sqrt(q.shape[-1])))
      out[b, i, s, h] += stick * beta * v[b, j, h]
      stick *= 1 - beta
  return out


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("lengths", [(5, 5), (6, 11)])
def test_definition(implementation, lengths):
  args = inputs(*lengths)
  out = api.stick_breaking_attention(*args, implementation=implementation)
  expected = literal(*(np.asarray(x, np.float64) for x in args))
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logit_scale", [1.0, 4.0])
@pytest.mark.parametrize("case", testing.LENGTHS)
def test_values_and_gradients_equal_the_oracle(case, logit_scale):
  q, k, v, *segments = inputs(*testing.LENGTHS[case], logit_scale=logit_scale)
  weights = jnp.asarray(np.random.default_rng(9).standard_normal(q.shape), jnp.float32)

  def run(implementation):
    def loss(q, k, v):
      out = api.stick_breaking_attention(q, k, v, *segments, implementation=implementation)
      return (out * weights).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients

  for ours, oracle in zip(run(Implementation.XLA), run(Implementation.REFERENCE), strict=True):
    assert np.isfinite(ours).all()
    scale = float(jnp.abs(oracle).max())
    np.testing.assert_allclose(ours, oracle, rtol=1e-4, atol=1e-5 * scale)


def test_many_weak_keys_lose_no_precision():
  # log(1 - beta) of each key is near float32's last bits of the logit: their sum must still count.
  length = 2048
  logits = np.random.default_rng(0).uniform(-16, -8, length)
  k = np.zeros((1, length, 1, 4), np.float32)
  k[0, :, 0, 0] = logits * 2  # sqrt(d) = 2.
  q = np.zeros((1, 1, 1, 1, 4), np.float32)
  q[..., 0] = 1
  v = np.ones((1, length, 1, 4), np.float32)
  ones = jnp.ones((1, length), jnp.int32)
  out = api.stick_breaking_attention(
    *map(jnp.asarray, (q, k, v)), ones[:, :1], ones, implementation=Implementation.XLA
  )
  expected = -np.expm1(-np.log1p(np.exp(k[0, :, 0, 0].astype(np.float64) / 2)).sum())
  np.testing.assert_allclose(out[0, 0, 0, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_a_key_that_takes_nearly_all_has_an_exact_gradient(implementation):
  rng = np.random.default_rng(0)
  logits = np.full(300, -30.0)
  logits[[100, 200]] = 3, 14
  k, v = rng.standard_normal((2, 300, DIM))
  k[:, 0] = logits
  q, d_out = np.eye(DIM)[0] * DIM**0.5, rng.standard_normal(DIM)
  beta, keep = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(logits))
  g = beta * np.append(np.cumprod(keep[:0:-1])[::-1], 1) * (v @ d_out)
  expected = (keep * g - beta * (np.cumsum(g) - g)) @ k / DIM**0.5

  def attention(q):
    ones = jnp.ones((1, 300), jnp.int32)
    keys, values = (jnp.asarray(x[None, :, None], jnp.float32) for x in (k, v))
    return api.stick_breaking_attention(
      q[None, None, None, None], keys, values, ones[:, -1:], ones, implementation=implementation
    )[0, 0, 0, 0]

  _, backward = jax.vjp(attention, jnp.asarray(q, jnp.float32))
  [dq] = backward(jnp.asarray(d_out, jnp.float32))
  np.testing.assert_allclose(dq, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_query_without_keys_gives_zero():
  q, k, v, q_segments, k_segments = inputs(6, 6)
  out = api.stick_breaking_attention(
    q, k, v, q_segments, jnp.zeros_like(k_segments), implementation=Implementation.XLA
  )
  assert (out == 0).all()


def test_wrong_shapes_are_named():
  q, k, v, q_segments, k_segments = inputs(5, 5)
  options = {"implementation": Implementation.XLA}
  with pytest.raises(ValueError, match=r"needs q \[b, q, s, h, d\]"):
    api.stick_breaking_attention(q[..., :4], k, v, q_segments, k_segments, **options)
  with pytest.raises(ValueError, match="t >= q"):
    api.stick_breaking_attention(q, k[:, :3], v[:, :3], q_segments, k_segments[:, :3], **options)
  with pytest.raises(ValueError, match="one floating point dtype.*bfloat16"):
    api.stick_breaking_attention(q, k.astype(jnp.bfloat16), v, q_segments, k_segments, **options)
  with pytest.raises(ValueError, match="0 <= eps < 1; got 1.0"):
    api.stick_breaking_attention(q, k, v, q_segments, k_segments, eps=1.0, **options)
  with pytest.raises(NotImplementedError, match="'auto'.*use reference, xla"):
    api.stick_breaking_attention(
      q, k, v, q_segments, k_segments, implementation=Implementation.AUTO
    )


def test_values_that_are_the_keys_need_no_array():
  q, k, _, *segments = inputs(70, 133)

  def run(implementation, v):
    def loss(q, k):
      out = api.stick_breaking_attention(
        q, k, k if v else None, *segments, implementation=implementation
      )
      return (out**2).sum()

    return jax.grad(loss, argnums=(0, 1))(q, k)

  for implementation in PORTABLE:
    for ours, expected in zip(run(implementation, False), run(implementation, True), strict=True):
      np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
