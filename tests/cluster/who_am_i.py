"""Join the job as `mfjax train` does, add up a number over all devices, and say so."""

import sys

import jax
import jax.numpy as jnp
from absl import flags

from launch import _cluster
from mfjax.config import ClusterConfig

flags.FLAGS(sys.argv[:1])
with _cluster.open_session(ClusterConfig(initialization_timeout=60)) as session:
  mesh = jax.make_mesh((jax.device_count(),), ("all",))
  ones = jax.make_array_from_callback(
    (jax.device_count(),),
    jax.sharding.NamedSharding(mesh, jax.P("all")),
    lambda index: jnp.ones(1) * (1 + session.process.index),
  )
  total = jax.jit(jnp.sum, out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))(ones)
  print(f"process {session.process.index} of {session.process.count} of a sum of {float(total)}")
