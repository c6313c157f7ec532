"""Routers: gates, top-k choice and the statistics that losses and metrics are made of.

Shapes: B batch rows, T positions, D d_model, G d_gate, N experts, K experts chosen per token.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mfjax.config import Gate, ModelConfig
from mfjax.layers import dropout, linear, normal, parameter

SAVED_CHOICE, SAVED_GATE = "router_choice", "router_gate"


class RouterStatistics(NamedTuple):
  """Sums over the tokens of a batch, padding left out; float32. They add up over batches."""

  tokens: jax.Array  # [] number of tokens
  prob_sum: jax.Array  # [N] router probability
  picks: jax.Array  # [N] times chosen among the top k
  entropy_sum: jax.Array  # [] entropy of the router, nats
  square_logsumexp_sum: jax.Array  # [] squared log-partition of the router logits


class Routing(NamedTuple):
  """A token's experts. A padding token has expert N (nobody) and weight 0."""

  expert_ids: jax.Array  # int32 [B, T, K]
  combine_weights: jax.Array  # float32 [B, T, K], the raw probabilities, not renormalised


class Router(nnx.Module):
  """Softmax over all experts, then the top k (arXiv 2306.04640, section 3; released weights' form).

  `mlp`: w2 . gelu_erf(w1 x + b1); `linear`: one matrix; `gmm`: scaled cosine to centroids. The last
  matrix is a dict of banks of rows, one per bank of experts.
  """

  def __init__(self, num_experts: int, top_k: int, config: ModelConfig, rngs: nnx.Rngs) -> None:
    self.config, self.num_experts, self.top_k = config, num_experts, top_k
    d_model, d_gate = config.d_model, config.d_gate
    width = d_model if config.gate is Gate.LINEAR else d_gate
    if config.gate is not Gate.LINEAR:
      self.w1 = parameter(normal(rngs, (d_model, d_gate), d_model, config), ("d_model", None))
    if config.gate is Gate.MLP:
      self.b1 = parameter(jnp.zeros(d_gate, jnp.float32), (None,))
    if config.gate is Gate.GMM:
      self.temperature = parameter(jnp.zeros(1, jnp.float32), (None,))
    rows = normal(rngs, (num_experts, width), width, config)
    if config.gate is Gate.GMM:  # Published: centroids from a unit normal; only directions count.
      rows = jax.random.normal(rngs.params(), (num_experts, width), jnp.float32)
    self.rows = nnx.Dict(bank_0=parameter(rows, (None, None)))

  def __call__(
    self, x_BTD: jax.Array, is_token_BT: jax.Array, key: jax.Array | None
  ) -> tuple[Routing, RouterStatistics]:
    """Route tokens.

    Args:
      x_BTD: the layer's normalised input, compute dtype.
      is_token_BT: bool, False for padding.
      key: for dropout and for sampling among the top k; None outside training.

    Returns:
      the choice for each token, and the sums over the batch.
    """
    drop_key, sample_key = (None, None) if key is None else jax.random.split(key)
    logits_BTN = self._logits(x_BTD, drop_key)
    probs_BTN = jax.nn.softmax(jax.lax.stop_gradient(logits_BTN))
    ids_BTK = checkpoint_name(self._choose(probs_BTN, sample_key), SAVED_CHOICE)
    ids_BTK = jnp.where(is_token_BT[:, :, None], ids_BTK, self.num_experts)
    weights_BTK, sums = _gate(logits_BTN, ids_BTK, is_token_BT)
    weights_BTK = checkpoint_name(weights_BTK, SAVED_CHOICE)
    tokens = is_token_BT.sum(dtype=jnp.float32)
    return Routing(ids_BTK, weights_BTK), RouterStatistics(tokens, *sums)

  def _logits(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
    """Return float32 [B, T, N]; inputs of products in x's dtype, sums in float32.

    Products are kept for the backward pass where it needs them: they are most of a router's work.
    """
    dtype, gate = x_BTD.dtype, self.config.gate
    rows_NG = jnp.concatenate([rows[...] for _, rows in sorted(self.rows.items())])
    if gate is Gate.LINEAR:
      return linear(x_BTD, rows_NG.T, is_sharded=False)
    z_BTG = linear(x_BTD, self.w1[...], is_sharded=True).astype(dtype)
    z_BTG = checkpoint_name(z_BTG, SAVED_GATE)
    if gate is Gate.GMM:
      unit_BTG = _unit(z_BTG.astype(jnp.float32))
      cosine = linear(unit_BTG, _unit(rows_NG).T, is_sharded=False)
      cosine = checkpoint_name(cosine, SAVED_GATE)
      return cosine * jnp.exp(self.temperature[...])
    a_BTG = _activation(z_BTG, self.b1[...])
    a_BTG = dropout(a_BTG, self.config.router_dropout, key)
    return linear(a_BTG, rows_NG.T, is_sharded=False)

  def _choose(self, probs_BTN: jax.Array, key: jax.Array | None) -> jax.Array:
    """Return int32 [B, T, K]: the k best, or k-s best and s drawn among the rest in training."""
    num_drawn = self.config.sample_top_k
    if key is None or num_drawn == 0:
      return _largest(probs_BTN, self.top_k)
    num_best = self.top_k - num_drawn
    best = _largest(probs_BTN, num_best)
    taken = jax.nn.one_hot(best, self.num_experts, dtype=bool).any(2)
    # The largest Gumbel-perturbed log weights are a draw without replacement.
    noise = jax.random.gumbel(key, probs_BTN.shape, out_sharding=jax.typeof(probs_BTN).sharding)
    scores = jnp.where(taken, -math.inf, jnp.log(probs_BTN + 1e-6) + noise)
    return jnp.concatenate([best, _largest(scores, num_drawn)], axis=-1)


def _largest(scores_BTN: jax.Array, count: int) -> jax.Array:
  """Return int32 [B, T, count]: the largest scores' indices, of equal ones the lower first.

  One after the other: on a GPU, `jax.lax.top_k` sorts whole rows (28 us for 16,384 rows of 32).
  """
  indices = []
  for _ in range(count):
    index_BT1 = jnp.argmax(scores_BTN, axis=-1, keepdims=True).astype(jnp.int32)
    indices.append(index_BT1)
    scores_BTN = jnp.where(_is(index_BT1, scores_BTN), -math.inf, scores_BTN)
  if not indices:
    return jnp.zeros_like(scores_BTN, jnp.int32)[..., :0]
  return jnp.concatenate(indices, axis=-1)


def _is(index_BT1: jax.Array, values_BTN: jax.Array) -> jax.Array:
  """Return bool [B, T, N]: where an index is the last dimension's."""
  return index_BT1 == jnp.arange(values_BTN.shape[-1], dtype=jnp.int32)


_Sums = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@jax.custom_vjp
def _gate(
  logits_BTN: jax.Array, ids_BTK: jax.Array, is_token_BT: jax.Array
) -> tuple[jax.Array, _Sums]:
  """Return combine weights [B, T, K] and RouterStatistics' sums after `tokens`.

  A custom gradient: in a few passes it computes what JAX's own takes a dozen for.
  """
  return _gate_forward(logits_BTN, ids_BTK, is_token_BT)[0]


def _gate_forward(
  logits_BTN: jax.Array, ids_BTK: jax.Array, is_token_BT: jax.Array
) -> tuple[tuple[jax.Array, _Sums], Any]:
  logsumexp_BT = jax.nn.logsumexp(logits_BTN, axis=-1)
  log_probs_BTN = jax.nn.log_softmax(logits_BTN)
  probs_BTN = jnp.exp(log_probs_BTN)
  choices = jnp.split(ids_BTK, ids_BTK.shape[-1], axis=-1)  # Padding has an expert beyond the last.
  chosen = [_is(index_BT1, probs_BTN) for index_BT1 in choices]
  weights = [jnp.where(is_it, probs_BTN, 0).sum(-1, keepdims=True) for is_it in chosen]
  kept_BTN = jnp.where(is_token_BT[:, :, None], probs_BTN, 0)
  picks_BTN = sum((is_it.astype(jnp.float32) for is_it in chosen), start=jnp.float32(0))
  sums = (
    kept_BTN.sum((0, 1)),
    picks_BTN.sum((0, 1)),
    -(kept_BTN * log_probs_BTN).sum(),
    jnp.where(is_token_BT, jnp.square(logsumexp_BT), 0).sum(),
  )
  saved = tuple(checkpoint_name(x, SAVED_CHOICE) for x in (log_probs_BTN, logsumexp_BT))
  return (jnp.concatenate(weights, axis=-1), sums), (*saved, ids_BTK, is_token_BT)


def _gate_backward(saved: Any, cotangents: tuple[jax.Array, _Sums]) -> tuple[jax.Array, None, None]:
  """With g the slope of the probabilities, entropy's -log p among it: p (g - <p, g>)."""
  log_probs_BTN, logsumexp_BT, ids_BTK, is_token_BT = saved
  d_weights_BTK, (d_prob_sum_N, _, d_entropy, d_square) = cotangents
  probs_BTN, is_token_BT1 = jnp.exp(log_probs_BTN), is_token_BT[:, :, None]
  slope_BTN = jnp.where(is_token_BT1, d_prob_sum_N - d_entropy * log_probs_BTN, 0)
  num_choices = ids_BTK.shape[-1]
  pairs = (jnp.split(x, num_choices, axis=-1) for x in (ids_BTK, d_weights_BTK))
  for index_BT1, d_weight_BT1 in zip(*pairs, strict=True):
    slope_BTN += jnp.where(_is(index_BT1, probs_BTN), d_weight_BT1, 0)
  mean_BT1 = (probs_BTN * slope_BTN).sum(-1, keepdims=True)
  level_BT1 = jnp.where(is_token_BT1, 2 * d_square * logsumexp_BT[:, :, None], 0)
  return probs_BTN * (slope_BTN - mean_BT1 + level_BT1), None, None


_gate.defvjp(_gate_forward, _gate_backward)


@jax.custom_vjp
def _activation(z_BTG: jax.Array, bias: jax.Array) -> jax.Array:
  """Return GELU (erf) of z + float32 bias, computed in float32, in z's dtype."""
  return jax.nn.gelu(z_BTG + bias, approximate=False).astype(z_BTG.dtype)


def _activation_forward(z_BTG: jax.Array, bias: jax.Array) -> tuple[jax.Array, Any]:
  return _activation(z_BTG, bias), (z_BTG, bias)


def _activation_backward(saved: Any, da_BTG: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keep no float32 [B, T, G]: the bias' gradient, too, comes from dz as it is rounded."""
  z_BTG, bias = saved
  x_BTG = z_BTG + bias
  below = 0.5 * jax.lax.erfc(-math.sqrt(0.5) * x_BTG)
  density = jnp.exp(-0.5 * jnp.square(x_BTG)) / math.sqrt(2 * math.pi)
  dz_BTG = ((below + x_BTG * density) * da_BTG).astype(z_BTG.dtype)
  dz_BTG = jax.lax.optimization_barrier(dz_BTG)  # XLA writes it rounded, once.
  return dz_BTG, dz_BTG.sum((0, 1), dtype=jnp.float32)


_activation.defvjp(_activation_forward, _activation_backward)


def _unit(x: jax.Array) -> jax.Array:
  """Scale the last dimension to length one; zero stays zero, and so does its gradient."""
  # PyTorch's 1e-12 under the root: beyond it the square root's infinite slope would give NaN.
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
