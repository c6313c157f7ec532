import dataclasses
import time

import jax
import pytest

from mfjax import sharding, train_step
from tests import tiny


def compile_step(num_layers: int) -> tuple[int, float]:
  """Return the length of a train step's optimized program, and the CPU seconds of making it."""
  model = dataclasses.replace(tiny.MODEL, num_layers=num_layers)
  config = tiny.run_config(model=model)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  config = train_step.resolve(config, mesh)
  state = train_step.abstract_state(config, mesh)
  batch = sharding.device_batch(mesh, tiny.batches(1)[0])
  before = time.process_time()
  compiled = train_step.make_train_step(config, mesh).lower(state, batch).compile()
  return len(compiled.as_text()), time.process_time() - before


@pytest.mark.slow
def test_program_size_and_compile_time_do_not_grow_with_depth():
  compile_step(2)  # Imports, and caches of tracing, are paid for here.
  size, seconds = compile_step(24)
  deep_size, deep_seconds = compile_step(48)
  print(f"program {size} -> {deep_size} characters, compile {seconds:.1f} -> {deep_seconds:.1f} s")
  assert abs(deep_size / size - 1) < 0.2
  assert deep_seconds / seconds < 1.5  # Twice the layers, were they not scanned, take twice.
