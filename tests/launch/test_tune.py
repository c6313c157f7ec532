"""`mfjax tune` keeps what is faster and right, and nothing else."""

import jax
import jax.numpy as jnp
import pytest

from mfjax import sharding
from mfjax.bench import tune
from mfjax.config import KernelConfig
from pallas_kernels import tuning
from pallas_kernels.grouped_matmul import tpu
from pallas_kernels.implementation import Implementation
from tests import tiny


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ("", "--config is missing"),
    ("--config=quickstart", "nothing to tune on cpu"),
    ("--config=quickstart --tokens=8,x", "--tokens=8,x: give positive numbers"),
    ("--config=quickstart --only=grouped_matmul.out", "did you mean 'grouped_matmul.outer'"),
    ("--config=quickstart --output=no/such/t.json", "there is no directory no/such"),
    ("--config=quickstart here", "unexpected argument 'here'"),
  ],
)
def test_mistakes_are_sentences(mfjax, args, message):
  done = mfjax("tune", *args.split())
  assert message in done.err
  assert done.code == 2


def test_a_file_that_is_no_table_is_left_alone(mfjax, tmp_path):
  (tmp_path / "t.json").write_text("[]")
  assert "not a table" in mfjax("tune", "--config=quickstart", "--output=t.json").err
  assert (tmp_path / "t.json").read_text() == "[]"


def test_problems_are_what_the_model_asks_for(monkeypatch):
  chosen = Implementation.INTERPRET
  kernels = KernelConfig(grouped_matmul=chosen, stick_breaking=chosen)
  run = tiny.Run(tiny.run_config(kernels=kernels, mesh=tiny.mesh()))
  (batch,) = tiny.batches(1)
  batch = sharding.device_batch(run.mesh, batch)
  asked = set()

  def lookup(operation, dtype, shape):
    asked.add((operation, tuning.shape_key(operation, shape)))

  monkeypatch.setattr(tuning, "lookup", lookup)
  run.step.lower(run.state, batch)
  problems = tune.problems(tiny.MODEL, tiny.ROWS * tiny.LENGTH, tiny.LENGTH)
  assert asked == {
    (problem.operation, tuning.shape_key(problem.operation, tune.looked_up(problem, chosen)))
    for problem in problems
  }


@pytest.fixture
def race(monkeypatch):
  """Tune one small product whose candidates take as long as they are told to."""

  def run(tilings, seconds, own=1.0):
    candidates = [tpu.Tiling(**fields) for fields in tilings]
    monkeypatch.setattr(tpu, "candidates", lambda *_: candidates)
    times = {str(tiling): time for tiling, time in zip(candidates, seconds, strict=True)}

    def take_turns(calls, repeats):
      return {name: (times | {"None": own})[name] for name in calls}

    monkeypatch.setattr(tune, "take_turns", take_turns)
    problem = tune.Problem(operation="grouped_matmul.matmul", shape=(64, 16, 32, 4))
    with jax.set_mesh(jax.sharding.Mesh(jax.devices()[:1], ("x",))):
      return tune.tune(problem, Implementation.INTERPRET, jnp.float32, repeats=1)

  return run


GOOD = {"tile_m": 8, "tile_k": 16, "tile_n": 32, "step_n": 32}
SPLIT = GOOD | {"step_n": 16}


def test_the_fastest_wins(race):
  outcome = race([GOOD, SPLIT], [0.9, 0.8])
  assert outcome.fields == SPLIT
  assert (outcome.own_seconds, outcome.best_seconds) == (1.0, 0.8)


def test_noise_is_no_win(race):
  outcome = race([GOOD, SPLIT], [0.995, 1.2])
  assert outcome.fields is None
  assert outcome.best_seconds == outcome.own_seconds


def test_a_wrong_tiling_is_rejected_however_fast(race, monkeypatch):
  real = tpu.matmul

  def wrong(*args, tiling=None, **options):
    result = real(*args, tiling=tiling, **options)
    return result * 1.1 if tiling == tpu.Tiling(**SPLIT) else result

  monkeypatch.setattr(tpu, "matmul", wrong)
  outcome = race([GOOD, SPLIT], [0.9, 0.1])
  assert outcome.fields == GOOD
  assert list(outcome.rejected) == [str(tpu.Tiling(**SPLIT))]
  assert "of the largest value" in outcome.rejected[str(tpu.Tiling(**SPLIT))]


def test_a_tiling_that_fails_is_rejected(race, monkeypatch):
  real = tpu.matmul

  def refuse(*args, tiling=None, **options):
    if tiling == tpu.Tiling(**SPLIT):
      raise NotImplementedError("too large")
    return real(*args, tiling=tiling, **options)

  monkeypatch.setattr(tpu, "matmul", refuse)
  outcome = race([GOOD, SPLIT], [0.9, 0.1])
  assert outcome.fields == GOOD
  assert "too large" in outcome.rejected[str(tpu.Tiling(**SPLIT))]


def test_command_merges_into_the_table(mfjax, tmp_path, monkeypatch):
  monkeypatch.setattr("mfjax.bench.tune.take_turns", _slow_default)
  old = tuning.updated({}, "other", "grouped_matmul.outer", "bfloat16", (8, 8, 8, 8), GOOD)
  tuning.write(tmp_path / "t.json", old)
  # No kernel of ours runs on a CPU by itself: the interpreter is asked for.
  sizes = ("num_layers=1", "d_model=16", "d_attention=16", "d_ff=16", "vocab_size=256")
  done = mfjax(
    "tune",
    "--config=quickstart",
    "--config.kernels.grouped_matmul=interpret",
    *(f"--config.model.{size}" for size in sizes),
    *("--tokens=32", "--only=grouped_matmul.outer", "--output=t.json"),
  )
  assert done.code == 0, done.err
  table = tuning.read(tmp_path / "t.json")
  assert table["other"] == old["other"]
  entries = table[jax.devices()[0].device_kind]["grouped_matmul.outer"]["float32"]
  assert entries
  for key, fields in entries.items():
    assert all(f"{name} {size}" in done.out for name, size in fields.items())
    assert key.endswith(("x16x16x4", "x16x16x8"))


def _slow_default(calls, repeats):
  return {name: 2.0 if name == "None" else 1.0 for name in calls}
