"""Bounds of a step: exact where a formula can be checked by hand, and what skew does to them."""

import dataclasses
import json

import numpy as np
import pytest

from mfjax import metrics, roofline, routing
from mfjax.collectives import Collective
from mfjax.config import Placement, Remat, TrainConfig
from mfjax.devices import DeviceFacts
from pallas_kernels.implementation import Implementation
from tests import tiny

FACTS = DeviceFacts(
  name="toy",
  kinds=("Toy",),
  bf16_flops=1e9,
  memory_bytes=2**30,
  memory_bandwidth=1e12,
  ici_bandwidth=4e6,
  ici_ports=4,
  dcn_bandwidth=1e6,
)
SIZES = {"data": 2, "fsdp": 1, "expert": 4}


def _config(placement=Placement.EXPERT, exchange_chunks=1):
  mesh = tiny.mesh(
    **SIZES,
    attention_placement=placement,
    ff_placement=placement,
    exchange_chunks=exchange_chunks,
  )
  config = tiny.run_config(mesh=mesh, train=TrainConfig(steps=20))
  kernels = dataclasses.replace(config.kernels, grouped_matmul=Implementation.REFERENCE)
  train = dataclasses.replace(config.train, remat=Remat.NONE)
  return dataclasses.replace(config, kernels=kernels, train=train)


def _collective(**changes):
  return Collective(
    **{
      "kind": "all-reduce",
      "count": 3,
      "dynamic": False,
      "operand_bytes": 0,
      "group_size": 4,
      "slices": 1,
      "ici_bytes": 1e6,
      "dcn_bytes": 0.0,
      "dimensions": 1,
      "source": "",
    }
    | changes
  )


def test_compute_is_the_models_products_the_scores_once_more_and_the_padded_vocabulary():
  config = _config()
  bounds = roofline.roofline(config, 8, SIZES, FACTS, [])
  model, tokens = config.model, tiny.ROWS * tiny.LENGTH // 8
  scores = 2 * model.attention_top_k * model.d_attention * (tiny.LENGTH + 1) / 2
  padding = 6 * model.d_model * (model.padded_vocab_size - model.vocab_size)
  flops = metrics.flops_per_token(model, tiny.LENGTH) + model.num_layers * scores + padding
  assert bounds.compute == pytest.approx(tokens * flops / 1e9)
  assert bounds.model_flops == tokens * metrics.flops_per_token(model, tiny.LENGTH)
  assert bounds.mfu_at_most < 1


def test_recomputation_costs_compute_but_no_model_flops():
  config = _config()
  found = {}
  for remat in Remat:
    changed = dataclasses.replace(config, train=dataclasses.replace(config.train, remat=remat))
    found[remat] = roofline.roofline(changed, 8, SIZES, FACTS, [])
  assert found[Remat.NONE].compute == found[Remat.SELECTIVE].compute < found[Remat.FULL].compute
  assert len({bounds.model_flops for bounds in found.values()}) == 1


def test_links_work_beside_each_other_and_a_collective_uses_the_ports_of_its_dimensions():
  sent = [_collective(), _collective(count=1, dimensions=2, dcn_bytes=2e6, slices=2)]
  ici, dcn = roofline.communication(sent, FACTS, 0)
  assert ici == pytest.approx(3 * 1e6 / 2e6 + 1e6 / 4e6)
  assert dcn == pytest.approx(2.0)
  bounds = roofline.roofline(_config(), 8, SIZES, FACTS, sent)
  assert bounds.bound == "DCN"
  assert bounds.at_least == pytest.approx(2.0 + bounds.optimizer)
  assert bounds.without_overlap > bounds.at_least + ici


def test_an_unknown_bandwidth_leaves_the_bound_unknown():
  facts = dataclasses.replace(FACTS, dcn_bandwidth=None)
  assert roofline.communication([_collective(dcn_bytes=1.0)], facts, 0)[1] is None
  assert roofline.communication([_collective()], facts, 0)[1] == 0


def _skewed(config, kind):
  """Send every token of one kind to the experts of the first of four peers, half to the first."""
  histogram = {name: np.array(shares) for name, shares in routing.balanced(config.model).items()}
  histogram[kind][:] = 0
  histogram[kind][:, :2] = 0.5
  return histogram


def test_skew_slows_the_fullest_device_of_an_exchange_and_adds_its_rounds():
  config = _config()
  exchange = _collective(kind="all-to-all", count=1, dynamic=True)
  even = roofline.roofline(config, 8, SIZES, FACTS, [exchange])
  skewed = roofline.roofline(config, 8, SIZES, FACTS, [exchange], _skewed(config, "ff"))
  tokens, model = tiny.ROWS * tiny.LENGTH // 8, config.model
  products = 3 * 4 * model.d_model * model.d_ff * model.ff_top_k * model.num_layers
  # Four times the balanced load, so three times as much again; buffers hold 1.5 times the load.
  assert skewed.compute - even.compute == pytest.approx(tokens * 3 * products / 1e9)
  assert even.ici == 0
  assert skewed.ici == pytest.approx((3 - 1) / 2 * 1e6 / 2e6)  # Three rounds of one of two kinds.


def test_skew_costs_nothing_where_each_device_has_all_experts():
  config = _config(Placement.FSDP)
  even = roofline.roofline(config, 8, SIZES, FACTS, [])
  skewed = roofline.roofline(config, 8, SIZES, FACTS, [], _skewed(config, "ff"))
  assert skewed.compute == pytest.approx(even.compute)


def test_tiles_are_computed_whole():
  shares = np.array([[0.5, 0.25, 0.25, 0.0]])
  # 100 slots: groups of 50, 25, 25 in tiles of 32 take 64 + 32 + 32 rows.
  assert routing.computed_rows(shares, 100, 1, 32) == 1.28
  # Two peers with 100 slots each: the first one's experts get 100 and 50 of the 200.
  assert routing.computed_rows(shares, 100, 2, 1) == 1.5


@pytest.mark.parametrize(
  ("fullest", "chunks", "extra"),
  [
    (0.25, 1, 0),
    (0.375, 1, 0),
    (0.376, 1, 1),
    (1.0, 1, 2),
    (0.375, 2, 0),
    (0.376, 2, 1),
    (1, 2, 4),
  ],
)
def test_rounds_of_buffers_of_one_and_a_half(fullest, chunks, extra):
  rest = (1 - fullest) / 3
  shares = np.array([[fullest, rest, rest, rest]])
  assert routing.extra_rounds(shares, 4, 1.5, chunks) == extra


def _counts(config):
  model = config.model
  return {
    "attention": np.ones((model.num_layers, model.num_attention_experts)).tolist(),
    "ff": np.arange(1, model.num_layers * model.num_ff_experts + 1)
    .reshape(model.num_layers, -1)
    .tolist(),
  }


def test_histograms_are_read_from_counts_and_from_a_runs_metrics(tmp_path):
  config = _config()
  counts = _counts(config)
  (tmp_path / "counts.json").write_text(json.dumps(counts))
  records = [
    {"step": 1, "router": {"attention": {"share": None}}},
    {"step": 2, "router": {kind: {"share": counts[kind]} for kind in counts}},
    {"step": 2, "evaluation": {}},
  ]
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
  for name in ("counts.json", "metrics.jsonl"):
    found = routing.read(str(tmp_path / name), config.model)
    assert found["ff"].sum(1) == pytest.approx([1, 1])
    assert found["ff"][0, 1] == pytest.approx(2 * found["ff"][0, 0])


@pytest.mark.parametrize(
  ("change", "what"),
  [
    ({"ff": [[1, 2]]}, r"shape \[1, 2\], not \[2, 16\]"),
    ({"ff": np.zeros((2, 16)).tolist()}, "all zero"),
    ({"ff": None}, "--routing="),
    ({"attention": "x"}, "--routing="),
  ],
)
def test_a_malformed_histogram_is_one_sentence(tmp_path, change, what):
  path = tmp_path / "counts.json"
  path.write_text(json.dumps(_counts(_config()) | change))
  with pytest.raises(ValueError, match=what) as raised:
    routing.read(str(path), _config().model)
  assert "give JSON with 'attention' and 'ff'" in str(raised.value)
