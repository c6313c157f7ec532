"""Parameters with logical axes, layer normalisation and dropout.

Shapes: B batch rows, T positions, D d_model.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mfjax.config import Init, ModelConfig
from mfjax.sharding import Axes


def parameter(value: jax.Array, axes: Axes) -> nnx.Param[jax.Array]:
  """Return a float32 parameter that knows its logical axes (rules: `mfjax/sharding.py`)."""
  return nnx.Param(value, axes=axes)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, config: ModelConfig) -> jax.Array:
  """Draw a dense matrix: N(0, init_std) as published, or truncated normal of variance 1/fan_in."""
  if config.init is Init.TRUNCATED_NORMAL:
    return _truncated_normal(rngs.params(), shape, fan_in)
  return config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)


def expert_matrix(rngs: nnx.Rngs, shape: tuple[int, int, int], config: ModelConfig) -> jax.Array:
  """Draw [experts, in, out]: U(-1/in, 1/in) as published, or truncated normal of variance 1/in."""
  fan_in = shape[1]
  if config.init is Init.TRUNCATED_NORMAL:
    return _truncated_normal(rngs.params(), shape, fan_in)
  bound = 1 / fan_in
  return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


def _truncated_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
  # 0.8796 is the standard deviation of a unit normal cut at two: the variance is 1/fan_in exactly.
  std = 1 / math.sqrt(fan_in) / 0.87962566103423978
  return std * jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)


class LayerNorm(nnx.Module):
  """Layer normalisation with weight and bias; statistics in float32."""

  def __init__(self, config: ModelConfig) -> None:
    self.eps = config.layer_norm_eps
    self.weight = parameter(jnp.ones(config.d_model, jnp.float32), (None,))
    self.bias = parameter(jnp.zeros(config.d_model, jnp.float32), (None,))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    x = x_BTD.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    normed = (x - mean) * jax.lax.rsqrt(variance + self.eps)
    return (normed * self.weight[...] + self.bias[...]).astype(x_BTD.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zero elements with probability `rate` and scale the rest; the identity without a key."""
  if key is None or rate == 0:
    return x
  bits = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding)
  return jnp.where(bits, x / (1 - rate), 0).astype(x.dtype)
