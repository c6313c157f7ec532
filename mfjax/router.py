"""Routers: gates, top-k choice and the statistics that losses and metrics are made of.

Shapes: B batch rows, T positions, D d_model, G d_gate, N experts, K experts chosen per token.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mfjax.config import Gate, ModelConfig
from mfjax.layers import dropout, linear, normal, parameter


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
    log_probs_BTN = jax.nn.log_softmax(logits_BTN)
    probs_BTN = jnp.exp(log_probs_BTN)
    ids_BTK = self._choose(jax.lax.stop_gradient(probs_BTN), sample_key)
    chosen_BTKN = jax.nn.one_hot(ids_BTK, self.num_experts, dtype=jnp.float32)
    chosen_BTKN = jnp.where(is_token_BT[:, :, None, None], chosen_BTKN, 0)
    # A product with one-hot rows: its gradient is a gather's inverse without a scatter.
    weights_BTK = jnp.einsum("btn,btkn->btk", probs_BTN, chosen_BTKN, precision="highest")
    is_token_BT1 = is_token_BT[:, :, None]
    kept_BTN = jnp.where(is_token_BT1, probs_BTN, 0)
    logsumexp_BT = jax.nn.logsumexp(logits_BTN, axis=-1)
    statistics = RouterStatistics(
      tokens=is_token_BT.sum(dtype=jnp.float32),
      prob_sum=kept_BTN.sum((0, 1)),
      picks=chosen_BTKN.sum((0, 1, 2)),
      entropy_sum=-(kept_BTN * log_probs_BTN).sum(),
      square_logsumexp_sum=jnp.where(is_token_BT, jnp.square(logsumexp_BT), 0).sum(),
    )
    ids_BTK = jnp.where(is_token_BT1, ids_BTK, self.num_experts)
    return Routing(ids_BTK, weights_BTK), statistics

  def _logits(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
    """Return float32 [B, T, N]; inputs of products in x's dtype, sums in float32."""
    dtype, gate = x_BTD.dtype, self.config.gate
    rows_NG = jnp.concatenate([rows[...] for _, rows in sorted(self.rows.items())])
    if gate is Gate.LINEAR:
      return linear(x_BTD, rows_NG.T, is_sharded=False)
    z_BTG = linear(x_BTD, self.w1[...], is_sharded=True)
    if gate is Gate.GMM:
      cosine = linear(_unit(z_BTG), _unit(rows_NG).T, is_sharded=False)
      return cosine * jnp.exp(self.temperature[...])
    z_BTG = _activation(z_BTG, self.b1[...])
    z_BTG = dropout(z_BTG, self.config.router_dropout, key)
    return linear(z_BTG.astype(dtype), rows_NG.T, is_sharded=False)

  def _choose(self, probs_BTN: jax.Array, key: jax.Array | None) -> jax.Array:
    """Return int32 [B, T, K]: the k best, or k-s best and s drawn among the rest in training."""
    num_drawn = self.config.sample_top_k
    if key is None or num_drawn == 0:
      return jax.lax.top_k(probs_BTN, self.top_k)[1]
    num_best = self.top_k - num_drawn
    best = jax.lax.top_k(probs_BTN, num_best)[1]
    taken = jax.nn.one_hot(best, self.num_experts, dtype=bool).any(2)
    # The largest Gumbel-perturbed log weights are a draw without replacement.
    noise = jax.random.gumbel(key, probs_BTN.shape, out_sharding=jax.typeof(probs_BTN).sharding)
    scores = jnp.where(taken, -math.inf, jnp.log(probs_BTN + 1e-6) + noise)
    return jnp.concatenate([best, jax.lax.top_k(scores, num_drawn)[1]], axis=-1)


@functools.partial(jax.checkpoint, prevent_cse=False)  # Keeps its input alone.
def _activation(z_BTG: jax.Array, bias: jax.Array) -> jax.Array:
  return jax.nn.gelu(z_BTG + bias, approximate=False)


def _unit(x: jax.Array) -> jax.Array:
  """Scale the last dimension to length one; zero stays zero, and so does its gradient."""
  # PyTorch's 1e-12 under the root: beyond it the square root's infinite slope would give NaN.
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
