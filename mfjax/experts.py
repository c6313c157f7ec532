"""Routed experts: feed-forward networks, and the projections of attention experts.

Each operation is one custom gradient per layer, inside one shard_map: it gathers the weights over
the axes that shard them, moves tokens to experts and back (`mfjax/dispatch.py`), and saves its
inputs, the routing plan and (feed-forward) the first products. The backward pass replays the plan,
never scatters, and writes each weight gradient once, summed over the gathered axes.

    feed-forward   y_t = sum_{e in top k} p_te W_out[e] . gelu_tanh(W_in[e] x_t)
    project_in     q_te = W[e] x_t                       project_out   y_t = sum_e p_te W[e] o_te

The gradient of p needs no forward result: with u = dy_t W_out[e]^T it is <a, u>, a the activation.

Shapes: T tokens of one device, K choices per token, S = T*K slots, R rows sorted by expert,
E experts of one device, D d_model, F d_ff (or d_attention).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from mfjax import dispatch
from mfjax.config import KernelConfig, MeshConfig, ModelConfig, Placement
from mfjax.dispatch import Exchange, Plan, RowOrder
from mfjax.layers import expert_matrix, parameter
from mfjax.router import Router, RouterStatistics
from mfjax.sharding import BATCH, WEIGHT_AXES, spec
from pallas_kernels.grouped_matmul import (
  grouped_matmul,
  grouped_matmul_gelu,
  grouped_matmul_gelu_backward,
  grouped_outer,
)

SAVED_HIDDEN, SAVED_PLAN, SAVED_QUERY = "expert_hidden", "expert_plan", "expert_query"


@dataclasses.dataclass(frozen=True)
class ExpertLayout:
  """Static facts of one kind of expert layer on one device."""

  exchange: Exchange
  top_k: int
  gather_axes: tuple[str, ...]  # mesh axes over which d_model of the weights is gathered


def expert_layout(
  num_experts: int, top_k: int, placement: Placement, mesh: MeshConfig, kernels: KernelConfig
) -> ExpertLayout:
  """Return the layout for the mesh in context (`jax.set_mesh`)."""
  sizes = jax.sharding.get_abstract_mesh().shape
  num_peers = sizes["expert"]
  assert num_peers == 1 or placement is not Placement.AUTO, "the config is not resolved"
  crosses = placement is Placement.EXPERT and num_peers > 1
  exchange = Exchange(
    num_experts=num_experts,
    implementation=kernels.grouped_matmul,
    axis="expert" if crosses else None,
    num_peers=num_peers if crosses else 1,
    buffer=mesh.exchange_buffer,
    transport=mesh.transport,
    chunks=mesh.exchange_chunks if crosses else 1,
  )
  axes = ("fsdp",) if placement is Placement.EXPERT else WEIGHT_AXES
  return ExpertLayout(exchange, top_k, tuple(axis for axis in axes if sizes[axis] > 1))


def make_plan(layout: ExpertLayout, ids_TK: jax.Array) -> Plan:
  """Plan the routes of a layer's slots, once; experts `num_experts` are nobody's."""
  plan = dispatch.make_plan(ids_TK.reshape(-1), layout.exchange)
  return jax.tree.map(lambda x: checkpoint_name(x, SAVED_PLAN), plan)


class _Products:
  """The grouped products of one round: rows in expert order, this device's experts."""

  def __init__(self, plan: Plan, index: jax.Array, layout: ExpertLayout) -> None:
    self.plan, self.exchange, self.top_k = plan, layout.exchange, layout.top_k
    self.is_gathered = bool(layout.gather_axes)
    self.this = dispatch.make_round(plan, index, layout.exchange)
    num_slots = plan.expert_ids.shape[0]
    self.options: dict[str, Any] = {
      "alignment": dispatch.alignment(num_slots, layout.exchange),
      "implementation": layout.exchange.implementation,
    }

  def kept(self, rows: jax.Array) -> jax.Array | None:
    """Return rows that the backward pass should not exchange again; gathering them is cheap."""
    return None if self.exchange.axis is None else rows

  def token_rows(self, x_TD: jax.Array, is_alone: bool = True) -> jax.Array:
    options: dict[str, Any] = {"per_token": self.top_k, "is_alone": is_alone}
    return dispatch.to_experts(x_TD, self.plan, self.this, self.exchange, **options)

  def slot_rows(self, x_SF: jax.Array, is_alone: bool = True) -> jax.Array:
    return dispatch.to_experts(x_SF, self.plan, self.this, self.exchange, is_alone=is_alone)

  def slots(self, rows: jax.Array, so_far: jax.Array | None, is_alone: bool = False) -> jax.Array:
    return dispatch.to_home(rows, self.plan, self.this, self.exchange, so_far, is_alone=is_alone)

  def matmul(self, rows: jax.Array, weights: jax.Array, transpose: bool = False) -> jax.Array:
    sizes = self.this.order.group_sizes
    return grouped_matmul(rows, weights, sizes, transpose_rhs=transpose, **self.options)

  def matmul_gelu(self, rows: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    return grouped_matmul_gelu(rows, weights, self.this.order.group_sizes, **self.options)

  def matmul_gelu_backward(
    self, dy_rows: jax.Array, w_out: jax.Array, hidden: jax.Array, p_rows: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    sizes = self.this.order.group_sizes
    return grouped_matmul_gelu_backward(dy_rows, w_out, hidden, p_rows, sizes, **self.options)

  def outer(self, a: jax.Array, b: jax.Array, total: jax.Array | None, dtype: Any) -> jax.Array:
    """Add per group a's rows times b's: float32, or `dtype` where there is nothing to add to."""
    is_all = isinstance(self.plan.route, RowOrder) and not self.is_gathered
    dtype = dtype if is_all else jnp.float32
    product = grouped_outer(a, b, self.this.order.group_sizes, out_dtype=dtype, **self.options)
    return product if total is None else total + product


def _rounds(
  plan: Plan,
  layout: ExpertLayout,
  run: Callable[[jax.Array, Any, Any], tuple[Any, Any]],
  kept: Sequence[Any] = (),
) -> tuple[Any, list[Any]]:
  """Fold `run(index, sums, kept) -> (sums, what to keep)` over all rounds, from sums None on.

  The rounds that always happen are unrolled: rows of one can travel while another's are computed.
  Only they keep something for the backward pass, whose `run` gets it. Later ones happen only under
  skew: memory stays flat.
  """
  chunks = layout.exchange.chunks
  sums, made = None, []
  for index in range(chunks):
    sums, keep = run(jnp.int32(index), sums, kept[index] if kept else None)
    made.append(keep)
  if isinstance(plan.route, RowOrder):
    return sums, made
  later = lambda index, sums: run(index, sums, None)[0]  # noqa: E731
  return jax.lax.fori_loop(chunks, plan.route.num_rounds, later, sums), made


def _home(values: jax.Array, plan: Plan, layout: ExpertLayout) -> jax.Array:
  """Return [S, ...]: what all rounds brought home, by slot."""
  return dispatch.settle(values, plan, layout.exchange)


def _gather(weights: jax.Array, dim: int, layout: ExpertLayout, dtype: Any) -> jax.Array:
  """Return [E, in, out] in the compute dtype, whole along d_model (dimension `dim`)."""
  weights = weights.astype(dtype)
  if not layout.gather_axes:
    return weights
  return jax.lax.all_gather(weights, layout.gather_axes, axis=dim, tiled=True)


def _scatter(gradient: jax.Array, dim: int, layout: ExpertLayout, dtype: Any) -> jax.Array:
  """Return this device's part of a weight gradient, summed over the gathered axes, in `dtype`."""
  if layout.gather_axes:
    gradient = jax.lax.psum_scatter(gradient, layout.gather_axes, scatter_dimension=dim, tiled=True)
  return gradient.astype(dtype)


def _weighted_sum(y_SD: jax.Array, p_TK: jax.Array, dtype: Any) -> jax.Array:
  # Not an einsum: a GPU would get a batch of tiny matrix products and no fusion with the gather.
  y_TKD = y_SD.reshape(*p_TK.shape, -1)
  return (y_TKD * p_TK[:, :, None]).sum(1, dtype=jnp.float32).astype(dtype)


def _sum_choices(dx_SD: jax.Array, top_k: int, dtype: Any) -> jax.Array:
  dx_TKD = dx_SD.reshape(-1, top_k, dx_SD.shape[-1])
  return dx_TKD.sum(1, dtype=jnp.float32).astype(dtype)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return (a.astype(jnp.float32) * b).sum(1)


# Feed-forward experts -----------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def feed_forward(
  layout: ExpertLayout,
  x_TD: jax.Array,
  p_TK: jax.Array,
  w_in: jax.Array,
  w_out: jax.Array,
  plan: Plan,
) -> jax.Array:
  """Return [T, D] in x's dtype.

  Args:
    layout: static.
    x_TD: tokens of this device. p_TK: float32 combine weights.
    w_in, w_out: [E, D / gathered, F], [E, F, D / gathered]: this device's shards, float32 or x's
      dtype. Their gradients are summed in float32 and have the weights' dtype.
    plan: where the tokens go.
  """
  return _feed_forward(layout, x_TD, p_TK, w_in, w_out, plan)[0]


def _feed_forward(
  layout: ExpertLayout,
  x_TD: jax.Array,
  p_TK: jax.Array,
  w_in: jax.Array,
  w_out: jax.Array,
  plan: Plan,
) -> tuple[jax.Array, Any]:
  dtype = x_TD.dtype
  w_in_full = _gather(w_in, 1, layout, dtype)
  w_out_full = _gather(w_out, 2, layout, dtype)

  def run(index: jax.Array, y_SD: jax.Array | None, _: None) -> tuple[jax.Array, Any]:
    products = _Products(plan, index, layout)
    x_rows = products.token_rows(x_TD)
    hidden, activation = products.matmul_gelu(x_rows, w_in_full)
    hidden = checkpoint_name(hidden, SAVED_HIDDEN)
    y_rows = products.matmul(activation, w_out_full)
    return products.slots(y_rows, y_SD), (hidden, products.kept(x_rows))

  y_SD, kept = _rounds(plan, layout, run)
  y_SD = _home(y_SD, plan, layout)
  return _weighted_sum(y_SD, p_TK, dtype), (x_TD, p_TK, w_in, w_out, plan, kept)


def _feed_forward_backward(layout: ExpertLayout, saved: Any, dy_TD: jax.Array) -> Any:
  x_TD, p_TK, w_in, w_out, plan, kept = saved
  dtype = x_TD.dtype
  w_in_full = _gather(w_in, 1, layout, dtype)
  w_out_full = _gather(w_out, 2, layout, dtype)

  def run(index: jax.Array, sums: Any, kept: Any) -> tuple[Any, None]:
    dx_SD, dp_S, dw_in, dw_out = sums or (None, None, None, None)
    products = _Products(plan, index, layout)
    hidden, x_rows = kept or (None, None)
    x_rows = products.token_rows(x_TD) if x_rows is None else x_rows
    if hidden is None:
      hidden = products.matmul(x_rows, w_in_full)
    dy_rows = products.token_rows(dy_TD)
    p_rows = products.slot_rows(p_TK.reshape(-1))
    d_hidden, weighted, dp_rows = products.matmul_gelu_backward(dy_rows, w_out_full, hidden, p_rows)
    dp_S = products.slots(dp_rows, dp_S)
    dw_out = products.outer(weighted, dy_rows, dw_out, w_out.dtype)
    dw_in = products.outer(x_rows, d_hidden, dw_in, w_in.dtype)
    dx_SD = products.slots(products.matmul(d_hidden, w_in_full, transpose=True), dx_SD)
    return (dx_SD, dp_S, dw_in, dw_out), None

  (dx_SD, dp_S, dw_in, dw_out), _ = _rounds(plan, layout, run, kept)
  dx_TD = _sum_choices(_home(dx_SD, plan, layout), layout.top_k, dtype)
  dp_S = _home(dp_S, plan, layout)
  dw_in = _scatter(dw_in, 1, layout, w_in.dtype)
  dw_out = _scatter(dw_out, 2, layout, w_out.dtype)
  return dx_TD, dp_S.reshape(p_TK.shape), dw_in, dw_out, None


feed_forward.defvjp(_feed_forward, _feed_forward_backward)


# Projections of attention experts -----------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project_in(layout: ExpertLayout, x_TD: jax.Array, w: jax.Array, plan: Plan) -> jax.Array:
  """Return [S, F]: each token through the matrix [E, D / gathered, F] of each of its experts."""
  return _project_in(layout, x_TD, w, plan)[0]


def _project_in(
  layout: ExpertLayout, x_TD: jax.Array, w: jax.Array, plan: Plan
) -> tuple[jax.Array, Any]:
  w_full = _gather(w, 1, layout, x_TD.dtype)

  def run(index: jax.Array, q_SF: jax.Array | None, _: None) -> tuple[jax.Array, Any]:
    products = _Products(plan, index, layout)
    x_rows = products.token_rows(x_TD)
    q_rows = products.matmul(x_rows, w_full)
    return products.slots(q_rows, q_SF, is_alone=True), products.kept(x_rows)

  q_SF, kept = _rounds(plan, layout, run)
  q_SF = _home(q_SF, plan, layout)
  # The barrier: what is saved is a copy, or XLA would gather the rows once more to save them.
  q_SF = jax.lax.optimization_barrier(q_SF)
  q_SF = checkpoint_name(q_SF, SAVED_QUERY)
  return q_SF, (x_TD, w, plan, kept)


def _project_in_backward(layout: ExpertLayout, saved: Any, dq_SF: jax.Array) -> Any:
  x_TD, w, plan, kept = saved
  w_full = _gather(w, 1, layout, x_TD.dtype)

  def run(index: jax.Array, sums: Any, x_rows: jax.Array | None) -> tuple[Any, None]:
    dx_SD, dw = sums or (None, None)
    products = _Products(plan, index, layout)
    dq_rows = products.slot_rows(dq_SF)
    x_rows = products.token_rows(x_TD) if x_rows is None else x_rows
    dw = products.outer(x_rows, dq_rows, dw, w.dtype)
    dx_SD = products.slots(products.matmul(dq_rows, w_full, transpose=True), dx_SD)
    return (dx_SD, dw), None

  (dx_SD, dw), _ = _rounds(plan, layout, run, kept)
  dx_TD = _sum_choices(_home(dx_SD, plan, layout), layout.top_k, x_TD.dtype)
  return dx_TD, _scatter(dw, 1, layout, w.dtype), None


project_in.defvjp(_project_in, _project_in_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project_out(
  layout: ExpertLayout, o_SF: jax.Array, p_TK: jax.Array, w: jax.Array, plan: Plan
) -> jax.Array:
  """Return [T, D]: the weighted sum over a token's slots of o times [E, F, D / gathered].

  A weight p below float32's normal numbers gets the gradient 0: p is a probability, and what passes
  on through a softmax is p times its gradient.
  """
  return _project_out(layout, o_SF, p_TK, w, plan)[0]


def _project_out(
  layout: ExpertLayout, o_SF: jax.Array, p_TK: jax.Array, w: jax.Array, plan: Plan
) -> tuple[jax.Array, Any]:
  w_full = _gather(w, 2, layout, o_SF.dtype)

  def run(index: jax.Array, y_SD: jax.Array | None, _: None) -> tuple[jax.Array, Any]:
    products = _Products(plan, index, layout)
    o_rows = products.slot_rows(o_SF)
    return products.slots(products.matmul(o_rows, w_full), y_SD), products.kept(o_rows)

  y_SD, kept = _rounds(plan, layout, run)
  y_SD = _home(y_SD, plan, layout)
  return _weighted_sum(y_SD, p_TK, o_SF.dtype), (o_SF, p_TK, w, plan, kept)


def _project_out_backward(layout: ExpertLayout, saved: Any, dy_TD: jax.Array) -> Any:
  o_SF, p_TK, w, plan, kept = saved
  dtype = o_SF.dtype
  w_full = _gather(w, 2, layout, dtype)

  def run(index: jax.Array, sums: Any, o_rows: jax.Array | None) -> tuple[Any, None]:
    do_SF, dw = sums or (None, None)
    products = _Products(plan, index, layout)
    # XLA takes both in one pass, and the weights with them. In dy they reach both results.
    p_rows = products.slot_rows(p_TK.reshape(-1))
    dy_rows = (products.token_rows(dy_TD, is_alone=False) * p_rows[:, None]).astype(dtype)
    o_rows = products.slot_rows(o_SF, is_alone=False) if o_rows is None else o_rows
    dw = products.outer(o_rows, dy_rows, dw, w.dtype)
    do_rows = products.matmul(dy_rows, w_full, transpose=True)
    return (products.slots(do_rows, do_SF, is_alone=True), dw), None

  (do_SF, dw), _ = _rounds(plan, layout, run, kept)
  do_SF = _home(do_SF, plan, layout)
  # do = p u. A probability that underflowed to 0 passes no gradient on, nor does padding's weight.
  dp_TK = _dot(o_SF, do_SF).reshape(p_TK.shape)
  dp_TK = jnp.where(p_TK < jnp.finfo(jnp.float32).tiny, 0, dp_TK / p_TK)
  return do_SF, dp_TK, _scatter(dw, 2, layout, w.dtype), None


project_out.defvjp(_project_out, _project_out_backward)


# Banks and modules --------------------------------------------------------------------------------


def join_banks(banks: Any) -> dict[str, jax.Array]:
  """Return {'w_in': [E, D, F], 'w_out': [E, F, D]}: the banks of a layer joined along experts."""
  names = sorted(banks)
  if len(names) == 1:
    return {name: banks[names[0]][name][...] for name in ("w_in", "w_out")}
  return {w: jnp.concatenate([banks[name][w][...] for name in names]) for w in ("w_in", "w_out")}


def bank_specs(banks: Any, mesh: MeshConfig) -> dict[str, P]:
  """Return the partition of `join_banks`' result: how shard_map receives the weights."""
  bank = banks[sorted(banks)[0]]
  return {name: spec(bank[name].axes, mesh) for name in ("w_in", "w_out")}


class FeedForwardExperts(nnx.Module):
  """Routed feed-forward networks."""

  def __init__(
    self, config: ModelConfig, mesh: MeshConfig, kernels: KernelConfig, rngs: nnx.Rngs
  ) -> None:
    self.mesh, self.kernels = mesh, kernels
    num, d_model, d_ff = config.num_ff_experts, config.d_model, config.d_ff
    self.router = Router(num, config.ff_top_k, config, rngs)
    w_in = expert_matrix(rngs, (num, d_model, d_ff), config)
    w_out = expert_matrix(rngs, (num, d_ff, d_model), config)
    in_axes, out_axes = ("ff_experts", "ff_d_model", None), ("ff_experts", None, "ff_d_model")
    bank = nnx.Dict(w_in=parameter(w_in, in_axes), w_out=parameter(w_out, out_axes))
    self.experts = nnx.Dict(bank_0=bank)

  def __call__(
    self, x_BTD: jax.Array, is_token_BT: jax.Array, key: jax.Array | None
  ) -> tuple[jax.Array, RouterStatistics]:
    """Return [B, T, D] (zero for padding) and the router's sums; x is the normalised input."""
    routing, statistics = self.router(x_BTD, is_token_BT, key)
    layout = expert_layout(
      self.router.num_experts, self.router.top_k, self.mesh.ff_placement, self.mesh, self.kernels
    )

    def local(
      x_BTD: jax.Array, ids_BTK: jax.Array, p_BTK: jax.Array, weights: dict[str, jax.Array]
    ) -> jax.Array:
      x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
      plan = make_plan(layout, ids_BTK.reshape(-1, layout.top_k))
      p_TK = p_BTK.reshape(-1, layout.top_k)
      y_TD = feed_forward(layout, x_TD, p_TK, weights["w_in"], weights["w_out"], plan)
      return y_TD.reshape(x_BTD.shape)

    specs = bank_specs(self.experts, self.mesh)
    apply = jax.shard_map(
      local, in_specs=(BATCH, BATCH, BATCH, specs), out_specs=BATCH, check_vma=False
    )
    return apply(x_BTD, *routing, join_banks(self.experts)), statistics
