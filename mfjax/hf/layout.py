"""The published PyTorch format (`model_type: moduleformer`) and where its tensors lie in our tree.

A published tensor belongs to one layer; our leaves stack the layers. Dense matrices are [out, in]
there and [in, out] here, the routers' last matrices excepted. Experts are [N, in, out] in both; our
banks of experts, and of router rows, are joined along N. The vocabulary's padding stays here.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from mfjax.config import Gate, ModelConfig

Keys = tuple[str, ...]
Shape = tuple[int, ...]

GATES = {
  Gate.MLP: {"w_gate.0.weight": "w1", "w_gate.0.bias": "b1", "w_gate.3.weight": "rows"},
  Gate.LINEAR: {"w_gate.0.weight": "rows"},
  Gate.GMM: {"w_gate.weight": "w1", "expert_centroids": "rows", "temperature": "temperature"},
}
BUFFERS = ("attn.mask", "attn.cum_weight")
STACKED = "blocks"
_BANKS = "*"  # Stands for every bank: bank_0, bank_1, ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """One published tensor, `parts` being our leaves that hold it, joined along its first axis."""

  name: str
  shape: Shape
  parts: tuple[Keys, ...]
  layer: int | None = None
  transposed: bool = False

  @property
  def size(self) -> int:
    return int(np.prod(self.shape))


def banks(leaves: Iterable[Keys]) -> tuple[str, ...]:
  """Return the names of the banks that a tree with these leaves has, oldest first."""
  names = {key for keys in leaves for key in keys if key.startswith("bank_")}
  return tuple(sorted(names, key=lambda name: int(name.removeprefix("bank_"))))


def tensors(config: ModelConfig, bank_names: Iterable[str] = ("bank_0",)) -> dict[str, Tensor]:
  """Return every published parameter by name, in the order of the published class.

  `config` counts all experts; `bank_names` are the banks that hold them.
  """
  names = tuple(bank_names)

  def expand(keys: Keys) -> tuple[Keys, ...]:
    if _BANKS not in keys:
      return (keys,)
    return tuple(tuple(name if key == _BANKS else key for key in keys) for name in names)

  made = [
    Tensor(name=name, shape=shape, parts=expand(keys), layer=layer, transposed=transposed)
    for name, shape, keys, layer, transposed in _entries(config)
  ]
  return {tensor.name: tensor for tensor in made}


_Entry = tuple[str, Shape, Keys, int | None, bool]


def _entries(config: ModelConfig) -> Iterator[_Entry]:
  vocabulary, vector = (config.vocab_size, config.d_model), (config.d_model,)
  yield "transformer.wte.weight", vocabulary, ("embedding",), None, False
  for layer in range(config.num_layers):
    for name, shape, keys, transposed in _layer_entries(config):
      yield f"transformer.h.{layer}.{name}", shape, (STACKED, *keys), layer, transposed
  for part in ("weight", "bias"):
    yield f"transformer.ln_f.{part}", vector, ("final_norm", part), None, False
  yield "lm_head.weight", vocabulary, ("lm_head",), None, False


def _layer_entries(config: ModelConfig) -> Iterator[tuple[str, Shape, Keys, bool]]:
  d_model, width = config.d_model, config.d_attention
  for part in ("weight", "bias"):
    yield f"ln_1.{part}", (d_model,), ("norm1", part), False
  num = config.num_attention_experts
  yield from _expert_entries("attn.q_proj", "attention", num, d_model, width)
  yield from _gate_entries(config, "attn.q_proj", "attention", num)
  if not config.identity_kv:
    for name in ("key", "value"):
      yield f"attn.{name[0]}_proj.weight", (width, d_model), ("attention", f"w_{name}"), True
      yield f"attn.{name[0]}_proj.bias", (width,), ("attention", f"b_{name}"), False
  for part in ("weight", "bias"):
    yield f"ln_2.{part}", (d_model,), ("norm2", part), False
  num = config.num_ff_experts
  yield from _expert_entries("mlpf", "ff", num, d_model, config.d_ff)
  yield from _gate_entries(config, "mlpf", "ff", num)


def _expert_entries(
  prefix: str, kind: str, num: int, d_model: int, width: int
) -> Iterator[tuple[str, Shape, Keys, bool]]:
  bank = (kind, "experts", _BANKS)
  yield f"{prefix}.experts.weight", (num, d_model, width), (*bank, "w_in"), False
  yield f"{prefix}.output_experts.weight", (num, width, d_model), (*bank, "w_out"), False


def _gate_entries(
  config: ModelConfig, prefix: str, kind: str, num: int
) -> Iterator[tuple[str, Shape, Keys, bool]]:
  d_model, d_gate = config.d_model, config.d_gate
  rows = (num, d_model if config.gate is Gate.LINEAR else d_gate)
  shapes = {"w1": (d_gate, d_model), "b1": (d_gate,), "rows": rows, "temperature": (1,)}
  for theirs, ours in GATES[config.gate].items():
    keys = (kind, "router", ours, _BANKS) if ours == "rows" else (kind, "router", ours)
    yield f"{prefix}.gate.{theirs}", shapes[ours], keys, ours == "w1"


def is_buffer(name: str) -> bool:
  """Return whether a published name is one of the attention's constant buffers."""
  return name.startswith("transformer.h.") and name.endswith(BUFFERS)


def buffer_names(num_layers: int) -> list[str]:
  """Return the names of all buffers of a model."""
  return [f"transformer.h.{layer}.{name}" for layer in range(num_layers) for name in BUFFERS]


def buffer(name: str, context_length: int, dtype: np.dtype) -> np.ndarray:
  """Return a buffer [C, C]: the int8 causal mask, or the strictly lower triangle in `dtype`."""
  if name.endswith(BUFFERS[0]):
    return np.tril(np.ones((context_length, context_length), np.int8))
  return np.tril(np.ones((context_length, context_length), dtype), -1)


def to_params(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, object]:
  """Return our parameter tree, held in memory, of the published tensors of a small model."""
  layers: dict[Keys, list[np.ndarray]] = {}
  for tensor in tensors(config).values():
    value = arrays[tensor.name].T if tensor.transposed else arrays[tensor.name]
    layers.setdefault(tensor.parts[0], []).append(value)
  tree: dict[str, object] = {}
  for keys, values in layers.items():
    leaf = np.stack(values) if keys[0] == STACKED else values[0]
    if keys in (("embedding",), ("lm_head",)):
      leaf = np.pad(leaf, ((0, config.padded_vocab_size - config.vocab_size), (0, 0)))
    node = tree
    for key in keys[:-1]:
      node = node.setdefault(key, {})  # type: ignore[assignment]
    node[keys[-1]] = leaf
  return tree
