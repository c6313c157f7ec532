"""Plots of a run: loss curves and expert load, from its metrics.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.colors
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mfjax.metrics import DEAD_SHARE, ROUTER_KINDS
from mfjax.writers import METRICS_FILE, read_records

_TITLES = {"attention": "Attention experts", "ff": "Feed-forward experts"}
_DEPTH = matplotlib.colormaps["viridis"]
_MARKERS = "o*sd"
_Records = Sequence[Mapping[str, Any]]


def draw(workdir: epath.PathLike, out: epath.PathLike | None = None) -> list[epath.Path]:
  """Write loss.png and, if the run logged router statistics, expert_load.png; return their paths.

  They go to `out`, by default WORKDIR/plots.

  Raises:
    ValueError: `workdir` is not the workdir of a run, or the run has logged nothing yet.
  """
  workdir = epath.Path(workdir)
  if not (workdir / METRICS_FILE).exists():
    raise ValueError(f"{workdir} has no {METRICS_FILE}: give the --workdir of a training run")
  records = read_records(workdir / METRICS_FILE)
  if not records:
    raise ValueError(f"{workdir / METRICS_FILE} is empty: the run has not logged a step yet")
  trained = [record for record in records if "loss" in record]
  evaluated = [record for record in records if "evaluation" in record]
  figures = {"loss.png": loss_figure(trained, evaluated)}
  if trained:
    figures["expert_load.png"] = expert_load_figure(trained)
  directory = epath.Path(out) if out is not None else workdir / "plots"
  directory.mkdir(parents=True, exist_ok=True)
  for name, figure in figures.items():
    with (directory / name).open("wb") as file:
      figure.savefig(file, format="png", dpi=150)
  return [directory / name for name in figures]


def loss_figure(trained: _Records, evaluated: _Records) -> Figure:
  """Draw training and held-out loss in nats per token, and held-out bits per byte, over steps."""
  figure = Figure(figsize=(11, 4.2), layout="constrained")
  nats, bits = figure.subplots(1, 2, sharex=True)
  if trained:
    steps = [record["step"] for record in trained]
    losses = np.array([record["cross_entropy"] for record in trained], float)  # None becomes NaN.
    nats.plot(steps, losses, color="0.7", linewidth=1, label="training")
  domains = sorted({domain for record in evaluated for domain in record["evaluation"]})
  for number, domain in enumerate(domains):
    points = [(r["step"], r["evaluation"][domain]) for r in evaluated if domain in r["evaluation"]]
    # Evaluations of different amounts of text cannot be joined: the last one may take more.
    for tokens, marker in zip(
      dict.fromkeys(v["tokens"] for _, v in points), _MARKERS, strict=False
    ):
      same = [(step, v) for step, v in points if v["tokens"] == tokens]
      steps = [step for step, _ in same]
      style = {"color": f"C{number}", "marker": marker, "markersize": 5}
      named = f"{domain}, {tokens:,} tokens"
      nats.plot(steps, [v["nats_per_token"] for _, v in same], label=named, **style)
      label = f"{named}: {same[-1][1]['bits_per_byte']:.3f}"
      bits.plot(steps, [v["bits_per_byte"] for _, v in same], label=label, **style)
  _finish_axes(nats, "Cross-entropy", "nats per token")
  _finish_axes(bits, "Held-out text", "bits per byte")
  return figure


def expert_load_figure(trained: _Records) -> Figure:
  """Draw, per kind, the last record's share of picks per expert, entropy and information."""
  figure = Figure(figsize=(15, 7.5), layout="constrained")
  for row, kind in zip(figure.subplots(2, 3), ROUTER_KINDS, strict=True):
    heat_map, entropy, information = row
    _draw_shares(heat_map, trained[-1], kind)
    num_experts = np.shape(trained[-1]["router"][kind]["share"])[-1]
    _draw_layers(entropy, trained, kind, "entropy")
    entropy.axhline(np.log(num_experts), color="0.5", linestyle=":", label=f"ln {num_experts}")
    _finish_axes(entropy, f"{_TITLES[kind]}: entropy of the mean router", "nats")
    _draw_layers(information, trained, kind, "mutual_information")
    _finish_axes(information, f"{_TITLES[kind]}: mutual information", "nats")
  return figure


def _draw_shares(axes: Axes, record: Mapping[str, Any], kind: str) -> None:
  """Draw share / balanced share, layer by expert, on a scale symmetric in ratio about 1."""
  share = np.asarray(record["router"][kind]["share"], float)
  ratio = share * share.shape[-1]
  norm = matplotlib.colors.LogNorm(1 / 8, 8)
  image = axes.imshow(
    np.clip(ratio, 1 / 8, 8), cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest"
  )
  layers, experts = np.nonzero(ratio < DEAD_SHARE)
  axes.scatter(experts, layers, marker="x", color="white", s=30, linewidth=1)
  dead = f", {len(experts)} dead (x)" if len(experts) else ""
  axes.set_title(f"{_TITLES[kind]}: load at step {record['step']}{dead}", loc="left")
  axes.set_xlabel("expert")
  axes.set_ylabel("layer")
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(MaxNLocator(integer=True))
  bar = axes.figure.colorbar(image, ax=axes, extend="both", pad=0.02)
  bar.set_ticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], labels=["⅛", "¼", "½", "1", "2", "4", "8"])
  bar.minorticks_off()
  bar.set_label("times the balanced share")


def _draw_layers(axes: Axes, trained: _Records, kind: str, name: str) -> None:
  """Draw one line per layer, coloured by depth."""
  steps = [record["step"] for record in trained]
  values = np.array([record["router"][kind][name] for record in trained], float)
  num_layers = values.shape[1]
  norm = matplotlib.colors.Normalize(0, max(num_layers - 1, 1))
  for layer in range(num_layers):
    axes.plot(steps, values[:, layer], color=_DEPTH(norm(layer)), linewidth=1.2)
  scale = ScalarMappable(norm, _DEPTH)
  bar = axes.figure.colorbar(scale, ax=axes, pad=0.02, ticks=MaxNLocator(6, integer=True))
  bar.set_label("layer", labelpad=2)


def _finish_axes(axes: Axes, title: str, ylabel: str) -> None:
  axes.set_title(title, loc="left")
  axes.set_xlabel("step")
  axes.set_ylabel(ylabel)
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(frameon=False)
