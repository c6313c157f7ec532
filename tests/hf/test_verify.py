"""`mfjax verify`: what counts as the same model, and that every difference is named."""

import dataclasses
import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest

from mfjax.hf import parity
from mfjax.hf.export import export
from mfjax.hf.source import narrower
from mfjax.hf.verify import verify
from tests.hf import models

has_torch = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """A workdir, and its exports in float32 and bfloat16."""
  folder = tmp_path_factory.mktemp("pair")
  models.make_workdir(folder / "w", models.HEADS)
  export(folder / "w", folder / "f32", dtype="float32", num_tokens=0)
  export(folder / "w", folder / "bf16", dtype="bfloat16", num_tokens=0)
  return folder


@pytest.mark.parametrize("a", ["w", "f32", "bf16"])
@pytest.mark.parametrize("b", ["w", "f32", "bf16"])
def test_any_two_of_either_kind(pair, a, b):
  verdict = verify(pair / a, pair / b, num_tokens=0)
  assert verdict.is_equal
  assert verdict.tensors == 2 * 18 + 4
  assert verdict.differences == ()


def test_every_difference_is_named(pair, tmp_path):
  params = models.draw_params(models.HEADS)
  params["blocks"]["norm1"]["weight"][1, 3] += 0.5
  params["blocks"]["ff"]["experts"]["bank_0"]["w_out"][0, 2, 5, 7] = np.nan
  params["blocks"]["attention"]["w_key"][0, 1, 2] *= 1.0000002
  params["lm_head"][4] += 2
  models.make_workdir(tmp_path / "w", models.HEADS, params=params)
  for a, b in ((tmp_path / "w", pair / "f32"), (pair / "w", tmp_path / "w")):
    verdict = verify(a, b, num_tokens=0)
    assert not verdict.is_equal
    assert [line.partition(" differs")[0] for line in verdict.differences] == [
      "transformer.h.0.attn.k_proj.weight",
      "transformer.h.0.mlpf.output_experts.weight",
      "transformer.h.1.ln_1.weight",
      "lm_head.weight",
    ]
    assert verdict.differences[2].endswith("differs in 1 values, by up to 0.5")
    assert verdict.differences[3].endswith("differs in 32 values, by up to 2")
  # A last bit is no difference once it is rounded away.
  assert len(verify(tmp_path / "w", pair / "bf16", num_tokens=0).differences) == 3


def test_signs_of_zero_count(pair, tmp_path):
  params = models.draw_params(models.HEADS)
  params["final_norm"]["bias"][0] = 0.0
  models.make_workdir(tmp_path / "a", models.HEADS, params=params)
  params["final_norm"]["bias"][0] = -0.0
  models.make_workdir(tmp_path / "b", models.HEADS, params=params)
  assert not verify(tmp_path / "a", tmp_path / "b", num_tokens=0).is_equal


def test_other_shapes_and_settings_are_differences(pair, tmp_path):
  config = dataclasses.replace(models.HEADS, num_layers=3, d_ff=40, ff_top_k=1, layer_norm_eps=1e-6)
  models.make_workdir(tmp_path / "w", config)
  verdict = verify(tmp_path / "w", pair / "f32", num_tokens=64)
  assert verdict.logits_skipped == "the models have different tensors"
  text = "\n".join(verdict.differences)
  assert "n_layer is 3 in" in text
  assert "k_mlp is 1 in" in text
  assert "layer_norm_epsilon is 1e-06 in" in text
  assert f"transformer.h.2.ln_1.weight is missing in {pair / 'f32'}" in text
  assert "transformer.h.1.mlpf.experts.weight is [8, 32, 40] in" in text


def test_settings_of_training_do_not_count(pair, tmp_path):
  config = dataclasses.replace(models.HEADS, residual_dropout=0.1, sample_top_k=1, init_std=0.5)
  models.make_workdir(tmp_path / "w", config)
  assert verify(tmp_path / "w", pair / "w", num_tokens=0).is_equal


def test_a_corrupt_step_is_passed_over(pair, tmp_path):
  models.make_workdir(tmp_path / "w", models.HEADS, steps=(1,))
  other = models.draw_params(models.HEADS, seed=1)
  models.make_workdir(tmp_path / "w", models.HEADS, params=other, steps=(2,))
  assert not verify(tmp_path / "w", pair / "f32", num_tokens=0).is_equal
  data = max((tmp_path / "w/checkpoints/2/params").rglob("*"), key=lambda p: p.stat().st_size)
  data.write_bytes(data.read_bytes()[:-1] + b"?")
  for a, b in ((tmp_path / "w", pair / "f32"), (pair / "w", tmp_path / "w")):
    assert verify(a, b, num_tokens=0).is_equal
  with pytest.raises(ValueError, match="step 2 .* is corrupt: params/.* differs from its digest"):
    verify(tmp_path / "w", pair / "f32", step_a=2, num_tokens=0)


def test_logits_of_two_checkpoints(pair, tmp_path):
  params = models.draw_params(models.HEADS)
  models.make_workdir(tmp_path / "same", models.HEADS, params=params)
  verdict = verify(pair / "w", tmp_path / "same", num_tokens=64)
  assert (verdict.logits.max_difference, verdict.logits.positions) == (0, 64)
  rounded = jax.tree.map(lambda x: x.astype(models.BFLOAT16), params)
  models.make_workdir(tmp_path / "bf16", models.HEADS, params=rounded)
  verdict = verify(pair / "w", tmp_path / "bf16", num_tokens=64)
  assert verdict.is_equal
  assert verdict.logits.max_difference == 0
  assert verdict.rounding.max_difference > 0


def test_logits_without_torch_are_skipped_and_said_to_be(pair, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  verdict = verify(pair / "w", pair / "f32", num_tokens=64)
  assert verdict.is_equal
  assert verdict.logits is None
  assert "torch and transformers are not installed" in verdict.logits_skipped


def test_logit_tolerance():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 100, 50))
  span = np.ptp(logits)
  near = logits + 0.9 * parity.TOLERANCE * span * rng.choice([-1, 1], logits.shape)
  found = parity.compare("a and b", logits, near)
  assert found.is_within_tolerance
  assert found.top1_agreement > 0.9
  near[0, 7] += rng.normal(size=50)  # One of 200 positions took another expert.
  assert parity.compare("a and b", logits, near).is_within_tolerance
  near[1, 7:10] += rng.normal(size=(3, 50))
  found = parity.compare("a and b", logits, near)
  assert not found.is_within_tolerance
  assert "BEYOND" in found.describe()
  assert found.kl > 0
  assert not parity.compare("a and b", logits, np.full_like(logits, np.nan)).is_within_tolerance
  same = parity.compare("a and b", logits, logits)
  assert (same.kl, same.top1_agreement, same.max_difference) == (0, 1, 0)


class Jumping(parity._JaxStack):
  """A program whose routers took other experts at some positions of the first layer."""

  positions: tuple[int, ...] = ()
  scale = 1.0

  def layer(self, h_BTD, weights, layer):
    h_BTD = super().layer(h_BTD, weights, layer).copy()
    if layer == 0:
      h_BTD[0, list(self.positions), :3] += 5.0
    return h_BTD

  def head(self, *args):
    return super().head(*args) * self.scale


@pytest.fixture
def jumping(pair, monkeypatch):
  """A function that compares logits of `w` and, by such a program, of its export."""
  monkeypatch.setattr(parity, "reason_to_skip", lambda a, b: "")
  monkeypatch.setattr(parity, "_WHOLE_MODEL_BYTES", 0)
  monkeypatch.setattr(parity, "_TorchStack", lambda config, _: Jumping(config))

  def compare(positions=(), scale=1.0):
    monkeypatch.setattr(Jumping, "positions", positions)
    monkeypatch.setattr(Jumping, "scale", scale)
    verdict = verify(pair / "w", pair / "f32")
    assert verdict.is_equal == verdict.logits.is_within_tolerance
    return verdict.logits

  return compare


def test_a_tie_of_a_router_is_no_difference(jumping):
  assert jumping().ties == 0
  found = jumping(positions=(3,))
  assert found.share_within < parity.SHARE_WITHIN  # What attends to it differs too.
  assert (found.ties, found.decisions, found.share_in_step) == (1, 512, 1.0)
  assert found.is_within_tolerance
  assert "; within tolerance: " in found.describe()
  assert "there 1 of 512 layers' positions are apart (0.1% may be, " in found.describe()
  assert "for ties of routers), 100.00% of the logits within" in found.describe()
  assert found.to_dict()["ties"] == 1


class Chaotic(parity._JaxStack):
  """A program whose last layer makes much of the smallest difference, as deep models do."""

  def layer(self, h_BTD, weights, layer):
    out_BTD = super().layer(h_BTD, weights, layer).copy()
    if layer == 1:
      out_BTD[..., 0] += 0.02 * np.sin(1e6 * h_BTD[..., 0])
    return out_BTD


class Rounding(Chaotic):
  """The same, rounding otherwise in its first layer."""

  def layer(self, h_BTD, weights, layer):
    out_BTD = super().layer(h_BTD, weights, layer)
    return out_BTD * np.float32(1 + 2e-6) if layer == 0 else out_BTD


def test_rounding_that_grows_from_layer_to_layer_is_no_difference(pair, monkeypatch):
  monkeypatch.setattr(parity, "reason_to_skip", lambda a, b: "")
  monkeypatch.setattr(parity, "_WHOLE_MODEL_BYTES", 0)
  monkeypatch.setattr(parity, "_TorchStack", lambda config, _: Rounding(config))
  monkeypatch.setattr(parity, "_JaxStack", Chaotic)
  found = verify(pair / "w", pair / "f32").logits
  assert found.share_within < 0.5
  assert (found.ties, found.share_in_step) == (0, 1.0)
  assert found.is_within_tolerance
  monkeypatch.setattr(parity, "KL_IN_STEP", found.kl / 2)
  assert not found.is_within_tolerance


def test_many_jumps_are_no_ties(jumping):
  found = jumping(positions=(3, 50))  # Of 512: more than a thousandth.
  assert (found.ties, found.share_in_step) == (2, 1.0)
  assert not found.is_within_tolerance
  assert "BEYOND" in found.describe()


@pytest.mark.parametrize("positions", [(), (3,)])
def test_ties_excuse_nothing_else(jumping, positions):
  found = jumping(positions, scale=1.01)
  assert found.ties == len(positions)
  assert found.share_in_step < 0.9
  assert not found.is_within_tolerance


def test_nan_is_no_tie(jumping):
  assert not jumping(scale=float("nan")).is_within_tolerance


@pytest.mark.parametrize(
  ("a", "b", "narrow"),
  [
    ("float32", "bfloat16", "bfloat16"),
    ("float16", "float64", "float16"),
    ("bfloat16", "float16", "float16"),
    ("float32", "float32", "float32"),
  ],
)
def test_narrower(a, b, narrow):
  left, right = (models.BFLOAT16 if n == "bfloat16" else np.dtype(n) for n in (a, b))
  assert narrower(left, right).name == narrower(right, left).name == narrow


def test_command(mfjax, pair, tmp_path):
  done = mfjax("verify", str(pair / "w"), str(pair / "f32"), "--parity_tokens=0", "--json=v.json")
  assert done.code == 0, done.err
  assert done.out.endswith("equal\n")
  assert json.loads((tmp_path / "v.json").read_text())["equal"] is True
  params = models.draw_params(models.HEADS, seed=1)
  models.make_workdir(tmp_path / "w", models.HEADS, params=params)
  done = mfjax("verify", "w", str(pair / "f32"), "--parity_tokens=0")
  assert done.code == 1
  assert done.out.count(" differs in ") == 40
  assert done.out.endswith("different\n")
  shutil.rmtree(tmp_path / "w")
  done = mfjax("verify", "w", str(pair / "f32"))
  assert done.code == 2
  assert done.err == (
    "mfjax verify: error: w is no directory: give one with config.json and model.safetensors\n"
  )


@pytest.mark.skipif(not has_torch, reason="needs torch and transformers")
@pytest.mark.parametrize(("a", "b"), [("w", "f32"), ("bf16", "w"), ("f32", "f32"), ("f32", "bf16")])
def test_logits_of_either_kind(pair, a, b):
  verdict = verify(pair / a, pair / b, num_tokens=64)
  assert verdict.is_equal
  assert verdict.logits.max_difference < 1e-4 * verdict.logits.logit_range
  assert (verdict.rounding is None) == ("bf16" not in (a, b))
