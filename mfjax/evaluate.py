"""Held-out loss as sums over tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mfjax import losses, model
from mfjax.config import Remat, RunConfig
from mfjax.train_step import execution, in_mesh


def make_eval_step(
  config: RunConfig, mesh: Mesh
) -> Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]:
  """Return the jitted (params, batch) -> {'nats', 'tokens'}: global float32 sums.

  Args:
    config: resolved (`train_step.resolve`).
    mesh: the mesh of params and batch; batch as in training.
  """
  how = dataclasses.replace(execution(config), remat=Remat.NONE)

  def step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    segments = batch["segment_ids"]
    hidden, _, _ = model.apply(params, config.model, how, batch["tokens"], segments)
    sums = losses.cross_entropy(
      params["lm_head"],
      hidden,
      batch["targets"],
      segments > 0,
      vocab_size=config.model.vocab_size,
      z_weight=0.0,
      chunk_tokens=config.loss.chunk_tokens,
    )
    return {"nats": sums.nats, "tokens": (segments > 0).sum(dtype=jnp.float32)}

  return in_mesh(jax.jit(step), mesh)
