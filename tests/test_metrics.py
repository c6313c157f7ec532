"""Counts against the published table and hand counts; what the meter makes of a few steps."""

import types

import jax
import numpy as np
import pytest

from mfjax import metrics
from mfjax.config import DType, Gate, ModelConfig

MOLM_350M_4B = ModelConfig()
MOLM_700M_4B = ModelConfig(attention_top_k=4, ff_top_k=4)
MOLM_700M_8B = ModelConfig(num_layers=48)


@pytest.mark.parametrize(
  ("model", "total", "in_blocks", "active"),
  [
    (MOLM_350M_4B, 4_142_526_464, 314_978_304, 366_482_432),
    (MOLM_700M_4B, 4_142_526_464, 616_968_192, 668_472_320),
    (MOLM_700M_8B, 8_182_046_720, 629_956_608, 681_460_736),
  ],
)
def test_parameters_of_the_released_models(model, total, in_blocks, active):
  counts = metrics.active_parameters(model)
  assert sum(metrics.total_parameters(model).values()) == total
  assert sum(counts.values()) == active
  assert sum(counts.values()) - counts["final_norm"] - counts["lm_head"] == in_blocks


@pytest.mark.parametrize(
  ("gate", "attention_routers", "ff_routers"),
  [
    (Gate.MLP, 2 * (8 * 3 + 3 + 3 * 4), 2 * (8 * 3 + 3 + 3 * 6)),
    (Gate.LINEAR, 2 * 8 * 4, 2 * 8 * 6),
    (Gate.GMM, 2 * (8 * 3 + 4 * 3 + 1), 2 * (8 * 3 + 6 * 3 + 1)),
  ],
)
def test_parameters_by_part(gate, attention_routers, ff_routers):
  model = ModelConfig(
    vocab_size=10, d_model=8, num_layers=2, num_heads=2, d_attention=4, d_ff=16,
    num_attention_experts=4, num_ff_experts=6, gate=gate, d_gate=3,
  )  # fmt: skip
  assert metrics.total_parameters(model) == {
    "embedding": 10 * 8,
    "attention_experts": 2 * 4 * (8 * 4 + 4 * 8),
    "attention_routers": attention_routers,
    "key_value": 2 * 2 * (8 * 4 + 4),
    "ff_experts": 2 * 6 * (8 * 16 + 16 * 8),
    "ff_routers": ff_routers,
    "layer_norms": 2 * 2 * (8 + 8),
    "final_norm": 8 + 8,
    "lm_head": 10 * 8,
  }


def test_flops_against_a_hand_count():
  model = ModelConfig(
    vocab_size=10, d_model=8, num_layers=2, num_heads=2, d_attention=4, d_ff=16,
    num_attention_experts=4, num_ff_experts=6, attention_top_k=3, ff_top_k=2, d_gate=5,
  )  # fmt: skip
  routers = (8 * 5 + 5 * 4) + (8 * 5 + 5 * 6)
  keys_values = 2 * 8 * 4
  attention_experts = 3 * (8 * 4 + 4 * 8)
  # A row of 3 tokens has 1 + 2 + 3 pairs, 2 per token; each of 3 slots has q.k and A.v of width 4.
  attention = 3 * 2 * 4 * 2
  ff_experts = 2 * (8 * 16 + 16 * 8)
  forward = 2 * (routers + keys_values + attention_experts + attention + ff_experts) + 8 * 10
  assert metrics.flops_per_token(model, sequence_length=3) == 3 * 2 * forward


def _devices(kind):
  return [types.SimpleNamespace(device_kind=kind, process_index=0)]


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA H100 80GB HBM3", 989.4e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU7x", 1153.5e12),
  ],
)
def test_published_peak_of_the_most_specific_kind(kind, peak):
  found = metrics.device_peak(_devices(kind), DType.BFLOAT16)
  assert found.flops_per_second == peak
  assert found.source == f"published dense bf16 peak of {kind}"


def test_unknown_device_is_measured_and_labelled():
  peak = metrics.device_peak(jax.devices()[:1], DType.FLOAT32)
  assert peak.flops_per_second > 1e8
  assert "float32 matmul measured" in peak.source


def test_peak_memory_prefers_the_devices_own_count():
  device = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7})
  without = types.SimpleNamespace(memory_stats=lambda: None)
  assert metrics.peak_memory([device, without]) == ("device_memory_peak_bytes", 7)
  name, peak = metrics.peak_memory([without])
  assert name == "host_memory_peak_bytes"
  assert peak > 10 * 2**20


def test_router_load_of_collapsed_and_of_specialised_routers():
  collapsed = {"picks": [8, 0], "prob_sum": [4.0, 0.0], "entropy_sum": 0.0}
  specialised = {"picks": [4, 4], "prob_sum": [2.0, 2.0], "entropy_sum": 0.0}
  undecided = {"picks": [4, 4], "prob_sum": [2.0, 2.0], "entropy_sum": 4 * np.log(2)}
  layers = [collapsed, specialised, undecided]
  sums = {name: np.array([layer[name] for layer in layers]) for name in collapsed}
  load = metrics.router_load(sums | {"tokens": np.float32(4)})
  np.testing.assert_allclose(load["share"], [[1, 0], [0.5, 0.5], [0.5, 0.5]])
  np.testing.assert_allclose(load["entropy"], [0, np.log(2), np.log(2)])
  np.testing.assert_allclose(load["mutual_information"], [0, np.log(2), 0], atol=1e-12)
  assert load["dead"].tolist() == [1, 0, 0]


def test_an_expert_is_dead_below_a_hundredth_of_its_balanced_share():
  picks = np.array([[1000, 1000, 6, 4]])  # The threshold is 2010 / 400 = 5.0 picks.
  sums = {"picks": picks, "prob_sum": picks, "entropy_sum": np.zeros(1), "tokens": 2010}
  assert metrics.router_load(sums)["dead"].tolist() == [1]


def _step_metrics(loss, skipped=0, picks=(3, 1)):
  load = {
    "picks": np.array([picks], np.float32),
    "prob_sum": np.array([picks], np.float32) / 2,
    "entropy_sum": np.zeros(1, np.float32),
    "tokens": np.float32(2),
  }
  scalars = ("loss", "cross_entropy", "z_loss", "aux_loss", "gradient_norm", "learning_rate")
  return {
    **dict.fromkeys(scalars, np.float32(loss)),
    "tokens": np.float32(100),
    "skipped": np.float32(skipped),
    "router": {"attention": load, "ff": load},
  }


def test_meter_splits_time_and_sums_over_the_interval():
  now = [0.0]
  peak = metrics.Peak(1000.0, "test")
  meter = metrics.Meter(2.0, num_devices=4, peak=peak, clock=lambda: now[0])

  def spend(section, seconds):
    with meter.timed(section):
      now[0] += seconds

  for loss, picks in ((5.0, (3, 1)), (4.0, (0, 4))):
    spend("input", 0.5)
    now[0] += 2.0
    meter.add(_step_metrics(loss, picks=picks))
  spend("checkpoint", 1.0)
  spend("pause", 100.0)
  record = meter.record(step=2)
  assert record["loss"] == 4.0
  assert record["skipped"] == 0
  assert record["tokens"] == 200
  assert record["seconds_input"] == 0.5
  assert record["seconds_checkpoint"] == 0.5
  assert record["seconds_step"] == 2.0
  assert record["tokens_per_second"] == pytest.approx(200 / 6)
  assert record["tokens_per_second_per_device"] == pytest.approx(200 / 6 / 4)
  assert record["mfu"] == pytest.approx(200 / 6 / 4 * 2.0 / 1000)
  np.testing.assert_allclose(record["router"]["ff"]["share"], [[3 / 8, 5 / 8]])

  now[0] += 1.0
  meter.add(_step_metrics(3.0))
  record = meter.record(step=3)
  assert record["tokens_per_second"] == pytest.approx(100)
  np.testing.assert_allclose(record["router"]["ff"]["share"], [[3 / 4, 1 / 4]])


def test_skipped_steps_leave_the_router_sums_alone():
  meter = metrics.Meter(1.0, num_devices=1, peak=metrics.Peak(1.0, "test"))
  broken = _step_metrics(np.nan, skipped=1, picks=(np.nan, np.nan))
  meter.add(broken)
  record = meter.record(step=1)
  assert np.isnan(record["router"]["ff"]["share"]).all()
  assert record["router"]["ff"]["dead"].tolist() == [0]
  meter.add(_step_metrics(1.0))
  meter.add(broken)
  record = meter.record(step=3)
  assert record["skipped"] == 1
  np.testing.assert_allclose(record["router"]["ff"]["share"], [[3 / 4, 1 / 4]])


def test_bits_per_byte_and_byte_entropy():
  assert metrics.bits_per_byte(8 * np.log(2), num_bytes=4) == pytest.approx(2)
  histogram = [0] * 256
  assert metrics.byte_entropy([*histogram[:-2], 6, 6]) == pytest.approx(1)
  assert metrics.byte_entropy([1] * 256) == pytest.approx(8)
