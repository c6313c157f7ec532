import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest

import pallas_kernels.grouped_matmul.tpu as grouped_tpu
import pallas_kernels.stick_breaking.tpu as stick_breaking_tpu
from mfjax import sharding, train_step
from mfjax.config import (
  AuxLoss,
  DType,
  Gate,
  KernelConfig,
  LossConfig,
  ModelConfig,
  OptimizerConfig,
  Placement,
  Remat,
  Statistics,
  TrainConfig,
  Transport,
)
from pallas_kernels.implementation import Implementation
from tests import tiny

GATHERED = {"attention_placement": Placement.FSDP, "ff_placement": Placement.FSDP}
EXCHANGED = {"attention_placement": Placement.EXPERT, "ff_placement": Placement.EXPERT}
PADDED = {**EXCHANGED, "transport": Transport.PADDED}
MESHES = {
  "8x1x1": tiny.mesh(data=8),
  "1x8x1": tiny.mesh(fsdp=8),
  "1x1x8": tiny.mesh(expert=8, **PADDED),
  "2x2x2": tiny.mesh(data=2, fsdp=2, expert=2, **EXCHANGED),
  "2x2x2, gathered": tiny.mesh(data=2, fsdp=2, expert=2, **GATHERED),
  # A buffer of the balanced share alone: most layers take more rounds than there are chunks.
  "1x1x8, rounds": tiny.mesh(expert=8, exchange_buffer=1.0, exchange_chunks=1, **EXCHANGED),
}


@functools.cache
def one_device() -> tuple[np.ndarray, tiny.Run]:
  run = tiny.Run(tiny.run_config())
  return tiny.losses(run.train(tiny.batches(20))), run


def bytes_per_device(tree) -> float:
  leaves = jax.tree.leaves(tree)
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_losses_of_one_device(name):
  expected, single = one_device()
  run = tiny.Run(tiny.run_config(mesh=MESHES[name]))
  np.testing.assert_allclose(tiny.losses(run.train(tiny.batches(20))), expected, rtol=1e-5)
  # What is not replicated by rule shrinks with fsdp * expert; moments like their parameters.
  for part in ("params", "optimizer"):
    whole, mine = bytes_per_device(single.state[part]), bytes_per_device(run.state[part])
    shards = run.mesh.shape["fsdp"] * run.mesh.shape["expert"]
    assert whole / shards <= mine <= whole / shards + 0.06 * whole


def test_losses_fall_and_runs_repeat_bitwise():
  batch = tiny.batches(1) * 20
  first, again = (tiny.Run(tiny.run_config()) for _ in range(2))
  history = tiny.losses(first.train(batch))
  assert history[-1] < history[0] - 1
  np.testing.assert_array_equal(history, tiny.losses(again.train(batch)))
  jax.tree.map(np.testing.assert_array_equal, first.state, again.state)


@pytest.mark.parametrize("aux", [AuxLoss.MUTUAL_INFORMATION, AuxLoss.SWITCH])
def test_exact_statistics_equal_the_big_batch(aux):
  def run(microbatches: int, statistics: Statistics):
    loss = LossConfig(aux=aux, aux_weight=0.5, statistics=statistics)
    train = TrainConfig(steps=20, microbatches=microbatches)
    made = tiny.Run(tiny.run_config(loss=loss, train=train))
    history = made.train(tiny.batches(3))
    return made.state["params"], tiny.losses(history)

  big, big_losses = run(1, Statistics.RUNNING)
  norm = sum(float((x**2).sum()) for x in jax.tree.leaves(big)) ** 0.5

  def distance(statistics: Statistics) -> float:
    params, _ = run(4, statistics)
    gaps = jax.tree.map(lambda a, b: float(((a - b) ** 2).sum()), params, big)
    return sum(jax.tree.leaves(gaps)) ** 0.5 / norm

  _, exact_losses = run(4, Statistics.EXACT)
  np.testing.assert_allclose(exact_losses, big_losses, rtol=1e-5)
  exact, running, micro = (
    distance(s) for s in (Statistics.EXACT, Statistics.RUNNING, Statistics.MICROBATCH)
  )
  # The other two are approximations, and must be seen to be.
  assert exact < 1e-4 < min(running, micro)


@pytest.mark.parametrize("remat", [Remat.SELECTIVE, Remat.NONE])
def test_rematerialisation_changes_memory_alone(remat):
  expected, full = one_device()
  run = tiny.Run(tiny.run_config(train=TrainConfig(steps=20, remat=remat)))
  assert temporary_bytes(run) > 1.02 * temporary_bytes(full)
  np.testing.assert_allclose(tiny.losses(run.train(tiny.batches(3))), expected[:3], rtol=1e-6)


@pytest.mark.parametrize("gate", Gate)
def test_selective_rematerialisation_computes_no_product_again(gate):
  def recomputed(remat):
    model = dataclasses.replace(tiny.MODEL, gate=gate)
    run = tiny.Run(tiny.run_config(model=model, train=TrainConfig(steps=20, remat=remat)))
    batch = sharding.device_batch(run.mesh, tiny.batches(1)[0])
    text = run.step.lower(run.state, batch).compile().as_text()
    return re.findall(r" dot\(.*rematted_computation.*", text)

  assert not recomputed(Remat.SELECTIVE)
  assert recomputed(Remat.FULL), "the search for them finds none at all"


@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_pallas_kernels_train_as_the_portable_path_does(sizes, monkeypatch):
  called = set()

  def record(name, function, *args, **options):
    called.add(name)
    return function(*args, **options)

  for module, name in ((grouped_tpu, "matmul_gelu"), (stick_breaking_tpu, "attention")):
    spy = functools.partial(record, name, getattr(module, name))
    monkeypatch.setattr(module, name, spy)

  def train(implementation):
    kernels = KernelConfig(grouped_matmul=implementation, stick_breaking=implementation)
    how = TrainConfig(steps=20, remat=Remat.SELECTIVE)
    run = tiny.Run(tiny.run_config(mesh=tiny.mesh(*sizes, **EXCHANGED), kernels=kernels, train=how))
    return tiny.losses(run.train(tiny.batches(2)))

  expected = train(Implementation.XLA)
  assert not called
  np.testing.assert_allclose(train(Implementation.INTERPRET), expected, rtol=1e-6)
  assert called == {"matmul_gelu", "attention"}


def test_gradients_in_the_compute_dtype_cast_experts_once_a_step_and_round_once():
  model = dataclasses.replace(tiny.MODEL, compute_dtype=DType.BFLOAT16)
  moments = {}
  for dtype in (DType.FLOAT32, DType.BFLOAT16):
    optimizer = OptimizerConfig(gradient_dtype=dtype, clip_norm=0, warmup_steps=2)
    train = TrainConfig(steps=20, microbatches=2)
    run = tiny.Run(tiny.run_config(model=model, optimizer=optimizer, train=train))
    batch = sharding.device_batch(run.mesh, tiny.batches(1)[0])
    program = run.step.lower(run.state, batch).as_text()
    # [experts, d_model, d_ff] of one layer, cast at each use.
    casts = re.findall(r"convert .*<16x32x48xf32>\) -> tensor<16x32x48xbf16>", program)
    assert bool(casts) == (dtype is DType.FLOAT32)
    run.train(tiny.batches(1))
    moments[dtype] = jax.device_get(optax.tree.get(run.state["optimizer"], "mu"))

  def near(exact, rounded):
    # Two microbatches' gradients, each rounded, and their sum.
    np.testing.assert_allclose(rounded, exact, rtol=2**-6, atol=2**-7 * np.abs(exact).max())
    return not np.array_equal(exact, rounded)

  differ = jax.tree.map(near, moments[DType.FLOAT32], moments[DType.BFLOAT16])
  assert any(jax.tree.leaves(differ))


@pytest.mark.parametrize(
  ("platform", "dtype", "expected"),
  [
    ("cpu", DType.BFLOAT16, Implementation.XLA),
    ("gpu", DType.BFLOAT16, Implementation.PALLAS_GPU),
    ("gpu", DType.FLOAT32, Implementation.XLA),
    ("tpu", DType.FLOAT32, Implementation.PALLAS_TPU),
  ],
)
def test_auto_is_the_kernel_of_the_platform_where_it_can(platform, dtype, expected, caplog):
  model = ModelConfig(compute_dtype=dtype, num_layers=2)
  kernels = train_step.resolve_kernels(KernelConfig(), platform, model)
  assert (kernels.grouped_matmul, kernels.stick_breaking) == (expected, expected)
  passed_over = platform == "gpu" and expected is Implementation.XLA
  assert ("xla, since" in caplog.text) == passed_over  # Nothing falls back silently.
  explicit = dataclasses.replace(kernels, grouped_matmul=Implementation.PALLAS_GPU)
  if expected is not Implementation.PALLAS_GPU:
    with pytest.raises(NotImplementedError, match="use .*xla"):
      train_step.resolve_kernels(explicit, platform, model)


def temporary_bytes(run: tiny.Run) -> int:
  batch = sharding.device_batch(run.mesh, tiny.batches(1)[0])
  return run.step.lower(run.state, batch).compile().memory_analysis().temp_size_in_bytes


def test_a_step_that_is_not_finite_is_skipped():
  run = tiny.Run(tiny.run_config())
  good = tiny.batches(3)
  run.train(good[:1])
  before = jax.device_get({k: run.state[k] for k in ("params", "optimizer")})
  poison = run.state["params"]["blocks"]["ff"]["router"]["b1"]
  run.state["params"]["blocks"]["ff"]["router"]["b1"] = poison.at[0, 0].set(np.nan)
  history = run.train(good[1:])
  assert [m["skipped"] for m in history] == [1, 1]
  assert [m["skipped_in_a_row"] for m in history] == [1, 2]
  assert int(run.state["step"]) == 3
  after = jax.device_get({k: run.state[k] for k in ("params", "optimizer")})
  after["params"]["blocks"]["ff"]["router"]["b1"] = before["params"]["blocks"]["ff"]["router"]["b1"]
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_memory_choices_keep_their_formats():
  optimizer = OptimizerConfig(
    warmup_steps=2,
    learning_rate=3e-3,
    first_moment_dtype=DType.BFLOAT16,
    second_moment_dtype=DType.BFLOAT16,
    gradient_dtype=DType.BFLOAT16,
  )
  expected, _ = one_device()
  run = tiny.Run(tiny.run_config(optimizer=optimizer))
  history = tiny.losses(run.train(tiny.batches(5)))
  moments = [x for x in jax.tree.leaves(run.state["optimizer"]) if x.ndim > 0]
  assert {x.dtype.name for x in moments} == {"bfloat16"}
  np.testing.assert_allclose(history, expected[:5], rtol=1e-2)


def test_bf16_compute_follows_float32():
  expected, _ = one_device()
  model = dataclasses.replace(tiny.MODEL, compute_dtype=DType.BFLOAT16)
  run = tiny.Run(tiny.run_config(model=model))
  np.testing.assert_allclose(tiny.losses(run.train(tiny.batches(5))), expected[:5], rtol=2e-2)
  assert {x.dtype.name for x in jax.tree.leaves(run.state["params"])} == {"float32"}


def test_statistics_leave_padding_out_and_count_every_pick():
  run = tiny.Run(tiny.run_config())
  made = tiny.batches(1)
  (metrics,) = run.train(made)
  tokens = (made[0]["segment_ids"] > 0).sum()
  assert metrics["tokens"] == tokens
  for kind, top_k in (("attention", 2), ("ff", 2)):
    sums = metrics["router"][kind]
    np.testing.assert_allclose(sums["picks"].sum(-1), tokens * top_k)
    np.testing.assert_allclose(sums["prob_sum"].sum(-1), tokens, rtol=1e-5)
