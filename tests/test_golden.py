"""Agreement with numbers recorded from the published implementation (float32, CPU)."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mfjax import losses, model, sharding
from mfjax.config import AuxLoss, DType, KernelConfig, MeshConfig
from mfjax.hf import layout, published_config
from mfjax.model import Execution
from pallas_kernels.implementation import Implementation

ROOT = pathlib.Path(__file__).parent / "golden"
CASES = ["linear_gate", "molm_like", "multihead"]
XLA = KernelConfig(grouped_matmul=Implementation.XLA, stick_breaking=Implementation.XLA)
ORACLE = KernelConfig(
  grouped_matmul=Implementation.REFERENCE, stick_breaking=Implementation.REFERENCE
)


@functools.cache
def load(name: str) -> tuple[Any, Any, dict[str, np.ndarray]]:
  """Return config, parameters and recorded arrays of a case."""
  expected = dict(np.load(ROOT / name / "expected.npz"))
  raw = json.loads((ROOT / name / "config.json").read_text())
  config, problems = published_config.from_published(raw, DType.FLOAT32)
  assert not problems
  params = layout.to_params(load_file(ROOT / name / "model.safetensors"), config)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  ids, mask = expected["input_ids"], expected["attention_mask"]
  batch = {"tokens": ids, "segments": mask, "whole": np.ones_like(ids)}
  batch = sharding.device_batch(mesh, {k: v.astype(np.int32) for k, v in batch.items()})
  placed = sharding.shardings(mesh, model.param_specs(config, MeshConfig()))
  return config, jax.device_put(params, placed), expected | batch


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
    yield


def relative_to_range(actual, expected) -> float:
  return float(np.abs(np.asarray(actual) - expected).max() / np.ptp(expected))


def aux_per_layer(sums: model.Statistics) -> np.ndarray:
  kind = AuxLoss.MUTUAL_INFORMATION
  return np.stack([losses.aux_loss_per_layer(part, kind) for part in sums], axis=1)


@pytest.mark.parametrize("kernels", [XLA, ORACLE], ids=["xla", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_losses(name, kernels):
  config, params, expected = load(name)
  tokens = expected["tokens"]
  how = Execution(kernels=kernels)
  hidden, sums, _ = model.apply(params, config, how, tokens, expected["whole"])
  assert relative_to_range(hidden, expected["hidden"]) < 1e-4
  assert relative_to_range(model.logits(params, config, hidden), expected["logits"]) < 1e-4
  np.testing.assert_allclose(aux_per_layer(sums), expected["aux_per_layer"], rtol=1e-5, atol=1e-6)
  aux = losses.aux_loss(sums, AuxLoss.MUTUAL_INFORMATION)
  np.testing.assert_allclose(aux, expected["aux_loss"], rtol=1e-5)
  entropy = _entropy(params, config, hidden, tokens)
  np.testing.assert_allclose(entropy, expected["loss"], rtol=1e-5)


def _entropy(params, config, hidden, tokens):
  targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
  is_target = (tokens >= 0).at[:, -1].set(False)
  sums = losses.cross_entropy(
    params["lm_head"],
    hidden,
    targets,
    is_target,
    vocab_size=config.vocab_size,
    z_weight=0.0,
    chunk_tokens=32,
  )
  return sums.objective / is_target.sum()


@pytest.mark.parametrize("name", CASES)
def test_gradient_of_every_parameter(name):
  config, params, expected = load(name)
  tokens = expected["tokens"]

  def loss(params):
    hidden, sums, _ = model.apply(params, config, Execution(kernels=XLA), tokens, expected["whole"])
    aux = losses.aux_loss(sums, AuxLoss.MUTUAL_INFORMATION)
    return _entropy(params, config, hidden, tokens) + 0.1 * aux

  gradients = jax.jit(jax.grad(loss))(params)
  recorded = {k.removeprefix("grad:"): v for k, v in expected.items() if k.startswith("grad:")}
  theirs = layout.to_params(recorded, config)
  # Layer by layer, as recorded: a stacked norm could hide one wrong layer.
  for path, ours in jax.tree_util.tree_leaves_with_path(gradients):
    reference = functools.reduce(lambda tree, key: tree[key.key], path, theirs)
    layers = range(config.num_layers) if path[0].key == "blocks" else [...]
    for layer in layers:
      error = np.linalg.norm(ours[layer] - reference[layer])
      assert error <= 1e-3 * np.linalg.norm(reference[layer]) + 1e-9, (path, layer)


@pytest.mark.parametrize("name", CASES)
def test_left_padding_changes_nothing(name):
  config, params, expected = load(name)
  tokens = expected["tokens"]
  segments = expected["segments"]
  assert (segments == 0).any()
  hidden, _, _ = model.apply(params, config, Execution(kernels=XLA), tokens, segments)
  logits = np.asarray(model.logits(params, config, hidden))
  kept = expected["attention_mask"] > 0
  assert relative_to_range(logits[kept], expected["padded_logits"][kept]) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_greedy_decoding_with_the_cache(name):
  config, params, expected = load(name)
  prompt = expected["tokens"][:, : int(expected["prompt_len"])]
  how = Execution(kernels=XLA)
  run = jax.jit(lambda t, s, cache: model.apply(params, config, how, t, s, cache=cache))
  cache = model.empty_cache(config, prompt.shape[0], prompt.shape[1] + 8)
  chosen, tokens = [], prompt
  for _ in range(8):
    hidden, _, cache = run(tokens, expected["whole"][:, : tokens.shape[1]], cache)
    tokens = model.logits(params, config, hidden[:, -1:]).argmax(-1).astype(jnp.int32)
    chosen.append(tokens)
  np.testing.assert_array_equal(jnp.concatenate(chosen, axis=1), expected["greedy_tokens"])
