"""The stand-in computes what ragged is specified to; a plan's slices are valid for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfjax import dispatch, sharding, transport
from mfjax.config import MeshConfig, Transport
from mfjax.dispatch import Exchange
from mfjax.sharding import P
from mfjax.transport import Slices
from pallas_kernels.implementation import Implementation

PEERS = 4


def over_peers(function, *args):
  """Run `function` on four peers along `expert`, leading dimensions of all arguments split."""
  mesh = sharding.make_mesh(MeshConfig(data=1, expert=PEERS), jax.devices()[:PEERS])
  split = jax.sharding.NamedSharding(mesh, P("expert"))
  run = jax.shard_map(
    function, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
  )
  return jax.device_get(jax.jit(run)(*jax.device_put(args, split)))


def specified(operands, outputs, slices):
  """Return what `jax.lax.ragged_all_to_all`'s documentation says, loop by loop."""
  results = outputs.copy()
  for sender in range(PEERS):
    start, size, target, _ = (np.asarray(x)[sender] for x in slices)
    for receiver in range(PEERS):
      rows = operands[sender, start[receiver] : start[receiver] + size[receiver]]
      results[receiver, target[receiver] : target[receiver] + size[receiver]] = rows
  return results


@pytest.mark.parametrize("width", [(), (3,)])
def test_stand_in_is_what_ragged_all_to_all_is_specified_to_be(width):
  rng = np.random.default_rng(0)
  sizes = rng.integers(0, 5, (PEERS, PEERS)).astype(np.int32)
  sizes[1, 2] = 0
  starts = np.cumsum(sizes, 1, dtype=np.int32) - sizes + 1  # A row that nobody gets comes first.
  targets = np.cumsum(sizes, 0, dtype=np.int32) - sizes + 2
  slices = Slices(starts, sizes, targets, sizes.T.copy())
  operands = rng.standard_normal((PEERS, 20, *width)).astype(np.float32)
  outputs = rng.standard_normal((PEERS, 24, *width)).astype(np.float32)

  def local(operand, output, *slices):
    mine = Slices(*(x[0] for x in slices))
    return transport.send(operand[0], output[0], mine, "expert", Transport.RAGGED_STAND_IN)[None]

  received = over_peers(local, operands, outputs, *slices)
  np.testing.assert_array_equal(received, specified(operands, outputs, slices))


@pytest.mark.parametrize("skew", [1, 2, PEERS])
@pytest.mark.parametrize("chunks", [1, 3])
def test_slices_of_a_plan_agree_between_peers_and_carry_every_slot_once(skew, chunks):
  num_slots, num_experts = 60, 8
  exchange = Exchange(
    num_experts, Implementation.XLA, "expert", PEERS, 1.0, Transport.RAGGED_STAND_IN, chunks
  )
  rng = np.random.default_rng(skew)
  ids = np.tile(np.arange(num_slots, dtype=np.int32) % num_experts, (PEERS, 1))
  ids[rng.random(ids.shape) < (skew - 1) / (PEERS - 1)] = 5
  ids[:, ::7] = num_experts  # Nobody's.
  most_rounds = chunks * PEERS

  def local(ids):
    plan = dispatch.make_plan(ids[0], exchange)
    rounds = [dispatch.make_round(plan, jnp.int32(i), exchange) for i in range(most_rounds)]
    slices = [[jnp.stack(way) for way in this.sent] for this in rounds]
    received = jnp.stack([this.order.group_sizes for this in rounds])
    return jnp.array(slices)[None], received[None], plan.route.num_rounds[None]

  slices, group_sizes, rounds = over_peers(local, ids)
  there, back = slices[:, :, 0], slices[:, :, 1]  # [peers, rounds, 4, peers]
  rows = dispatch.buffer_rows(num_slots, exchange)
  assert rounds.max() == rounds.min() <= most_rounds
  assert (rounds[0] > chunks) == (skew > 1)
  for way in (there, back):
    np.testing.assert_array_equal(way[:, :, 1], way[:, :, 3].transpose(2, 1, 0))
  for receiver in range(PEERS):
    for number in range(most_rounds):
      start, size = there[:, number, 2, receiver], there[:, number, 1, receiver]
      filled = np.concatenate([np.arange(a, a + n) for a, n in zip(start, size, strict=True)])
      np.testing.assert_array_equal(np.sort(filled), np.arange(len(filled)))
      assert len(filled) <= rows
      assert len(filled) == group_sizes[receiver, number].sum()
      assert number < rounds[0] or not len(filled)
  for sender in range(PEERS):
    start, size = there[sender, :, 0].reshape(-1), there[sender, :, 1].reshape(-1)
    sent = np.concatenate([np.arange(a, a + n) for a, n in zip(start, size, strict=True)])
    np.testing.assert_array_equal(np.sort(sent), np.arange((ids[sender] < num_experts).sum()))
    # The way back ends where the way there began.
    np.testing.assert_array_equal(back[:, :, 2, sender].T, there[sender, :, 0])
  total = np.bincount(ids.reshape(-1), minlength=num_experts + 1)[:num_experts]
  np.testing.assert_array_equal(group_sizes.sum(1).reshape(-1), total)


def test_auto_is_the_platforms_and_ragged_is_refused_where_it_does_not_exist():
  expected = {
    "cpu": Transport.RAGGED_STAND_IN,
    "gpu": Transport.PADDED,
    "tpu": Transport.RAGGED,
  }
  for platform, choice in expected.items():
    assert transport.resolve(Transport.AUTO, platform) is choice
    assert transport.resolve(Transport.PADDED, platform) is Transport.PADDED
  with pytest.raises(ValueError, match="mesh.transport=ragged does not exist on cpu: use ragged_s"):
    transport.resolve(Transport.RAGGED, "cpu")
