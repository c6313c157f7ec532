"""Logits of two programs on the same weights and tokens: JAX's, and the exported PyTorch file's.

Models are computed layer by layer in float32, one layer's weights in memory at a time. PyTorch
loads a small model as users will, through transformers.

Where a router is near a tie, rounding decides which expert it takes, and two right programs part.
What attends to that position then differs as well; and a deep model of random weights makes much of
each rounding. So if logits are too far apart from end to end, the programs are run again in step:
each layer, and the head, of both from the first program's state. Positions at which a layer's
outputs are then apart are counted, and only few are taken for ties.

Shapes: B rows, T positions, D d_model, V vocabulary.
"""

import dataclasses
import functools
import importlib
import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from mfjax import model, sharding
from mfjax.config import DType, KernelConfig, MeshConfig, ModelConfig
from mfjax.hf import layout
from mfjax.hf.directory import Directory
from mfjax.hf.progress import Report, Stage
from mfjax.hf.published_config import DEFAULTS
from mfjax.hf.source import BLOCK_BYTES, Source, cast, narrower, row_blocks
from mfjax.layers import LayerNorm
from mfjax.model import Block, Execution
from pallas_kernels.implementation import Implementation

TOLERANCE = 1e-4  # Of a position's logits, relative to their range.
STEP_TOLERANCE = 2e-5  # The same of one layer's output from equal input: nothing has added up.
SHARE_WITHIN = 0.99  # A router that is near a tie may choose otherwise at a position or two.
KL_IN_STEP = 1e-2  # Nats; from end to end the two still are the same model.
SHARE_OF_TIES = 1e-3  # Of all layers' positions, at most; one wrong expert of one layer has more.
_ROWS = 2
_WHOLE_MODEL_BYTES = 2**30  # Up to this size PyTorch loads the model as a whole.
_SEED = 0
_MODEL = "mfjax.hf.modeling_moduleformer"  # Imported when it is needed: it imports torch.
_PORTABLE = KernelConfig(grouped_matmul=Implementation.XLA, stick_breaking=Implementation.XLA)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitParity:
  """How far logits are apart; `kl` is the mean of KL(a || b) over positions, in nats.

  If too few are within tolerance from end to end, each layer and the head run from the first
  program's state: then `ties` of the layers' positions are apart, and `share_in_step` of the
  logits are within tolerance.
  """

  what: str
  positions: int
  max_difference: float
  mean_difference: float
  logit_range: float
  share_within: float
  kl: float
  top1_agreement: float
  ties: int = 0
  decisions: int = 0
  share_in_step: float | None = None

  @property
  def is_within_tolerance(self) -> bool:
    if self.share_within >= SHARE_WITHIN:  # False for NaN.
      return True
    is_equal_in_step = self.ties <= max(1, SHARE_OF_TIES * self.decisions) and (
      (self.share_in_step or 0) >= SHARE_WITHIN
    )
    return is_equal_in_step and self.kl <= KL_IN_STEP

  def to_dict(self) -> dict[str, Any]:
    """Return the figures and the tolerance."""
    tolerance = {
      "relative_to_range": TOLERANCE,
      "of_one_layer": STEP_TOLERANCE,
      "share_of_positions": SHARE_WITHIN,
      "share_of_ties": SHARE_OF_TIES,
      "kl_in_step": KL_IN_STEP,
    }
    return dataclasses.asdict(self) | {"tolerance": tolerance}

  def describe(self, *, verdict: bool = True) -> str:
    """Return one line of text."""
    text = (
      f"{self.what}, {self.positions} positions in float32: difference at most "
      f"{self.max_difference:.3g}, {self.mean_difference:.3g} on average, of a range of "
      f"{self.logit_range:.3g}; KL {self.kl:.3g} nats; top-1 agreement {self.top1_agreement:.2%}"
    )
    if not verdict:
      return text
    within = "within" if self.is_within_tolerance else "BEYOND"
    text += f"; {within} tolerance: {self.share_within:.2%} of positions are within {TOLERANCE:g} "
    text += f"of the range, {SHARE_WITHIN:.0%} must be"
    if self.share_in_step is None:
      return text
    return (
      f"{text}, or each layer from equal input: there {self.ties} of {self.decisions:,} layers' "
      f"positions are apart ({SHARE_OF_TIES:.1%} may be, for ties of routers), "
      f"{self.share_in_step:.2%} of the logits within tolerance, and KL must be at most "
      f"{KL_IN_STEP:g}"
    )


def compare(what: str, a: np.ndarray, b: np.ndarray) -> LogitParity:
  """Compare logits [B, T, V]."""
  a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
  largest, means, kls, top1 = [], [], [], []
  for left, right in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
    difference = np.abs(left - right)
    log_p, log_q = _log_softmax(left), _log_softmax(right)
    largest.append(difference.max())
    means.append(difference.mean())
    kls.append((np.exp(log_p) * (log_p - log_q)).sum())
    top1.append(left.argmax() == right.argmax())
  span = float(np.ptp(a))
  return LogitParity(
    what=what,
    positions=len(a),
    max_difference=float(np.max(largest)),
    mean_difference=float(np.mean(means)),
    logit_range=span,
    share_within=float(np.mean(np.array(largest) <= TOLERANCE * span)),
    kl=float(np.mean(kls)),
    top1_agreement=float(np.mean(top1)),
  )


def _log_softmax(x: np.ndarray) -> np.ndarray:
  x = x - x.max()
  return x - np.log(np.exp(x).sum())


def reason_to_skip(a: Source, b: Source) -> str:
  """Return why the logits of these two cannot be compared here, or nothing."""
  has_torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
  if any(isinstance(source, Directory) for source in (a, b)) and not has_torch:
    return "torch and transformers are not installed (pip install 'mfjax[hf]')"
  return ""


def compare_logits(
  a: Source, b: Source, num_tokens: int, report: Report
) -> tuple[LogitParity, LogitParity | None]:
  """Compare the logits of `num_tokens` random tokens, both models rounded to the narrower dtype.

  Returns:
    the comparison, and what rounding does to the wider one's logits, if one is wider.
  """
  rng = np.random.default_rng(_SEED)
  ids_BT = rng.integers(0, a.config.vocab_size, (_ROWS, max(1, num_tokens // _ROWS)))
  narrow = {name: narrower(a.dtype(name), b.dtype(name)) for name in a.tensors}
  wide = next((s for s in (a, b) if any(s.dtype(n) != narrow[n] for n in narrow)), None)
  total = sum(tensor.size * 4 for tensor in a.tensors.values())
  stage = Stage("computing logits", (2 if wide is None else 3) * total, report)
  first, second = _Program(a), _Program(b)
  left, right = (program.logits(ids_BT, narrow, stage) for program in (first, second))
  found = compare(f"{first.name} and {second.name}", left, right)
  if not found.is_within_tolerance:
    found = _in_step(found, first, second, ids_BT, narrow, report)
  if wide is None:
    return found, None
  program = first if wide is a else second
  exact = program.logits(ids_BT, {name: wide.dtype(name) for name in narrow}, stage)
  names = sorted({dtype.name for dtype in narrow.values()})
  what = f"{program.name} before and after rounding to {'/'.join(names)}"
  return found, compare(what, exact, left if wide is a else right)


def _in_step(
  found: LogitParity,
  first: "_Program",
  second: "_Program",
  ids_BT: np.ndarray,
  dtypes: Mapping[str, np.dtype],
  report: Report,
) -> LogitParity:
  """Return `found` with the layers' positions that are apart in step, and the head's logits."""
  total = 2 * sum(tensor.size * 4 for tensor in first.source.tensors.values())
  stage = Stage("comparing layers", total, report)
  left, right = first.rounded(dtypes, stage), second.rounded(dtypes, stage)
  h_BTD = left.embed(ids_BT)
  num_layers, ties = first.source.config.num_layers, 0
  for layer in range(num_layers):
    left_BTD, right_BTD = left.layer(h_BTD, layer), right.layer(h_BTD, layer)
    difference_BT = np.abs(left_BTD - right_BTD).max(-1)
    is_near_BT = difference_BT <= STEP_TOLERANCE * np.ptp(left_BTD)  # False for NaN.
    ties += int((~is_near_BT).sum())
    h_BTD = left_BTD
  in_step = compare(found.what, left.head(h_BTD), right.head(h_BTD))
  return dataclasses.replace(
    found,
    ties=ties,
    decisions=num_layers * ids_BT.size,
    share_in_step=in_step.share_within,
  )


class _Program:
  """What computes a source's logits: JAX for a workdir, PyTorch for a directory."""

  def __init__(self, source: Source) -> None:
    self.source = source
    self.name = "PyTorch" if isinstance(source, Directory) else "JAX"

  @functools.cached_property
  def stack(self) -> "_Stack":
    if isinstance(self.source, Directory):
      return _TorchStack(self.source.config, self.source.published)
    return _JaxStack(self.source.config)

  def rounded(self, dtypes: Mapping[str, np.dtype], stage: Stage) -> "_Rounded":
    """Return the model with its weights rounded to `dtypes`."""
    return _Rounded(self.source, self.stack, dtypes, stage)

  def logits(self, ids_BT: np.ndarray, dtypes: Mapping[str, np.dtype], stage: Stage) -> np.ndarray:
    """Return float32 [B, T, V] of the model with its weights rounded to `dtypes`."""
    source = self.source
    if isinstance(source, Directory):
      size = sum(tensor.size * 4 for tensor in source.tensors.values())
      as_it_is = all(source.dtype(name) == dtypes[name] for name in source.tensors)
      if size <= _WHOLE_MODEL_BYTES and as_it_is:
        stage.add(size)
        return _loaded_logits(source.path, ids_BT)
    model = self.rounded(dtypes, stage)
    h_BTD = model.embed(ids_BT)
    for layer in range(source.config.num_layers):
      h_BTD = model.layer(h_BTD, layer)
    return model.head(h_BTD)


@dataclasses.dataclass(frozen=True)
class _Rounded:
  """A model whose layers are computed one by one, each read when it is needed."""

  source: Source
  stack: "_Stack"
  dtypes: Mapping[str, np.dtype]
  stage: Stage

  def embed(self, ids_BT: np.ndarray) -> np.ndarray:
    return self._read("transformer.wte.weight")[ids_BT]

  def layer(self, h_BTD: np.ndarray, layer: int) -> np.ndarray:
    names = [name for name, tensor in self.source.tensors.items() if tensor.layer == layer]
    return self.stack.layer(h_BTD, {name: self._read(name) for name in names}, layer)

  def head(self, h_BTD: np.ndarray) -> np.ndarray:
    norm = {part: self._read(f"transformer.ln_f.{part}") for part in ("weight", "bias")}
    name = "lm_head.weight"
    rows = max(1, BLOCK_BYTES // (4 * self.source.config.d_model))
    blocks = row_blocks(self.source.tensors[name], rows)
    pieces = [self.stack.head(h_BTD, norm, self._read(name, *block)) for block in blocks]
    return np.concatenate(pieces, axis=-1)

  def _read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    stop = self.source.tensors[name].shape[0] if stop is None else stop
    values = cast(self.source.read(name, start, stop), self.dtypes[name], name)
    values = values.astype(np.float32)
    self.stage.add(values.nbytes)
    return values


class _Stack(Protocol):
  """A program that computes one layer at a time; float32 arrays in and out."""

  def layer(self, h_BTD: np.ndarray, weights: Mapping[str, np.ndarray], layer: int) -> np.ndarray:
    """Return the output of a layer with these published tensors."""
    ...

  def head(
    self, h_BTD: np.ndarray, norm: Mapping[str, np.ndarray], rows_VD: np.ndarray
  ) -> np.ndarray:
    """Return the logits of some rows of lm_head."""
    ...


class _JaxStack:
  """The library's own block, on one device."""

  def __init__(self, config: ModelConfig) -> None:
    self._config = dataclasses.replace(config, compute_dtype=DType.FLOAT32)
    self._tensors = layout.tensors(dataclasses.replace(config, num_layers=1))
    devices = jax.devices()[:1]
    self._mesh = sharding.make_mesh(MeshConfig(), devices)
    execution = Execution(kernels=_PORTABLE)
    specs = model.param_specs(self._config, MeshConfig())["blocks"]
    unstacked = jax.tree.map(lambda s: P(*s[1:]), specs, is_leaf=lambda s: isinstance(s, P))
    self._shardings = sharding.shardings(self._mesh, unstacked)
    self._block = _parts(lambda: Block(self._config, execution, nnx.Rngs(params=0)))
    self._norm = _parts(lambda: LayerNorm(self._config))
    self._run_block, self._run_head = jax.jit(self._apply_block), jax.jit(self._apply_head)

  def layer(self, h_BTD: np.ndarray, weights: Mapping[str, np.ndarray], layer: int) -> np.ndarray:
    params: dict[str, Any] = {}
    for name, tensor in self._tensors.items():
      if tensor.layer is not None:
        value = weights[name.replace("transformer.h.0.", f"transformer.h.{layer}.")]
        *folders, last = tensor.parts[0][1:]
        node = params
        for folder in folders:
          node = node.setdefault(folder, {})
        node[last] = value.T if tensor.transposed else value
    with jax.set_mesh(self._mesh):
      return np.asarray(
        self._run_block(jax.device_put(params, self._shardings), self._place(h_BTD))
      )

  def head(
    self, h_BTD: np.ndarray, norm: Mapping[str, np.ndarray], rows_VD: np.ndarray
  ) -> np.ndarray:
    with jax.set_mesh(self._mesh):
      return np.asarray(self._run_head(dict(norm), self._place(h_BTD), rows_VD))

  def _place(self, h_BTD: np.ndarray) -> jax.Array:
    return sharding.device_batch(self._mesh, {"h": h_BTD})["h"]

  def _apply_block(self, params: Any, h_BTD: jax.Array) -> jax.Array:
    segments_BT = jnp.ones_like(h_BTD[:, :, 0], jnp.int32)
    block = _filled(self._block, params)
    return block(h_BTD, segments_BT, None, None, None, None)[0]

  def _apply_head(self, norm: Any, h_BTD: jax.Array, rows_VD: jax.Array) -> jax.Array:
    h_BTD = _filled(self._norm, norm)(h_BTD)
    return jnp.einsum("btd,vd->btv", h_BTD, rows_VD, precision="highest")


def _parts(build: Callable[[], nnx.Module]) -> tuple[Any, Any]:
  return nnx.split(nnx.eval_shape(build))


def _filled(parts: tuple[Any, Any], params: Any) -> Any:
  graph, state = parts
  state = jax.tree.map(lambda x: x, state)  # A copy: the next line writes into it.
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graph, state)


class _TorchStack:
  """The exported modelling file's block."""

  def __init__(self, config: ModelConfig, published: Mapping[str, Any]) -> None:
    self._torch = torch = importlib.import_module("torch")
    module = importlib.import_module(_MODEL)
    self._eps = config.layer_norm_eps
    shape = {key: value for key, value in published.items() if key in DEFAULTS}
    with torch.device("meta"):
      block = module.ModuleFormerBlock(module.ModuleFormerConfig(**shape), 0)
    self._block = block.eval()

  def layer(self, h_BTD: np.ndarray, weights: Mapping[str, np.ndarray], layer: int) -> np.ndarray:
    prefix = f"transformer.h.{layer}."
    tensors = {name.removeprefix(prefix): self._tensor(value) for name, value in weights.items()}
    self._block.load_state_dict(tensors, strict=True, assign=True)
    with self._torch.no_grad():
      return self._block(self._tensor(h_BTD))[0].numpy()

  def head(
    self, h_BTD: np.ndarray, norm: Mapping[str, np.ndarray], rows_VD: np.ndarray
  ) -> np.ndarray:
    functional = self._torch.nn.functional
    weight, bias = (self._tensor(norm[part]) for part in ("weight", "bias"))
    h = functional.layer_norm(self._tensor(h_BTD), weight.shape, weight, bias, self._eps)
    return functional.linear(h, self._tensor(rows_VD)).numpy()

  def _tensor(self, values: np.ndarray) -> Any:
    return self._torch.from_numpy(np.ascontiguousarray(values))


def _loaded_logits(path: pathlib.Path, ids_BT: np.ndarray) -> np.ndarray:
  """Return the logits of a directory as its users load it, by our own class, never by its code."""
  torch = importlib.import_module("torch")
  importlib.import_module("transformers.utils.logging").disable_progress_bar()
  model_class = importlib.import_module(_MODEL).ModuleFormerForCausalLM
  loaded = model_class.from_pretrained(path, dtype=torch.float32).eval()
  with torch.no_grad():
    return loaded(torch.from_numpy(ids_BT)).logits.numpy()
