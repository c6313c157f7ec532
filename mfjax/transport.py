"""How buffers of rows cross the mesh axis of the experts, inside a shard_map.

`padded` sends every peer equally many rows. `ragged` sends slices of any sizes; on a TPU it is one
operation of the hardware's. The stand-in computes what ragged is specified to, from an all-gather,
for platforms that lack it: every offset and size that ragged would use is used.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mfjax.config import Transport


class Slices(NamedTuple):
  """Which rows each peer gets and where; all int32 [P], as `jax.lax.ragged_all_to_all` has them."""

  input_offsets: jax.Array  # where a peer's rows begin here
  send_sizes: jax.Array
  output_offsets: jax.Array  # where they go on that peer
  recv_sizes: jax.Array


_CHOICES = {"cpu": Transport.RAGGED_STAND_IN, "gpu": Transport.PADDED, "tpu": Transport.RAGGED}


def resolve(transport: Transport, platform: str) -> Transport:
  """Return the transport with AUTO replaced by the platform's.

  Raises:
    ValueError: the platform cannot; names what can.
  """
  if transport is Transport.AUTO:
    return _CHOICES[platform]
  if transport is Transport.RAGGED and platform == "cpu":
    raise ValueError(
      "mesh.transport=ragged does not exist on cpu: use ragged_stand_in, which computes the same, "
      "or padded"
    )
  return transport


def swap(buffer: jax.Array, axis: str) -> jax.Array:
  """Send buffer[p] to peer p; the result's p-th part came from peer p."""
  return jax.lax.all_to_all(buffer, axis, 0, 0)


def send(
  operand: jax.Array, output: jax.Array, slices: Slices, axis: str, transport: Transport
) -> jax.Array:
  """Return `output` [M, ...] with the rows of `operand` [N, ...] that peers sent to this device."""
  if transport is Transport.RAGGED:
    return jax.lax.ragged_all_to_all(operand, output, *slices, axis_name=axis)
  assert transport is Transport.RAGGED_STAND_IN, transport
  return _stand_in(operand, output, slices, axis)


def _stand_in(operand: jax.Array, output: jax.Array, slices: Slices, axis: str) -> jax.Array:
  num_rows, me = operand.shape[0], jax.lax.axis_index(axis)
  everything = jax.lax.all_gather(operand, axis, tiled=True)
  sent = jax.lax.all_gather(jnp.stack(slices[:3]), axis)[:, :, me]
  starts, sizes, targets = (sent[:, i, None] for i in range(3))
  row = jnp.arange(output.shape[0])
  comes = (row >= targets) & (row < targets + sizes)  # [P, M]
  peer = jnp.arange(sent.shape[0])[:, None]
  source = jnp.where(comes, peer * num_rows + starts + row - targets, 0).sum(0)
  came = comes.any(0).reshape(-1, *(1,) * (output.ndim - 1))
  return jnp.where(came, everything[source], output)
