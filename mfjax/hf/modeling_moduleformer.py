"""ModuleFormer (arXiv 2306.04640) for Hugging Face transformers 5.

An exported checkpoint carries this file: it imports nothing but torch and transformers.

    h = wte(tokens);  per layer: h += AttentionExperts(ln_1(h)); h += FeedForwardExperts(ln_2(h))

Shapes: B batch rows, T new positions, S keys (earlier positions, then the new ones), D width,
H heads, h width of a head, K experts per token, N experts, n tokens (B*T), R rows (n*K) of tokens
sorted by expert, G sequences of one head (B*H).
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, StaticCache
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_moduleformer import ModuleFormerConfig

_EPS = 1e-8  # Inside the marginal's logarithm, as published.
_BLOCK_QUERIES = 256  # Queries whose scores are computed at once: at most so many,
_BLOCK_BYTES = 64 << 20  # and so that their float32 scores take no more than this.

# transformers 5.24 renamed `past_key_values` to `cache`, in outputs and in what `generate` passes.
_CACHE = next(
  field.name
  for field in fields(MoeModelOutputWithPast)
  if field.name in ("cache", "past_key_values")
)


# Stick-breaking attention -------------------------------------------------------------------------
#
# With s = softplus(z) = -log(1 - beta):  A_ij = exp(z_ij - sum_{j <= l <= i} s_il). Keys come in
# reversed order, so that the sum runs forward, and blocks of queries bound the memory.


class _Block(NamedTuple):
  """Some queries and the keys up to the last one's own."""

  rows: slice  # of the queries: `slots` per position
  keys: slice  # of the reversed keys
  length: int  # positions
  slots: int


def _blocks(q: Tensor, k: Tensor, slots: int) -> Iterator[_Block]:
  groups, rows, _ = q.shape
  num_keys, num_queries = k.shape[1], rows // slots
  fitting = _BLOCK_BYTES // (4 * groups * slots * num_keys)
  step = max(1, min(_BLOCK_QUERIES, fitting))
  for start in range(0, num_queries, step):
    length = min(step, num_queries - start)
    rows = slice(start * slots, (start + length) * slots)
    yield _Block(rows, slice(num_queries - start - length, num_keys), length, slots)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
  """Return float32 scale * q k^T, [G, m, S]; the inputs may have any dtype."""
  zero = q.new_zeros((), dtype=torch.float32)
  if q.is_cuda and q.dtype is not torch.float32:
    return torch.baddbmm(zero, q, k.mT, out_dtype=torch.float32, beta=0, alpha=scale)
  return torch.baddbmm(zero, q.float(), k.float().mT, beta=0, alpha=scale)


def _weights(
  block: _Block, q: Tensor, k: Tensor, hidden: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
  """Return a block's scores, -inf where a query does not see a key, and A; float32."""
  z = _scores(q[:, block.rows], k[:, block.keys], scale)
  steps = torch.arange(block.length, device=q.device)
  later = steps < block.length - 1 - steps[:, None]  # Only the newest keys may be in the future.
  by_query = z.unflatten(1, (block.length, block.slots))
  by_query[..., : block.length].masked_fill_(later[:, None], -torch.inf)
  if hidden is not None:
    by_row = z.unflatten(0, (hidden.shape[0], -1))
    by_row.masked_fill_(hidden[:, None, None, block.keys], -torch.inf)
  stick = F.softplus(z).cumsum_(-1)
  return z, torch.sub(z, stick, out=stick).exp_()


class _StickBreaking(torch.autograd.Function):
  """The backward pass computes the weights again, so that memory does not grow with T^2."""

  @staticmethod
  def forward(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, slots: int, scale: float
  ) -> Tensor:
    ctx.save_for_backward(q, k, v, hidden)
    ctx.slots, ctx.scale = slots, scale
    out = torch.empty_like(q)
    with torch.autocast(q.device.type, enabled=False):
      for block in _blocks(q, k, slots):
        _, weights = _weights(block, q, k, hidden, scale)
        torch.bmm(weights.to(v.dtype), v[:, block.keys], out=out[:, block.rows])
    return out

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, hidden = ctx.saved_tensors
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
      for block in _blocks(q, k, ctx.slots):
        z, weights = _weights(block, q, k, hidden, ctx.scale)
        d_rows = d_out[:, block.rows].contiguous()
        gain = _scores(d_rows, v[:, block.keys], 1.0).mul_(weights)
        dv[:, block.keys] += _scores(weights.to(q.dtype).mT, d_rows.mT, 1.0)
        # dz_m = g_m - beta_m sum_{j <= m} g_j: in reversed order, a sum over what follows.
        before = gain.flip(-1).cumsum_(-1).flip(-1)
        dz = gain.sub_(z.sigmoid_().mul_(before)).to(q.dtype)
        torch.bmm(dz, k[:, block.keys], out=dq[:, block.rows])
        dk[:, block.keys] += _scores(dz.mT, q[:, block.rows].mT, ctx.scale)
    return dq.mul_(ctx.scale), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def stick_breaking_attention(
  q: Tensor, k: Tensor, v: Tensor, is_token: Tensor | None = None
) -> Tensor:
  """Return [B, T, K, H, h]: attention of K query slots per position, the current key included.

  Args:
    q: [B, T, K, H, h]. k, v: [B, H, S, h] of q's dtype; the last query sits at the last key.
    is_token: bool [B, S] or None; a key that is none takes no part of the stick. A query that
      sees no key gets 0.
  """
  batch, length, slots, heads, width = q.shape
  rows = q.permute(0, 3, 1, 2, 4).reshape(batch * heads, length * slots, width)
  keys = k.flatten(0, 1).flip(1)
  values = keys if v is k else v.flatten(0, 1).flip(1)
  hidden = None if is_token is None else ~is_token.flip(1)
  out = _StickBreaking.apply(rows, keys, values, hidden, slots, width**-0.5)
  return out.view(batch, heads, length, slots, width).permute(0, 2, 3, 1, 4)


# Routed experts -----------------------------------------------------------------------------------


class Groups:
  """Rows sorted by expert: row r holds slot `slots[r]` of the n*K slots; `rows` is the inverse."""

  def __init__(self, expert_ids: Tensor, num_experts: int) -> None:
    self.top_k = expert_ids.shape[1]
    # Few bits make the radix sort of a GPU short.
    ids = expert_ids.flatten().to(torch.uint8 if num_experts <= 256 else torch.int32)
    ids, self.slots = ids.sort(stable=True)
    count = torch.arange(len(ids), device=ids.device)
    self.rows = torch.empty_like(count).scatter_(0, self.slots, count)
    experts = torch.arange(num_experts, device=ids.device, dtype=ids.dtype)
    self.ends = torch.searchsorted(ids, experts, right=True, out_int32=True)

  @functools.cached_property
  def sizes(self) -> list[int]:
    """Return the number of rows of each expert, on the host."""
    return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()

  def from_tokens(self, x: Tensor) -> Tensor:
    """Return [R, D] rows of tokens [n, D]."""
    return _Take.apply(x, self.slots // self.top_k, self.rows)

  def from_slots(self, x: Tensor) -> Tensor:
    """Return [R, D] rows of slots [n*K, D]."""
    return _Take.apply(x, self.slots, self.rows)

  def to_slots(self, rows: Tensor) -> Tensor:
    """Return [n*K, D] slots of rows [R, D]."""
    return _Take.apply(rows, self.rows, self.slots)


class _Take(torch.autograd.Function):
  """x[index], where every row of x is taken equally often: the gradient is a gather too."""

  @staticmethod
  def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    ctx.save_for_backward(inverse)
    ctx.num_rows = x.shape[0]
    return x.index_select(0, index)

  @staticmethod
  @once_differentiable
  def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (inverse,) = ctx.saved_tensors
    taken = gradient.index_select(0, inverse).unflatten(0, (ctx.num_rows, -1))
    return taken.sum(1) if taken.shape[1] > 1 else taken.squeeze(1), None, None


_grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # Public since torch 2.10.


def _has_grouped_mm(rows: Tensor, weight: Tensor) -> bool:
  if not rows.is_cuda or rows.dtype is not torch.bfloat16 or torch.version.hip:
    return False
  aligned = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
  return aligned and torch.cuda.get_device_capability(rows.device) >= (9, 0)


class ExpertLinear(nn.Module):
  """One bias-free matrix per expert, [N, in, out]."""

  def __init__(self, num_experts: int, d_in: int, d_out: int) -> None:
    super().__init__()
    self.weight = nn.Parameter(torch.empty(num_experts, d_in, d_out))

  def forward(self, rows: Tensor, groups: Groups) -> Tensor:
    """Multiply [R, in] rows, sorted by expert, to [R, out]."""
    weight = self.weight
    if torch.is_autocast_enabled(rows.device.type):
      dtype = torch.get_autocast_dtype(rows.device.type)
      rows, weight = rows.to(dtype), weight.to(dtype)
    if _has_grouped_mm(rows, weight):
      return _grouped_mm(rows, weight, offs=groups.ends)
    parts = zip(rows.split(groups.sizes), weight.unbind(), strict=True)
    return torch.cat([part @ matrix for part, matrix in parts if len(part)])


class Routing(NamedTuple):
  """What a router decides."""

  weights: Tensor  # float32 [n, K]: raw probabilities, not renormalised
  groups: Groups
  logits: Tensor  # float32 [n, N]
  aux_loss: Tensor | None  # float32 []


class Router(nn.Module):
  """Softmax over all experts, then the k best."""

  def __init__(self, config: ModuleFormerConfig, num_experts: int, top_k: int) -> None:
    super().__init__()
    self.gate_type, self.num_experts, self.top_k = config.gate_type, num_experts, top_k
    self.sample_topk, self.aux_loss_type = config.sample_topk, config.aux_loss_type
    d_model, d_gate = config.n_embd, config.gating_size
    if self.gate_type == "mlp":
      self.w_gate = nn.Sequential(
        nn.Linear(d_model, d_gate),
        nn.GELU(),
        nn.Dropout(config.moe_pdrop),
        nn.Linear(d_gate, num_experts, bias=False),
      )
    elif self.gate_type == "linear":
      self.w_gate = nn.Sequential(nn.Linear(d_model, num_experts, bias=False))
    else:
      self.w_gate = nn.Linear(d_model, d_gate, bias=False)
      self.expert_centroids = nn.Parameter(torch.empty(num_experts, d_gate))
      self.temperature = nn.Parameter(torch.zeros(1))

  def forward(self, x: Tensor, is_token: Tensor | None, needs_aux_loss: bool) -> Routing:
    """Route [n, D] tokens; `is_token` (bool [n] or None) keeps padding out of the loss."""
    logits = self._logits(x)
    probs = logits.softmax(-1)
    ids = self._choose(probs.detach())
    loss = self._aux_loss(logits, probs, ids, is_token) if needs_aux_loss else None
    return Routing(probs.gather(1, ids), Groups(ids, self.num_experts), logits, loss)

  def _logits(self, x: Tensor) -> Tensor:
    if self.gate_type == "mlp":
      w1, gelu, drop, w2 = self.w_gate
      x, last = drop(gelu(w1(x))), w2.weight
    elif self.gate_type == "linear":
      last = self.w_gate[0].weight
    else:
      x, last = F.normalize(self.w_gate(x).float(), dim=-1), self.expert_centroids
      last = F.normalize(last.float(), dim=-1) * self.temperature.float().exp()
    # The last product stays in float32: rounded logits would tie and pick other experts.
    with torch.autocast(x.device.type, enabled=False):
      return F.linear(x.float(), last.float())

  def _choose(self, probs: Tensor) -> Tensor:
    if not self.training or self.sample_topk == 0:
      return probs.topk(self.top_k).indices
    best = probs.topk(self.top_k - self.sample_topk).indices
    rest = (probs + 1e-6).scatter(1, best, 0)
    return torch.cat([best, torch.multinomial(rest, self.sample_topk)], dim=1)

  def _aux_loss(
    self, logits: Tensor, probs: Tensor, expert_ids: Tensor, is_token: Tensor | None
  ) -> Tensor:
    share = torch.ones_like(probs[:, :1]) if is_token is None else is_token[:, None].to(probs)
    share = share / share.sum().clamp(min=1)
    p = (share * probs).sum(0)
    if self.aux_loss_type == "switch":
      picks = torch.zeros_like(probs).scatter(1, expert_ids, 1 / self.top_k)
      square = (share * logits.logsumexp(-1, keepdim=True).square()).sum()
      return self.num_experts * (p * (share * picks).sum(0)).sum() + 0.1 * square
    return (p * (p + _EPS).log()).sum() - (share * probs * logits.log_softmax(-1)).sum()


class RoutedExperts(nn.Module):
  """A router and two matrices per expert."""

  def __init__(
    self, config: ModuleFormerConfig, num_experts: int, top_k: int, d_hidden: int
  ) -> None:
    super().__init__()
    self.experts = ExpertLinear(num_experts, config.n_embd, d_hidden)
    self.output_experts = ExpertLinear(num_experts, d_hidden, config.n_embd)
    self.gate = Router(config, num_experts, top_k)

  def route(self, x: Tensor, is_token: Tensor | None, needs_aux_loss: bool) -> Routing:
    """Route x [B, T, D]; `is_token` is bool [B, S] or None."""
    is_new = None if is_token is None else is_token[:, -x.shape[1] :].flatten()
    return self.gate(x.flatten(0, 1), is_new, needs_aux_loss)

  def project_in(self, x: Tensor, groups: Groups) -> Tensor:
    """Return the hidden rows [R, d_hidden] of x [B, T, D]."""
    return self.experts(groups.from_tokens(x.flatten(0, 1)), groups)

  def project_out(self, rows: Tensor, routing: Routing) -> Tensor:
    """Return [n, D]: the weighted sum of each token's outputs, from hidden rows [R, d_hidden]."""
    groups = routing.groups
    y = groups.to_slots(self.output_experts(rows, groups)).unflatten(0, (-1, groups.top_k))
    first, *others = zip(y.unbind(1), routing.weights.to(y.dtype).split(1, 1), strict=True)
    total = first[0] * first[1]
    for y_k, weight in others:
      total = torch.addcmul(total, y_k, weight)
    return total


class FeedForwardExperts(RoutedExperts):
  """y = sum over a token's experts of p_e * W_out[e] . gelu_tanh(W_in[e] x)."""

  def forward(
    self, x: Tensor, is_token: Tensor | None, needs_aux_loss: bool
  ) -> tuple[Tensor, Routing]:
    """Return [B, T, D] and the routing."""
    routing = self.route(x, is_token, needs_aux_loss)
    hidden = self.project_in(x, routing.groups)
    y = self.project_out(F.gelu(hidden, approximate="tanh"), routing)
    return y.view_as(x), routing


class AttentionExperts(nn.Module):
  """Experts are pairs of query and output projections; keys and values are common to them."""

  def __init__(self, config: ModuleFormerConfig, layer_idx: int) -> None:
    super().__init__()
    self.layer_idx, self.context = layer_idx, config.block_size + config.history_length
    self.heads = (config.n_head, config.head_dim)
    self.q_proj = RoutedExperts(config, config.n_att_experts, config.k_att, config.att_hidden)
    self.identity_kv = config.identity_kv
    if not self.identity_kv:
      self.k_proj = nn.Linear(config.n_embd, config.att_hidden)
      self.v_proj = nn.Linear(config.n_embd, config.att_hidden)

  def forward(
    self, x: Tensor, is_token: Tensor | None, cache: Cache | None, needs_aux_loss: bool
  ) -> tuple[Tensor, Routing]:
    """Return [B, T, D] and the routing; `is_token` is bool [B, S] or None."""
    routing = self.q_proj.route(x, is_token, needs_aux_loss)
    groups = routing.groups
    q = groups.to_slots(self.q_proj.project_in(x, groups))
    q = q.unflatten(1, self.heads).unflatten(0, (*x.shape[:2], groups.top_k))
    k, v = self._keys_and_values(x.to(q.dtype), cache)
    attended = stick_breaking_attention(q, k, v, is_token)
    rows = groups.from_slots(attended.flatten(3).flatten(0, 2))
    return self.q_proj.project_out(rows, routing).view_as(x), routing

  def _keys_and_values(self, x: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
    """Return [B, H, S, h] keys and values of all positions, the same tensor if K = V."""

    def by_head(y: Tensor) -> Tensor:
      return y.unflatten(2, self.heads).transpose(1, 2)

    k = by_head(x if self.identity_kv else self.k_proj(x))
    # One tensor is cached where K = V: values have width 0.
    v = k[..., :0] if self.identity_kv else by_head(self.v_proj(x))
    if cache is not None:
      k, v = cache.update(k, v, self.layer_idx)
    return k, k if self.identity_kv else v

  def format_buffers(self, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the two buffers that the file format has; nothing here computes with them."""
    ones = torch.ones(self.context, self.context)
    return {"mask": ones.tril().to(torch.int8), "cum_weight": ones.tril(-1).to(dtype)}

  def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    for name in ("mask", "cum_weight"):
      state_dict.pop(prefix + name, None)
    super()._load_from_state_dict(state_dict, prefix, *args)


# The model ----------------------------------------------------------------------------------------


class ModuleFormerBlock(GradientCheckpointingLayer):
  """One layer."""

  def __init__(self, config: ModuleFormerConfig, layer_idx: int) -> None:
    super().__init__()
    self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
    self.attn = AttentionExperts(config, layer_idx)
    self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
    self.mlpf = FeedForwardExperts(config, config.n_mlp_experts, config.k_mlp, config.ffd_hidden)
    self.resid_dropout = nn.Dropout(config.resid_pdrop)

  def forward(
    self,
    h: Tensor,
    is_token: Tensor | None = None,
    past_key_values: Cache | None = None,
    needs_aux_loss: bool = False,
    cache: Cache | None = None,
  ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """Return [B, T, D], and the router logits and auxiliary loss of both kinds of experts."""
    cache = _one_cache(cache, past_key_values)
    y, attention = self.attn(self.ln_1(h), is_token, cache, needs_aux_loss)
    h = h + self.resid_dropout(y)
    y, ff = self.mlpf(self.ln_2(h), is_token, needs_aux_loss)
    loss = attention.aux_loss + ff.aux_loss if needs_aux_loss else None
    return h + self.resid_dropout(y), (attention.logits, ff.logits), loss


class ModuleFormerPreTrainedModel(PreTrainedModel):
  """Initialisation, and saving in the published file format."""

  config_class = ModuleFormerConfig
  base_model_prefix = "transformer"
  supports_gradient_checkpointing = True
  _input_embed_layer = "wte"
  _no_split_modules: ClassVar = ["ModuleFormerBlock"]
  _skip_keys_device_placement: ClassVar = ["cache", "past_key_values"]
  _keys_to_ignore_on_load_unexpected: ClassVar = [r"attn\.mask$", r"attn\.cum_weight$"]

  @torch.no_grad()
  def _init_weights(self, module: nn.Module) -> None:
    std = self.config.initializer_range
    if isinstance(module, nn.Linear | nn.Embedding):
      init.normal_(module.weight, std=std)
      if getattr(module, "bias", None) is not None:
        init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
      init.ones_(module.weight)
      init.zeros_(module.bias)
    elif isinstance(module, ExpertLinear):
      bound = 1 / module.weight.shape[1]
      init.uniform_(module.weight, -bound, bound)
    elif isinstance(module, Router) and module.gate_type == "gmm":
      init.normal_(module.expert_centroids)
      init.zeros_(module.temperature)

  def save_pretrained(
    self,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
  ) -> None:
    """Save in the published format, whose two buffers per layer this class does not hold."""
    state_dict = dict(self.state_dict() if state_dict is None else state_dict)
    for name, module in self.named_modules():
      if isinstance(module, AttentionExperts):
        buffers = module.format_buffers(self.dtype)
        state_dict |= {f"{name}.{key}": value for key, value in buffers.items()}
    super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)


@dataclass
class ModuleFormerOutput(MoeModelOutputWithPast):
  """`aux_loss`: summed over layers and both kinds of experts, unweighted; None unless needed."""

  aux_loss: Tensor | None = None


class ModuleFormerModel(ModuleFormerPreTrainedModel):
  """The stack from tokens to the last layer's normalised output."""

  def __init__(self, config: ModuleFormerConfig) -> None:
    super().__init__(config)
    self.wte = nn.Embedding(config.vocab_size, config.n_embd)
    self.drop = nn.Dropout(config.embd_pdrop)
    self.h = nn.ModuleList(ModuleFormerBlock(config, i) for i in range(config.n_layer))
    self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
    self.post_init()

  @can_return_tuple
  def forward(
    self,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
    output_router_logits: bool | None = None,
    output_attentions: bool | None = None,
    needs_aux_loss: bool = False,
    cache: Cache | None = None,
    **kwargs: Any,
  ) -> ModuleFormerOutput:
    """Run the stack.

    Args:
      input_ids: [B, T], or inputs_embeds [B, T, D].
      attention_mask: [B, S], 0 for padding on either side; the T new positions are the last.
      cache, past_key_values: a cache that grows, such as DynamicCache, by either of its names.
      use_cache: by default what the config says, and False in training.
      needs_aux_loss: also return the auxiliary loss, over the tokens that are no padding.
      kwargs: position_ids and the like: there are no positions in this model.
    """
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError("give either input_ids or inputs_embeds")
    if output_attentions:
      raise ValueError("output_attentions=True: attention weights are never kept; leave it off")
    cache = _one_cache(cache, past_key_values)
    if isinstance(cache, StaticCache):
      raise ValueError("a StaticCache is not supported: use a DynamicCache, the default")
    config = self.config
    use_cache = (config.use_cache and not self.training) if use_cache is None else use_cache
    if output_hidden_states is None:
      output_hidden_states = config.output_hidden_states
    if use_cache and cache is None:
      cache = DynamicCache()
    h = self.drop(self.wte(input_ids) if inputs_embeds is None else inputs_embeds)
    is_token = _is_token(attention_mask, cache, h.shape[1])
    states: list[Tensor] = []
    router_logits: list[Tensor] = []
    losses: list[Any] = []
    for block in self.h:
      states += [h] if output_hidden_states else []
      # By its name in this version: gradient checkpointing takes it away by that.
      options: dict[str, Any] = {_CACHE: cache, "needs_aux_loss": needs_aux_loss}
      h, logits, loss = block(h, is_token=is_token, **options)
      router_logits += logits if output_router_logits else []
      losses.append(loss)
    h = self.ln_f(h)
    return ModuleFormerOutput(
      last_hidden_state=h,
      hidden_states=(*states, h) if output_hidden_states else None,
      router_logits=tuple(router_logits) if output_router_logits else None,
      aux_loss=sum(loss.to(h.device) for loss in losses) if needs_aux_loss else None,
      **{_CACHE: cache if use_cache else None},
    )


def _one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
  if cache is not None and past_key_values is not None:
    raise ValueError("give either cache or past_key_values: they are two names of one argument")
  return past_key_values if cache is None else cache


def _is_token(attention_mask: Tensor | None, cache: Cache | None, length: int) -> Tensor | None:
  """Return bool [B, S] or None."""
  if attention_mask is None:
    return None
  num_keys = length + (0 if cache is None else cache.get_seq_length())
  if attention_mask.ndim != 2 or attention_mask.shape[1] != num_keys:
    raise ValueError(
      f"attention_mask has shape {tuple(attention_mask.shape)}: it must be [batch, {num_keys}], "
      "one entry per cached and new position"
    )
  return attention_mask.bool()


class ModuleFormerForCausalLM(ModuleFormerPreTrainedModel, GenerationMixin):
  """The language model."""

  def __init__(self, config: ModuleFormerConfig) -> None:
    super().__init__(config)
    self.transformer = ModuleFormerModel(config)
    self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
    self.post_init()

  @can_return_tuple
  def forward(
    self,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    output_router_logits: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    cache: Cache | None = None,
    **kwargs: Any,
  ) -> MoeCausalLMOutputWithPast:
    """Run the model; the other arguments are those of `ModuleFormerModel.forward`.

    Args:
      labels: [B, T], -100 to leave out. The loss is the mean next-token cross-entropy plus
        aux_loss_weight times the auxiliary loss. Trainer's num_items_in_batch divides the first
        and weights the second by this batch's share of the items.
      logits_to_keep: how many last positions (or which) get logits; 0 is all.
      output_router_logits: also return router_logits (attention and feed-forward of each layer in
        turn, [B*T, N]) and aux_loss.
    """
    needs_aux_loss = bool(
      output_router_logits or (labels is not None and self.config.aux_loss_weight)
    )
    loss_options = {
      name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs
    }
    outputs = self.transformer(
      input_ids,
      attention_mask,
      past_key_values,
      inputs_embeds,
      use_cache,
      output_router_logits=output_router_logits,
      needs_aux_loss=needs_aux_loss,
      cache=cache,
      return_dict=True,
      **kwargs,
    )
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = self.lm_head(outputs.last_hidden_state[:, keep])
    loss = None
    if labels is not None:
      loss = self.loss_function(logits, labels, self.config.vocab_size, **loss_options)
      if self.config.aux_loss_weight:
        share = _share_of_items(labels, **loss_options)
        loss = loss + self.config.aux_loss_weight * share * outputs.aux_loss.to(loss.device)
    return MoeCausalLMOutputWithPast(
      loss=loss,
      aux_loss=outputs.aux_loss,
      logits=logits,
      hidden_states=outputs.hidden_states,
      router_logits=outputs.router_logits,
      **{_CACHE: getattr(outputs, _CACHE)},
    )


def _share_of_items(
  labels: Tensor, num_items_in_batch: Tensor | int | None = None, shift_labels: Tensor | None = None
) -> Tensor | int:
  """Return which part of an accumulated batch's targets these labels hold."""
  if num_items_in_batch is None:
    return 1
  targets = labels[:, 1:] if shift_labels is None else shift_labels
  return (targets != -100).sum() / num_items_in_batch


__all__ = ["ModuleFormerForCausalLM", "ModuleFormerModel", "ModuleFormerPreTrainedModel"]
