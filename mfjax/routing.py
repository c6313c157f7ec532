"""Measured load of experts, and what it means for the fullest device of a mesh.

A histogram is counts (or shares) of picks per layer and expert, [L, N] for each kind: what a
training run writes to metrics.jsonl as `router.KIND.share`. It is of the whole batch; that each
device's own tokens follow it is an assumption.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mfjax.config import ModelConfig
from mfjax.metrics import ROUTER_KINDS

Histogram = Mapping[str, np.ndarray]


def read(path: str, model: ModelConfig) -> Histogram:
  """Return {'attention': [L, N], 'ff': [L, N]}, shares of picks, each layer's sum 1.

  Args:
    path: JSON {"attention": [[...]], "ff": [[...]]}, counts or shares, layer by layer; or a run's
      metrics.jsonl, whose last record with router loads counts.
    model: what the shapes must fit.

  Raises:
    ValueError: the file is neither, or its shapes are not the model's.
  """
  text = pathlib.Path(path).read_text(encoding="utf-8")
  wanted = (model.num_attention_experts, model.num_ff_experts)
  try:
    if path.endswith(".jsonl"):
      records = [json.loads(line) for line in text.splitlines() if line.strip()]
      found = [record["router"] for record in records if "router" in record][-1]
    else:
      found = json.loads(text)
    return {
      kind: _shares(found[kind], (model.num_layers, count))
      for kind, count in zip(ROUTER_KINDS, wanted, strict=True)
    }
  except (KeyError, IndexError, TypeError, json.JSONDecodeError, ValueError) as error:
    raise ValueError(
      f"--routing={path}: {error}; give JSON with 'attention' and 'ff', counts of picks "
      f"[{model.num_layers} layers, {wanted[0]} or {wanted[1]} experts], or a run's metrics.jsonl"
    ) from error


def _shares(counts: Any, shape: tuple[int, int]) -> np.ndarray:
  if isinstance(counts, dict):
    counts = counts["share"]
  array = np.asarray(counts, np.float64)
  if array.shape != shape:
    raise ValueError(f"the histogram has shape {list(array.shape)}, not {list(shape)}")
  totals = array.sum(1, keepdims=True)
  if not np.isfinite(array).all() or (array < 0).any() or (totals <= 0).any():
    raise ValueError("a layer's counts are negative, not finite or all zero")
  return array / totals


def balanced(model: ModelConfig) -> Histogram:
  """Return the histogram of equal loads."""
  counts = (model.num_attention_experts, model.num_ff_experts)
  return {
    kind: np.full((model.num_layers, count), 1 / count)
    for kind, count in zip(ROUTER_KINDS, counts, strict=True)
  }


def computed_rows(shares: np.ndarray, slots: int, peers: int, alignment: int) -> float:
  """Return the rows that the fullest device computes per layer on average, over its own `slots`.

  Groups of experts begin at multiples of the kernels' row tile, and tiles are computed whole.

  Args:
    shares: [L, N]. slots: of one device (tokens times top k).
    peers: devices that share the experts (1: each holds all). alignment: of the groups.
  """
  rows = np.ceil(shares * slots * peers / alignment) * alignment
  by_peer = rows.reshape(len(shares), peers, -1).sum(2)
  return float(by_peer.max(1).mean()) / slots


def extra_rounds(shares: np.ndarray, peers: int, buffer: float, chunks: int) -> float:
  """Return how many rounds an exchange adds to its `chunks` per layer, on average.

  A round's buffers hold 1/chunks of `buffer` times the balanced load.
  """
  by_peer = shares.reshape(len(shares), peers, -1).sum(2)
  fullest = by_peer.max(1) * peers
  needed = [math.ceil(round(load * chunks / buffer, 9)) for load in fullest]
  return float(np.mean([max(0, count - chunks) for count in needed]))
