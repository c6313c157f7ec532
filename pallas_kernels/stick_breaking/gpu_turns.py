"""Turns between two consumer warpgroups: one multiplies while the other breaks sticks.

Two warpgroups that wait for the same copies would otherwise issue their products at the same time,
share the tensor cores, finish together and then share the arithmetic units: neither kind of unit
works while the other does.
"""

import dataclasses
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Turns:
  """One consumer's side of the turns in a walk; consumer 0 has the first.

  Both walk the steps from `first` on to before `end`, and one of them may walk more on either side,
  where it is alone. A turn reaches from the products that end a step to those that begin the next.
  """

  barriers: Any  # Of each consumer; None: nobody waits.
  index: jax.Array  # Of this consumer.
  first: Any
  end: Any

  @staticmethod
  def scratch(consumers: int) -> tuple[Any, ...]:
    """Return the scratch type of `barriers`, if any."""
    return (plgpu.Barrier(num_arrivals=1, num_barriers=2),) if consumers == 2 else ()

  @staticmethod
  def prepare(barriers: Any, index: jax.Array) -> None:
    """Hand the first turn to consumer 0; for each consumer, once, before any walk."""
    if barriers is not None:
      pl.when(index == 1)(lambda: plgpu.barrier_arrive(barriers.at[0]))

  def before(self, start: Any) -> None:
    """Take the turn before a walk that starts at a step."""
    self._take(start == self.first)

  def multiplied(self, step: Any) -> None:
    """Give the turn when the products that begin a step are complete."""
    self._give((self.first <= step) & (step <= self.end))

  def multiply(self, step: Any) -> None:
    """Take the turn before the products that end a step."""
    self._take((self.first <= step + 1) & (step < self.end))

  def after(self, stop: Any) -> None:
    """Give the turn after a walk that stopped before a step, its products complete."""
    self._give(stop == self.end)

  def _take(self, condition: Any) -> None:
    if self.barriers is not None:
      pl.when(condition)(lambda: plgpu.barrier_wait(self.barriers.at[self.index]))

  def _give(self, condition: Any) -> None:
    if self.barriers is not None:
      pl.when(condition)(lambda: plgpu.barrier_arrive(self.barriers.at[1 - self.index]))
