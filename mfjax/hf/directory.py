"""A directory in the published PyTorch format: opened, and checked in full before it is used."""

import contextlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from mfjax.config import DType, Gate, ModelConfig
from mfjax.hf import layout, pickled, published_config, safetensors

CONFIG_FILE = "config.json"
# (index, single file), the first that is there counts.
_FORMATS = (
  ("model.safetensors.index.json", "model.safetensors"),
  ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
_FLOATS = {"float64", "float32", "float16", "bfloat16"}
_BLOCK_BYTES = 64 * 2**20


class _File(Protocol):
  @property
  def entries(self) -> Mapping[str, safetensors.Entry]: ...

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray: ...

  def close(self) -> None: ...


class Directory:
  """Parameters of a directory in the published format."""

  def __init__(
    self,
    path: pathlib.Path,
    published: Mapping[str, Any],
    config: ModelConfig,
    files: Mapping[str, _File],
    closing: contextlib.ExitStack,
  ) -> None:
    self.path, self.label, self.published, self.config = path, str(path), published, config
    self.tensors = layout.tensors(config)
    self._files, self._closing = files, closing

  def dtype(self, name: str) -> np.dtype:
    return self._files[name].entries[name].dtype

  def rows_per_block(self, name: str) -> int:
    tensor = self.tensors[name]
    return max(1, _BLOCK_BYTES * tensor.shape[0] // (tensor.size * self.dtype(name).itemsize))

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    return self._files[name].read(name, start, stop)

  def close(self) -> None:
    self._closing.close()


def open_directory(path: pathlib.Path) -> Directory:
  """Open a directory of safetensors or pickled tensors, one file or several with an index.

  Raises:
    ValueError: something is wrong with it; names everything that is, not the first thing only.
  """
  if not path.is_dir():
    raise ValueError(f"{path} is no directory: give one with config.json and model.safetensors")
  problems: list[str] = []
  with contextlib.ExitStack() as closing:
    published = _read_json(path / CONFIG_FILE, problems)
    files = _open_files(path, closing, problems)
    config = None
    if published is not None:
      config, found = published_config.from_published(published, _compute_dtype(files))
      problems += [f"{CONFIG_FILE}: {problem}" for problem in found]
    if config is not None and files is not None:
      problems += _disagreements(config, files)
    if problems:
      count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
      raise ValueError(f"{path} has {count}: {'; '.join(problems)}")
    assert published is not None and config is not None and files is not None
    return Directory(path, published, config, files, closing.pop_all())


def _read_json(path: pathlib.Path, problems: list[str]) -> dict[str, Any] | None:
  try:
    content = json.loads(path.read_bytes())
  except FileNotFoundError:
    problems.append(f"{path.name} is missing")
    return None
  except (ValueError, RecursionError) as error:
    problems.append(f"{path.name} is no JSON ({error})")
    return None
  if not isinstance(content, dict):
    problems.append(f"{path.name} is no JSON object")
    return None
  return content


def _compute_dtype(files: Mapping[str, _File] | None) -> DType:
  """Return what the model was made to run in: float32 only if its weights are."""
  held = (files or {}).items()
  dtypes = {file.entries[name].dtype.name for name, file in held if not layout.is_buffer(name)}
  return DType.FLOAT32 if dtypes & {"float32", "float64"} else DType.BFLOAT16


def _open_files(
  path: pathlib.Path, closing: contextlib.ExitStack, problems: list[str]
) -> dict[str, _File] | None:
  """Return the file that holds each tensor, or None if that cannot be known."""
  for index_name, single_name in _FORMATS:
    if (path / index_name).exists():
      return _open_sharded(path, index_name, closing, problems)
    if (path / single_name).exists():
      file = _open_file(path / single_name, closing, problems)
      return None if file is None else dict.fromkeys(file.entries, file)
  names = " or ".join(single for _, single in _FORMATS)
  problems.append(f"it has neither {names} nor an index of shards")
  return None


def _open_file(
  path: pathlib.Path, closing: contextlib.ExitStack, problems: list[str]
) -> _File | None:
  try:
    reader: _File
    reader = safetensors.Reader(path) if path.suffix == ".safetensors" else pickled.Reader(path)
    return closing.enter_context(contextlib.closing(reader))
  except ValueError as error:
    problems.append(str(error).replace(f"{path.parent}/", ""))
  except OSError as error:
    problems.append(f"{path.name} cannot be read ({error.strerror})")
  return None


def _open_sharded(
  path: pathlib.Path, index_name: str, closing: contextlib.ExitStack, problems: list[str]
) -> dict[str, _File] | None:
  index = _read_json(path / index_name, problems)
  if index is None:
    return None
  weight_map = index.get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
    problems.append(f"{index_name} has no weight_map from tensors to files")
    return None
  opened: dict[str, _File | None] = {}
  for shard in sorted(set(weight_map.values())):
    if pathlib.Path(shard).name != shard or not (path / shard).is_file():
      problems.append(f"{index_name} names {shard}, which is absent")
      opened[shard] = None
    else:
      opened[shard] = _open_file(path / shard, closing, problems)
  whole = all(opened.values())
  files: dict[str, _File] = {}
  for shard, file in opened.items():
    held = set() if file is None else set(file.entries)
    expected = {name for name, where in weight_map.items() if where == shard}
    for name in sorted(expected - held) if file is not None else ():
      problems.append(f"{shard} lacks {name}, which {index_name} places there")
    for name in sorted(held - expected):
      where = weight_map.get(name)
      also = f"places it in {where}" if where else "does not name it"
      problems.append(f"{shard} holds {name}, but {index_name} {also}")
    if file is not None:
      files |= dict.fromkeys(sorted(expected & held), file)
  return files if whole else None


def _disagreements(config: ModelConfig, files: Mapping[str, _File]) -> list[str]:
  """Return one phrase per fact in which the tensors are not those of `config`."""
  entries = {name: file.entries[name] for name, file in files.items()}
  found = _contradictions(config, {name: entry.shape for name, entry in entries.items()})
  wanted: dict[str, layout.Tensor] = {}
  if not found:  # A wrong count would make every layer's tensors wrong.
    wanted = layout.tensors(config)
    buffers = set(layout.buffer_names(config.num_layers))
    shapes = [
      (name, f"is {list(entries[name].shape)}, not {list(tensor.shape)}")
      for name, tensor in wanted.items()
      if name in entries and entries[name].shape != tensor.shape
    ]
    found += _by_layer(shapes)
    found += _by_layer([(n, "is missing") for n in wanted if n not in entries])
    extra = [n for n in sorted(entries) if n not in wanted and n not in buffers]
    found += _by_layer([(name, "is not part of this model") for name in extra])
  dtypes = [
    (name, f"has dtype {entry.dtype.name}, no floating point")
    for name, entry in entries.items()
    if name in wanted and entry.dtype.name not in _FLOATS
  ]
  return found + _by_layer(dtypes)


def _contradictions(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
  """Return where config.json's sizes are not those of the first layer's tensors."""
  layers = {int(m[1]) for m in map(re.compile(r"transformer\.h\.(\d+)\.").match, shapes) if m}
  told = {"n_layer": (config.num_layers, len(layers))}
  first = "transformer.h.0"
  gate = {Gate.MLP: "w_gate.3.weight", Gate.LINEAR: "w_gate.0.weight", Gate.GMM: "expert_centroids"}
  where = {
    "vocab_size": (config.vocab_size, "transformer.wte.weight", 0),
    "n_embd": (config.d_model, "transformer.wte.weight", 1),
    "n_att_experts": (config.num_attention_experts, f"{first}.attn.q_proj.experts.weight", 0),
    "att_hidden": (config.d_attention, f"{first}.attn.q_proj.experts.weight", 2),
    "n_mlp_experts": (config.num_ff_experts, f"{first}.mlpf.experts.weight", 0),
    "ffd_hidden": (config.d_ff, f"{first}.mlpf.experts.weight", 2),
  }
  if config.gate is not Gate.LINEAR:
    where["gating_size"] = (config.d_gate, f"{first}.mlpf.gate.{gate[config.gate]}", 1)
  for key, (value, name, axis) in where.items():
    if len(shapes.get(name, ())) > axis:
      told[key] = (value, shapes[name][axis])
  found = [
    f"{CONFIG_FILE} says {key}={said} and the tensors {has}"
    for key, (said, has) in told.items()
    if said != has
  ]
  actual = _gate_of(shapes)
  if actual not in (None, config.gate):
    found.append(f"{CONFIG_FILE} says gate_type={config.gate.value} and the tensors {actual.value}")
  projects = f"{first}.attn.k_proj.weight" in shapes
  has_experts = f"{first}.attn.q_proj.experts.weight" in shapes
  if has_experts and projects is config.identity_kv and not found:
    they = "have" if projects else "lack"
    found.append(
      f"{CONFIG_FILE} says n_head={config.num_heads}, att_hidden={config.d_attention}, "
      f"n_embd={config.d_model} and the tensors {they} key and value projections"
    )
  return found


def _gate_of(shapes: Iterable[str]) -> Gate | None:
  for name in shapes:
    if name.endswith(".gate.expert_centroids"):
      return Gate.GMM
    if name.endswith(".gate.w_gate.3.weight"):
      return Gate.MLP
  return Gate.LINEAR if any(n.endswith(".gate.w_gate.0.weight") for n in shapes) else None


def _by_layer(problems: Iterable[tuple[str, str]]) -> list[str]:
  """Return 'NAME PROBLEM' phrases; the same thing in several layers becomes one."""
  grouped: dict[tuple[str, str], list[int]] = {}
  for name, problem in problems:
    match = re.fullmatch(r"(transformer\.h\.)(\d+)(\..*)", name)
    pattern = f"{match[1]}{{}}{match[3]}" if match else name.replace("{", "{{").replace("}", "}}")
    grouped.setdefault((pattern, problem), []).extend([int(match[2])] if match else [])
  phrases = []
  for (pattern, problem), layers in grouped.items():
    text = str(layers[0]) if len(layers) == 1 else "{" + _ranges(layers) + "}"
    phrases.append(f"{pattern.format(text) if layers else pattern.format()} {problem}")
  return phrases


def _ranges(numbers: list[int]) -> str:
  parts: list[list[int]] = []
  for number in sorted(numbers):
    if parts and number == parts[-1][1] + 1:
      parts[-1][1] = number
    else:
      parts.append([number, number])
  return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
