import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import testing
from pallas_kernels.grouped_matmul import api
from pallas_kernels.implementation import Implementation

K, N = 12, 20
PORTABLE = (Implementation.REFERENCE, Implementation.XLA)


def oracle_matmul(rows, weights, sizes, alignment):
  """Multiply group by group in float64, as plainly as it can be said."""
  out = np.full((len(rows), weights.shape[2]), np.nan)
  row = 0
  for group, size in enumerate(sizes):
    out[row : row + size] = rows[row : row + size].astype(np.float64) @ weights[group]
    row += -(-size // alignment) * alignment
  return out


def oracle_outer(a, b, sizes, alignment):
  out = np.zeros((len(sizes), a.shape[1], b.shape[1]))
  row = 0
  for group, size in enumerate(sizes):
    out[group] = a[row : row + size].T.astype(np.float64) @ b[row : row + size]
    row += -(-size // alignment) * alignment
  return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("case", testing.GROUP_SIZES)
def test_products_equal_the_oracle_and_ignore_unused_rows(case, implementation, dtype, tolerance):
  sizes = testing.GROUP_SIZES[case]
  alignment = 8 if implementation is Implementation.XLA else 1
  options = {"alignment": alignment, "implementation": implementation}
  a, used = testing.aligned_rows(sizes, K, alignment, seed=1)
  b, _ = testing.aligned_rows(sizes, N, alignment, seed=2)
  weights = np.random.default_rng(3).standard_normal((len(sizes), K, N))
  groups, w = jnp.asarray(sizes, jnp.int32), jnp.asarray(weights, dtype)

  def check(actual, expected):
    actual = np.asarray(actual.astype(jnp.float32))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * 8)

  forward = api.grouped_matmul(jnp.asarray(a, dtype), w, groups, **options)
  check(forward[used], oracle_matmul(a, weights, sizes, alignment)[used])
  backward = api.grouped_matmul(jnp.asarray(b, dtype), w, groups, transpose_rhs=True, **options)
  check(backward[used], oracle_matmul(b, weights.swapaxes(1, 2), sizes, alignment)[used])
  outer = api.grouped_outer(jnp.asarray(a, dtype), jnp.asarray(b, dtype), groups, **options)
  check(outer, oracle_outer(a, b, sizes, alignment))
  assert forward.dtype == dtype
  assert outer.dtype == jnp.float32


def test_wrong_shapes_and_dtypes_are_named():
  x, w, sizes = jnp.ones((8, 4)), jnp.ones((2, 4, 4)), jnp.array([4, 4])
  options = {"alignment": 8, "implementation": Implementation.XLA}
  with pytest.raises(ValueError, match=r"\(8, 4\), \(2, 5, 4\)"):
    api.grouped_matmul(x, jnp.ones((2, 5, 4)), sizes, **options)
  with pytest.raises(ValueError, match="one dtype.*float32, bfloat16"):
    api.grouped_matmul(x, w.astype(jnp.bfloat16), sizes, **options)
  with pytest.raises(ValueError, match="int32 group_sizes.*float32"):
    api.grouped_matmul(x, w, sizes.astype(jnp.float32), **options)
  with pytest.raises(ValueError, match="floating point lhs; got int32"):
    api.grouped_matmul(x.astype(jnp.int32), w, sizes, **options)
  with pytest.raises(ValueError, match="hidden"):
    api.grouped_matmul_gelu_backward(x, w, jnp.ones((8, 5)), jnp.ones(8), sizes, **options)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_rows_are_taken_by_index_and_those_past_the_end_are_zeros(implementation):
  values = jnp.arange(12.0).reshape(4, 3).at[1].set(jnp.nan)
  index = jnp.array([3, 4, 0, 3, 9], jnp.int32)
  taken = api.take_rows(values, index, implementation=implementation)
  np.testing.assert_array_equal(taken, [[9, 10, 11], [0] * 3, [0, 1, 2], [9, 10, 11], [0] * 3])
  with pytest.raises(ValueError, match=r"int32 index \[r\]; got \(4, 3\) and float32 \(5,\)"):
    api.take_rows(values, index.astype(jnp.float32), implementation=implementation)


def test_choices_are_resolved_or_refused_by_name():
  shapes = ((2, 128, 256),)
  assert api.resolve(Implementation.AUTO, "cpu", jnp.float32, shapes) is Implementation.XLA
  with pytest.raises(NotImplementedError, match=r"pallas_tpu.*'cpu'.*auto, xla"):
    api.resolve(Implementation.PALLAS_TPU, "cpu", jnp.float32, shapes)
  assert api.resolve(Implementation.AUTO, "gpu", jnp.bfloat16, shapes) is Implementation.PALLAS_GPU
  for wide in ((2, 28800, 1024), (2, 1024, 28800)):  # Which the gather cannot take.
    assert api.resolve(Implementation.AUTO, "gpu", jnp.bfloat16, (wide,)) is Implementation.XLA
    with pytest.raises(NotImplementedError, match=r"take_rows.*28800.*use xla"):
      api.resolve(Implementation.PALLAS_GPU, "gpu", jnp.bfloat16, (wide,))
  x, w, sizes = jnp.ones((8, 4)), jnp.ones((2, 4, 4)), jnp.array([4, 4])
  with pytest.raises(NotImplementedError, match=r"'auto'.*use reference, xla"):
    api.grouped_matmul(x, w, sizes, alignment=8, implementation=Implementation.AUTO)
