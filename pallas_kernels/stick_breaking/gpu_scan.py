"""Breaking the stick inside one block of keys, in the registers of a Hopper warpgroup.

Of a row of scores [64 queries, n keys] that wgmma leaves in registers, four neighbouring lanes hold
the columns 8g + 2t + {0, 1}, t being the lane. Keys are therefore laid into shared memory permuted,
so that in each block of 64 lane t holds the 16 consecutive keys 16t ... 16t + 15: what is left of
the stick is then a product over a lane's own registers, and two exchanges between the four lanes.

The stick is kept as a product, not as a sum of logarithms: with e = 2^s and u = 1 + e,
    A_j = e_j / u_j * R_j,    R_j = prod_{j<m} 1 / u_m,
needs one exponential per key and one reciprocal per four keys. A product that leaves float32's
range becomes 0, as do all weights left of it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

ROWS = 64  # Queries of a warpgroup, wgmma's height.
KEYS = 64  # Keys of a permuted block.
LANES = 4
_GROUP = 4  # Keys that share a reciprocal.
_MAX_EXPONENT = 28.0  # 2^28 to the fourth fits float32; beyond it beta is 1 to float32's precision.


class Lane(Protocol):
  """Arithmetic on one float32 register of each of the four lanes that share a row."""

  def constant(self, value: float) -> Any: ...
  def add(self, x: Any, y: Any) -> Any: ...
  def multiply(self, x: Any, y: Any) -> Any: ...
  def subtract_product(self, x: Any, y: Any, z: Any) -> Any:
    """Return x - y * z."""

  def minimum(self, x: Any, y: Any) -> Any: ...
  def exp2(self, x: Any) -> Any: ...
  def reciprocal(self, x: Any) -> Any: ...
  def product_after(self, x: Any) -> tuple[Any, Any]:
    """Return the product over the lanes after this one, and over all four."""

  def sum_before(self, x: Any) -> tuple[Any, Any]:
    """Return the sum over the lanes before this one, and over all four."""


def weights(lane: Lane, logits: Sequence[Any], factor: Any, stick: Any) -> tuple[list[Any], Any]:
  """Return a lane's 16 weights of one row, and the stick left of the block.

  Args:
    logits: the lane's 16 products q . k, in the order of the keys.
    factor: scale times log2(e).
    stick: what is left of the row's stick right of the block, equal in the four lanes.
  """
  odds, inverses, _ = _odds(lane, logits, factor)
  edges, stick = _sticks(lane, inverses, stick)
  return [lane.multiply(x, edges[i // _GROUP]) for i, x in enumerate(odds)], stick


def gradients(
  lane: Lane,
  logits: Sequence[Any],
  d_weights: Sequence[Any],
  factor: Any,
  stick: Any,
  prefix: Any,
) -> tuple[list[Any], list[Any], Any]:
  """Return a lane's 16 weights A, 16 gradients of its logits, and the prefix right of the block.

  With g = A * d_weights:  d_logit_m = g_m - beta_m * sum_{j<=m} g_j.

  Args:
    logits, factor, stick: as of `weights`.
    d_weights: the lane's 16 products dO . v.
    prefix: the row's sum of g over all keys left of the block.
  """
  attention, g, betas, (before, total) = gains(lane, logits, d_weights, factor, stick)
  return attention, d_logits(lane, g, betas, lane.add(prefix, before)), lane.add(prefix, total)


def gains(
  lane: Lane, logits: Sequence[Any], d_weights: Sequence[Any], factor: Any, stick: Any
) -> tuple[list[Any], list[Any], list[Any], tuple[Any, Any]]:
  """Return a lane's 16 weights A, g and betas of `gradients`, and sums of g.

  The sums are those over the lanes before this one, and over all four.
  """
  odds, inverses, betas = _odds(lane, logits, factor)
  edges, _ = _sticks(lane, inverses, stick)
  attention = [lane.multiply(x, edges[i // _GROUP]) for i, x in enumerate(odds)]
  g = [lane.multiply(x, y) for x, y in zip(attention, d_weights, strict=True)]
  return attention, g, betas, lane.sum_before(_tree(lane.add, g))


def d_logits(lane: Lane, g: Sequence[Any], betas: Sequence[Any], running: Any) -> list[Any]:
  """Return a lane's 16 gradients of its logits; `running` is the sum of g left of its keys."""
  found = []
  # Summed once more rather than kept: registers are what these kernels are short of.
  for x, beta in zip(g, betas, strict=True):
    running = lane.add(running, x)
    found.append(lane.subtract_product(x, beta, running))
  return found


def _odds(lane: Lane, logits: Sequence[Any], factor: Any) -> tuple[list[Any], list[Any], list[Any]]:
  """Return a lane's e_k * prod_{m<k} u_m, 1 / prod u_m and beta_k, the products over groups."""
  odds, inverses, betas = [], [], []
  one, limit = lane.constant(1.0), lane.constant(_MAX_EXPONENT)
  for start in range(0, len(logits), _GROUP):
    group = logits[start : start + _GROUP]
    e = [lane.exp2(lane.minimum(lane.multiply(x, factor), limit)) for x in group]
    u = [lane.add(one, x) for x in e]
    product = u[0]
    for k in range(1, _GROUP):
      e[k] = lane.multiply(e[k], product)
      product = lane.multiply(product, u[k])
    after = inverse = lane.reciprocal(product)
    group_betas = []
    for k in reversed(range(_GROUP)):
      group_betas.append(lane.multiply(e[k], after))
      after = lane.multiply(after, u[k])
    odds.extend(e)
    inverses.append(inverse)
    betas.extend(group_betas[::-1])
  return odds, inverses, betas


def _sticks(lane: Lane, inverses: Sequence[Any], stick: Any) -> tuple[list[Any], Any]:
  """Return what is left of the stick left of each of a lane's groups, and left of the block."""
  after, total = lane.product_after(_tree(lane.multiply, inverses))
  rest = lane.multiply(stick, after)
  edges = []
  for inverse in reversed(inverses):
    rest = lane.multiply(rest, inverse)
    edges.append(rest)
  return edges[::-1], lane.multiply(stick, total)


def _tree(combine: Callable[[Any, Any], Any], values: Sequence[Any]) -> Any:
  """Combine a power of two of values in pairs of pairs."""
  while len(values) > 1:
    values = [combine(x, y) for x, y in zip(values[::2], values[1::2], strict=True)]
  return values[0]
