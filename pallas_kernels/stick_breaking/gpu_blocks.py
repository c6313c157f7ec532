"""Which blocks of keys a tile of queries sees, and where segments have to be compared.

Computed by XLA from the smallest and largest segment of every block and tile: no pair of positions
is looked at. Blocks hold 64 keys. A range may hold blocks that turn out to be invisible where
segments are not contiguous, never the reverse.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.stick_breaking.gpu_scan import KEYS, ROWS

Segments = tuple[jax.Array, jax.Array]
_LARGEST = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What the kernels read of the segments; for tiles of some number of queries.

  first, last: int32 [b, tiles]: first and last visible block; where there is none, one past all
    blocks and -1.
  plain_from: int32 [b, tiles]: from this block up to the diagonal, all keys are in the segment of
    all queries.
  q_segments, k_segments: int32 [b, queries or keys], padded.
  tile: queries of a tile.
  """

  first: jax.Array
  last: jax.Array
  plain_from: jax.Array
  q_segments: jax.Array
  k_segments: jax.Array
  tile: int


jax.tree_util.register_dataclass(
  Blocks,
  data_fields=("first", "last", "plain_from", "q_segments", "k_segments"),
  meta_fields=("tile",),
)


def blocks_of(segments: Segments, tile: int, num_queries: int, num_keys: int) -> Blocks:
  """Return Blocks for tiles of `tile` queries; queries and keys padded to these numbers."""
  lengths = [x.shape[1] for x in segments]
  # Padding repeats the last one: it is never stored, or hidden by the diagonal, and must not make
  # a block seem to have a border.
  q_segments, k_segments = (
    jnp.pad(x, ((0, 0), (0, length - x.shape[1])), mode="edge")
    for x, length in zip(segments, (num_queries, num_keys), strict=True)
  )
  blocks = [x.reshape(x.shape[0], -1, KEYS) for x in (q_segments, k_segments)]
  parts = blocks[0].shape[1]
  bounds = _bounds(jnp.concatenate(blocks, axis=1))
  q_low, q_high, q_least = (x[:, :parts] for x in bounds)
  k_low, k_high, k_least = (x[:, None, parts:] for x in bounds)
  num_tiles = -(-lengths[0] // tile)
  shape = (q_low.shape[0], -1, tile // ROWS)
  q_low, q_least = (x.reshape(shape).min(-1)[:, :num_tiles, None] for x in (q_low, q_least))
  q_high = q_high.reshape(shape).max(-1)[:, :num_tiles, None]

  last_query = jnp.minimum((jnp.arange(num_tiles) + 1) * tile, lengths[0]) - 1
  block = jnp.arange(num_keys // KEYS)
  causal = block * KEYS <= last_query[:, None] + (lengths[1] - lengths[0])
  visible = (k_low <= q_high) & (k_high >= q_low) & causal
  # Blocks that hold one segment only, padding included, which is the tile's only one.
  plain = (q_least == q_high) & (q_high == k_high) & (k_least == k_high) & (k_high > 0)
  # One reduction, as a kernel that short costs no more than its launch.
  first, last, plain_from = lax.reduce(
    (
      jnp.where(visible, block, num_keys // KEYS),
      jnp.where(visible, block, -1),
      jnp.where(causal & ~plain, block + 1, 0),
    ),
    (jnp.int32(num_keys // KEYS), jnp.int32(-1), jnp.int32(0)),
    lambda x, y: (lax.min(x[0], y[0]), lax.max(x[1], y[1]), lax.max(x[2], y[2])),
    (2,),
  )
  return Blocks(first, last, plain_from, q_segments, k_segments, tile)


def _bounds(segments: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return smallest positive, largest and smallest segment along the last axis."""
  positive = jnp.where(segments > 0, segments, _LARGEST)
  return positive.min(-1), segments.max(-1), segments.min(-1)
