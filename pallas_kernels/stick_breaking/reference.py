"""Oracle of stick-breaking attention: all scores at once, in float32, gradients by JAX."""

import jax
import jax.numpy as jnp


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, scale: float
) -> jax.Array:
  """Return float32 [b, q, s, h, d].

  Args:
    q: [b, q, s, h, d], s query slots sharing the keys. k, v: [b, t, h, d].
    allowed: bool [b, q, t]; other keys take no part of the stick.
    scale: factor of q . k.
  """
  scores = jnp.einsum(
    "bqshd,bthd->bshqt", *(x.astype(jnp.float32) for x in (q, k)), precision="highest"
  )
  allowed = allowed[:, None, None]
  log_keep = jnp.where(allowed, jax.nn.log_sigmoid(-scores * scale), 0)
  # Of the keys after it: a sum less a key's own would lose what is left beside a large one.
  following = jnp.pad(log_keep[..., 1:], ((0, 0),) * 4 + ((0, 1),))
  after = jax.lax.cumsum(following, axis=4, reverse=True)
  log_weights = jax.nn.log_sigmoid(scores * scale) + after
  weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, log_weights, 0)), 0)
  return jnp.einsum("bshqt,bthd->bqshd", weights, v.astype(jnp.float32), precision="highest")
