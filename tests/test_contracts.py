"""Contracts on every run in configs/: which collectives a compiled train step may hold.

Shapes are told apart by their sizes: a row of tokens has a length that no weight has.
"""

import dataclasses
import math
import pathlib
import re

import jax
import pytest

from launch.flags import load_config
from mfjax import collectives, sharding, train_step
from mfjax.config import MeshConfig, Placement, RunConfig, Transport

CONFIGS = sorted(
  path.stem for path in (pathlib.Path(__file__).parent.parent / "configs").glob("[!_]*.py")
)
MESH = {"data": 2, "fsdp": 2, "expert": 2}
LENGTH = 37  # Of a row; a device has one row in a microbatch.
ARRAY = re.compile(r"\b[a-z]+\d*\[([\d,]*)\]")


def compiled(config: RunConfig, placement: Placement) -> str:
  """Return the program of a config's train step on eight virtual devices, two layers deep."""
  mesh_config = MeshConfig(
    **MESH,
    attention_placement=placement,
    ff_placement=placement,
    transport=Transport.PADDED,
    exchange_chunks=1,
  )
  rows = 8 * config.train.microbatches
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, num_layers=2),
    mesh=mesh_config,
    data=dataclasses.replace(config.data, batch_rows=rows, sequence_length=LENGTH),
  )
  mesh = sharding.make_mesh(mesh_config, jax.devices())
  config = train_step.resolve(config, mesh)
  batch = jax.ShapeDtypeStruct(
    (rows, LENGTH), "int32", sharding=jax.NamedSharding(mesh, sharding.BATCH)
  )
  step = train_step.make_train_step(config, mesh)
  state = train_step.abstract_state(config, mesh)
  batches = dict.fromkeys(("tokens", "targets", "segment_ids"), batch)
  return step.lower(state, batches).compile().as_text()


def operations(text: str) -> list[tuple[str, list[tuple[int, ...]], set[str]]]:
  """Return (kind, shapes of the operands, mesh axes crossed) of every collective."""
  computations, _ = collectives.parse(text)
  found = []
  for lines in computations.values():
    shapes = {line.name: line.shape for line in lines}
    for line in lines:
      if line.opcode in collectives.KINDS:
        operands = [
          tuple(int(n) for n in sizes.split(",") if n)
          for name in line.operands
          for sizes in ARRAY.findall(shapes[name])
        ]
        found.append((line.opcode, operands, crossed(line.attributes)))
  return found


def crossed(attributes: str) -> set[str]:
  """Return the mesh axes along which the devices of a group differ."""
  names, sizes = list(MESH), list(MESH.values())
  axes = set()
  for group in collectives._groups(attributes, math.prod(sizes)):
    places = [(d // 4, d // 2 % 2, d % 2) for d in group]
    axes |= {name for i, name in enumerate(names) if len({place[i] for place in places}) > 1}
  return axes


def is_activation(shape: tuple[int, ...], config: RunConfig) -> bool:
  """Whether a shape has a dimension of positions, tokens or slots."""
  slots = {LENGTH * k for k in (1, config.model.attention_top_k, config.model.ff_top_k)}
  return bool(slots & set(shape))


def is_expert_weight(shape: tuple[int, ...], config: RunConfig) -> bool:
  """Whether a shape is of a layer's experts' matrices: [experts, in, out], any dimension split."""
  model = config.model
  inner = {model.d_ff, model.d_attention}
  return len(shape) >= 3 and bool(inner & set(shape[-2:])) and shape[-3] > 1


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[] if n == "quickstart" else pytest.mark.slow) for n in CONFIGS]
)
def test_tokens_travel_and_neither_expert_weights_nor_activations_are_gathered(name):
  config = load_config(name)
  exchanged = operations(compiled(config, Placement.EXPERT))
  gathers = [o for o in exchanged if o[0] == "all-gather" and "expert" in o[2]]
  assert gathers  # The weights that are not experts'.
  for kind, shapes, axes in exchanged:
    for shape in shapes:
      assert not (kind == "all-gather" and "expert" in axes and is_expert_weight(shape, config))
      if kind == "all-to-all":
        assert axes == {"expert"}
      else:
        assert not is_activation(shape, config), (kind, shape, axes)
  # Rows do travel, as many as the buffers hold; and gathered experts would be seen.
  assert {o[0] for o in exchanged} >= {"all-to-all", "all-gather", "reduce-scatter"}
  gathered = operations(compiled(config, Placement.FSDP))
  assert "all-to-all" not in {o[0] for o in gathered}
  assert any(
    kind == "all-gather" and "expert" in axes and is_expert_weight(shape, config)
    for kind, shapes, axes in gathered
    for shape in shapes
  )
