import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfjax import dispatch, sharding
from mfjax.config import MeshConfig, Transport
from mfjax.dispatch import Exchange
from mfjax.sharding import P
from pallas_kernels.grouped_matmul import group_starts
from pallas_kernels.implementation import Implementation


@settings(max_examples=60, deadline=None)
@given(
  ids=st.lists(st.integers(0, 6), min_size=40, max_size=40), alignment=st.sampled_from([1, 8, 16])
)
def test_order_is_a_stable_sort_and_its_inverse(ids, alignment):
  num_experts = 6  # Expert 6 is nobody.
  ids = np.array(ids, np.int32)
  order = jax.tree.map(np.asarray, dispatch.order_rows(jnp.asarray(ids), num_experts, alignment))
  np.testing.assert_array_equal(order.group_sizes, np.bincount(ids, minlength=7)[:6])
  starts = np.asarray(group_starts(jnp.asarray(order.group_sizes), alignment))
  for expert in range(num_experts):
    rows = order.slot_of_row[starts[expert] : starts[expert] + order.group_sizes[expert]]
    np.testing.assert_array_equal(rows, np.flatnonzero(ids == expert))
  used = order.slot_of_row < len(ids)
  assert used.sum() == order.group_sizes.sum()
  np.testing.assert_array_equal(order.row_of_slot[order.slot_of_row[used]], np.flatnonzero(used))
  assert (order.row_of_slot[ids == num_experts] == len(order.slot_of_row)).all()


@pytest.mark.parametrize("skew", ["uniform", "all to one", "half skewed", "some to nobody"])
@pytest.mark.parametrize(
  ("transport", "buffer", "chunks"),
  [
    (Transport.PADDED, 1.5, 1),
    (Transport.RAGGED_STAND_IN, 1.5, 2),
    pytest.param(Transport.PADDED, 1.0, 2, marks=pytest.mark.slow),
    pytest.param(Transport.RAGGED_STAND_IN, 1.0, 1, marks=pytest.mark.slow),
  ],
)
def test_dispatch_then_combine_is_the_identity_across_devices(skew, transport, buffer, chunks):
  num_experts, top_k, tokens = 8, 2, 24
  mesh = sharding.make_mesh(MeshConfig(data=2, expert=4), jax.devices())
  rng = np.random.default_rng(0)
  ids = rng.integers(0, num_experts, (8 * tokens * top_k,)).astype(np.int32)
  if skew == "all to one":
    ids[:] = 5
  if skew == "half skewed":  # The two data groups need different numbers of rounds.
    ids[len(ids) // 2 :] = 5
  if skew == "some to nobody":
    ids[::3] = num_experts
  x = rng.standard_normal((8 * tokens, 4)).astype(np.float32)
  exchange = Exchange(num_experts, Implementation.XLA, "expert", 4, buffer, transport, chunks)

  def local(x, ids):
    plan = dispatch.make_plan(ids, exchange)
    me = jax.lax.axis_index("expert")

    def run(index, so_far):
      this = dispatch.make_round(plan, index, exchange)
      rows = dispatch.to_experts(x, plan, this, exchange, top_k)
      sizes = this.order.group_sizes
      starts = group_starts(sizes, dispatch.alignment(ids.shape[0], exchange))
      row = jnp.arange(rows.shape[0])[:, None]
      inside = (row >= starts) & (row < starts + sizes)
      # What an expert does to its rows: add its number; rows of nobody turn into NaN.
      expert = (inside * (me * 2 + jnp.arange(2))).sum(1, keepdims=True)
      rows = jnp.where(inside.any(1, keepdims=True), rows + expert, jnp.nan)
      return dispatch.to_home(rows, plan, this, exchange, so_far)

    first = run(jnp.int32(0), None)
    home = jax.lax.fori_loop(1, plan.route.num_rounds, run, first)
    home = dispatch.settle(home, plan, exchange)
    # A collective over the other axis meets groups that looped for different times.
    groups = jax.lax.psum(jnp.float32(1), "data")
    return home * groups / 2, plan.route.num_rounds[None]

  sharded = P(("data", "expert"))
  function = jax.shard_map(
    local, mesh=mesh, in_specs=(sharded, sharded), out_specs=(sharded, sharded), check_vma=False
  )
  put = lambda v: jax.device_put(v, jax.sharding.NamedSharding(mesh, sharded))  # noqa: E731
  home, rounds = jax.jit(function)(put(x), put(ids))
  expected = np.repeat(x, top_k, 0) + ids[:, None]
  expected[ids == num_experts] = 0
  np.testing.assert_allclose(home, expected, rtol=1e-6)
  first, second = np.asarray(rounds).reshape(2, 4)
  assert len(set(first)) == len(set(second)) == 1
  most = int(np.ceil(4 / buffer * chunks))
  assert (first[0] == most) == (skew == "all to one")
  assert (second[0] == most) == (skew in ("all to one", "half skewed"))
