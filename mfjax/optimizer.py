"""AdamW with warm-up schedules, as an optax chain; number formats of gradients and moments."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mfjax.config import DType, OptimizerConfig, Schedule


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Return the learning rate by optimizer step: linear warm-up, then the configured shape.

  `cosine` falls to final_fraction of the peak at `steps`; `wsd` stays at the peak and falls
  linearly over the last decay_fraction of `steps`; `constant` stays.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  final = peak * config.final_fraction
  rest = max(1, steps - warmup)
  match config.schedule:
    case Schedule.COSINE:
      after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    case Schedule.WSD:
      decay = min(rest, round(steps * config.decay_fraction))
      parts = [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)]
      after = optax.join_schedules(parts, [rest - decay])
    case Schedule.CONSTANT:
      after = optax.constant_schedule(peak)
  # Step 0 already learns: the rate reaches its peak at step `warmup` - 1.
  ramp = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
  return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
  config: OptimizerConfig, steps: int, param_axes: Any
) -> optax.GradientTransformation:
  """Return the chain: clip by global norm, Adam, decay of matrices, learning rate.

  Args:
    config: as documented there. steps: length of the schedule.
    param_axes: tree of logical axes; vectors (norms, biases, temperatures) do not decay.
  """
  decays = jax.tree.map(
    lambda axes: len(axes) - (axes[0] == "layers") >= 2,
    param_axes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  adam = optax.scale_by_adam(
    config.beta1, config.beta2, config.eps, mu_dtype=jnp.dtype(config.first_moment_dtype.value)
  )
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  return optax.chain(
    clip,
    _stored_second_moment(adam, config.second_moment_dtype),
    optax.add_decayed_weights(config.weight_decay, mask=decays),
    optax.scale_by_learning_rate(make_schedule(config, steps)),
  )


def _stored_second_moment(
  adam: optax.GradientTransformation, dtype: DType
) -> optax.GradientTransformation:
  """Keep Adam's second moment in `dtype` between steps (optax offers this for the first alone)."""
  if dtype is DType.FLOAT32:
    return adam

  def cast(state: optax.ScaleByAdamState, to: Any) -> optax.ScaleByAdamState:
    return state._replace(nu=jax.tree.map(lambda x: x.astype(to), state.nu))

  def init(params: Any) -> Any:
    return cast(adam.init(params), dtype.value)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, state = adam.update(updates, cast(state, jnp.float32), params)
    return updates, cast(state, dtype.value)

  return optax.GradientTransformation(init, update)


def learning_rate(config: OptimizerConfig, steps: int, optimizer_state: Any) -> jax.Array:
  """Return the rate of the coming update; skipped steps do not move the schedule."""
  count = optax.tree.get_all_with_path(optimizer_state, "count")[-1][1]
  return jnp.asarray(make_schedule(config, steps)(count), jnp.float32)
