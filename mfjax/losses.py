"""Losses as sums and counts, so that they are exact over any division of a batch.

Shapes: B batch rows, T positions, D d_model, V padded vocabulary, n tokens of one chunk, L layers,
N experts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mfjax.config import AuxLoss, LossConfig, Statistics
from mfjax.model import Statistics as RouterSums
from mfjax.router import RouterStatistics
from mfjax.sharding import AXES, BATCH, WEIGHT_AXES
from pallas_kernels.precision import matmul_precision

_EPS = 1e-8  # Inside the marginal's logarithm, as published.


class CrossEntropy(NamedTuple):
  """Sums over target tokens, float32."""

  objective: jax.Array  # nats + z_weight * squared log-partition: the differentiable part
  nats: jax.Array
  square_logsumexp: jax.Array


def cross_entropy(
  lm_head_VD: jax.Array,
  hidden_BTD: jax.Array,
  targets_BT: jax.Array,
  is_target_BT: jax.Array,
  *,
  vocab_size: int,
  z_weight: float,
  chunk_tokens: int,
) -> CrossEntropy:
  """Sum the next-token loss over the global batch; logits exist for one chunk of tokens at a time.

  Args:
    lm_head_VD: float32 parameter, sharded on D. hidden_BTD: compute dtype, sharded on B.
    targets_BT: int32 ids. is_target_BT: bool, False for padding.
    vocab_size: rows of lm_head beyond it are padding and take no part.
    z_weight: weight of the squared log-partition. chunk_tokens: tokens per chunk and device.

  Returns:
    global sums. Only `objective` may be differentiated; its gradients are computed in the forward
    pass, chunk by chunk, which spares a fourth product with lm_head.
  """

  def local(
    head_VD: jax.Array, hidden_BTD: jax.Array, targets_BT: jax.Array, is_target_BT: jax.Array
  ) -> CrossEntropy:
    hidden_nD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    chunk = min(chunk_tokens, hidden_nD.shape[0])
    options = _Options(vocab_size, z_weight, chunk)
    return _sums(options, head_VD, hidden_nD, targets_BT.reshape(-1), is_target_BT.reshape(-1))

  sums = jax.shard_map(
    local,
    in_specs=(P(None, WEIGHT_AXES), BATCH, BATCH, BATCH),
    out_specs=P(),
    check_vma=False,
  )
  return sums(lm_head_VD, hidden_BTD, targets_BT, is_target_BT)


class _Options(NamedTuple):
  vocab_size: int
  z_weight: float
  chunk: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
  options: _Options, head: jax.Array, hidden: jax.Array, targets: jax.Array, mask: jax.Array
) -> CrossEntropy:
  return _chunked(options, head, hidden, targets, mask, with_gradients=False)[0]


def _chunked(
  options: _Options,
  head: jax.Array,
  hidden: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  *,
  with_gradients: bool,
) -> tuple[CrossEntropy, Any]:
  """Return global sums and, if asked for, the objective's gradients of head (shard) and hidden."""
  dtype, num_tokens = hidden.dtype, hidden.shape[0]
  head_VD = jax.lax.all_gather(head.astype(dtype), WEIGHT_AXES, axis=1, tiled=True)
  in_vocabulary = jnp.arange(head_VD.shape[0]) < options.vocab_size
  pad = -num_tokens % options.chunk
  dot = functools.partial(
    jnp.einsum, precision=matmul_precision(dtype), preferred_element_type=jnp.float32
  )

  def split(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(-1, options.chunk, *x.shape[1:])

  def one_chunk(carry: Any, xs: Any) -> tuple[Any, Any]:
    total, d_head = carry
    hidden_nD, target_n, mask_n = xs
    logits_nV = dot("nd,vd->nv", hidden_nD, head_VD)
    lse_n = _logsumexp(logits_nV, in_vocabulary)
    picked_n = jnp.take_along_axis(logits_nV, target_n[:, None], axis=-1)[:, 0]
    nats = jnp.where(mask_n, lse_n - picked_n, 0).sum()
    square = jnp.where(mask_n, jnp.square(lse_n), 0).sum()
    sums = CrossEntropy(nats + options.z_weight * square, nats, square)
    total = jax.tree.map(jnp.add, total, sums)
    if not with_gradients:
      return (total, d_head), None
    probs_nV = jnp.exp(logits_nV - lse_n[:, None])
    d_logits_nV = probs_nV * (1 + 2 * options.z_weight * lse_n)[:, None]
    is_target_nV = jnp.arange(logits_nV.shape[1]) == target_n[:, None]
    d_logits_nV = jnp.where(mask_n[:, None], d_logits_nV - is_target_nV, 0)
    # The padding is masked where logits are read, twice: masked once, they would be written again.
    d_logits_nV = jnp.where(in_vocabulary, d_logits_nV, 0).astype(dtype)
    d_head += dot("nv,nd->vd", d_logits_nV, hidden_nD)
    d_hidden_nD = dot("nv,vd->nd", d_logits_nV, head_VD)
    return (total, d_head), d_hidden_nD.astype(dtype)

  zero = CrossEntropy(*(jnp.float32(0),) * 3)
  d_head = jnp.zeros(head_VD.shape if with_gradients else (), jnp.float32)
  xs = (split(hidden), split(targets), split(mask))
  (total, d_head), d_hidden = jax.lax.scan(one_chunk, (zero, d_head), xs)
  total = jax.lax.psum(total, AXES)
  if not with_gradients:
    return total, None
  d_head = jax.lax.psum_scatter(d_head, WEIGHT_AXES, scatter_dimension=1, tiled=True)
  return total, (d_head, d_hidden.reshape(-1, hidden.shape[1])[:num_tokens])


def _logsumexp(logits_nV: jax.Array, in_vocabulary: jax.Array) -> jax.Array:
  """Return float32 [n]: log of the vocabulary's summed exponentials, in one pass over the logits.

  A pair (m, s) stands for s exp(m). Logits are the step's largest array: a pass for the maximum and
  one for the sum would take twice the time.
  """

  def add(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> Any:
    (m, s), (n, t) = a, b
    ratio = jnp.exp(-jnp.abs(m - n))
    return jnp.maximum(m, n), jnp.where(m > n, s + t * ratio, s * ratio + t)

  least = jnp.finfo(jnp.float32).min  # Not -inf: the difference of two is not a number.
  logits_nV = jnp.where(in_vocabulary, logits_nV, least)
  ones_nV = jnp.broadcast_to(in_vocabulary.astype(jnp.float32), logits_nV.shape)
  m_n, s_n = jax.lax.reduce((logits_nV, ones_nV), (jnp.float32(least), jnp.float32(0)), add, (1,))
  return m_n + jnp.log(s_n)


def _sums_forward(
  options: _Options, head: jax.Array, hidden: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[CrossEntropy, Any]:
  return _chunked(options, head, hidden, targets, mask, with_gradients=True)


def _sums_backward(options: _Options, gradients: Any, d_sums: CrossEntropy) -> Any:
  del options
  # The sums are replicated: shard_map hands each device its share of the cotangent.
  scale = jax.lax.psum(d_sums.objective, AXES)
  d_head, d_hidden = gradients
  return d_head * scale, (d_hidden * scale).astype(d_hidden.dtype), None, None


_sums.defvjp(_sums_forward, _sums_backward)


# Router losses ------------------------------------------------------------------------------------


def aux_loss_per_layer(sums: RouterStatistics, kind: AuxLoss) -> jax.Array:
  """Return float32 [L]: the auxiliary loss of each layer of one kind of expert.

  With g the router's softmax and p its mean over tokens (padding left out, whole batch):
    mutual information    sum_e p log p - mean_x sum_e g log g      (-I(expert; x))
    concentration         -sum_e p log p                            (H(expert))
    switch                N sum_e p_e f_e + 0.1 mean(logsumexp^2), f the share of top-k picks

  Args:
    sums: leaves with a leading layers dimension.
  """
  tokens = jnp.maximum(sums.tokens, 1)
  p_LN = sums.prob_sum / tokens[:, None]
  if kind is AuxLoss.NONE:
    return jnp.zeros_like(sums.entropy_sum)
  if kind is AuxLoss.SWITCH:
    picks = sums.picks / jnp.maximum(sums.picks.sum(-1, keepdims=True), 1)
    balance = p_LN.shape[-1] * (p_LN * picks).sum(-1)
    return balance + 0.1 * sums.square_logsumexp_sum / tokens
  negative_entropy = (p_LN * jnp.log(p_LN + _EPS)).sum(-1)
  if kind is AuxLoss.CONCENTRATION:
    return -negative_entropy
  return negative_entropy + sums.entropy_sum / tokens


def aux_loss(sums: RouterSums, kind: AuxLoss) -> jax.Array:
  """Return the auxiliary loss summed over layers and both kinds of experts, unweighted."""
  return sum((aux_loss_per_layer(part, kind).sum() for part in sums), start=jnp.float32(0))


def aux_objective(
  sums: RouterSums, before: RouterSums, whole: RouterSums, tokens: jax.Array, config: LossConfig
) -> jax.Array:
  """Return a microbatch's term whose gradient is its part of the batch's auxiliary loss' gradient.

  The loss is a function of ratios of the whole batch's sums S, so that its gradient is the sum over
  microbatches of <dL/dS, dS_i>. `config.statistics` says at which S the first factor is taken: the
  microbatch's own (its loss, weighted by its tokens), the sums so far (the default), or the whole
  batch's, which alone equals one big batch.

  Args:
    sums: this microbatch's. before: the sum of the earlier ones'. whole: the batch's (EXACT only).
    tokens: target tokens of the whole batch.
  """
  estimate = {
    Statistics.MICROBATCH: lambda: sums,
    Statistics.RUNNING: lambda: jax.tree.map(jnp.add, before, sums),
    Statistics.EXACT: lambda: whole,
  }[config.statistics]()
  estimate = jax.lax.stop_gradient(estimate)
  slope = jax.grad(lambda s: aux_loss(s, config.aux))(estimate)
  # The estimate covers `seen` tokens: scaled to the batch, its slope shrinks by seen / tokens.
  seen = estimate.ff.tokens[0]
  products = jax.tree.map(lambda a, b: (jax.lax.stop_gradient(a) * b).sum(), slope, sums)
  return seen / tokens * sum(jax.tree.leaves(products), start=jnp.float32(0))
