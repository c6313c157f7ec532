"""The Hopper kernels: numbers by Pallas' GPU interpreter or on a GPU, machine code by compiling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import get_races

from pallas_kernels import testing
from pallas_kernels.grouped_matmul import api, gpu, gpu_kernels, gpu_pipeline, reference
from tests.pallas_kernels import gpu_target

try:
  from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams, force_gpu_interpret_mode
except ImportError:  # JAX 0.10.
  from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,
    force_gpu_interpret_mode,
  )

# Results of outer: consumers that split tiles write float32 at once, bf16 during the next products.
OUTER = {"outer": jnp.float32, "outer_bf16": jnp.bfloat16}
PLAIN = ("matmul", "transposed", *OUTER)  # Whose consumers may split tiles.
OPERATIONS = (*PLAIN, "matmul_gelu", "matmul_gelu_backward")
# What JAX 0.10 cannot interpret: transposed operands of wgmma (it hangs), and layout_cast.
NOT_IN_0_10 = ("transposed", *OUTER, "matmul_gelu_backward")
JAX_VERSION = tuple(map(int, jax.__version__.split(".")[:2]))


@pytest.fixture
def few_blocks(monkeypatch):
  """Return a function that says how many blocks run the kernels; the tests interpret them all."""
  if JAX_VERSION < (0, 11):  # It cannot interpret single warps: the whole warpgroup copies.
    monkeypatch.setattr(gpu_pipeline, "each_warp", lambda function: function(jnp.int32(0)))
  return functools.partial(monkeypatch.setattr, gpu_pipeline, "MULTIPROCESSORS")


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
    **dict.fromkeys(OUTER, (a, b)),
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
  if operation in OUTER:
    return (gpu.outer(*arrays, starts, sizes, out_dtype=OUTER[operation], **options),)
  return getattr(gpu, operation)(*arrays, starts, sizes, **options)


def expected(operation, arrays, starts, sizes):
  """Return the float32 results of the oracle."""
  a, w = arrays[:2]
  if operation in OUTER:
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
  rows = slice(None) if operation in OUTER else used
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
def test_kernels_equal_the_oracle_and_ignore_unused_rows(case, operation, few_blocks):
  if JAX_VERSION < (0, 11) and operation in NOT_IN_0_10:
    pytest.skip("JAX 0.10 cannot interpret transposed operands and layout_cast: needs 0.11")
  few_blocks(2)
  tile_m = 128 if operation in OUTER else 64
  tiling = gpu.Tiling(tile_m=tile_m, tile_n=128, stages=2, panel=1, cluster=1)
  with force_gpu_interpret_mode(InterpretGPUParams()):
    check(operation, testing.GROUP_SIZES[case], 64, 128, 128, tiling)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whole_and_half_tiles_equal_the_oracle(operation, few_blocks):
  if JAX_VERSION < (0, 11) and operation in NOT_IN_0_10:
    pytest.skip("JAX 0.10 cannot interpret transposed operands and layout_cast: needs 0.11")
  few_blocks(2)
  tiling = gpu.Tiling(tile_m=128, tile_n=128, stages=3, panel=2, cluster=1)
  with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
    check(operation, [200, 0, 30, 64, 129], 128, 256, 256, tiling)
  assert not get_races().races_found


@pytest.mark.parametrize("sizes", [[200, 0, 100, 30, 129, 1], [200, 30], [100]])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("operation", PLAIN)
def test_consumers_that_split_tiles_equal_the_oracle(operation, cluster, sizes, few_blocks):
  if JAX_VERSION < (0, 11) and (operation in NOT_IN_0_10 or cluster > 1):
    pytest.skip("JAX 0.10 cannot interpret transposed operands and clusters: needs 0.11")
  few_blocks(2 * cluster)
  tiling = gpu.Tiling(tile_m=128, tile_n=256, stages=3, panel=1, cluster=cluster, split=True)
  with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
    check(operation, sizes, 128, 256, 256, tiling)
  # Of an odd number of row tiles, both blocks of a cluster compute the last, and write the same.
  if cluster == 1 or operation in OUTER or sum(-(-size // 128) for size in sizes) % 2 == 0:
    assert not get_races().races_found


def test_large_matrices_and_long_groups_split_tiles_where_they_can():
  assert gpu.default_tiling("matmul", 128, 2048, 5632).split
  assert gpu.default_tiling("transposed", 128, 5632, 2048).split
  assert not gpu.default_tiling("matmul", 128, 1024, 2048).split
  assert not gpu.default_tiling("matmul", 64, 2048, 5632).split
  assert not gpu.default_tiling("matmul_gelu", 128, 2048, 5632).split
  assert gpu.outer_tiling(65536, 1024, 2048, 32).split
  assert not gpu.outer_tiling(65536, 1024, 2048, 64).split
  assert not gpu.outer_tiling(65536, 1024, 1024, 16).split
  assert not gpu.outer_tiling(65536, 1024 + 128, 2048, 32).split
  assert not gpu.outer_tiling(65536, 1024, 2048 + 128, 32).split


def test_a_tiling_that_does_not_divide_the_result_is_refused():
  with pytest.raises(ValueError, match=r"does not divide .* 128 x 256"):
    check("outer", [200, 30], 128, 128, 256, gpu.split_tiling(256))
  with pytest.raises(ValueError, match=r"does not divide .* 256 x 384"):
    check("outer", [200, 30], 128, 256, 384, gpu.split_tiling(512))
  tiling = gpu.Tiling(tile_m=128, tile_n=128, stages=3, panel=3, cluster=1)
  with pytest.raises(ValueError, match=r"does not divide .* 512 wide"):
    check("matmul", [200, 30], 128, 128, 512, tiling)
  tiling = gpu.Tiling(tile_m=64, tile_n=64, stages=3, panel=1, cluster=1)
  with pytest.raises(ValueError, match=r"1 units to store"):
    check("outer_bf16", [200, 30], 64, 128, 128, tiling)


def deal(sizes, tiles, clusters):
  """Return which tiles each cluster computes, and what they cost; sizes are in slices of rows."""
  sizes = np.array(sizes)
  rows = jnp.asarray(64 * sizes, jnp.int32)
  starts = jnp.cumulative_sum(rows) - rows
  order, *places, extra = gpu_kernels.schedule(starts, rows, tiles, clusters)
  extra = gpu_kernels.round_extra(extra[-1], len(sizes), tiles, clusters)
  assert sizes[order].tolist() == sorted(sizes.tolist(), reverse=True)
  np.testing.assert_array_equal(places, [starts[order], rows[order]])
  dealt = []
  for cluster in range(clusters):
    here = gpu_pipeline.Here(clusters, jnp.int32(cluster), jnp.int32(0))
    deal = gpu_pipeline.Deal(here, len(sizes) * tiles, tiles, extra)
    dealt.append([int(deal.mine(jnp.int32(i))) for i in range(int(deal.num_mine()))])
  costs = np.maximum(sizes, 1)[order] + gpu_kernels.TILE_COST
  return dealt, [sum(int(costs[tile // tiles]) for tile in mine) for mine in dealt]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 64, 65, 71, 72, 120, 127, 128, 129, 1000])
def test_slices_hold_each_row_once_and_begin_where_copies_can(size):
  # On a GPU the copies are of tiles of 8 rows; Pallas' interpreter copies from any row.
  tile = gpu_kernels.OuterTile(*map(jnp.int32, (0, 0, size)))
  starts = [min(j * 64, int(tile.last)) for j in range(int(tile.steps))]
  assert all(start % 8 == 0 for start in starts)
  repeated = (len(starts) - 1) * 64 - starts[-1]
  rows = [row for start in starts[:-1] for row in range(start, start + 64)]
  rows += range(starts[-1] + repeated, size)
  assert rows == list(range(size))
  assert size <= starts[-1] + 64 <= max(size, 57) + 7


@pytest.mark.parametrize("sizes", [[5, 5, 5], [12, 0, 3, 3], [40, 20, 9, 1], [7], [0, 0]])
@pytest.mark.parametrize(("tiles", "clusters"), [(4, 3), (6, 3), (2, 3), (16, 7)])
def test_every_tile_is_dealt_once(sizes, tiles, clusters):
  dealt, work = deal(sizes, tiles, clusters)
  assert sorted(tile for mine in dealt for tile in mine) == list(range(len(sizes) * tiles))
  assert max(work) - min(work) <= max(*sizes, 1) + gpu_kernels.TILE_COST


def test_who_gets_one_long_tile_less_gets_more_of_the_short_ones():
  _, work = deal([1, 10, *[1] * 8], 4, 3)  # Four long tiles for three clusters.
  assert max(work) - min(work) <= 1 + gpu_kernels.TILE_COST


def test_no_cluster_always_gets_the_shorter_tile():
  _, work = deal(range(1, 33), 2, 4)
  assert max(work) - min(work) <= 3, "in turn, all in one direction: 16"


@gpu_target.needs_gpu
@pytest.mark.parametrize("operation", PLAIN)
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
  "sizes",
  [
    testing.GROUP_SIZES["ragged"],
    [300, 0, 1, 129, 64, 1000, 63],
    [300, 100, 0, 1, 129, 63, 190, 7] * 6,  # Several tiles for each block.
  ],
)
def test_split_tiles_and_clusters_equal_the_oracle_on_a_gpu(sizes, split, cluster, operation):
  tile_n, stages = (256, 4) if split else (128, 6)
  tiling = gpu.Tiling(
    tile_m=128, tile_n=tile_n, stages=stages, panel=2, cluster=cluster, split=split
  )
  k, n = (512, 1024) if operation in OUTER else (384, 1024)
  check(operation, sizes, 128, *((n, k) if operation == "transposed" else (k, n)), tiling)


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
    *((name, 64, split) for name in OUTER for split in (False, True)),
    *((name, rows, False) for rows in (64, 128) for name in OPERATIONS if name not in OUTER),
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
    **dict.fromkeys(OUTER, (rows(m, k), rows(m, n))),
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
  report.assert_efficient()


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
    if operation == "outer_bf16":  # Has the tilings of outer.
      continue
    if operation == "outer" and k % 128:
      continue
    for alignment in (64, 128):
      tilings = gpu.candidates(operation, jnp.bfloat16, (4096, k, n, 8), alignment)
      assert len({tiling.stages for tiling in tilings if not tiling.split}) == 3
      for tiling in tilings:
        assert n % (tiling.tile_n * tiling.panel) == 0
        assert operation != "outer" or k % (tiling.tile_m * tiling.cluster) == 0
        ring = tiling.stages * gpu_pipeline.STEP * 2 * (tiling.tile_m + tiling.tile_n)
        assert tiling.stages >= 2
        assert ring < gpu_pipeline.SHARED_MEMORY


def test_tiles_are_each_visited_once_and_neighbours_stay_near():
  tiling = gpu.Tiling(tile_m=128, tile_n=128, stages=4, panel=2, cluster=1)
  order = [
    tuple(map(int, gpu_pipeline.tile_of(jnp.int32(i), 3, tiling, jnp.int32(0)))) for i in range(12)
  ]
  assert sorted(order) == [(m, n) for m in range(3) for n in range(4)]
  assert order[:3] == [(0, 0), (0, 1), (1, 0)]
  assert order[5][0] == order[6][0] == 2, "the second panel begins with the first one's last rows"
