import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfjax import model, sharding, train_step
from mfjax.config import Gate, Init, KernelConfig, MeshConfig
from mfjax.model import Execution
from pallas_kernels.implementation import Implementation
from tests import tiny

XLA = KernelConfig(grouped_matmul=Implementation.XLA, stick_breaking=Implementation.XLA)
VARIANTS = {
  "identity K/V": tiny.MODEL,
  "multi-head K/V": dataclasses.replace(tiny.MODEL, num_heads=4, gate=Gate.LINEAR),
  "gmm gate": dataclasses.replace(tiny.MODEL, d_attention=16, gate=Gate.GMM),
}


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
    yield


def init(config):
  """Return parameters placed by the sharding rules, as training has them."""
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  placed = sharding.shardings(mesh, model.param_specs(config, MeshConfig()))
  return jax.device_put(model.init_params(config, jax.random.key(0)), placed)


def run(config, params, embedded_noise, segments, key=None):
  """Return [B, T, D] with `embedded_noise` [B, T, D] added to the tokens' embeddings."""
  batch, length, _ = embedded_noise.shape
  rows = embedded_noise.reshape(-1, config.d_model)
  rows = jax.sharding.reshard(rows, jax.typeof(params["embedding"]).sharding.spec)
  table = jnp.concatenate([params["embedding"], rows])
  tokens = params["embedding"].shape[0] + jnp.arange(batch * length).reshape(batch, length)
  tokens = jax.sharding.reshard(tokens, sharding.BATCH)
  hidden, _, _ = model.apply(
    params | {"embedding": table}, config, Execution(kernels=XLA), tokens, segments, key
  )
  return hidden


@pytest.mark.parametrize("name", VARIANTS)
def test_no_gradient_flows_to_later_tokens_or_other_documents(name):
  config = VARIANTS[name]
  params = init(config)
  length = 12
  segments = np.array([[1] * 5 + [2] * 5 + [0] * 2, [1] * 12], np.int32)
  placed = jax.sharding.reshard(jnp.asarray(segments), sharding.BATCH)
  inputs = jax.random.normal(jax.random.key(1), (2, length, config.d_model))
  direction = jax.random.normal(jax.random.key(2), (config.d_model,))

  def output(inputs):
    return jnp.einsum("btd,d->bt", run(config, params, inputs, placed), direction)

  jacobian = np.asarray(jax.jit(jax.jacrev(output))(inputs))  # [b, i, b, j, D]
  influence = np.abs(jacobian).max(-1)
  for row in range(2):
    assert (influence[row, :, 1 - row] == 0).all()
    for i, j in np.ndindex(length, length):
      same = segments[row, i] == segments[row, j] and segments[row, i] > 0
      if j > i or (j < i and not same):
        assert influence[row, i, row, j] == 0, (row, i, j)
      if j <= i and same:
        assert influence[row, i, row, j] > 0, (row, i, j)


@pytest.mark.parametrize("scheme", Init)
def test_initialisation_has_the_stated_moments(scheme):
  config = dataclasses.replace(tiny.MODEL, init=scheme, num_layers=3)
  params = model.init_params(config, jax.random.key(0))
  w_in = np.asarray(params["blocks"]["ff"]["experts"]["bank_0"]["w_in"])
  w_out = np.asarray(params["blocks"]["ff"]["experts"]["bank_0"]["w_out"])
  head = np.asarray(params["lm_head"])[: config.vocab_size]
  if scheme is Init.PUBLISHED:
    for matrix, fan_in in ((w_in, 32), (w_out, 48)):
      assert np.abs(matrix).max() <= 1 / fan_in
      np.testing.assert_allclose(matrix.std(), 1 / fan_in / 3**0.5, rtol=0.02)
    np.testing.assert_allclose(head.std(), 0.02, rtol=0.03)
  else:
    for matrix, fan_in in ((w_in, 32), (w_out, 48), (head, 32)):
      np.testing.assert_allclose(matrix.std(), fan_in**-0.5, rtol=0.03)
  assert not np.array_equal(w_in[0], w_in[1])
  assert (np.asarray(params["lm_head"])[config.vocab_size :] == 0).all()


@pytest.mark.parametrize("field", ["embedding_dropout", "residual_dropout", "router_dropout"])
def test_each_dropout_acts_in_training_alone(field):
  config = dataclasses.replace(tiny.MODEL, **{field: 0.3})
  params = init(config)
  segments = jax.sharding.reshard(jnp.ones((2, 8), jnp.int32), sharding.BATCH)
  inputs = jax.random.normal(jax.random.key(1), (2, 8, config.d_model))
  forward = jax.jit(lambda key: run(config, params, inputs, segments, key))
  plain = jax.jit(lambda: run(config, params, inputs, segments))()
  a, b, again = (forward(jax.random.key(seed)) for seed in (1, 2, 1))
  assert not np.allclose(a, plain)
  assert not np.allclose(a, b)
  np.testing.assert_array_equal(a, again)


def test_layers_are_stacked_and_every_parameter_has_axes():
  shapes = model.abstract_params(tiny.MODEL)
  axes = model.param_axes(tiny.MODEL)
  for path, shape in jax.tree_util.tree_leaves_with_path(shapes):
    names = axes
    for key in path:
      names = names[key.key]
    assert len(names) == shape.ndim
    if path[0].key == "blocks":
      assert names[0] == "layers"
      assert shape.shape[0] == tiny.MODEL.num_layers


def test_program_size_does_not_grow_with_depth():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])

  def size(layers: int) -> int:
    config = tiny.run_config(model=dataclasses.replace(tiny.MODEL, num_layers=layers))
    config = train_step.resolve(config, mesh)
    batch = {
      name: jax.ShapeDtypeStruct(
        (tiny.ROWS, tiny.LENGTH), jnp.int32, sharding=jax.NamedSharding(mesh, sharding.BATCH)
      )
      for name in ("tokens", "targets", "segment_ids")
    }
    step = train_step.make_train_step(config, mesh)
    return len(step.lower(train_step.abstract_state(config, mesh), batch).as_text())

  assert size(48) < 1.02 * size(24)
