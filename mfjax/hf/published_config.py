"""config.json of the published PyTorch format, and our model configuration."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mfjax.config import DType, Gate, ModelConfig
from mfjax.schema import coerce

MODEL_TYPE = "moduleformer"
# The buffers' side is their sum; the published model attends to everything that it is given.
CONTEXT = {"block_size": 512, "history_length": 512}

# What the published class takes for a key that is missing.
DEFAULTS: dict[str, Any] = {
  "vocab_size": 50295,
  "block_size": 512,
  "history_length": 512,
  "n_embd": 1024,
  "n_layer": 48,
  "n_head": 1,
  "att_hidden": 1024,
  "ffd_hidden": 2048,
  "n_att_experts": 16,
  "n_mlp_experts": 32,
  "k_att": 2,
  "k_mlp": 2,
  "gate_type": "mlp",
  "gating_size": 256,
  "sample_topk": 0,
  "embd_pdrop": 0.0,
  "resid_pdrop": 0.0,
  "moe_pdrop": 0.0,
  "layer_norm_epsilon": 1e-5,
  "initializer_range": 0.02,
}
FIELDS = {
  "vocab_size": "vocab_size",
  "n_embd": "d_model",
  "n_layer": "num_layers",
  "n_head": "num_heads",
  "att_hidden": "d_attention",
  "ffd_hidden": "d_ff",
  "n_att_experts": "num_attention_experts",
  "n_mlp_experts": "num_ff_experts",
  "k_att": "attention_top_k",
  "k_mlp": "ff_top_k",
  "gate_type": "gate",
  "gating_size": "d_gate",
  "sample_topk": "sample_top_k",
  "embd_pdrop": "embedding_dropout",
  "resid_pdrop": "residual_dropout",
  "moe_pdrop": "router_dropout",
  "layer_norm_epsilon": "layer_norm_eps",
  "initializer_range": "init_std",
}
# Values that name the only thing this model does.
_ONLY = {
  "model_type": MODEL_TYPE,
  "activation_function": "gelu_new",
  "att_func": "stickbreaking",
  "tie_word_embeddings": False,
}


def to_published(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
  """Return config.json's content but for the tokenizer's special ids."""
  published: dict[str, Any] = {
    "architectures": ["ModuleFormerForCausalLM"],
    "auto_map": {
      "AutoConfig": "configuration_moduleformer.ModuleFormerConfig",
      "AutoModelForCausalLM": "modeling_moduleformer.ModuleFormerForCausalLM",
    },
    **_ONLY,
    **CONTEXT,
    "attn_pdrop": 0.0,
    "aux_loss_type": "mi",
    "aux_loss_weight": 0.0,
    "n_ctx": 512 * config.num_layers,
    # `torch_dtype` was renamed: transformers 5 writes and reads `dtype`, 4 reads `torch_dtype`.
    "dtype": dtype,
    "torch_dtype": dtype,
    "use_cache": True,
  }
  for theirs, ours in FIELDS.items():
    value = getattr(config, ours)
    published[theirs] = value.value if isinstance(value, Gate) else value
  return dict(sorted(published.items()))


def from_published(
  published: Mapping[str, Any], compute_dtype: DType = DType.BFLOAT16
) -> tuple[ModelConfig | None, list[str]]:
  """Return the model that a config.json describes, or None, and one phrase per problem with it.

  Missing keys take the published defaults; keys that say nothing about the model are ignored.
  """
  problems = []
  for key, wanted in _ONLY.items():
    if published.get(key) not in (None, wanted):
      problems.append(f"{key}={published[key]!r} is not {wanted!r}")
  kinds = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
  values: dict[str, Any] = {}
  for theirs, ours in FIELDS.items():
    value = published.get(theirs)
    try:
      values[ours] = coerce(DEFAULTS[theirs] if value is None else value, kinds[ours], theirs)
    except ValueError as error:
      problems.append(str(error))
  for kind, names in {"att": ("k_att", "n_att_experts"), "mlp": ("k_mlp", "n_mlp_experts")}.items():
    top_k, count = (values.get(FIELDS[name], 0) for name in names)
    if top_k > count:
      problems.append(f"k_{kind}={top_k} exceeds n_{kind}_experts={count}")
  if problems:
    return None, problems
  try:
    return ModelConfig(**values, compute_dtype=compute_dtype), []
  except ValueError as error:
    return None, [_in_their_words(str(error))]


def context_length(published: Mapping[str, Any]) -> int:
  """Return C, the side of the buffers [C, C]."""
  return sum(int(published.get(key) or default) for key, default in CONTEXT.items())


def _in_their_words(message: str) -> str:
  for theirs, ours in sorted(FIELDS.items(), key=lambda pair: -len(pair[1])):
    message = message.replace(ours, theirs)
  return message
