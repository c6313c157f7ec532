import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import get_races
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.stick_breaking.gpu_turns import Turns

try:
  from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams, force_gpu_interpret_mode
except ImportError:  # JAX 0.10.
  from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,
    force_gpu_interpret_mode,
  )

SIZE = 32


def walk(out, count, log, turn, together, *, starts, stops, walks):
  """Log [consumer, step] of every product, in the order in which they are issued."""
  index = lax.axis_index("warpgroup")
  first, end = max(starts), min(stops)
  start, stop = (jnp.where(index == 0, *pair) for pair in (starts, stops))

  def note(step):
    log[count[0]] = 100 * index + step
    count[0] = count[0] + 1

  def body(step, _):
    turns.multiplied(step)
    turns.multiply(step)

    @pl.when((first <= step) & (step < end))
    def _():
      note(step)

  @pl.when(index == 0)
  def _():
    count[0] = 0

  plgpu.barrier_arrive(together)
  plgpu.barrier_wait(together)
  Turns.prepare(turn, index)
  for _ in range(walks):
    turns = Turns(turn, index, first, end)
    turns.before(start)
    lax.fori_loop(start, stop, body, None)
    turns.after(stop)
  plgpu.barrier_arrive(together)
  plgpu.barrier_wait(together)

  @pl.when(index == 0)
  def _():
    plgpu.barrier_wait(turn.at[0])  # The turn is back; the interpreter wants that seen.
    for i in range(SIZE):
      out[i] = log[i]


@pytest.mark.parametrize("walks", [1, 2])
@pytest.mark.parametrize(
  ("starts", "stops"),
  [((0, 0), (3, 3)), ((1, 0), (4, 4)), ((0, 2), (4, 4)), ((0, 0), (2, 5)), ((0, 4), (4, 4)),
   ((0, 0), (0, 3)), ((0, 0), (0, 0))],
)  # fmt: skip
def test_consumers_alternate_where_both_walk_and_none_waits_for_ever(starts, stops, walks):
  kernel = plgpu.kernel(
    functools.partial(walk, starts=starts, stops=stops, walks=walks),
    out_type=jax.ShapeDtypeStruct((SIZE,), jnp.int32),
    scratch_types=(
      plgpu.SMEM((1,), jnp.int32),
      plgpu.SMEM((SIZE,), jnp.int32),
      *Turns.scratch(2),
      plgpu.Barrier(num_arrivals=2),
    ),
    num_threads=2,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
  )
  with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):
    log = np.asarray(kernel())
  assert not get_races().races_found
  steps = range(max(starts), min(stops))
  both = [100 * index + step for step in steps for index in range(2)]
  np.testing.assert_array_equal(log[: walks * len(both)], both * walks)
