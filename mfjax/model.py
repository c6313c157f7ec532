"""ModuleFormer (arXiv 2306.04640): pre-LayerNorm, no positional encoding, every layer routed.

    h = embed(tokens);  per layer: h += AttentionExperts(LN1(h)); h += FeedForwardExperts(LN2(h))

Outside this module a model is a pytree of parameters: nested dicts, layers stacked under 'blocks'.

Shapes: B batch rows, T positions, D d_model, V padded vocabulary, L layers, S cache positions.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from mfjax.attention import SAVED_ATTENTION, AttentionExperts, Cache
from mfjax.config import KernelConfig, MeshConfig, ModelConfig, Remat
from mfjax.experts import SAVED_HIDDEN, SAVED_PLAN, SAVED_QUERY, FeedForwardExperts
from mfjax.layers import LayerNorm, dropout, embed, normal, parameter
from mfjax.router import SAVED_CHOICE, SAVED_GATE, RouterStatistics
from mfjax.sharding import AXES, BATCH, Axes, gathered, spec
from pallas_kernels.precision import matmul_precision
from pallas_kernels.stick_breaking import SAVED

Params = dict[str, Any]

SAVED_RESIDUAL = "residual"


class Statistics(NamedTuple):
  """Router sums of a forward pass; every leaf has a leading layers dimension."""

  attention: RouterStatistics
  ff: RouterStatistics


class ModelCache(NamedTuple):
  """Decode cache of a whole model."""

  layers: Cache  # leaves [L, B, S, H, h]
  segments: jax.Array  # int32 [B, S]; 0 where nothing was written
  position: jax.Array  # int32 []: the next position


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """How a model is computed, apart from what it is."""

  mesh: MeshConfig = MeshConfig()
  kernels: KernelConfig = KernelConfig()
  remat: Remat = Remat.NONE


class Block(nnx.Module):
  """One layer."""

  def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs) -> None:
    self.dropout = config.residual_dropout
    self.norm1, self.norm2 = LayerNorm(config), LayerNorm(config)
    self.attention = AttentionExperts(config, execution.mesh, execution.kernels, rngs)
    self.ff = FeedForwardExperts(config, execution.mesh, execution.kernels, rngs)

  def __call__(
    self,
    h_BTD: jax.Array,
    segments_BT: jax.Array,
    key: jax.Array | None,
    cache: Cache | None,
    position: jax.Array | None,
    cache_segments_BS: jax.Array | None,
  ) -> tuple[jax.Array, Statistics, Cache | None]:
    keys = (None,) * 4 if key is None else jax.random.split(key, 4)
    y_BTD, attention_statistics, cache = self.attention(
      self.norm1(h_BTD), segments_BT, keys[0], cache, position, cache_segments_BS
    )
    h_BTD = checkpoint_name(h_BTD + dropout(y_BTD, self.dropout, keys[1]), SAVED_RESIDUAL)
    y_BTD, ff_statistics = self.ff(self.norm2(h_BTD), segments_BT > 0, keys[2])
    h_BTD = h_BTD + dropout(y_BTD, self.dropout, keys[3])
    return h_BTD, Statistics(attention_statistics, ff_statistics), cache


class ModuleFormer(nnx.Module):
  """The stack from tokens to the last layer's normalised output; lm_head is applied by the loss."""

  def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs) -> None:
    self.config, self.execution = config, execution

    def vocabulary_matrix() -> nnx.Param[jax.Array]:
      value = normal(rngs, (config.padded_vocab_size, config.d_model), config.d_model, config)
      used = jnp.arange(config.padded_vocab_size)[:, None] < config.vocab_size
      return parameter(jnp.where(used, value, 0), ("vocab", "d_model"))

    self.embedding, self.lm_head = vocabulary_matrix(), vocabulary_matrix()
    self.final_norm = LayerNorm(config)

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap
    def stack(rngs: nnx.Rngs) -> Block:
      return Block(config, execution, rngs)

    self.blocks = stack(rngs)

  def __call__(
    self,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    key: jax.Array | None = None,
    cache: ModelCache | None = None,
  ) -> tuple[jax.Array, Statistics, ModelCache | None]:
    """Run the stack.

    Args:
      tokens_BT: int32 ids; segments_BT: int32 documents of packed rows, 0 is padding.
      key: randomness of training (dropout, sampled top k); None outside training.
      cache: for decoding; the first call gives the prompt, later calls one token per row.

    Returns:
      [B, T, D] after the final LayerNorm in the compute dtype, router sums, and the new cache.
    """
    dtype = jnp.dtype(self.config.compute_dtype.value)
    keys = None
    if key is not None:
      key, embed_key = jax.random.split(key)
      keys = jax.random.split(key, self.config.num_layers)
    h_BTD = embed(self.embedding[...], tokens_BT, dtype)
    h_BTD = dropout(h_BTD, self.config.embedding_dropout, None if key is None else embed_key)
    if cache is not None:
      write = jax.lax.dynamic_update_slice_in_dim
      cache = cache._replace(segments=write(cache.segments, segments_BT, cache.position, 1))
    layer_caches, cache_segments, position = cache or (None, None, None)
    graph, stacked = nnx.split(self.blocks)

    def body(h_BTD: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
      params, layer_key, layer_cache = xs
      block = nnx.merge(graph, params)
      h_BTD, statistics, layer_cache = block(
        h_BTD, segments_BT, layer_key, layer_cache, position, cache_segments
      )
      return h_BTD, (statistics, layer_cache)

    body = _rematerialised(body, self.execution.remat)
    h_BTD, (statistics, layer_caches) = jax.lax.scan(body, h_BTD, (stacked, keys, layer_caches))
    if cache is not None:
      cache = ModelCache(layer_caches, cache.segments, cache.position + tokens_BT.shape[1])
    return self.final_norm(h_BTD), statistics, cache


def _rematerialised(body: Any, remat: Remat) -> Any:
  """Wrap a layer in the policy of what the backward pass recomputes."""
  if remat is Remat.NONE:
    return body
  saved = []
  if remat is Remat.SELECTIVE:
    saved = [SAVED_RESIDUAL, SAVED_GATE, SAVED_CHOICE, SAVED_HIDDEN, SAVED_PLAN, SAVED_QUERY]
    saved += [SAVED_ATTENTION, SAVED]
  policy = jax.checkpoint_policies.save_only_these_names(*saved)
  return jax.checkpoint(body, policy=policy, prevent_cse=False)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
  """Draw the parameters: nested dicts of float32; equal for every mesh."""
  model = ModuleFormer(config, Execution(), nnx.Rngs(params=key))
  return nnx.to_pure_dict(nnx.state(model))


@functools.cache
def _abstract(config: ModelConfig, execution: Execution) -> tuple[Any, Any]:
  """Return the graph definition and abstract state: shapes only, nothing is allocated."""
  return nnx.split(nnx.eval_shape(lambda: ModuleFormer(config, execution, nnx.Rngs(params=0))))


def apply(
  params: Params,
  config: ModelConfig,
  execution: Execution,
  tokens_BT: jax.Array,
  segments_BT: jax.Array,
  key: jax.Array | None = None,
  cache: ModelCache | None = None,
) -> tuple[jax.Array, Statistics, ModelCache | None]:
  """Run `ModuleFormer.__call__` with these parameters, inside `jax.set_mesh`."""
  graph, state = _abstract(config, execution)
  state = jax.tree.map(lambda x: x, state)  # A copy: the next line writes into it.
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graph, state)(tokens_BT, segments_BT, key, cache)


def abstract_params(config: ModelConfig) -> Params:
  """Return the parameters' shapes (jax.ShapeDtypeStruct), nested as in `init_params`."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    nnx.to_pure_dict(_abstract(config, Execution())[1]),
  )


def param_axes(config: ModelConfig) -> Any:
  """Return the parameters' logical axes, nested as in `init_params`; leaves are tuples."""
  axes: dict[str, Any] = {}
  for path, variable in nnx.to_flat_state(_abstract(config, Execution())[1]):
    node = axes
    for name in path[:-1]:
      node = node.setdefault(str(name), {})
    stacked: Axes = ("layers",) if path[0] == "blocks" else ()
    node[str(path[-1])] = stacked + variable.axes
  return axes


def cast_experts(params: Params, config: ModelConfig) -> Params:
  """Return the parameters with the experts' matrices, nearly all of them, in the compute dtype.

  Differentiated with respect to these, the model gives gradients of that dtype, each rounded once
  from a float32 sum, and the cast happens once a step instead of at every use.
  """
  dtype = jnp.dtype(config.compute_dtype.value)

  def cast(value: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    is_expert = axes[0] == "layers" and len(axes) == 4
    return value.astype(dtype) if is_expert else value

  return jax.tree.map(cast, params, param_axes(config))


def param_specs(config: ModelConfig, mesh: MeshConfig) -> Any:
  """Return the parameters' partitions, nested as in `init_params`."""
  return jax.tree.map(
    lambda axes: spec(axes, mesh), param_axes(config), is_leaf=lambda x: isinstance(x, tuple)
  )


def empty_cache(config: ModelConfig, batch: int, length: int) -> ModelCache:
  """Return a decode cache for `batch` rows of up to `length` positions, sharded by row."""
  dtype = jnp.dtype(config.compute_dtype.value)
  shape = (config.num_layers, batch, length, config.num_heads, config.head_dim)

  def zeros() -> jax.Array:
    return jax.sharding.reshard(jnp.zeros(shape, dtype), P(None, AXES))

  keys = zeros()
  values = None if config.identity_kv else zeros()
  segments = jax.sharding.reshard(jnp.zeros((batch, length), jnp.int32), BATCH)
  return ModelCache(Cache(keys, values), segments, jnp.int32(0))


def logits(params: Params, config: ModelConfig, hidden_BTD: jax.Array) -> jax.Array:
  """Return float32 [B, T, vocab_size] (for decoding and tests; the loss never holds them whole)."""
  head_VD = gathered(params["lm_head"], hidden_BTD.dtype)
  full = jnp.einsum(
    "btd,vd->btv",
    hidden_BTD,
    head_VD,
    precision=matmul_precision(hidden_BTD.dtype),
    preferred_element_type=jnp.float32,
  )
  return full[..., : config.vocab_size]
