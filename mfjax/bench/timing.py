"""Time alternatives in turns, so that the noise of a machine falls on all of them alike."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

_MOST_CALLS = 10_000
_BLOCK_SECONDS = 0.05
# For 0.14 s an H200 keeps the clock of what ran before: up to 14 % too fast, 5 % too slow.
_SETTLE_SECONDS = 0.2
_SLOW = 3  # Times the fastest.


@dataclasses.dataclass(frozen=True)
class Call:
  """Something to time: `wait(function(*args))`.

  `function` may return before its result is there; `wait` returns when it is.
  """

  function: Callable[..., Any]
  args: tuple[Any, ...] = ()
  wait: Callable[[Any], Any] = jax.block_until_ready

  def seconds(self, count: int = 1) -> float:
    """Return the seconds of one call when `count` are made at once, then waited for."""
    start = time.perf_counter()
    for _ in range(count):
      result = self.function(*self.args)
    self.wait(result)
    return (time.perf_counter() - start) / count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """What one operation takes beside its alternatives; seconds are medians over turns."""

  operation: str
  shape: str
  flops: float
  seconds: float
  beside: dict[str, float]  # alternative -> seconds
  missing: dict[str, str]  # alternative -> why it was not measured
  moved_bytes: float = 0.0  # read and written, of an operation that only moves


def take_turns(calls: Mapping[str, Call], repeats: int) -> dict[str, float]:
  """Return the median seconds of each call; each is timed once per turn.

  Short calls are made many at once in a turn, waited for together: what is measured is the
  device at work, not the gap before a launch. Calls before those, which are not timed, let the
  device's clock settle: under its limit of power it depends on what ran last, and whoever came
  after a lighter alternative would seem faster. Much slower ones are lighter: they take turns of
  their own.
  """
  estimates = {name: _estimate(call) for name, call in calls.items()}
  is_slow = {name: seconds > _SLOW * min(estimates.values()) for name, seconds in estimates.items()}
  samples: dict[str, list[float]] = {name: [] for name in calls}
  for slow in (True, False):
    for _ in range(repeats):
      for name, call in calls.items():
        if is_slow[name] == slow:
          call.seconds(math.ceil(_count(_SETTLE_SECONDS, estimates[name])))
          samples[name].append(call.seconds(math.floor(_count(_BLOCK_SECONDS, estimates[name]))))
  return {name: statistics.median(times) for name, times in samples.items()}


def _estimate(call: Call) -> float:
  """Return about how many seconds a call takes among others."""
  call.seconds()  # Compiles.
  return call.seconds(math.floor(_count(_BLOCK_SECONDS, call.seconds())))


def _count(seconds: float, of_one: float) -> float:
  """Return how many calls, not rounded, take so long: one to as many as are made at once."""
  return max(1.0, seconds / max(of_one, seconds / _MOST_CALLS))


def compare(
  operation: str,
  shape: str,
  flops: float,
  call: Call,
  alternatives: Mapping[str, Call | str],
  repeats: int,
  moved_bytes: float = 0.0,
) -> Comparison:
  """Time a call and what does the same work otherwise.

  Args:
    operation, shape: how the result is named. flops: of one call.
    call: what is measured.
    alternatives: by name; a text instead of a call says why it cannot be measured. One that raises
      when it is first called is left out too, with the error's first line.
    repeats: turns. moved_bytes: read and written, of an operation that only moves.
  """
  missing = {name: other for name, other in alternatives.items() if isinstance(other, str)}
  calls = {"": call}
  for name, other in alternatives.items():
    if isinstance(other, Call):
      try:
        other.seconds()
      except (NotImplementedError, ValueError, RuntimeError) as error:  # XLA's is a RuntimeError.
        missing[name] = f"{type(error).__name__}: {str(error).partition('.')[0][:160]}"
      else:
        calls[name] = other
  seconds = take_turns(calls, repeats)
  return Comparison(
    operation=operation,
    shape=shape,
    flops=flops,
    seconds=seconds.pop(""),
    beside=seconds,
    missing=missing,
    moved_bytes=moved_bytes,
  )


def jit_local(function: Callable[..., Any]) -> Callable[..., Any]:
  """Jit a function as each device of the mesh in context computes it: kernels know no sharding."""
  return jax.jit(jax.shard_map(function, in_specs=P(), out_specs=P(), check_vma=False))


def matmul_ceiling(dtype: jax.typing.DTypeLike, size: int, repeats: int) -> float:
  """Return the FLOP/s of one square matrix product, the ceiling that results are held against."""
  keys = jax.random.split(jax.random.key(0))
  operands = tuple(jax.random.normal(key, (size, size), dtype) for key in keys)
  return 2 * size**3 / take_turns({"": Call(jax.jit(jnp.matmul), operands)}, repeats)[""]
