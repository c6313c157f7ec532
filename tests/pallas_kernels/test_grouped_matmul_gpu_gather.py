"""The gather of rows for Hopper: interpreted or on a GPU, and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import api, gpu_pipeline
from pallas_kernels.implementation import Implementation
from tests.pallas_kernels import gpu_target
from tests.pallas_kernels.test_grouped_matmul_gpu import (
  JAX_VERSION,
  InterpretGPUParams,
  force_gpu_interpret_mode,
)

GPU = Implementation.PALLAS_GPU
# (rows taken, numbers of a row): fewer than warps, not a multiple of them, some blocks with a rest.
SIZES = [(1, 128), (3, 256), (42, 384), (131, 1024)]


def check(m, r, d, dtype):
  values = jax.random.normal(jax.random.key(0), (m, d), dtype).at[0].set(jnp.nan)
  index = np.random.default_rng(1).integers(0, m + 1, r).astype(np.int32)
  index[-1], index[r // 2] = m, 0
  taken = np.asarray(api.take_rows(values, jnp.asarray(index), implementation=GPU), np.float32)
  padded = np.concatenate([np.asarray(values, np.float32), np.zeros((1, d), np.float32)])
  np.testing.assert_array_equal(taken, padded[index])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("r", "d"), SIZES)
def test_rows_are_taken_and_those_past_the_end_are_zeros(r, d, dtype, monkeypatch):
  def in_turn(function):
    for warp in range(gpu_pipeline.WARPS):
      function(jnp.int32(warp))

  if JAX_VERSION < (0, 11):  # It cannot interpret single warps.
    monkeypatch.setattr(gpu_pipeline, "each_warp", in_turn)
  # As the hardware does: what a copy reads past the end is zero.
  zeros = {"out_of_bounds_reads": "uninitialized", "uninitialized_memory": "zero"}
  with force_gpu_interpret_mode(InterpretGPUParams(**zeros)):
    check(20, r, d, dtype)


@gpu_target.needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("r", "d"), [*SIZES, (20000, 1024), (4096, 2048), (999, 8192)])
def test_rows_are_taken_on_a_gpu(r, d, dtype):
  check(20, r, d, dtype)
  check(5000, r, d, dtype)


@pytest.mark.parametrize(
  ("d", "dtype"),
  [(100, jnp.bfloat16), (28800, jnp.bfloat16), (0, jnp.int8), (32896, jnp.int8)],
)
def test_rows_that_copies_cannot_move_are_refused(d, dtype):
  with pytest.raises(NotImplementedError, match=rf"got \({d},\) of {jnp.dtype(dtype)}: use xla"):
    api.take_rows(jnp.zeros((8, d), dtype), jnp.zeros(8, jnp.int32), implementation=GPU)


@pytest.mark.slow
@gpu_target.needs_cuda_plugin
@pytest.mark.parametrize("d", [128, 1024, 2048, 12288, 28672])
def test_the_gather_compiles_for_hopper(d):
  def run(values, index):
    return api.take_rows(values, index, implementation=GPU)

  values, index = jax.ShapeDtypeStruct((4096, d), jnp.bfloat16), jax.ShapeDtypeStruct((5003,), "i4")
  gpu_target.compile_kernel(run, values, index).assert_efficient()
