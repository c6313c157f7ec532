"""Exchange or gather: what the cost model says, by hand for one case, and that it can be forced."""

import dataclasses

import jax
import pytest

from mfjax import communication, devices, placement, sharding, train_step
from mfjax.communication import Phase
from mfjax.config import (
  DataConfig,
  MeshConfig,
  ModelConfig,
  Placement,
  Remat,
  RunConfig,
  TrainConfig,
  Transport,
)
from tests import tiny

SIZES = {"data": 1, "fsdp": 1, "expert": 16}
V5P = "TPU v5"


def run(tokens: int, **mesh) -> RunConfig:
  """Return a run of MoLM-350M with so many tokens per device and microbatch."""
  return RunConfig(
    mesh=MeshConfig(data=1, expert=16, **mesh),
    data=DataConfig(batch_rows=16, sequence_length=tokens),
    train=TrainConfig(remat=Remat.NONE),
  )


def resolved(config: RunConfig, platform="tpu", kind=V5P, sizes=SIZES) -> MeshConfig:
  return placement.resolve(config, sizes, platform, kind)


def test_few_tokens_travel_and_many_stay():
  few, many = resolved(run(2048)), resolved(run(65536))
  assert (few.ff_placement, many.ff_placement) == (Placement.EXPERT, Placement.FSDP)
  assert few.transport is many.transport is Transport.RAGGED
  # Wider experts weigh more, tokens do not.
  wide = dataclasses.replace(run(65536), model=ModelConfig(d_ff=32768))
  assert resolved(wide).ff_placement is Placement.EXPERT
  assert resolved(wide).attention_placement is Placement.FSDP


def test_a_forced_placement_stays():
  forced = {"attention_placement": Placement.EXPERT, "ff_placement": Placement.FSDP}
  for tokens in (2048, 65536):
    mesh = resolved(run(tokens, **forced))
    assert (mesh.attention_placement, mesh.ff_placement) == tuple(forced.values())


def test_what_cannot_be_exchanged_is_gathered():
  alone = resolved(run(2048), sizes={"data": 16, "fsdp": 1, "expert": 1})
  assert alone.ff_placement is alone.attention_placement is Placement.FSDP
  uneven = dataclasses.replace(run(2048), model=ModelConfig(num_ff_experts=24))
  assert resolved(uneven).ff_placement is Placement.FSDP


def test_seconds_of_a_torus_and_of_a_switch_by_hand():
  config = run(4096, transport=Transport.RAGGED)
  (kind,) = (k for k in communication.expert_kinds(config.model, config.mesh) if k.name == "ff")

  def forward(placed: Placement, device: str, sizes=SIZES) -> float:
    facts = devices.of_name(device)
    transfers = placement.transfers_of(config, dataclasses.replace(kind, placement=placed), sizes)
    chosen = [t for t in transfers if t.phase is Phase.FORWARD and t.what != "counts"]
    return sum(placement.seconds(t, sizes, facts) for t in chosen)

  row, weights = 2 * 1024, 2 * 32 * 1024 * 2048 * 2
  both = 2 * 4096 * 2 * row  # x there, y home; two slots a token.
  axis = 600e9 / 3  # v5p: three dimensions share its links.
  assert forward(Placement.FSDP, "v5p") == pytest.approx(weights * 15 / 16 / axis)
  assert forward(Placement.EXPERT, "v5p") == pytest.approx(both * 16 / 4 / axis)
  eight = {"data": 1, "fsdp": 1, "expert": 8}
  assert forward(Placement.EXPERT, "h100", eight) == pytest.approx(2 * both * 7 / 8 / 450e9)
  # Beyond one host of eight, the network carries all.
  assert forward(Placement.EXPERT, "h100") == pytest.approx(both * 15 / 16 / 50e9)


@pytest.mark.parametrize("kind", [V5P, "NVIDIA A100", "cpu"])
def test_report_says_what_both_ways_cost(kind):
  config = run(4096)
  config = dataclasses.replace(config, mesh=resolved(config, "gpu", kind))
  attention, ff = placement.report(config, SIZES, kind)
  assert attention.startswith("attention experts: ")
  assert "ff experts: " in ff
  assert "ms, gather" in ff
  assert ("unknown device" in ff) == (kind != V5P)  # No figure for an A100's links.


def test_resolving_a_run_decides_and_the_step_trains_with_it():
  mesh_config = tiny.mesh(data=2, expert=4)
  made = tiny.Run(tiny.run_config(mesh=mesh_config))
  assert made.config.mesh.transport is Transport.RAGGED_STAND_IN
  for placed in (made.config.mesh.attention_placement, made.config.mesh.ff_placement):
    assert placed in (Placement.EXPERT, Placement.FSDP)
  mesh = sharding.make_mesh(mesh_config, jax.devices())
  assert train_step.resolve(made.config, mesh) == made.config
