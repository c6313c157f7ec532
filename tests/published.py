"""The published PyTorch layout as our parameter tree: what the recorded cases are compared in."""

from typing import Any

import numpy as np

from mfjax.config import DType, Gate, ModelConfig

_GATES = {
  Gate.MLP: {"w_gate.0.weight": "w1", "w_gate.0.bias": "b1", "w_gate.3.weight": "rows"},
  Gate.LINEAR: {"w_gate.0.weight": "rows"},
  Gate.GMM: {"w_gate.weight": "w1", "expert_centroids": "rows", "temperature": "temperature"},
}


def model_config(published: dict[str, Any], vocab_size: int) -> ModelConfig:
  """Return the float32 config of a published config.json."""
  return ModelConfig(
    vocab_size=vocab_size,
    d_model=published["n_embd"],
    num_layers=published["n_layer"],
    num_heads=published["n_head"],
    d_attention=published["att_hidden"],
    d_ff=published["ffd_hidden"],
    num_attention_experts=published["n_att_experts"],
    num_ff_experts=published["n_mlp_experts"],
    attention_top_k=published["k_att"],
    ff_top_k=published["k_mlp"],
    gate=Gate(published["gate_type"]),
    d_gate=published["gating_size"],
    layer_norm_eps=published["layer_norm_epsilon"],
    compute_dtype=DType.FLOAT32,
  )


def to_params(tensors: dict[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
  """Return the stacked parameter tree for the published tensors of a model (or its gradients)."""

  def vocabulary(name: str) -> np.ndarray:
    rows = config.padded_vocab_size - config.vocab_size
    return np.pad(tensors[name], ((0, rows), (0, 0)))

  def layer(index: int, name: str) -> np.ndarray:
    return tensors[f"transformer.h.{index}.{name}"]

  def stack(name: str, transpose: bool = False) -> np.ndarray:
    rows = [layer(index, name) for index in range(config.num_layers)]
    return np.stack([row.T if transpose else row for row in rows])

  def router(prefix: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for theirs, ours in _GATES[config.gate].items():
      value = stack(f"{prefix}.gate.{theirs}", transpose=ours == "w1")
      tree[ours] = {"bank_0": value} if ours == "rows" else value
    return tree

  def sublayer(router_prefix: str, experts_prefix: str) -> dict[str, Any]:
    bank = {
      "w_in": stack(f"{experts_prefix}.experts.weight"),
      "w_out": stack(f"{experts_prefix}.output_experts.weight"),
    }
    return {"router": router(router_prefix), "experts": {"bank_0": bank}}

  def norm(name: str) -> dict[str, Any]:
    return {part: stack(f"{name}.{part}") for part in ("weight", "bias")}

  attention = sublayer("attn.q_proj", "attn.q_proj")
  if not config.identity_kv:
    for name in ("key", "value"):
      attention[f"w_{name}"] = stack(f"attn.{name[0]}_proj.weight", transpose=True)
      attention[f"b_{name}"] = stack(f"attn.{name[0]}_proj.bias")
  return {
    "embedding": vocabulary("transformer.wte.weight"),
    "lm_head": vocabulary("lm_head.weight"),
    "final_norm": {part: tensors[f"transformer.ln_f.{part}"] for part in ("weight", "bias")},
    "blocks": {
      "norm1": norm("ln_1"),
      "norm2": norm("ln_2"),
      "attention": attention,
      "ff": sublayer("mlpf", "mlpf"),
    },
  }
