"""The Hopper kernels: numbers by Pallas' GPU interpreter or on a GPU, machine code by compiling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import testing
from pallas_kernels.grouped_matmul import api, gpu, gpu_pipeline, reference
from tests.pallas_kernels import gpu_target

try:
  from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams, force_gpu_interpret_mode
except ImportError:  # JAX 0.10.
  from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,
    force_gpu_interpret_mode,
  )

OPERATIONS = ("matmul", "transposed", "outer", "matmul_gelu", "matmul_gelu_backward")
# What JAX 0.10 cannot interpret: transposed operands of wgmma (it hangs), and layout_cast.
NOT_IN_0_10 = ("transposed", "outer", "matmul_gelu_backward")
JAX_VERSION = tuple(map(int, jax.__version__.split(".")[:2]))


def inputs(operation, sizes, alignment, k, n):
  """Return arguments with NaN in unused rows, and the mask of used ones."""
  a, used = testing.aligned_rows(sizes, k, alignment, seed=1)
  b, _ = testing.aligned_rows(sizes, n, alignment, seed=2)
  row_weights, _ = testing.aligned_rows(sizes, 1, alignment, seed=3)
  a, b = jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)
  w = np.random.default_rng(4).standard_normal((len(sizes), k, n)) / np.sqrt(k)
  w = jnp.asarray(w, jnp.bfloat16)
  arrays = {
    "matmul": (a, w),
    "transposed": (b, w),
    "outer": (a, b),
    "matmul_gelu": (a, w),
    "matmul_gelu_backward": (a, w.swapaxes(1, 2), b, jnp.asarray(row_weights[:, 0])),
  }
  return arrays[operation], used


def call(operation, arrays, starts, sizes, alignment, tiling=None):
  """Return the operation's results as a tuple."""
  options = {"alignment": alignment, "tiling": tiling}
  if operation in ("matmul", "transposed"):
    transpose = operation == "transposed"
    return (gpu.matmul(*arrays, starts, sizes, transpose_rhs=transpose, **options),)
  results = getattr(gpu, operation)(*arrays, starts, sizes, **options)
  return (results,) if operation == "outer" else results


def expected(operation, arrays, starts, sizes):
  """Return the float32 results of the oracle."""
  a, w = arrays[:2]
  if operation == "outer":
    return (reference.outer(a, w, starts, sizes),)
  w = w.swapaxes(1, 2) if operation in ("transposed", "matmul_gelu_backward") else w
  product = reference.matmul(a, w, starts, sizes)
  gelu = functools.partial(jax.nn.gelu, approximate=True)
  if operation == "matmul_gelu":
    return product, gelu(product)
  if operation == "matmul_gelu_backward":
    hidden, row_weights = arrays[2].astype(jnp.float32), arrays[3][:, None]
    activation, backward = jax.vjp(gelu, hidden)
    [derivative] = backward(jnp.ones_like(hidden))
    d_hidden = derivative * row_weights * product
    return d_hidden, activation * row_weights, jnp.sum(activation * product, axis=1)
  return (product,)


def check(operation, sizes, alignment, k, n, tiling=None):
  """Compare with the oracle in the used rows."""
  arrays, used = inputs(operation, sizes, alignment, k, n)
  group_sizes = jnp.asarray(sizes, jnp.int32)
  starts = api.group_starts(group_sizes, alignment)
  results = jax.jit(functools.partial(call, operation, alignment=alignment, tiling=tiling))(
    arrays, starts, group_sizes
  )
  rows = slice(None) if operation == "outer" else used
  for actual, oracle in zip(results, expected(operation, arrays, starts, group_sizes), strict=True):
    # Products are of bf16 numbers in float32, then rounded once unless float32 is asked for: that
    # is of sums of n terms of unit size, which are of size sqrt(n), as is their rounding.
    is_sum = actual.dtype == jnp.float32
    tolerance = 1e-5 if is_sum else 2**-8
    size = max(n, *sizes) ** 0.5 if is_sum else 0.5
    actual, oracle = np.asarray(actual.astype(jnp.float32))[rows], np.asarray(oracle)[rows]
    np.testing.assert_allclose(actual, oracle, rtol=tolerance, atol=tolerance * size / 2)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
  "case",
  ["ragged", *(pytest.param(case, marks=pytest.mark.slow) for case in testing.GROUP_SIZES)],
)
def test_kernels_equal_the_oracle_and_ignore_unused_rows(case, operation, monkeypatch):
  if JAX_VERSION < (0, 11) and operation in NOT_IN_0_10:
    pytest.skip("JAX 0.10 cannot interpret transposed operands and layout_cast: needs 0.11")
  monkeypatch.setattr(gpu_pipeline, "MULTIPROCESSORS", 2)
  tile_m = 128 if operation == "outer" else 64
  tiling = gpu.Tiling(tile_m=tile_m, tile_n=128, stages=2, panel=1, cluster=1)
  with force_gpu_interpret_mode(InterpretGPUParams()):
    check(operation, testing.GROUP_SIZES[case], 64, 128, 128, tiling)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whole_and_half_tiles_equal_the_oracle(operation, monkeypatch):
  if JAX_VERSION < (0, 11) and operation in NOT_IN_0_10:
    pytest.skip("JAX 0.10 cannot interpret transposed operands and layout_cast: needs 0.11")
  monkeypatch.setattr(gpu_pipeline, "MULTIPROCESSORS", 2)
  tiling = gpu.Tiling(tile_m=128, tile_n=128, stages=3, panel=2, cluster=1)
  with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
    check(operation, [200, 0, 30, 64, 129], 128, 256, 256, tiling)


@pytest.mark.parametrize("operation", ["matmul", "transposed"])
def test_consumers_that_split_tiles_equal_the_oracle(operation, monkeypatch):
  if JAX_VERSION < (0, 11) and operation in NOT_IN_0_10:
    pytest.skip("JAX 0.10 cannot interpret transposed operands and layout_cast: needs 0.11")
  monkeypatch.setattr(gpu_pipeline, "MULTIPROCESSORS", 2)
  tiling = gpu.Tiling(tile_m=128, tile_n=256, stages=3, panel=1, cluster=1, split=True)
  with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
    check(operation, [200, 0, 30, 129], 128, 128, 256, tiling)


def test_large_matrices_split_tiles_where_they_can():
  assert gpu.default_tiling("matmul", 128, 2048, 5632).split
  assert gpu.default_tiling("transposed", 128, 5632, 2048).split
  assert not gpu.default_tiling("matmul", 128, 1024, 2048).split
  assert not gpu.default_tiling("matmul", 64, 2048, 5632).split
  assert not gpu.default_tiling("matmul_gelu", 128, 2048, 5632).split
  for tiling in gpu.candidates("matmul", jnp.bfloat16, (4096, 2048, 5632, 8), 128):
    tiles = 5632 // tiling.tile_n
    assert tiles % tiling.panel == 0
    assert tiling.panel % tiling.cluster == 0
  with pytest.raises(ValueError, match="do not split"):
    check("outer", [200, 30], 128, 256, 256, gpu.split_tiling(256))


@gpu_target.needs_gpu
@pytest.mark.parametrize("operation", ["matmul", "transposed"])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("sizes", [*testing.GROUP_SIZES.values(), [300, 0, 1, 129, 64, 1000, 63]])
def test_consumers_that_split_tiles_equal_the_oracle_on_a_gpu(sizes, cluster, operation):
  check(operation, sizes, 128, 384, 1024, gpu.split_tiling(1024, cluster))


@gpu_target.needs_gpu
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("alignment", [64, 128])
@pytest.mark.parametrize("sizes", [*testing.GROUP_SIZES.values(), [300, 0, 1, 129, 64, 1000, 63]])
def test_kernels_equal_the_oracle_on_a_gpu(sizes, alignment, operation):
  check(operation, sizes, alignment, 256, 512)
  check(operation, sizes, alignment, 384, 384)


@pytest.mark.slow
@gpu_target.needs_cuda_plugin
@pytest.mark.parametrize(
  ("operation", "alignment", "split"),
  [
    ("outer", 64, False),
    *((name, rows, False) for rows in (64, 128) for name in OPERATIONS if name != "outer"),
    ("matmul", 128, True),
    ("transposed", 128, True),
  ],
)
def test_kernels_compile_for_hopper_without_spills_or_serialized_wgmma(operation, alignment, split):
  m, k, n, g = 4096, 1024, 2048, 8

  def rows(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  arrays = {
    "matmul": (rows(m, k), rows(g, k, n)),
    "transposed": (rows(m, n), rows(g, k, n)),
    "outer": (rows(m, k), rows(m, n)),
    "matmul_gelu": (rows(m, k), rows(g, k, n)),
    "matmul_gelu_backward": (
      *(rows(m, k), rows(g, n, k), rows(m, n)),
      jax.ShapeDtypeStruct((m,), jnp.float32),
    ),
  }

  def run(*args):
    *arrays, starts, group_sizes = args
    width = k if operation == "transposed" else n
    tiling = gpu.split_tiling(width) if split else None
    return call(operation, arrays, starts, group_sizes, alignment, tiling)

  groups = jax.ShapeDtypeStruct((g,), jnp.int32)
  report = gpu_target.compile_kernel(run, *arrays[operation], groups, groups)
  # JAX 0.10 spills ten loop invariants of the longest epilogue; GPUs run a newer one.
  report.assert_efficient(spilled_bytes=40 if JAX_VERSION < (0, 11) else 0)


def test_what_the_kernels_cannot_do_names_who_can():
  sizes = jnp.asarray([64], jnp.int32)
  rows, weights = jnp.ones((64, 128), jnp.bfloat16), jnp.ones((1, 128, 128), jnp.bfloat16)
  options = {"alignment": 64, "transpose_rhs": False}
  with pytest.raises(NotImplementedError, match=r"float32.*use xla"):
    gpu.matmul(rows.astype(jnp.float32), weights, sizes * 0, sizes, **options)
  with pytest.raises(NotImplementedError, match=r"n=100: use xla"):
    gpu.matmul(rows, weights[:, :, :100], sizes * 0, sizes, **options)
  with pytest.raises(NotImplementedError, match=r"k=100, n=128: use xla"):
    gpu.outer(rows[:, :100], rows, sizes * 0, sizes, alignment=64)
  with pytest.raises(NotImplementedError, match=r"got 8: use xla"):
    gpu.matmul(rows, weights, sizes * 0, sizes, alignment=8, transpose_rhs=False)


@pytest.mark.parametrize("k", [64, 1024, 5632])
@pytest.mark.parametrize("n", [128, 384, 2048, 5632])
def test_every_candidate_covers_the_result_and_fits_shared_memory(k, n):
  for operation in OPERATIONS:
    if operation == "outer" and k % 128:
      continue
    for alignment in (64, 128):
      tilings = gpu.candidates(operation, jnp.bfloat16, (4096, k, n, 8), alignment)
      assert len({tiling.stages for tiling in tilings if not tiling.split}) == 3
      for tiling in tilings:
        tiles_n = n // tiling.tile_n
        assert tiles_n % tiling.panel == 0 == tiling.panel % tiling.cluster
        ring = tiling.stages * gpu_pipeline.STEP * 2 * (tiling.tile_m + tiling.tile_n)
        assert tiling.stages >= 2
        assert ring < gpu_pipeline.SHARED_MEMORY


def test_tiles_are_each_visited_once_and_neighbours_stay_near():
  tiling = gpu.Tiling(tile_m=128, tile_n=128, stages=4, panel=2, cluster=1)
  order = [tuple(map(int, gpu_pipeline.tile_of(jnp.int32(i), 3, tiling))) for i in range(12)]
  assert sorted(order) == [(m, n) for m in range(3) for n in range(4)]
  assert order[:3] == [(0, 0), (0, 1), (1, 0)]
  assert order[5][0] == order[6][0] == 2, "the second panel begins with the first one's last rows"
