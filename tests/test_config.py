"""Configuration: what is accepted, what is refused and how, and the way to JSON and back."""

import dataclasses
import enum
import json
import re
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfjax.config import (
  DataConfig,
  Gate,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TrainConfig,
  flatten,
)

LEAVES = flatten(RunConfig().to_dict())


def _with(leaf: str, value: object) -> dict[str, typing.Any]:
  values = RunConfig().to_dict()
  section, _, name = leaf.rpartition(".")
  values[section][name] = value
  return values


def test_default_is_molm_350m_4b_and_survives_json():
  config = RunConfig()
  assert (config.model.vocab_size, config.model.num_layers) == (50295, 24)
  assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_leaf_survives_json_and_shows_as_a_difference():
  for leaf, value in LEAVES.items():
    changed = {"mixture": [["code", 0.25]]}.get(leaf.rpartition(".")[2])
    if isinstance(value, bool):
      changed = not value
    elif isinstance(value, float):
      changed = value * 0.5 + 0.001 if "buffer" not in leaf else 2.0
    elif isinstance(value, str) and _kind(leaf) is str:
      changed = "elsewhere"
    elif isinstance(value, str):
      changed = next(member.value for member in _kind(leaf) if member.value != value)
    elif isinstance(value, int):
      changed = {"model.num_heads": 2, "mesh.data": 2, "model.sample_top_k": 1}.get(leaf, value * 2)
      changed = changed or 1
    config = RunConfig.from_dict(json.loads(json.dumps(_with(leaf, changed))))
    assert flatten(config.to_dict())[leaf] == changed
    assert [line.partition(":")[0] for line in config.differences(RunConfig())] == [leaf]


def _kind(leaf: str) -> typing.Any:
  section, _, name = leaf.rpartition(".")
  return typing.get_type_hints(typing.get_type_hints(RunConfig)[section])[name]


def test_fewer_than_a_hundred_leaves():
  assert len(LEAVES) < 100


def test_configs_are_frozen_and_keyword_only():
  with pytest.raises(dataclasses.FrozenInstanceError):
    ModelConfig().d_ff = 1
  with pytest.raises(TypeError):
    ModelConfig(1024)


def test_derived_sizes():
  model = ModelConfig()
  assert (model.padded_vocab_size, model.head_dim, model.identity_kv) == (50304, 1024, True)
  assert not dataclasses.replace(model, num_heads=4).identity_kv
  assert not dataclasses.replace(model, d_attention=512).identity_kv
  assert ModelConfig(vocab_size=256).padded_vocab_size == 256


def test_values_are_coerced_to_their_type():
  assert ModelConfig(gate="gmm").gate is Gate.GMM
  assert isinstance(OptimizerConfig(learning_rate=1).learning_rate, float)
  assert DataConfig(mixture={"code": 1}).mixture == (("code", 1.0),)


@pytest.mark.parametrize(
  ("cls", "values", "text"),
  [
    (ModelConfig, {"d_ff": 1.0}, "d_ff=1.0 has type float: give a int"),
    (ModelConfig, {"d_ff": True}, "d_ff=True has type bool"),
    (ModelConfig, {"vocab_size": 0}, "vocab_size=0 must be positive"),
    (ModelConfig, {"attention_top_k": 17}, "choose attention_top_k of at most 16"),
    (ModelConfig, {"num_heads": 5}, "num_heads=4 works"),
    (ModelConfig, {"num_heads": 10**15}, "num_heads=1024 works"),
    (ModelConfig, {"sample_top_k": -1}, "sample_top_k=-1 must not be negative"),
    (MeshConfig, {"data": -2}, "data=-2 must be a positive number of devices, or -1"),
    (MeshConfig, {"expert": -1}, "only one mesh axis may be -1"),
    (MeshConfig, {"exchange_buffer": 0.5}, "must be at least 1"),
    (DataConfig, {"path": None}, "path=None has type NoneType"),
    (DataConfig, {"mixture": ("code",)}, "give (domain, share) pairs"),
    (DataConfig, {"mixture": ""}, "mixture='': give (domain, share) pairs"),
    (DataConfig, {"mixture": {"code": 0.0}}, "it must be positive"),
    (OptimizerConfig, {"eps": 0.0}, "eps=0.0 must be positive"),
    (OptimizerConfig, {"learning_rate": float("inf")}, "must be a finite number"),
    (OptimizerConfig, {"eps": 10**400}, "eps has 1329 bits: give a finite number"),
    (OptimizerConfig, {"decay_fraction": 1.5}, "decay_fraction=1.5 must lie between 0 and 1"),
    (TrainConfig, {"steps": 0}, "steps=0 must be positive"),
    (TrainConfig, {"remat": "some"}, "unknown choice 'some'"),
  ],
)
def test_refused_values_name_the_field_and_a_remedy(cls, values, text):
  with pytest.raises(ValueError, match=re.escape(text)):
    cls(**values)


@pytest.mark.parametrize(
  ("values", "text"),
  [
    ({"model": {"d_fff": 1}}, "unknown field 'model.d_fff': did you mean 'model.d_ff'?"),
    ({"modell": {}}, "unknown field 'modell': did you mean 'model'?"),
    ({"model": 3}, "model=3: expected fields vocab_size"),
    ({"model": {"num_heads": 5}}, "model.d_attention=1024 is not divisible"),
    ({"train": {"microbatches": 3}}, "data.batch_rows=513 works"),
    ({"train": {"steps": 10}}, "optimizer.warmup_steps=2000 exceeds train.steps=10"),
  ],
)
def test_refused_json_names_the_whole_field(values, text):
  with pytest.raises(ValueError, match=re.escape(text)):
    RunConfig.from_dict(values)


_JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(LEAVES)), _JSON | st.lists(_JSON, max_size=2))
def test_any_json_value_is_accepted_or_refused_in_one_sentence(leaf, value):
  try:
    config = RunConfig.from_dict(_with(leaf, value))
  except ValueError as error:
    assert leaf.rpartition(".")[2] in str(error)
    assert "\n" not in str(error).replace(repr(value), "")
  else:
    kept = flatten(config.to_dict())[leaf]
    assert kept == type(kept)(value)  # An integer in a float field loses what a float cannot hold.
    assert isinstance(kept, bool) == isinstance(value, bool)


def test_each_enum_value_is_lower_case_and_unlike_its_kin():
  for leaf in LEAVES:
    kind = _kind(leaf)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
      values = [member.value for member in kind]
      assert values == [member.name.lower() for member in kind]
