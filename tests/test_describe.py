"""The report of `mfjax train --dry_run`: counts, shardings and memory from abstract shapes."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.flags import load_config
from mfjax import describe, metrics, model, sharding, train_step
from mfjax.config import (
  DataConfig,
  DType,
  Gate,
  MeshConfig,
  ModelConfig,
  Placement,
  Remat,
  RunConfig,
  TrainConfig,
)

ONE_DEVICE = {"data": 1, "fsdp": 1, "expert": 1}

# Published: total parameters, active in blocks, active with lm_head and the final LayerNorm.
RELEASED = {
  "molm_350m_4b": (4_142_526_464, 314_978_304, 366_482_432),
  "molm_700m_4b": (4_142_526_464, 616_968_192, 668_472_320),
  "molm_700m_8b": (8_182_046_720, 629_956_608, 681_460_736),
}


@pytest.mark.parametrize("name", RELEASED)
def test_counts_are_the_published_ones(name):
  config = load_config(name)
  parts = describe.counts(describe.parameters(config, ONE_DEVICE))
  total, active = (sum(column) for column in zip(*parts.values(), strict=True))
  assert (total, describe.active_in_blocks(parts), active) == RELEASED[name]
  report = describe.describe(config)
  for count in RELEASED[name]:
    assert f"{count:,}" in report


@settings(max_examples=15, deadline=None)
@given(
  st.sampled_from(Gate),
  st.sampled_from([(8, 1), (8, 2), (16, 1), (24, 3)]),
  st.integers(1, 3),
  st.integers(1, 300),
)
def test_counts_from_shapes_equal_the_closed_formula(gate, attention, top_k, vocab_size):
  d_attention, num_heads = attention
  shape = ModelConfig(
    vocab_size=vocab_size,
    d_model=8,
    num_layers=3,
    num_heads=num_heads,
    d_attention=d_attention,
    d_ff=5,
    num_attention_experts=3,
    num_ff_experts=7,
    attention_top_k=top_k,
    ff_top_k=top_k + 1,
    gate=gate,
    d_gate=6,
  )
  parts = describe.counts(describe.parameters(RunConfig(model=shape), ONE_DEVICE))
  total, active = metrics.total_parameters(shape), metrics.active_parameters(shape)
  for part in total:
    assert parts.get(part, (0, 0)) == (total[part], active.get(part, 0)), part
  assert not parts.keys() - total.keys()


def _small(placement: Placement) -> RunConfig:
  return RunConfig(
    model=ModelConfig(vocab_size=100, d_model=16, num_layers=2, d_attention=16, d_ff=32, d_gate=8),
    mesh=MeshConfig(
      data=2, fsdp=2, expert=2, attention_placement=placement, ff_placement=placement
    ),
    data=DataConfig(batch_rows=8, sequence_length=4),
  )


@pytest.mark.parametrize("placement", [Placement.EXPERT, Placement.FSDP])
def test_bytes_per_device_are_those_of_the_sharding(placement):
  config = _small(placement)
  axis_sizes = config.mesh.axis_sizes
  mesh = jax.sharding.AbstractMesh(tuple(axis_sizes.values()), tuple(axis_sizes))
  specs = jax.tree.leaves(model.param_specs(config.model, config.mesh))
  shapes = jax.tree.leaves(model.abstract_params(config.model))
  params = describe.parameters(config, axis_sizes)
  for p, spec, leaf in zip(params, specs, shapes, strict=True):
    local = jax.sharding.NamedSharding(mesh, spec).shard_shape(leaf.shape)
    assert p.elements_per_device == math.prod(local), p.name
  experts = [p for p in params if p.part == "ff_experts"]
  assert [p.elements_per_device * 4 for p in experts] == [p.size for p in experts]


def test_memory_counts_each_kind_in_its_dtype():
  config = _small(Placement.FSDP)
  optimizer = dataclasses.replace(config.optimizer, first_moment_dtype=DType.BFLOAT16)
  config = dataclasses.replace(config, optimizer=optimizer)
  params = describe.parameters(config, config.mesh.axis_sizes)
  kinds = {m.kind: m.bytes for m in describe.memory(config, params, config.mesh.axis_sizes)}
  elements = sum(p.elements_per_device for p in params)
  assert kinds["parameters"] == kinds["gradients"] == kinds["second moments"] == 4 * elements
  assert kinds["first moments"] == 2 * elements
  # One row of four positions per device; remat full keeps each layer's input in bfloat16.
  assert kinds["activations kept"] == 2 * 4 * 16 * 2


def test_report_shows_config_mesh_and_every_parameter():
  config = _small(Placement.EXPERT)
  report = describe.describe(config)
  assert "mesh of 8 devices: data=2 x fsdp=2 x expert=2" in report
  assert "model.d_ff = 32" in report
  for p in describe.parameters(config, config.mesh.axis_sizes):
    assert re.search(rf"^  {p.name} .* {p.elements_per_device * 4:,}$", report, re.MULTILINE)
  assert re.search(r"ff/experts/bank_0/w_in .* -, expert, fsdp, - ", report)
  assert re.search(r"norm1/bias .* replicated ", report)


def test_devices_beyond_the_fixed_axes_join_the_free_one():
  report = describe.describe(load_config("molm_350m_4b"), num_devices=64)
  assert "mesh of 64 devices: data=4 x fsdp=16 x expert=1" in report


@pytest.mark.parametrize(
  ("changes", "num_devices", "text"),
  [
    ({}, 6, "mesh data=2 x fsdp=2 x expert=2 does not fit 6 devices"),
    ({"data": DataConfig(batch_rows=12)}, None, "data.batch_rows=16 works"),
    ({"mesh": MeshConfig(data=1, expert=3)}, None, "batch_rows"),
    (
      {"mesh": MeshConfig(fsdp=32), "data": DataConfig(batch_rows=32)},
      None,
      "model.d_model=16 is not divisible by the mesh's fsdp*expert=32",
    ),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(changes, num_devices, text):
  config = dataclasses.replace(_small(Placement.EXPERT), **changes)
  with pytest.raises(ValueError, match=re.escape(text)):
    describe.describe(config, num_devices)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [Remat.FULL, Remat.SELECTIVE])
def test_memory_is_near_what_the_compiler_allocates(remat):
  config = RunConfig(
    model=ModelConfig(
      vocab_size=8192,
      d_model=256,
      num_layers=8,
      d_attention=256,
      d_ff=512,
      num_attention_experts=8,
      num_ff_experts=16,
      d_gate=64,
      compute_dtype=DType.FLOAT32,
    ),
    mesh=MeshConfig(
      data=2, fsdp=2, expert=2, attention_placement=Placement.FSDP, ff_placement=Placement.FSDP
    ),
    data=DataConfig(batch_rows=16, sequence_length=512),
    train=TrainConfig(remat=remat),
  )
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  config = train_step.resolve(config, mesh)
  rows = jax.ShapeDtypeStruct(
    (16, 512), jnp.int32, sharding=jax.sharding.NamedSharding(mesh, sharding.BATCH)
  )
  batch = dict.fromkeys(("tokens", "targets", "segment_ids", "domain_ids"), rows)
  step = train_step.make_train_step(config, mesh)
  compiled = step.lower(train_step.abstract_state(config, mesh), batch).compile()
  used = compiled.memory_analysis()
  sizes = config.mesh.axis_sizes
  kinds = describe.memory(config, describe.parameters(config, sizes), sizes)
  stored = sum(
    m.bytes for m in kinds if m.kind in ("parameters", "first moments", "second moments")
  )
  assert used.argument_size_in_bytes == pytest.approx(stored, rel=0.01)
  estimate = sum(m.bytes for m in kinds) - stored
  assert used.temp_size_in_bytes == pytest.approx(estimate, rel=0.25)
