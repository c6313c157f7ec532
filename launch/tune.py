"""Find the fastest tile sizes of the kernels for a config on this device, and keep them.

  mfjax tune --config=molm_350m_4b [--tokens=16384,32768] [--sequence_length=1024]

Every candidate is compared with the portable implementation, then timed in turns with the others.
Where one beats what the kernel does by itself, it becomes an entry of the table that the kernels
read, keyed by device, operation, number format and shape. The table is written after each
operation, so that an interrupted run keeps what it found; entries of other devices and shapes stay.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from launch import flags as shared
from mfjax.schema import unknown_name
from pallas_kernels import tuning

_TOKENS = flags.DEFINE_list(
  "tokens", ["16384", "32768"], "Tokens of a device and microbatch to tune for."
)
_SEQUENCE_LENGTH = flags.DEFINE_integer(
  "sequence_length", None, "Positions of a row. Default: the config's.", lower_bound=1
)
_ONLY = flags.DEFINE_list(
  "only", [], "Operations, such as grouped_matmul.outer or stick_breaking. Default: all."
)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Turns of which the median counts.", lower_bound=1)
_OUTPUT = flags.DEFINE_string(
  "output", str(tuning.PACKAGED), "Table to write; only the default one is read by the kernels."
)


def main(argv: Sequence[str]) -> None:
  """Tune as the flags say."""
  if len(argv) > 1:
    raise ValueError(f"unexpected argument {argv[1]!r}: all of tune's settings are flags")
  config = shared.run_config()
  names = [*dict.fromkeys(name.partition(".")[0] for name in tuning.OPERATIONS), *tuning.OPERATIONS]
  for name in _ONLY.value:
    if name not in names:
      raise ValueError(unknown_name(name, names, "operation"))
  counts = [_tokens(text) for text in _TOKENS.value]
  output = pathlib.Path(_OUTPUT.value)
  table = tuning.read(output)  # Before anything is measured.
  if not output.parent.is_dir():
    raise ValueError(f"--output={output}: there is no directory {output.parent}")

  import jax

  from mfjax import sharding, train_step
  from mfjax.bench import tune
  from mfjax.config import MeshConfig
  from pallas_kernels.implementation import Implementation

  device = jax.devices()[0]
  kernels = train_step.resolve_kernels(config.kernels, device.platform, config.model)
  chosen = {"grouped_matmul": kernels.grouped_matmul, "stick_breaking": kernels.stick_breaking}
  if set(chosen.values()) == {Implementation.XLA}:
    raise ValueError(f"nothing to tune on {device.device_kind}: its implementations have no tiles")
  dtype = jax.numpy.dtype(config.model.compute_dtype.value)
  length = _SEQUENCE_LENGTH.value or config.data.sequence_length
  problems = dict.fromkeys(
    problem for count in counts for problem in tune.problems(config.model, count, length)
  )
  print(f"{device.device_kind}, jax {jax.__version__}, table {output}")
  print(f"{'':36} {'shape':28} {'own ms':>9} {'best ms':>9}")
  with jax.set_mesh(sharding.make_mesh(MeshConfig(), [device])):
    for problem in problems:
      kind = problem.operation.partition(".")[0]
      if _ONLY.value and not {kind, problem.operation} & set(_ONLY.value):
        continue
      if chosen[kind] is Implementation.XLA:
        continue
      outcome = tune.tune(problem, chosen[kind], dtype, _REPEATS.value)
      _show(problem, outcome)
      if outcome is not None and outcome.fields is not None:
        table = tuning.updated(
          table, device.device_kind, problem.operation, dtype, outcome.shape, outcome.fields
        )
        tuning.write(output, table)


def _tokens(text: str) -> int:
  if not text.isdecimal() or int(text) == 0:
    raise ValueError(f"--tokens={','.join(_TOKENS.value)}: give positive numbers")
  return int(text)


def _show(problem: Any, outcome: Any) -> None:
  sizes = "x".join(map(str, outcome.shape if outcome else problem.shape))
  start = f"{problem.operation:36} {sizes:28}"
  if outcome is None:
    print(f"{start} has no candidates", flush=True)
    return
  found = "its own choice stays"
  if outcome.fields is not None:
    found = ", ".join(f"{name} {size}" for name, size in outcome.fields.items())
  times = f"{outcome.own_seconds * 1e3:9.3f} {outcome.best_seconds * 1e3:9.3f}"
  print(f"{start} {times}  {found} (of {outcome.num_candidates})", flush=True)
  for tiling, error in outcome.rejected.items():
    print(f"  rejected {tiling}: {error}")
