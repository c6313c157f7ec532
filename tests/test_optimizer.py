import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mfjax.config import OptimizerConfig, Schedule
from mfjax.optimizer import make_optimizer, make_schedule

STEPS, WARMUP, PEAK = 100, 10, 2e-3


def config(**fields):
  return OptimizerConfig(**({"learning_rate": PEAK, "warmup_steps": WARMUP} | fields))


@pytest.mark.parametrize("schedule", Schedule)
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
  rate = make_schedule(config(schedule=schedule), STEPS)
  ramp = [rate(step) for step in range(WARMUP)]
  np.testing.assert_allclose(ramp, PEAK * np.arange(1, WARMUP + 1) / WARMUP, rtol=1e-5)


def test_shapes_after_the_warm_up():
  final = PEAK * 0.1
  constant = make_schedule(config(schedule=Schedule.CONSTANT), STEPS)
  assert constant(STEPS) == pytest.approx(PEAK)
  cosine = make_schedule(config(schedule=Schedule.COSINE), STEPS)
  assert cosine(WARMUP) == pytest.approx(PEAK)
  assert cosine((STEPS + WARMUP) // 2) == pytest.approx((PEAK + final) / 2)
  assert cosine(STEPS) == pytest.approx(final)
  wsd = make_schedule(config(schedule=Schedule.WSD, decay_fraction=0.2), STEPS)
  assert wsd(80) == pytest.approx(PEAK)
  assert wsd(90) == pytest.approx((PEAK + final) / 2)
  assert wsd(STEPS) == pytest.approx(final)


def updates(gradient, **fields):
  params = {"matrix": jnp.ones((2, 3, 4)), "vector": jnp.ones((2, 3))}  # Stacked over two layers.
  axes = {"matrix": ("layers", "d_model", None), "vector": ("layers", None)}
  optimizer = make_optimizer(config(warmup_steps=0, **fields), STEPS, axes)
  gradients = {name: jnp.full_like(p, gradient) for name, p in params.items()}
  made, _ = optimizer.update(gradients, optimizer.init(params), params)
  return made


def test_matrices_decay_and_vectors_do_not():
  made = updates(0.0, weight_decay=0.5)
  np.testing.assert_allclose(made["matrix"], -PEAK * 0.5, rtol=1e-6)
  assert (made["vector"] == 0).all()


@pytest.mark.parametrize(("clip_norm", "clipped"), [(1e-6, True), (0.0, False)])
def test_clip_norm_zero_means_no_clipping(clip_norm, clipped):
  # With eps above every clipped gradient, Adam's first step tells the gradient's size.
  made = updates(1.0, clip_norm=clip_norm, eps=1e-3, weight_decay=0.0)
  norm = optax.tree.norm(made) / PEAK
  assert (norm < 0.01) == clipped
