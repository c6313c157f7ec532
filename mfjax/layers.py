"""Parameters with logical axes, embedding, linear maps, layer normalisation and dropout.

The embedding and linear maps have gradients of their own: weights are cast to the compute dtype for
their products, yet their gradients are summed, over tokens and devices, in float32. JAX's own
transposition would sum them in the compute dtype, and a bf16 sum stops growing.

Shapes: B batch rows, T positions, D d_model, V vocabulary, n tokens of one device, i inputs,
o outputs.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from mfjax.config import Init, ModelConfig
from mfjax.sharding import BATCH, WEIGHT_AXES, Axes
from pallas_kernels.precision import matmul_precision


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
    return _layer_norm(self.eps, x_BTD, self.weight[...], self.bias[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer_norm(eps: float, x_BTD: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
  x = x_BTD.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  variance = jnp.square(x - mean).mean(-1, keepdims=True)
  normed = (x - mean) * jax.lax.rsqrt(variance + eps)
  return (normed * weight + bias).astype(x_BTD.dtype)


def _layer_norm_forward(
  eps: float, x_BTD: jax.Array, weight: jax.Array, bias: jax.Array
) -> tuple[jax.Array, Any]:
  return _layer_norm(eps, x_BTD, weight, bias), (x_BTD, weight)


def _layer_norm_backward(eps: float, saved: Any, dy_BTD: jax.Array) -> tuple[jax.Array, ...]:
  """Read x and dy twice: for sums over a row, then for dx together with sums over all tokens.

  JAX's own transposition wrote a float32 product of them, to sum it for the weight.
  """
  x_BTD, weight = saved
  x, dy = x_BTD.astype(jnp.float32), dy_BTD.astype(jnp.float32)
  # One pass gives mean and variance. Relative to one of the row's own elements: its square is at
  # most D times the variance, so that the difference below loses at most log2(D) of 24 bits.
  origin = x[..., :1]
  offset = (x - origin).mean(-1, keepdims=True)
  variance = jnp.square(x - origin).mean(-1, keepdims=True) - jnp.square(offset)
  rstd = jax.lax.rsqrt(jnp.maximum(variance, 0) + eps)
  d_normed_mean = (dy * weight).mean(-1, keepdims=True)
  product = (dy * weight * (x - origin)).mean(-1, keepdims=True)
  slope = (product - d_normed_mean * offset) * rstd
  # Without the barrier XLA would compute them again in each of the fusions that follow.
  rows = (origin + offset, rstd, d_normed_mean, slope)
  mean, rstd, d_normed_mean, slope = jax.lax.optimization_barrier(rows)
  normed = (x - mean) * rstd
  dx = (dy * weight - d_normed_mean - normed * slope) * rstd
  return dx.astype(x_BTD.dtype), (dy * normed).sum((0, 1)), dy.sum((0, 1))


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
  """Return the tokens' rows, [B, T, D] in `dtype`, of a float32 table sharded on D.

  The gradient is a float32 scatter-add: on a GPU its order, hence its rounding, may vary.
  """
  lookup = functools.partial(_lookup, jnp.dtype(dtype))
  specs = (P(None, WEIGHT_AXES), BATCH)
  apply = jax.shard_map(lookup, in_specs=specs, out_specs=BATCH, check_vma=False)
  return apply(table_VD, tokens_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(dtype: Any, table: jax.Array, tokens_BT: jax.Array) -> jax.Array:
  whole_VD = jax.lax.all_gather(table.astype(dtype), WEIGHT_AXES, axis=1, tiled=True)
  return whole_VD[tokens_BT]


def _lookup_forward(dtype: Any, table: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, Any]:
  return _lookup(dtype, table, tokens_BT), (tokens_BT, table.shape[0])


def _lookup_backward(dtype: Any, saved: Any, d_rows_BTD: jax.Array) -> tuple[jax.Array, None]:
  del dtype
  tokens_BT, vocabulary = saved
  zeros = jnp.zeros((vocabulary, d_rows_BTD.shape[-1]), jnp.float32)
  d_whole = zeros.at[tokens_BT].add(d_rows_BTD.astype(jnp.float32))
  return jax.lax.psum_scatter(d_whole, WEIGHT_AXES, scatter_dimension=1, tiled=True), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def linear(x_BTi: jax.Array, weight_io: jax.Array, *, is_sharded: bool) -> jax.Array:
  """Return float32 [B, T, o]: x times a float32 weight cast to x's dtype, summed in float32.

  Args:
    x_BTi: sharded on B.
    weight_io: sharded on its inputs (`is_sharded`) or whole on every device.
    is_sharded: as said.
  """
  axes = WEIGHT_AXES if is_sharded else ()
  specs = (BATCH, P(axes or None, None))
  product = functools.partial(_product, axes)
  apply = jax.shard_map(product, in_specs=specs, out_specs=BATCH, check_vma=False)
  return apply(x_BTi, weight_io)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(axes: tuple[str, ...], x_BTi: jax.Array, weight: jax.Array) -> jax.Array:
  return _dot("bti,io->bto", x_BTi, _whole(axes, weight, x_BTi.dtype))


def _product_forward(
  axes: tuple[str, ...], x_BTi: jax.Array, weight: jax.Array
) -> tuple[jax.Array, Any]:
  return _product(axes, x_BTi, weight), (x_BTi, weight)


def _product_backward(
  axes: tuple[str, ...], saved: Any, dy_BTo: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x_BTi, weight = saved
  dy_BTo = dy_BTo.astype(x_BTi.dtype)
  dx_BTi = _dot("bto,io->bti", dy_BTo, _whole(axes, weight, x_BTi.dtype)).astype(x_BTi.dtype)
  d_weight = _dot("bti,bto->io", x_BTi, dy_BTo)
  if axes:
    d_weight = jax.lax.psum_scatter(d_weight, axes, scatter_dimension=0, tiled=True)
  return dx_BTi, d_weight


_product.defvjp(_product_forward, _product_backward)


def _whole(axes: tuple[str, ...], weight: jax.Array, dtype: Any) -> jax.Array:
  weight = weight.astype(dtype)
  return jax.lax.all_gather(weight, axes, axis=0, tiled=True) if axes else weight


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  precision = matmul_precision(a.dtype)
  return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zero elements with probability `rate` and scale the rest; the identity without a key."""
  if key is None or rate == 0:
    return x
  bits = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding)
  return jnp.where(bits, x / (1 - rate), 0).astype(x.dtype)
