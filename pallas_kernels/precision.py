"""Precision of matrix products: what float32 operands mean on accelerators."""

import jax
import jax.numpy as jnp


def matmul_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
  """Return HIGHEST for float32: by default a TPU rounds it to bf16, and a GPU may to TF32."""
  is_float32 = jnp.dtype(dtype) == jnp.float32
  return jax.lax.Precision.HIGHEST if is_float32 else jax.lax.Precision.DEFAULT
