"""A routed feed-forward layer beside a dense one of the same active FLOPs."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mfjax import dispatch, experts, sharding
from mfjax.bench.timing import Call, take_turns
from mfjax.config import KernelConfig, MeshConfig, Placement
from pallas_kernels import grouped_matmul
from pallas_kernels.implementation import Implementation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertShape:
  """Sizes of the measured layer."""

  tokens: int = 4096
  d_model: int = 512
  d_ff: int = 1024
  num_experts: int = 32
  top_k: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertTiming:
  """One routing's result; seconds are medians, routed and dense calls taking turns."""

  routing: str
  rows_ratio: float  # rows that the grouped products compute / active rows: the FLOPs' ratio
  forward: float
  dense_forward: float
  training: float  # forward and backward
  dense_training: float


def measure(shape: ExpertShape, device: jax.Device, repeats: int) -> list[ExpertTiming]:
  """Time the layer under balanced, random and skewed routing, after checking its values.

  The dense layer has one matrix pair of d_ff * top_k: the same active FLOPs. In float32 on a CPU,
  bfloat16 elsewhere.

  Raises:
    AssertionError: the routed layer's values are wrong.
  """
  dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
  with jax.set_mesh(sharding.make_mesh(MeshConfig(), [device])):
    return list(_measure(shape, device, dtype, repeats))


def _balanced(shape: ExpertShape, rng: np.random.Generator) -> np.ndarray:
  slots = np.arange(shape.tokens * shape.top_k) % shape.num_experts
  return slots.reshape(shape.tokens, shape.top_k)


def _random(shape: ExpertShape, rng: np.random.Generator) -> np.ndarray:
  return rng.random((shape.tokens, shape.num_experts)).argsort(1)[:, : shape.top_k]


def _skewed(shape: ExpertShape, rng: np.random.Generator) -> np.ndarray:
  """Send every token's first choice to expert 0."""
  ids = _random(shape, rng)
  ids[:, 1:] = np.where(ids[:, 1:] == 0, 1, ids[:, 1:])
  ids[:, 0] = 0
  return ids


_ROUTINGS = {"balanced": _balanced, "random": _random, "half to one": _skewed}


def _measure(
  shape: ExpertShape, device: jax.Device, dtype: Any, repeats: int
) -> Iterator[ExpertTiming]:
  products = ((shape.num_experts, shape.d_model, shape.d_ff),)
  kernels = KernelConfig(
    grouped_matmul=grouped_matmul.resolve(Implementation.AUTO, device.platform, dtype, products)
  )
  layout = experts.expert_layout(
    shape.num_experts, shape.top_k, Placement.EXPERT, MeshConfig(), kernels
  )
  keys = iter(jax.random.split(jax.random.key(0), 5))

  def draw(*size: int) -> jax.Array:
    return jax.random.normal(next(keys), size) * size[-2] ** -0.5

  d_model, d_ff, wide = shape.d_model, shape.d_ff, shape.d_ff * shape.top_k
  x = jax.random.normal(next(keys), (shape.tokens, d_model), dtype)
  weights = jnp.full((shape.tokens, shape.top_k), 1 / shape.top_k, jnp.float32)
  w_in, w_out = draw(shape.num_experts, d_model, d_ff), draw(shape.num_experts, d_ff, d_model)

  def local(
    x: jax.Array, w_in: jax.Array, w_out: jax.Array, weights: jax.Array, ids: jax.Array
  ) -> jax.Array:
    plan = experts.make_plan(layout, ids)
    return experts.feed_forward(layout, x, weights, w_in, w_out, plan)

  routed = jax.shard_map(local, in_specs=P(), out_specs=P(), check_vma=False)

  def dense(x: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ w_in.astype(dtype), approximate=True) @ w_out.astype(dtype)

  functions: dict[str, Callable[..., Any]] = {
    "routed": jax.jit(routed),
    "dense": jax.jit(dense),
    "routed training": jax.jit(_with_gradients(routed)),
    "dense training": jax.jit(_with_gradients(dense)),
  }
  dense_args = (x, draw(d_model, wide), draw(wide, d_model))
  tile = dispatch.alignment(shape.tokens * shape.top_k, layout.exchange)
  for name, routing in _ROUTINGS.items():
    ids = routing(shape, np.random.default_rng(0)).astype(np.int32)
    args = {"routed": (x, w_in, w_out, weights, jnp.asarray(ids)), "dense": dense_args}
    _check(functions["routed"](*args["routed"]), x, w_in, w_out, ids, dtype)
    calls = {name: Call(function, args[name.split()[0]]) for name, function in functions.items()}
    seconds: dict[str, float] = {}
    for pair in (("routed", "dense"), ("routed training", "dense training")):
      seconds |= take_turns({name: calls[name] for name in pair}, repeats)
    computed = sum(-(-size // tile) * tile for size in np.bincount(ids.ravel()))
    yield ExpertTiming(
      routing=name,
      rows_ratio=computed / ids.size,
      forward=seconds["routed"],
      dense_forward=seconds["dense"],
      training=seconds["routed training"],
      dense_training=seconds["dense training"],
    )


def _with_gradients(layer: Callable[..., jax.Array]) -> Callable[..., Any]:
  def loss(*args: jax.Array) -> jax.Array:
    return jnp.square(layer(*args).astype(jnp.float32)).sum()

  return jax.value_and_grad(loss, argnums=(0, 1, 2))


def _check(
  actual: jax.Array, x: jax.Array, w_in: jax.Array, w_out: jax.Array, ids: np.ndarray, dtype: Any
) -> None:
  """Compare the first tokens with their experts applied one by one."""
  for token in range(4):
    row = x[token].astype(jnp.float32)
    outputs = [jax.nn.gelu(row @ w_in[e], approximate=True) @ w_out[e] for e in ids[token]]
    expected = np.mean(np.stack(outputs), axis=0)
    tolerance = 1e-4 if dtype == jnp.float32 else 3e-2
    np.testing.assert_allclose(actual[token], expected, rtol=tolerance, atol=tolerance)
