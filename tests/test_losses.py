import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfjax import losses, sharding
from mfjax.config import MeshConfig
from pallas_kernels.precision import matmul_precision

VOCAB, PADDED, WIDTH, Z_WEIGHT = 300, 384, 16, 1e-3


def plain(head, hidden, targets, is_target):
  """Return the summed objective of whole logits without the padding."""
  logits = jnp.einsum(
    "btd,vd->btv",
    hidden,
    head[:VOCAB].astype(hidden.dtype),
    precision=matmul_precision(hidden.dtype),
    preferred_element_type=jnp.float32,
  )
  lse = jax.nn.logsumexp(logits, axis=-1)
  nats = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
  return jnp.where(is_target, nats + Z_WEIGHT * lse**2, 0).sum()


# Scale 30 gives logits of some hundred, whose exponentials overflow; offset: none is near zero.
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (30, 0), (1, 100), (1, -100)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cross_entropy_and_its_gradients_equal_those_of_whole_logits(dtype, scale, offset):
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  keys = jax.random.split(jax.random.key(0), 3)
  head = jax.random.normal(keys[0], (PADDED, WIDTH)).at[:, 0].set(offset)
  head = head.at[VOCAB:].set(1e3)  # The padding takes no part, whatever it holds.
  hidden = scale * jax.random.normal(keys[1], (2, 50, WIDTH)).at[:, :, 0].set(1).astype(dtype)
  targets = jax.random.randint(keys[2], (2, 50), 0, VOCAB)
  is_target = jnp.ones((2, 50), bool).at[1, -7:].set(False)
  reference = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))
  expected, expected_gradients = reference(head, hidden, targets, is_target)

  def objective(head, hidden, targets, is_target):
    options = {"vocab_size": VOCAB, "z_weight": Z_WEIGHT, "chunk_tokens": 40}
    return losses.cross_entropy(head, hidden, targets, is_target, **options).objective

  specs = (sharding.P(None, sharding.WEIGHT_AXES), *(sharding.BATCH,) * 3)
  with jax.set_mesh(mesh):
    arguments = [
      jax.device_put(x, jax.NamedSharding(mesh, spec))
      for x, spec in zip((head, hidden, targets, is_target), specs, strict=True)
    ]
    value, gradients = jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))(*arguments)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert (np.asarray(gradients[0])[VOCAB:] == 0).all()
  tolerance = 1e-4 if dtype == jnp.float32 else 1e-2
  for got, want in zip(gradients, expected_gradients, strict=True):
    assert got.dtype == want.dtype
    error = jnp.linalg.norm((got - want).astype(jnp.float32))
    assert error < tolerance * jnp.linalg.norm(want.astype(jnp.float32))
