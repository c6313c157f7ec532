"""One training step: a pure function of (state, batch), jitted over the mesh.

State: {'params', 'optimizer', 'step': int32, 'skipped': int32 steps skipped in a row}. Randomness
of step n is fold_in(key(seed), n). Same seed and mesh give the same bits on CPU and TPU; on a GPU
the embedding's gradient is a scatter-add, deterministic only under --xla_gpu_deterministic_ops.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import pallas_kernels.grouped_matmul as grouped_matmul
import pallas_kernels.stick_breaking as stick_breaking
from mfjax import compiler_options, losses, model, placement, sharding
from mfjax.config import AuxLoss, KernelConfig, ModelConfig, RunConfig, Statistics
from mfjax.model import Execution
from mfjax.optimizer import learning_rate, make_optimizer
from mfjax.router import RouterStatistics

State = dict[str, Any]
Batch = dict[str, jax.Array]
Metrics = dict[str, Any]


def resolve_kernels(config: KernelConfig, platform: str, model: ModelConfig) -> KernelConfig:
  """Return the config with AUTO replaced by a platform's choice for a model, and checked.

  Args:
    config: the choices. platform: 'cpu', 'gpu' or 'tpu'. model: what will be computed.

  Raises:
    NotImplementedError: a choice that cannot run there or do these sizes; names what can.
  """
  dtype = jnp.dtype(model.compute_dtype.value)
  products = (
    (model.num_attention_experts, model.d_model, model.d_attention),
    (model.num_attention_experts, model.d_attention, model.d_model),
    (model.num_ff_experts, model.d_model, model.d_ff),
    (model.num_ff_experts, model.d_ff, model.d_model),
  )
  heads, slots = (model.num_heads, model.head_dim), model.attention_top_k
  return dataclasses.replace(
    config,
    grouped_matmul=grouped_matmul.resolve(config.grouped_matmul, platform, dtype, products),
    stick_breaking=stick_breaking.resolve(
      config.stick_breaking, platform, dtype, heads, slots, model.identity_kv
    ),
  )


def resolve(config: RunConfig, mesh: Mesh) -> RunConfig:
  """Return the config with kernels, transport and placements decided, after checking all sizes.

  Raises:
    ValueError: a size does not divide, or a kernel does not exist; names what would work.
  """
  sizes, device = dict(mesh.shape), mesh.devices.flat[0]
  placed = placement.resolve(config, sizes, device.platform, device.device_kind)
  config = dataclasses.replace(config, mesh=placed)
  sharding.check_divisible(config.model, config.mesh, config.data, config.train.microbatches, sizes)
  try:
    kernels = resolve_kernels(config.kernels, device.platform, config.model)
  except NotImplementedError as error:
    raise ValueError(f"config.kernels: {error}") from error
  return dataclasses.replace(config, kernels=kernels)


def execution(config: RunConfig) -> Execution:
  """Return how the model of a resolved config is computed in training."""
  return Execution(mesh=config.mesh, kernels=config.kernels, remat=config.train.remat)


def _optimizer(config: RunConfig) -> optax.GradientTransformation:
  axes = model.param_axes(config.model)
  return make_optimizer(config.optimizer, config.train.steps, axes)


def _init(config: RunConfig, key: jax.Array) -> State:
  params = model.init_params(config.model, key)
  return {
    "params": params,
    "optimizer": _optimizer(config).init(params),
    "step": jnp.int32(0),
    "skipped": jnp.int32(0),
  }


def state_specs(config: RunConfig) -> Any:
  """Return the partition of every leaf of the state: moments are sharded as their parameters."""
  specs = model.param_specs(config.model, config.mesh)
  params = model.abstract_params(config.model)
  optimizer = _optimizer(config)
  moments = optax.tree_map_params(
    optimizer,
    lambda _, spec: spec,
    jax.eval_shape(optimizer.init, params),
    specs,
    transform_non_params=lambda _: P(),
  )
  return {"params": specs, "optimizer": moments, "step": P(), "skipped": P()}


def abstract_state(config: RunConfig, mesh: Mesh) -> State:
  """Return the state as jax.ShapeDtypeStructs with shardings; nothing is allocated."""
  shapes = jax.eval_shape(lambda: _init(config, jax.random.key(0)))
  placed = sharding.shardings(mesh, state_specs(config))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
  )


def init_state(config: RunConfig, mesh: Mesh) -> State:
  """Draw the state of step 0 from train.seed, each device its own part; equal on every mesh."""
  # The compiler spreads the random numbers over the devices; explicit axes would replicate them.
  placed = sharding.shardings(sharding.compiler_mesh(mesh), state_specs(config))
  key = jax.random.key(config.train.seed)
  state = jax.jit(lambda: _init(config, key), out_shardings=placed)()
  return jax.device_put(state, sharding.shardings(mesh, state_specs(config)))


def make_train_step(
  config: RunConfig, mesh: Mesh
) -> Callable[[State, Batch], tuple[State, Metrics]]:
  """Return the jitted step of a resolved config; it donates the state.

  A step whose loss or gradient is not finite changes `step` and `skipped` alone.

  Returns:
    (state, batch) -> (state, metrics). Batch: int32 [rows, T] `tokens`, `targets`, `segment_ids`
    (0: padding). Metrics: float32 scalars over the global batch, and the routers' sums.
  """
  optimizer = _optimizer(config)

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    key = jax.random.fold_in(jax.random.key(config.train.seed), state["step"])
    gradients, metrics = _gradients(config, state["params"], batch, key)
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    updates, moments = optimizer.update(gradients, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    old, new = (state["params"], state["optimizer"]), (params, moments)
    params, moments = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    metrics |= {
      "gradient_norm": norm,
      "learning_rate": learning_rate(config.optimizer, config.train.steps, state["optimizer"]),
      "skipped": (~finite).astype(jnp.float32),
      "skipped_in_a_row": jnp.where(finite, 0, state["skipped"] + 1),
    }
    state = {
      "params": params,
      "optimizer": moments,
      "step": state["step"] + 1,
      "skipped": metrics["skipped_in_a_row"],
    }
    return state, metrics

  platform = mesh.devices.flat[0].platform
  options = compiler_options.options(platform, config.kernels.compiler_preset)
  return in_mesh(jax.jit(step, donate_argnums=0, compiler_options=options), mesh)


def in_mesh(function: Any, mesh: Mesh) -> Any:
  """Return the jitted function called, or lowered, inside `jax.set_mesh(mesh)`."""

  def call(*args: Any) -> Any:
    with jax.set_mesh(mesh):
      return function(*args)

  def lower(*args: Any) -> Any:
    with jax.set_mesh(mesh):
      return function.lower(*args)

  call.lower = lower  # type: ignore[attr-defined]
  return call


def _gradients(config: RunConfig, params: Any, batch: Batch, key: jax.Array) -> tuple[Any, Metrics]:
  """Return gradients and metrics of a batch, summed over its microbatches."""
  count = config.train.microbatches
  tokens = jnp.maximum((batch["segment_ids"] > 0).sum(dtype=jnp.float32), 1)
  dtype = jnp.dtype(config.optimizer.gradient_dtype.value)
  if config.optimizer.gradient_dtype is config.model.compute_dtype:
    params = model.cast_experts(params, config.model)
  zero_sums = _zero_sums(config)
  micro = [jax.tree.map(lambda x: _strided(x, count), batch), jax.random.split(key, count)]

  def router_sums(total: Any, xs: Any) -> tuple[Any, None]:
    part, part_key = xs
    _, sums, _ = _forward(config, params, part, part_key)
    return jax.tree.map(jnp.add, total, sums), None

  whole = zero_sums
  has_aux = config.loss.aux is not AuxLoss.NONE and config.loss.aux_weight > 0
  if config.loss.statistics is Statistics.EXACT and count > 1 and has_aux:
    whole, _ = jax.lax.scan(router_sums, zero_sums, tuple(micro))

  def objective(params: Any, xs: Any, before: Any) -> tuple[jax.Array, Any]:
    part, part_key = xs
    hidden, sums, _ = _forward(config, params, part, part_key)
    entropy = losses.cross_entropy(
      params["lm_head"],
      hidden,
      part["targets"],
      part["segment_ids"] > 0,
      vocab_size=config.model.vocab_size,
      z_weight=config.loss.z_weight,
      chunk_tokens=config.loss.chunk_tokens,
    )
    exact = whole if count > 1 else sums
    aux = losses.aux_objective(sums, before, exact, tokens, config.loss)
    return entropy.objective / tokens + config.loss.aux_weight * aux, (entropy, sums)

  def accumulate(carry: Any, xs: Any) -> tuple[Any, None]:
    gradients, entropy, sums = carry
    part_gradients, part_sums = jax.grad(objective, has_aux=True)(params, xs, sums)
    gradients = jax.tree.map(lambda a, b: a + b.astype(dtype), gradients, part_gradients)
    return (gradients, *jax.tree.map(jnp.add, (entropy, sums), part_sums)), None

  zero_entropy = losses.CrossEntropy(*(jnp.float32(0),) * 3)
  if count == 1:
    first = jax.tree.map(lambda x: x[0], tuple(micro))
    gradients, (entropy, sums) = jax.grad(objective, has_aux=True)(params, first, zero_sums)
    gradients = jax.tree.map(lambda g: g.astype(dtype), gradients)
  else:
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params)
    carry = (zeros, zero_entropy, zero_sums)
    (gradients, entropy, sums), _ = jax.lax.scan(accumulate, carry, tuple(micro))
  return gradients, _loss_metrics(config, entropy, sums, tokens)


def _forward(config: RunConfig, params: Any, part: Batch, key: jax.Array) -> Any:
  tokens, segments = part["tokens"], part["segment_ids"]
  needed = key if config.model.is_random else None
  return model.apply(params, config.model, execution(config), tokens, segments, needed)


def _strided(rows: jax.Array, count: int) -> jax.Array:
  """Return [count, rows / count, ...]: microbatch i holds rows i, i + count, ...

  So that which rows a microbatch holds does not depend on the mesh, and no row changes its device.
  """
  shape = (rows.shape[0] // count, count, *rows.shape[1:])
  return jnp.moveaxis(rows.reshape(shape, out_sharding=sharding.BATCH), 1, 0)


def _zero_sums(config: RunConfig) -> model.Statistics:
  layers = config.model.num_layers

  def zeros(num_experts: int) -> RouterStatistics:
    per_layer, per_expert = jnp.zeros(layers), jnp.zeros((layers, num_experts))
    return RouterStatistics(per_layer, per_expert, per_expert, per_layer, per_layer)

  return model.Statistics(
    zeros(config.model.num_attention_experts), zeros(config.model.num_ff_experts)
  )


def _loss_metrics(
  config: RunConfig, entropy: losses.CrossEntropy, sums: model.Statistics, tokens: jax.Array
) -> Metrics:
  z_loss = config.loss.z_weight * entropy.square_logsumexp / tokens
  aux = config.loss.aux_weight * losses.aux_loss(sums, config.loss.aux)
  return {
    "loss": entropy.nats / tokens + z_loss + aux,
    "cross_entropy": entropy.nats / tokens,
    "z_loss": z_loss,
    "aux_loss": aux,
    "tokens": tokens,
    "router": {"attention": sums.attention._asdict(), "ff": sums.ff._asdict()},
  }
