"""Sampled continuations: prefill of the prompt, then one token at a time against the cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mfjax import model, sharding
from mfjax.config import Remat, RunConfig
from mfjax.train_step import execution, in_mesh


def sample(
  params: Any,
  config: RunConfig,
  mesh: Mesh,
  prompt: np.ndarray,
  num_tokens: int,
  *,
  temperature: float = 1.0,
  seed: int = 0,
) -> np.ndarray:
  """Continue one prompt.

  Args:
    params: on the mesh. config: resolved (`train_step.resolve`).
    prompt: int [n] token ids, at least one. num_tokens: length of the continuation.
    temperature: divides the logits; 0 takes the most likely token.
    seed: of the draws; equal seeds give equal tokens.

  Returns:
    int32 [num_tokens].

  Raises:
    ValueError: an empty prompt or continuation.
  """
  if num_tokens < 1:
    raise ValueError(f"num_tokens={num_tokens} must be positive")
  if len(prompt) == 0:
    raise ValueError("the prompt has no token: begin with end-of-text")
  how = dataclasses.replace(execution(config), remat=Remat.NONE)
  # Rows are sharded over all devices: each device continues a copy of the prompt.
  rows = np.tile(np.asarray(prompt, np.int32), (len(mesh.local_devices), 1))

  def choose(params: Any, hidden: jax.Array, key: jax.Array) -> jax.Array:
    logits = model.logits(params, config.model, hidden[:, -1:])[:, 0]
    logits = jax.sharding.reshard(logits, P(None, None))[0]
    if temperature == 0:
      return logits.argmax().astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

  def run(params: Any, tokens: jax.Array, cache: model.ModelCache, key: jax.Array) -> Any:
    segments = jax.sharding.reshard(jnp.ones(tokens.shape, jnp.int32), sharding.BATCH)
    hidden, _, extended = model.apply(params, config.model, how, tokens, segments, cache=cache)
    return choose(params, hidden, key), extended

  def generate(params: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
    cache = model.empty_cache(config.model, mesh.size, tokens.shape[1] + num_tokens)
    keys = jax.random.split(key, num_tokens)
    first, cache = run(params, tokens, cache, keys[0])

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
      token, cache = carry
      column = jax.sharding.reshard(jnp.full((mesh.size, 1), token), sharding.BATCH)
      return run(params, column, cache, key), token

    (last, _), tokens = jax.lax.scan(step, (first, cache), keys[1:])
    return jnp.append(tokens, last)

  placed = sharding.device_batch(mesh, {"tokens": rows})["tokens"]
  tokens = in_mesh(jax.jit(generate), mesh)(params, placed, jax.random.key(seed))
  return np.asarray(tokens)
