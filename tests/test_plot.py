"""Plots: what is drawn from which records, and what a user is told instead."""

import json

import numpy as np
import pytest

from mfjax import plot


def train_record(step, num_layers=3, num_experts=4, loss=2.0):
  share = np.full((num_layers, num_experts), 1 / num_experts)
  share[0] = np.eye(num_experts)[0]
  load = {
    "share": share.tolist(),
    "entropy": np.linspace(1, 1.2, num_layers).tolist(),
    "mutual_information": np.linspace(0, 0.2, num_layers).tolist(),
    "dead": [num_experts - 1, *[0] * (num_layers - 1)],
  }
  return {"step": step, "loss": loss, "cross_entropy": loss, "router": dict.fromkeys(
    ("attention", "ff"), load)}  # fmt: skip


def evaluation_record(step, domains=("code", "prose"), tokens=1000):
  losses = {"nats_per_token": 1.5, "bits_per_byte": 2.1, "tokens": tokens}
  return {"step": step, "evaluation": dict.fromkeys(domains, losses)}


def write(workdir, records):
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_draws_both_files(tmp_path):
  write(tmp_path, [train_record(1), train_record(2, loss=None), evaluation_record(2)])
  paths = plot.draw(tmp_path)
  assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
    "plots/loss.png",
    "plots/expert_load.png",
  ]
  assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_loss_figure_has_a_curve_per_domain_and_amount_of_text():
  evaluated = [evaluation_record(1), evaluation_record(2)]
  evaluated.append(evaluation_record(3, domains=("prose",), tokens=5000))
  nats, bits = plot.loss_figure([train_record(1), train_record(2)], evaluated).axes
  names = ["code, 1,000 tokens", "prose, 1,000 tokens", "prose, 5,000 tokens"]
  assert [line.get_label() for line in nats.lines] == ["training", *names]
  assert [line.get_label() for line in bits.lines] == [f"{name}: 2.100" for name in names]
  assert [list(line.get_xdata()) for line in bits.lines] == [[1, 2], [1, 2], [3]]


def test_expert_load_figure_shows_shares_relative_to_balance():
  figure = plot.expert_load_figure([train_record(1), train_record(2)])
  (image,) = figure.axes[0].images
  np.testing.assert_allclose(image.get_array()[0], [4, 1 / 8, 1 / 8, 1 / 8])  # 0 is clipped.
  np.testing.assert_allclose(image.get_array()[1:], 1)
  assert "3 dead (x)" in figure.axes[0].get_title(loc="left")
  assert len(figure.axes[1].lines) == 3 + 1  # Layers, and the most an entropy can be.


def test_writes_elsewhere_on_request(tmp_path):
  write(tmp_path, [evaluation_record(2)])
  assert plot.draw(tmp_path, tmp_path / "out") == [tmp_path / "out" / "loss.png"]


def test_not_a_workdir(tmp_path):
  with pytest.raises(ValueError, match=r"has no metrics\.jsonl: give the --workdir"):
    plot.draw(tmp_path / "missing")
  write(tmp_path, [])
  with pytest.raises(ValueError, match="has not logged a step yet"):
    plot.draw(tmp_path)
  assert not (tmp_path / "plots").exists()
