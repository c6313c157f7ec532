import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfjax import dispatch, experts, sharding
from mfjax.config import KernelConfig, MeshConfig, Placement
from mfjax.dispatch import Exchange
from pallas_kernels.grouped_matmul import group_starts
from pallas_kernels.implementation import Implementation

TOKENS, TOP_K, NUM, D_MODEL, D_FF = 40, 2, 6, 8, 12
KERNELS = KernelConfig(grouped_matmul=Implementation.XLA)


def nan_in_unused_rows(function):
  """Wrap a grouped matmul so that rows between groups come back as NaN."""

  def call(lhs, rhs, group_sizes, **options):
    out = function(lhs, rhs, group_sizes, **options)
    starts = group_starts(group_sizes, options["alignment"])
    row = jnp.arange(out.shape[0])[:, None]
    used = ((row >= starts) & (row < starts + group_sizes)).any(1)
    return jnp.where(used[:, None], out, jnp.nan)

  return call


def inputs():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
  ids = rng.integers(0, NUM + 1, (TOKENS, TOP_K))  # NUM is nobody.
  x, p = draw(TOKENS, D_MODEL), jnp.where(ids < NUM, jnp.abs(draw(TOKENS, TOP_K)), 0)
  return x, p, draw(NUM, D_MODEL, D_FF), draw(NUM, D_FF, D_MODEL), jnp.asarray(ids, jnp.int32)


def dense(x, p, w_in, w_out, ids):
  """Apply every expert to every token and keep the chosen ones."""
  hidden = jax.nn.gelu(jnp.einsum("td,edf->tef", x, w_in), approximate=True)
  y = jnp.einsum("tef,efd->ted", hidden, w_out)
  return jnp.einsum("tk,tke,ted->td", p, jax.nn.one_hot(ids, NUM), y)


def routed(x, p, w_in, w_out, ids):
  layout = experts.expert_layout(NUM, TOP_K, Placement.EXPERT, MeshConfig(), KERNELS)

  def local(x, p, w_in, w_out, ids):
    return experts.feed_forward(layout, x, p, w_in, w_out, experts.make_plan(layout, ids))

  replicated = sharding.P()
  apply = jax.shard_map(local, in_specs=replicated, out_specs=replicated, check_vma=False)
  return apply(x, p, w_in, w_out, ids)


def projected(x, p, w_in, w_out, ids):
  layout = experts.expert_layout(NUM, TOP_K, Placement.EXPERT, MeshConfig(), KERNELS)

  def local(x, p, w_in, w_out, ids):
    plan = experts.make_plan(layout, ids)
    hidden = jax.nn.gelu(experts.project_in(layout, x, w_in, plan), approximate=True)
    return experts.project_out(layout, hidden, p, w_out, plan)

  replicated = sharding.P()
  apply = jax.shard_map(local, in_specs=replicated, out_specs=replicated, check_vma=False)
  return apply(x, p, w_in, w_out, ids)


@pytest.mark.parametrize("layer", [routed, projected])
def test_layer_and_gradients_equal_dense_with_nan_in_unused_rows(layer, monkeypatch):
  monkeypatch.setattr(experts, "grouped_matmul", nan_in_unused_rows(experts.grouped_matmul))
  *args, ids = inputs()
  weights = jnp.asarray(np.random.default_rng(1).standard_normal((TOKENS, D_MODEL)), jnp.float32)

  def run(function):
    loss = lambda *args: (function(*args, ids) * weights).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*args)

  with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
    ours, expected = run(layer), run(dense)
  # Nobody's weight is zero by contract, and takes no gradient.
  mask = np.asarray(ids) < NUM
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    if a.shape == mask.shape:
      a, b = a * mask, b * mask
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [routed, projected])
@pytest.mark.parametrize("weight", [0.0, 1e-39, 1e-30])
def test_a_vanishing_combine_weight_leaves_gradients_finite(weight, layer):
  x, p, *matrices, ids = inputs()
  chosen = np.asarray(ids) < NUM
  row, choice = np.argwhere(chosen)[0]
  p = p.at[row, choice].set(weight)

  def loss(p, x):
    return layer(x, p, *matrices, ids).sum()

  with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
    dp, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(p, x)
    expected = jax.grad(lambda p: dense(x, p, *matrices, ids).sum())(p)
  assert np.isfinite(dp)[chosen].all()
  assert np.isfinite(dx).all()
  # Attention's way home takes what is below float32's normal numbers, and its gradient, for zero.
  is_zero = layer is projected and weight < np.finfo(np.float32).tiny
  np.testing.assert_allclose(dp[row, choice], 0 if is_zero else expected[row, choice], rtol=1e-3)


@pytest.mark.parametrize("routing", ["balanced", "one row each, then all to one"])
def test_computed_rows_stay_near_the_active_ones(routing):
  num_slots, num_experts = 4096 * 2, 32
  exchange = Exchange(num_experts, Implementation.XLA)
  tile = dispatch.alignment(num_slots, exchange)
  ids = np.arange(num_slots) % num_experts
  if routing != "balanced":  # The most that padding can cost: 31 tiles for 31 rows.
    ids[num_experts:] = 0
  sizes = np.bincount(ids, minlength=num_experts)
  computed = (-(-sizes // tile) * tile).sum()
  assert computed <= 1.3 * num_slots
  rows = dispatch.order_rows(jnp.asarray(ids, jnp.int32), num_experts, tile).slot_of_row
  assert computed <= len(rows) <= 1.3 * num_slots
