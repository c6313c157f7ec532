"""A run's verdict: memory that adds up, collectives by link, remedies and ranked layouts.

The machine is one of eight virtual CPU devices as two slices; tests/launch/test_compile.py compiles
for real targets.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mfjax import ahead_of_time, describe, fit, roofline, search, train_step
from mfjax.config import Placement, Remat, TrainConfig
from mfjax.devices import DeviceFacts
from mfjax.targets import Target
from tests import tiny

FACTS = DeviceFacts(
  name="toy",
  kinds=("Toy",),
  bf16_flops=1e12,
  memory_bytes=2**30,
  memory_bandwidth=1e11,
  ici_bandwidth=1e10,
  dcn_bandwidth=1e9,
)


class CpuTarget(Target):
  """Devices of this process in place of a target's."""

  facts = FACTS
  dimensions = ()


def _machine(memory_bytes=2**30):
  target = CpuTarget("toy", "4", 2)
  object.__setattr__(target, "facts", dataclasses.replace(FACTS, memory_bytes=memory_bytes))
  return fit.Machine(target, tuple(jax.devices()))


def _config(**train):
  placed = {"attention_placement": Placement.FSDP, "ff_placement": Placement.EXPERT}
  mesh = tiny.mesh(data=2, fsdp=2, expert=2, **placed)
  return tiny.run_config(mesh=mesh, train=TrainConfig(steps=20, **train))


@pytest.fixture(scope="module")
def report():
  """A run compiled once: some twenty seconds."""
  return fit.check(_config(microbatches=2), _machine())


@pytest.mark.slow
def test_memory_by_kind_adds_up_to_the_compilers_peak(report):
  train, evaluation = report.programs
  assert (train.name, evaluation.name) == ("train step", "evaluation step")
  for program in report.programs:
    assert sum(kind.bytes for kind in program.memory) == program.peak_bytes
    assert all(kind.bytes > 0 for kind in program.memory)
  kinds = {kind.kind: kind.bytes for kind in train.memory}
  params = describe.parameters(report.config, report.axis_sizes)
  own = 4 * sum(parameter.elements_per_device for parameter in params)
  assert kinds["parameters"] == own
  assert 2 * own <= kinds["optimizer state"] < 2 * own + 64
  assert kinds["batch"] == 3 * 4 * tiny.ROWS * tiny.LENGTH // 8
  assert report.peak_bytes == train.peak_bytes
  assert report.fits


@pytest.mark.slow
def test_evaluation_counts_the_optimizers_state_beside_it(report):
  train, evaluation = ({kind.kind: kind.bytes for kind in p.memory} for p in report.programs)
  assert evaluation["optimizer state"] == pytest.approx(train["optimizer state"], abs=64)
  assert evaluation["batch"] == train["batch"] // 2  # One microbatch.


@pytest.mark.slow
def test_collectives_of_the_step_by_link(report):
  rows = report.collective_rows()
  links = {(row["kind"], row["link"]) for row in rows}
  assert ("all-gather", "ICI") in links  # Weights, inside a slice.
  assert ("all-reduce", "DCN") in links or ("all-reduce", "ICI+DCN") in links  # Gradients.
  assert any(row["kind"] == "all-to-all" and row["per_round"] for row in rows)
  assert not any(row["kind"] == "all-to-all" and "DCN" in row["link"] for row in rows)
  sent = report.sent_by_link()
  assert sent["ICI"] > 0
  assert sent["DCN"] > 0


@pytest.mark.slow
def test_report_is_plain(report):
  plain = report.to_dict()
  assert plain["target"] == "2 x toy:4"
  assert plain["programs"][0]["memory"]["parameters"] > 0
  assert plain["bounds"]["balanced"]["at_least"] == report.bounds.at_least
  assert "measured" not in plain["bounds"]


@pytest.mark.slow
def test_a_program_that_is_too_large_does_not_fit(report):
  small = _machine(report.peak_bytes - 1)
  tight = dataclasses.replace(report, machine=small)
  assert not tight.fits
  assert tight.limit_bytes == report.peak_bytes - 1


def _refused(monkeypatch, message):
  """Compile a program that holds 64 bytes of parameters with a compiler that refuses."""

  def refuse(self, *args, **kwargs):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
  shape = jax.ShapeDtypeStruct((16,), jnp.float32)
  held, shown = {"parameters": 64}, {"gradients": 2**40}
  return ahead_of_time._compile("train step", jax.jit(jnp.sum), (shape,), held, shown, [])


@pytest.mark.parametrize(
  ("message", "used", "limit"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
      "(22.50G) exceeds available HBM (15.75G).",
      *(22.5, 15.75),
    ),
    ("RESOURCE_EXHAUSTED: ... Used 20.00G of 15.75G hbm. Exceeded hbm by 4.25G.", 20.0, 15.75),
  ],
)
def test_a_refusal_for_lack_of_memory_says_how_much(monkeypatch, message, used, limit):
  program = _refused(monkeypatch, message)
  assert (program.peak_bytes, program.limit_bytes) == (int(used * 2**30), int(limit * 2**30))
  assert sum(kind.bytes for kind in program.memory) == program.peak_bytes
  assert program.collectives == ()
  found = fit.Report(
    config=_config(),
    machine=_machine(2**35),
    axis_sizes={},
    programs=(program,),
    bounds=None,
    measured_bounds=None,
    assumptions=(),
    remedies=(),
  )
  assert not found.fits
  assert found.limit_bytes == program.limit_bytes  # Not all of the device's memory.


@pytest.mark.parametrize(
  ("message", "what"),
  [
    (
      "XLA:TPU compile permanent error. Ran out of memory in memory space vmem. Used 22.25M of "
      '16.00M vmem. Operator: op_name="jit(step)/shard_map/stick_breaking_backward/pallas_call"',
      "kernel stick_breaking_backward of the train step needs 22.25M of vector memory .* 16.00M",
    ),
    ("INTERNAL: no idea", "the compiler refuses the train step: INTERNAL: no idea"),
  ],
)
def test_other_refusals_are_one_sentence(monkeypatch, message, what):
  with pytest.raises(ValueError, match=what):
    _refused(monkeypatch, message)


def test_the_programs_are_the_train_step_and_the_evaluation_step(monkeypatch):
  lowered = []
  for module, name in ((train_step, "make_train_step"), (ahead_of_time, "make_eval_step")):
    make = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, make=make, n=name: lowered.append(n) or make(*a))
  monkeypatch.setattr(
    ahead_of_time, "_compile", lambda name, function, *args: lowered.append(name) or None
  )
  config = _config()
  mesh = _machine().mesh(config)
  config = train_step.resolve(config, mesh)
  ahead_of_time.compile_train_step(config, mesh, [])
  ahead_of_time.compile_eval_step(config, mesh, [])
  assert lowered == ["make_train_step", "train step", "make_eval_step", "evaluation step"]


# Layouts ------------------------------------------------------------------------------------------


def test_remedies_save_memory_and_are_ordered():
  config = dataclasses.replace(_config(), train=TrainConfig(steps=20, remat=Remat.NONE))
  sizes = {"data": 2, "fsdp": 2, "expert": 2}
  found = search.remedies(config, sizes, 1)
  saved = [saving for _, saving in found]
  assert saved == sorted(saved, reverse=True)
  assert all(saving > 0 for saving in saved)
  flags = [flags for flags, _ in found]
  assert "--config.train.remat=full" in flags
  assert "--config.train.microbatches=2" in flags
  assert "--config.mesh.fsdp=4" in flags
  # Over two slices the data axis cannot shrink to one.
  assert "--config.mesh.fsdp=4" not in [flags for flags, _ in search.remedies(config, sizes, 2)]


def test_ranked_layouts_divide_and_the_shortlist_fits():
  ranked = fit.rank(_config(), _machine())
  seconds = [candidate.seconds for candidate in ranked]
  assert seconds == sorted(seconds)
  assert len({candidate.flags for candidate in ranked}) == len(ranked)
  for candidate in ranked:
    sizes, rows = candidate.axis_sizes, candidate.config.train.microbatches
    assert sizes["data"] * sizes["fsdp"] * sizes["expert"] == 8
    assert sizes["data"] % 2 == 0  # Two slices.
    assert tiny.ROWS % (8 * rows) == 0
  assert {candidate.config.train.remat for candidate in ranked} == set(Remat)
  middle = sorted(candidate.memory_bytes for candidate in ranked)[len(ranked) // 2]
  chosen = search.shortlist(ranked, middle, 3)
  assert len(chosen) == 3
  assert all(candidate.memory_bytes <= 1.05 * middle for candidate in chosen)


def test_no_layout_that_fits_is_an_error():
  ranked = fit.rank(_config(), _machine())
  with pytest.raises(ValueError, match="no layout fits 2 x toy:4: the smallest needs about"):
    fit.shortlist(ranked, _machine(1000), 3)
  with pytest.raises(ValueError, match="choose data.batch_rows as a multiple of 8"):
    fit.shortlist([], _machine(), 3)


@pytest.mark.slow
def test_reckoned_collectives_are_near_the_compiled_ones(report):
  sent = search.reckoned_collectives(report.config, report.axis_sizes, 2, 4)
  ici, _ = roofline.communication(sent, FACTS, 0)
  compiled, _ = roofline.communication(report.programs[0].collectives, FACTS, 0)
  assert 0.5 < ici / compiled < 2
