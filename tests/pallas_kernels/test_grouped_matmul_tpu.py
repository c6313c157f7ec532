import functools
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import testing
from pallas_kernels.grouped_matmul import api, reference, tpu
from tests.pallas_kernels import tpu_target

K, N = 12, 20
STRICT = pltpu.InterpretParams(
  detect_races=True,
  uninitialized_memory="nan",
  out_of_bounds_reads="raise",
  num_cores_or_threads=2,  # They share blocks of columns, as on a v4 or v5p.
)
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
OPERATIONS = ("matmul", "transposed", "outer", "matmul_gelu", "matmul_gelu_backward")


def make_operands(sizes, alignment, dtype, k=K, n=N):
  """Return rows [m, k] and [m, n], matrices, row weights (NaN where unused) and used rows."""
  a, used = testing.aligned_rows(sizes, k, alignment, seed=1)
  b, _ = testing.aligned_rows(sizes, n, alignment, seed=2)
  weights = np.random.default_rng(3).standard_normal((len(sizes), k, n))
  p = np.where(used, np.random.default_rng(4).uniform(size=len(used)), np.nan)
  cast = functools.partial(jnp.asarray, dtype=dtype)
  return cast(a), cast(b), cast(weights), jnp.asarray(p, jnp.float32), used


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def run(a, b, w, p, sizes, alignment, interpret, operations, tiling):
  """Return {operation: results} of the kernels."""
  groups = (api.group_starts(sizes, alignment), sizes)
  options = {"alignment": alignment, "interpret": interpret, "tiling": tiling}
  w_t = w.swapaxes(1, 2)
  calls = {
    "matmul": lambda: (tpu.matmul(a, w, *groups, transpose_rhs=False, **options),),
    "transposed": lambda: (tpu.matmul(a, w_t, *groups, transpose_rhs=True, **options),),
    "outer": lambda: (tpu.outer(a, b, *groups, **options),),
    "matmul_gelu": lambda: tpu.matmul_gelu(a, w, *groups, **options),
    "matmul_gelu_backward": lambda: tpu.matmul_gelu_backward(a, w_t, b, p, *groups, **options),
  }
  return {operation: calls[operation]() for operation in operations}


@functools.partial(jax.jit, static_argnums=5)
def oracle(a, b, w, p, sizes, alignment):
  """Return {operation: results} in float32."""
  groups = (api.group_starts(sizes, alignment), sizes)
  product = reference.matmul(a, w, *groups)
  gelu = functools.partial(jax.nn.gelu, approximate=True)
  activation, derivative = jax.vjp(gelu, b.astype(jnp.float32))
  return {
    "matmul": (product,),
    "transposed": (product,),
    "outer": (reference.outer(a, b, *groups),),
    "matmul_gelu": (product, gelu(product)),
    "matmul_gelu_backward": (
      *derivative(p[:, None] * product),
      activation * p[:, None],
      (activation * product).sum(1),
    ),
  }


def check(operands, sizes, alignment, interpret, tolerance, **options):
  """Compare the kernels with the oracle where rows are used; return the kernels' results."""
  *arrays, used = operands
  arrays.append(jnp.asarray(sizes, jnp.int32))
  operations, tiling = options.get("operations", OPERATIONS), options.get("tiling")
  actual = run(*arrays, alignment, interpret, operations, tiling)
  expected = oracle(*arrays, alignment)
  for operation in operations:
    for result, value in zip(actual[operation], expected[operation], strict=True):
      rows = ... if operation == "outer" else used
      x, y = (np.asarray(z.astype(jnp.float32))[rows] for z in (result, value))
      scale = max(1.0, np.abs(y).max(initial=0))
      np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=operation)
  return actual


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", testing.GROUP_SIZES)
def test_values_equal_the_oracle_and_ignore_unused_rows(case, dtype):
  sizes, alignment = testing.GROUP_SIZES[case], 8
  operands = make_operands(sizes, alignment, dtype)
  actual = check(operands, sizes, alignment, True, TOLERANCE[dtype])
  assert all(x.dtype == dtype for x in (*actual["matmul"], *actual["matmul_gelu"]))
  (outer,) = actual["outer"]
  assert outer.dtype == jnp.float32
  assert not np.asarray(outer)[np.array(sizes) == 0].any()


@pytest.mark.parametrize("n", [256, 320])
def test_blocks_of_columns_steps_within_and_tiles_below_the_alignment(n):
  sizes, alignment = [3, 40, 0, 17], 32
  operands = make_operands(sizes, alignment, "float32", 256, n)
  # The last of two blocks of 256 columns is partly outside: a sum over columns cannot do that.
  is_partial = n % 256 > 0
  operations = OPERATIONS[:-1] if is_partial else OPERATIONS
  tiling = tpu.Tiling(tile_m=16, tile_k=128, tile_n=256 if is_partial else 128, step_n=128)
  check(operands, sizes, alignment, True, 1e-4, operations=operations, tiling=tiling)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_races_no_uninitialised_or_outside_reads_and_no_work_on_unused_tiles(operation):
  sizes, alignment = testing.GROUP_SIZES["ragged"], 8
  *operands, used = make_operands(sizes, alignment, "float32", 128, 256)
  # Four more tiles than rows need, and two blocks of columns.
  a, b, p = (
    jnp.pad(x, [(0, 4 * alignment)] + [(0, 0)] * (x.ndim - 1), constant_values=1)
    for x in (operands[0], operands[1], operands[3])
  )
  used = np.pad(used, (0, 4 * alignment))
  tiling = tpu.Tiling(tile_m=8, tile_k=128, tile_n=128, step_n=128)
  operands = (a, b, operands[2], p, used)
  options = {"operations": (operation,), "tiling": tiling}
  actual = check(operands, sizes, alignment, STRICT, 1e-4, **options)
  assert not interpret_pallas_call.races.races_found
  tile_is_used = used.reshape(-1, alignment).any(1)
  for result in actual[operation] if operation != "outer" else ():
    tiles = np.asarray(result).reshape(len(tile_is_used), -1)
    assert np.isnan(tiles[~tile_is_used]).all()  # As allocated: never written.
    assert not np.isnan(tiles[tile_is_used]).all(1).any()


def test_row_alignment_follows_the_mean_group():
  expected = {1: 8, 2: 8, 31: 8, 32: 16, 64: 32, 256: 128, 1024: 128, 2048: 256, 4096: 512}
  assert {mean: tpu.row_alignment(8 * mean, 8) for mean in expected} == expected
  assert tpu.row_alignment(1 << 20, 1) == tpu.MAX_ROWS
  assert tpu.row_alignment(3, 8) == 8


def test_default_tilings_read_little_and_share_between_cores():
  shape = (65536, 1024, 2048, 32)
  found = tpu.candidates("matmul", "bfloat16", shape, 256)
  assert found[0] == tpu.Tiling(tile_m=256, tile_k=1024, tile_n=2048, step_n=2048)
  # Without a mesh in context the device may have two cores, which split the columns.
  assert tpu.default_tiling("matmul", "bfloat16", shape, 256).tile_n == 1024
  for operation in OPERATIONS:
    tilings = tpu.candidates(operation, "bfloat16", (64, 12, 20, 5), 8)
    assert tilings == (tpu.Tiling(tile_m=8, tile_k=12, tile_n=20, step_n=20),)


def test_what_the_kernels_cannot_do_is_named():
  sizes = jnp.array([8], jnp.int32)
  options = {"alignment": 8, "transpose_rhs": False, "interpret": True}
  half = jnp.ones((8, 8), jnp.float16)
  with pytest.raises(NotImplementedError, match="float16.*xla"):
    tpu.matmul(half, half[None], sizes * 0, sizes, **options)
  rows = jax.ShapeDtypeStruct((8, 1 << 20), jnp.bfloat16)
  weights = jax.ShapeDtypeStruct((1, 1 << 20, 128), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match=r"\(8, 1048576, 128, 1\).*xla"):
    jax.eval_shape(lambda x, w: tpu.matmul(x, w, sizes * 0, sizes, **options), rows, weights)


def test_no_rows_at_all():
  *operands, _ = make_operands([0, 0], 8, "float32")
  a, b, p = (x[:0] for x in (operands[0], operands[1], operands[3]))
  sizes = jnp.zeros(2, jnp.int32)
  results = run(a, b, operands[2], p, sizes, 8, True, OPERATIONS, None)
  assert results["matmul"][0].shape == (0, N)
  assert not results["outer"][0].any()


def program(operation, *dims, dtype="bfloat16"):
  """Return (function, shapes) of an operation of (m, k, n, g), as `tpu_target` compiles it."""
  m, k, n, g = map(int, dims)
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
  p, sizes = shape((m,), dtype=jnp.float32), shape((g,), dtype=jnp.int32)
  operands = (shape((m, k)), shape((m, n)), shape((g, k, n)), p, sizes)
  operations = OPERATIONS if operation == "all" else (operation,)

  def function(*operands):
    return run(*operands, tpu.row_alignment(m, g), False, operations, None)

  return function, operands


@tpu_target.needs_libtpu
@pytest.mark.parametrize("target", tpu_target.TOPOLOGIES)
def test_kernels_compile(target):
  function, shapes = program("all", 64, 256, 384, 4)
  compiled = tpu_target.compile_kernel(function, *shapes, target=target)
  assert all(f"grouped_{operation}" in compiled.as_text() for operation in OPERATIONS)


@tpu_target.needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
  "dims", [(64, 12, 20, 8), (1024, 1000, 300, 4), (65536, 1024, 2048, 32), (32768, 5632, 2048, 8)]
)
@pytest.mark.parametrize("target", tpu_target.TOPOLOGIES)
def test_kernels_of_odd_and_large_widths_fit(target, dims, dtype):
  function, shapes = program("all", *dims, dtype=dtype)
  tpu_target.compile_kernel(function, *shapes, target=target)


# GELU and its gradient take more vector operations than the matrix unit of a v6e leaves time for.
MXU_SHARE = {("v6e", "matmul_gelu"): 0.9, ("v6e", "matmul_gelu_backward"): 0.5}


def mxu_share(target, *arguments):
  """Return the matrix unit's share of the cycles from the first to the last product of a step."""
  with tempfile.TemporaryDirectory() as directory:
    flags = " ".join(tpu_target._DUMP_FLAGS).format(directory=directory)
    program_name = f"{__name__}:program"
    done = subprocess.run(
      [sys.executable, "-m", tpu_target.__name__, program_name, target, *arguments],
      cwd=pathlib.Path(__file__).parents[2],
      env={**os.environ, **tpu_target._ENVIRONMENT, "LIBTPU_INIT_ARGS": flags},
      capture_output=True,
      text=True,
      timeout=600,
      check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    pattern = "*-grouped_*-pre-delay_hlo-static-per-bundle-utilization.txt"
    (path,) = pathlib.Path(directory).glob(pattern)
    lines = path.read_text().splitlines()
  heading = lines.index("== CAPACTIY:")  # As the dump spells it.
  unit = [name.strip() for name in lines[heading + 1].split(",")].index("MXU")
  slots = int(lines[heading + 2].split()[unit])
  used = np.array([int(line.split()[unit]) for line in lines[heading + 4 :] if line.strip()])
  cycles = np.flatnonzero(used)
  return used.sum() / slots / (cycles[-1] - cycles[0] + 1)


@tpu_target.needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dims", [(65536, 1024, 2048, 32), (32768, 2048, 5632, 8)])
@pytest.mark.parametrize("target", ["v5p", "v6e"])
def test_bodies_keep_the_matrix_unit_busy(target, dims, operation):
  share = mxu_share(target, operation, *map(str, dims))
  assert share >= MXU_SHARE.get((target, operation), 0.95)
