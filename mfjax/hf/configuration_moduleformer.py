"""Configuration of ModuleFormer (arXiv 2306.04640) for Hugging Face transformers 5.

An exported checkpoint carries this file: it imports nothing but transformers.
"""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

_GATE_TYPES = ("mlp", "linear", "gmm")
_AUX_LOSS_TYPES = ("mi", "switch")


class ModuleFormerConfig(PreTrainedConfig):
  """Shape of a ModuleFormer; a missing key takes the value of the released MoLM-700M-8B.

  Args:
    history_length, block_size: training context; they size the two buffers of the file format.
    n_embd, n_layer: width and depth. n_head, att_hidden: heads, and their joint width.
    ffd_hidden: width of a feed-forward expert. gating_size: hidden width of a router.
    n_att_experts, k_att, n_mlp_experts, k_mlp: experts of each kind, and how many a token uses.
    sample_topk: in training, how many of the k are drawn rather than chosen.
    gate_type: `mlp`, `linear` or `gmm`.
    aux_loss_type, aux_loss_weight: `mi` or `switch`, added to the loss of given labels.
  """

  model_type = "moduleformer"
  keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
  attribute_map: ClassVar[dict[str, str]] = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
  }

  def __init__(
    self,
    vocab_size: int = 50295,
    history_length: int = 512,
    block_size: int = 512,
    n_embd: int = 1024,
    n_layer: int = 48,
    n_head: int = 1,
    att_hidden: int = 1024,
    ffd_hidden: int = 2048,
    activation_function: str = "gelu_new",
    resid_pdrop: float = 0.0,
    embd_pdrop: float = 0.0,
    attn_pdrop: float = 0.0,
    moe_pdrop: float = 0.0,
    layer_norm_epsilon: float = 1e-5,
    initializer_range: float = 0.02,
    use_cache: bool = True,
    sample_topk: int = 0,
    gating_size: int = 256,
    n_att_experts: int = 16,
    k_att: int = 2,
    n_mlp_experts: int = 32,
    k_mlp: int = 2,
    aux_loss_type: str = "mi",
    aux_loss_weight: float = 0.0,
    gate_type: str = "mlp",
    bos_token_id: int | None = 50256,
    eos_token_id: int | None = 50256,
    tie_word_embeddings: bool = False,
    **kwargs: Any,
  ) -> None:
    self.vocab_size = vocab_size
    self.history_length, self.block_size = history_length, block_size
    self.n_embd, self.n_layer, self.n_head = n_embd, n_layer, n_head
    self.att_hidden, self.ffd_hidden = att_hidden, ffd_hidden
    self.activation_function = activation_function
    self.resid_pdrop, self.embd_pdrop = resid_pdrop, embd_pdrop
    self.attn_pdrop, self.moe_pdrop = attn_pdrop, moe_pdrop
    self.layer_norm_epsilon, self.initializer_range = layer_norm_epsilon, initializer_range
    self.use_cache, self.sample_topk = use_cache, sample_topk
    self.gate_type, self.gating_size = gate_type, gating_size
    self.n_att_experts, self.k_att = n_att_experts, k_att
    self.n_mlp_experts, self.k_mlp = n_mlp_experts, k_mlp
    self.aux_loss_type, self.aux_loss_weight = aux_loss_type, aux_loss_weight
    self.n_ctx = kwargs.pop("n_ctx", history_length * n_layer)
    self._check(tie_word_embeddings)
    super().__init__(
      bos_token_id=bos_token_id,
      eos_token_id=eos_token_id,
      tie_word_embeddings=tie_word_embeddings,
      **kwargs,
    )

  def _check(self, tie_word_embeddings: bool) -> None:
    if self.gate_type not in _GATE_TYPES:
      raise ValueError(f"gate_type={self.gate_type!r} is none of {', '.join(_GATE_TYPES)}")
    if self.aux_loss_type not in _AUX_LOSS_TYPES:
      raise ValueError(
        f"aux_loss_type={self.aux_loss_type!r} is none of {', '.join(_AUX_LOSS_TYPES)}"
      )
    for k, n in (("k_att", "n_att_experts"), ("k_mlp", "n_mlp_experts")):
      top_k, num_experts = getattr(self, k), getattr(self, n)
      if not 1 <= top_k <= num_experts:
        raise ValueError(f"{k}={top_k} must be from 1 to {n}={num_experts}")
      if not 0 <= self.sample_topk <= top_k:
        raise ValueError(f"sample_topk={self.sample_topk} must be from 0 to {k}={top_k}")
    if self.att_hidden % self.n_head:
      raise ValueError(f"att_hidden={self.att_hidden} is not divisible by n_head={self.n_head}")
    if self.activation_function != "gelu_new":
      raise ValueError(
        f"activation_function={self.activation_function!r} is unknown: ModuleFormer has 'gelu_new'"
      )
    if self.attn_pdrop:
      raise ValueError(f"attn_pdrop={self.attn_pdrop} is not supported: set it to 0")
    if tie_word_embeddings:
      raise ValueError("tie_word_embeddings=True: ModuleFormer's embeddings are not tied")

  @property
  def head_dim(self) -> int:
    """Return the width of one head."""
    return self.att_hidden // self.n_head

  @property
  def identity_kv(self) -> bool:
    """Return True if keys and values are the layer's normalised input, without parameters."""
    return self.n_head == 1 and self.att_hidden == self.n_embd
