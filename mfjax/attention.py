"""Attention experts: mixture of stick-breaking attention heads, and their decode cache.

Queries and output projections belong to experts; keys and values are shared by a layer's experts.
With one head as wide as the model there are no key and value matrices: K = V = the layer's input.

Shapes: B batch rows, T positions, K choices, D d_model, A d_attention, H heads, h head dim,
S cache positions, L layers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mfjax import experts
from mfjax.config import KernelConfig, MeshConfig, ModelConfig
from mfjax.layers import expert_matrix, linear, normal, parameter
from mfjax.router import Router, RouterStatistics
from mfjax.sharding import BATCH
from pallas_kernels.stick_breaking import stick_breaking_attention

SAVED_ATTENTION = "attention_output"


class Cache(NamedTuple):
  """Keys, values and segments of earlier positions; stacked over layers in the model.

  `values` is None where K = V. Positions not yet written have segment 0.
  """

  keys: jax.Array  # [B, S, H, h]
  values: jax.Array | None  # [B, S, H, h]


def write_cache(
  cache: Cache, keys: jax.Array, values: jax.Array | None, position: jax.Array
) -> Cache:
  """Return the cache with [B, T, H, h] keys and values written from `position` on."""
  write = jax.lax.dynamic_update_slice_in_dim
  new_values = cache.values
  if new_values is not None:
    assert values is not None
    new_values = write(new_values, values.astype(new_values.dtype), position, 1)
  return Cache(write(cache.keys, keys.astype(cache.keys.dtype), position, 1), new_values)


class AttentionExperts(nnx.Module):
  """Routed stick-breaking attention."""

  def __init__(
    self, config: ModelConfig, mesh: MeshConfig, kernels: KernelConfig, rngs: nnx.Rngs
  ) -> None:
    self.config, self.mesh, self.kernels = config, mesh, kernels
    num, d_model, width = config.num_attention_experts, config.d_model, config.d_attention
    self.router = Router(num, config.attention_top_k, config, rngs)
    w_query = expert_matrix(rngs, (num, d_model, width), config)
    w_out = expert_matrix(rngs, (num, width, d_model), config)
    in_axes = ("attention_experts", "attention_d_model", None)
    out_axes = ("attention_experts", None, "attention_d_model")
    bank = nnx.Dict(w_in=parameter(w_query, in_axes), w_out=parameter(w_out, out_axes))
    self.experts = nnx.Dict(bank_0=bank)
    if not config.identity_kv:

      def draw() -> tuple[nnx.Param[jax.Array], nnx.Param[jax.Array]]:
        weight = normal(rngs, (d_model, width), d_model, config)
        bias = jnp.zeros(width, jnp.float32)
        return parameter(weight, ("d_model", None)), parameter(bias, (None,))

      self.w_key, self.b_key = draw()
      self.w_value, self.b_value = draw()

  def __call__(
    self,
    x_BTD: jax.Array,
    segments_BT: jax.Array,
    key: jax.Array | None,
    cache: Cache | None = None,
    position: jax.Array | None = None,
    cache_segments_BS: jax.Array | None = None,
  ) -> tuple[jax.Array, RouterStatistics, Cache | None]:
    """Attend.

    Args:
      x_BTD: the layer's normalised input.
      segments_BT: documents of packed rows; 0 is padding.
      key: randomness of training; None outside.
      cache, position, cache_segments_BS: for decoding: what was kept of earlier positions, where
        the new ones go, and the cache's segments with the new ones already written. Several new
        tokens at once (prefill) start at position 0.

    Returns:
      [B, T, D], the router's sums, and the cache with the new positions.
    """
    routing, statistics = self.router(x_BTD, segments_BT > 0, key)
    k_BTHh, v_BTHh = self._keys_and_values(x_BTD)
    k_segments = segments_BT
    if cache is not None:
      assert position is not None and cache_segments_BS is not None
      cache = write_cache(cache, k_BTHh, v_BTHh, position)
      if x_BTD.shape[1] == 1:
        k_BTHh = cache.keys
        v_BTHh = cache.values
        k_segments = cache_segments_BS
    layout = experts.expert_layout(
      self.router.num_experts,
      self.router.top_k,
      self.mesh.attention_placement,
      self.mesh,
      self.kernels,
    )
    weights = experts.join_banks(self.experts)
    specs = experts.bank_specs(self.experts, self.mesh)
    attend = jax.shard_map(
      functools.partial(self._attend, layout),
      in_specs=(*(BATCH,) * 6, specs),
      out_specs=BATCH,
      check_vma=False,
    )
    segments = (segments_BT, k_segments)
    y_BTD = attend(x_BTD, k_BTHh, v_BTHh, segments, *routing, weights)
    return y_BTD, statistics, cache

  def _attend(
    self,
    layout: experts.ExpertLayout,
    x_BTD: jax.Array,
    k_BTHh: jax.Array,
    v_BTHh: jax.Array | None,
    segments: tuple[jax.Array, jax.Array],
    ids_BTK: jax.Array,
    p_BTK: jax.Array,
    weights: dict[str, jax.Array],
  ) -> jax.Array:
    """Return [B, T, D] of one device's rows: project in, attend, project out."""
    batch, length, d_model = x_BTD.shape
    plan = experts.make_plan(layout, ids_BTK.reshape(-1, layout.top_k))
    q_SA = experts.project_in(layout, x_BTD.reshape(-1, d_model), weights["w_in"], plan)
    heads = (self.config.num_heads, self.config.head_dim)
    o_BTKHh = stick_breaking_attention(
      q_SA.reshape(batch, length, layout.top_k, *heads),
      k_BTHh,
      v_BTHh,
      *segments,
      implementation=self.kernels.stick_breaking,
      eps=self.kernels.stick_breaking_eps,
    )
    # The barrier: see residuals.named. A kernel that is used and saved would run twice.
    o_SA = jax.lax.optimization_barrier(o_BTKHh.reshape(q_SA.shape))
    o_SA = checkpoint_name(o_SA, SAVED_ATTENTION)
    p_TK = p_BTK.reshape(-1, layout.top_k)
    return experts.project_out(layout, o_SA, p_TK, weights["w_out"], plan).reshape(x_BTD.shape)

  def _keys_and_values(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Return keys and values [B, T, H, h]; None for values that are the keys."""
    shape = (*x_BTD.shape[:2], self.config.num_heads, self.config.head_dim)
    if self.config.identity_kv:
      k_BTHh = x_BTD.reshape(shape, out_sharding=BATCH)
      return k_BTHh, None

    def project(weight: jax.Array, bias: jax.Array) -> jax.Array:
      y_BTA = linear(x_BTD, weight, is_sharded=True)
      return (y_BTA + bias).astype(x_BTD.dtype).reshape(shape, out_sharding=BATCH)

    return (
      project(self.w_key[...], self.b_key[...]),
      project(self.w_value[...], self.b_value[...]),
    )
