"""A step of one line in place of the model, for tests of what processes do to each other.

Loop, data, checkpoints, processes and collectives are the real ones; only the minutes that several
processes need to compile a model on two cores are saved. The parameters are spread over all
devices, and each loss depends on every token of all batches so far and on its place: exactly, and
so that it is the same bits on every layout.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mfjax import metrics, plot, sharding, train, train_step
from mfjax.data.pipeline import TrainStream

SIZE = 64
PACE_SECONDS = 0.1  # Between batches, so that a test can hit the run in its middle.


def abstract_state(config, mesh):
  def array(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  return {
    "params": {"w": array((SIZE,), jnp.float32, sharding.BATCH)},
    "optimizer": {"m": array((SIZE,), jnp.float32, sharding.BATCH)},
    "step": array((), jnp.int32, PartitionSpec()),
    "skipped": array((), jnp.int32, PartitionSpec()),
  }


def init_state(config, mesh):
  def zeros(x):
    return jax.make_array_from_callback(
      x.shape, x.sharding, lambda index: np.zeros(x.shape, x.dtype)[index]
    )

  return jax.tree.map(zeros, abstract_state(config, mesh))


def make_train_step(config, mesh):
  def step(state, batch):
    w = 0.9 * state["params"]["w"] + _digest(batch["tokens"])
    loss = jnp.max(w)  # They are all equal.
    load = {"picks": jnp.ones((1, 2)), "prob_sum": jnp.ones((1, 2))}
    load |= {"entropy_sum": jnp.zeros(1), "tokens": jnp.float32(2)}
    scalars = ("loss", "cross_entropy", "z_loss", "aux_loss", "gradient_norm", "learning_rate")
    step_metrics = {
      **dict.fromkeys(scalars, loss),
      "tokens": jnp.float32(batch["tokens"].size),
      "skipped": jnp.float32(0),
      "skipped_in_a_row": jnp.int32(0),
      "router": {"attention": load, "ff": load},
    }
    optimizer = {"m": state["optimizer"]["m"] + 1}
    new = {"params": {"w": w}, "optimizer": optimizer, "step": state["step"] + 1}
    return new | {"skipped": state["skipped"]}, step_metrics

  return jax.jit(step, donate_argnums=0)


def _digest(tokens):
  """Return a number in [0, 1) that depends on each token and its row and position."""
  sharding = jax.typeof(tokens).sharding
  row, position = (
    jax.lax.broadcasted_iota(jnp.uint32, tokens.shape, dim, out_sharding=sharding) for dim in (0, 1)
  )
  place = (row * tokens.shape[1] + position) * np.uint32(2654435761) + 1
  total = jnp.sum(tokens.astype(jnp.uint32) * place)  # Modulo 2^32, in whatever order.
  return (total >> 16).astype(jnp.float32) / 2**16


def make_eval_step(config, mesh):
  def step(params, batch):
    inside = batch["segment_ids"] > 0
    return {"nats": jnp.mean(params["w"]) * jnp.sum(inside), "tokens": jnp.sum(inside)}

  return jax.jit(step)


def install() -> None:
  """Put the step in the model's place, in this process."""
  usual = TrainStream.__next__

  def next_batch(stream):
    time.sleep(PACE_SECONDS)
    return usual(stream)

  TrainStream.__next__ = next_batch
  train_step.resolve = lambda config, mesh: config
  train_step.abstract_state = abstract_state
  train_step.init_state = init_state
  train_step.make_train_step = make_train_step
  train.evaluate.make_eval_step = make_eval_step
  metrics.device_peak = lambda *_: metrics.Peak(1e12, "no device")
  plot.draw = lambda workdir: []
