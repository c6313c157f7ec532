"""How buffers of rows cross the mesh axis of the experts, inside a shard_map.

`padded` sends every peer equally many rows. `ragged` sends slices of any sizes; on a TPU it is one
operation of its own. The stand-in computes what ragged is specified to from a padded all-to-all,
for platforms that lack it: every offset and size that ragged would use is used. Rows of one number
go that way on a TPU, too, where ragged would make 512 bytes of each.
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
  assert transport is not Transport.PADDED
  if transport is Transport.RAGGED and operand.ndim > 1:
    return jax.lax.ragged_all_to_all(operand, output, *slices, axis_name=axis)
  return _stand_in(operand, output, slices, axis)


def _stand_in(operand: jax.Array, output: jax.Array, slices: Slices, axis: str) -> jax.Array:
  """Compute the same from an all-to-all whose parts hold the longest slice there can be."""
  start, size = slices.input_offsets[:, None], slices.send_sizes[:, None]
  part = min(operand.shape[0], output.shape[0])
  row = jnp.arange(part)
  index = jnp.where(row < size, start + row, operand.shape[0])
  received = swap(operand.at[index].get(mode="fill", fill_value=0), axis)  # [P, part, ...]
  target, size = swap(slices.output_offsets, axis)[:, None], slices.recv_sizes[:, None]
  row = jnp.arange(output.shape[0])
  comes = (row >= target) & (row < target + size)  # [P, M]
  peer = jnp.arange(comes.shape[0])[:, None]
  source = jnp.where(comes, peer * part + row - target, 0).sum(0)
  came = comes.any(0).reshape(-1, *(1,) * (output.ndim - 1))
  return jnp.where(came, received.reshape(-1, *output.shape[1:])[source], output)
