"""Whether two checkpoints hold the same model: tensor by tensor, and in their logits.

Tensors are equal if they are the same bits once the wider of the two is rounded to the narrower.
Logits are compared in float32, both models rounded alike, so that what is left is how the two
programs compute; what the rounding itself does to the logits is reported beside it.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from mfjax.hf import parity, published_config
from mfjax.hf.parity import LogitParity
from mfjax.hf.progress import Report, Stage, silent
from mfjax.hf.source import Confirm, Source, cast, narrower, row_blocks, use_source
from mfjax.parallel import run_all

NUM_THREADS = 4
_NOT_COMPARED = {"sample_topk", "embd_pdrop", "resid_pdrop", "moe_pdrop", "initializer_range"}


class DifferenceError(Exception):
  """What was written is not the model that was read; nothing was left behind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """What a comparison found; `differences` has one phrase per tensor or fact that differs."""

  tensors: int
  parameters: int
  dtypes: tuple[str, str]
  differences: tuple[str, ...]
  logits: LogitParity | None = None
  logits_skipped: str = ""
  rounding: LogitParity | None = None

  @property
  def is_equal(self) -> bool:
    return not self.differences and (self.logits is None or self.logits.is_within_tolerance)

  def require_equal(self) -> "Verdict":
    """Return this verdict, or raise DifferenceError with all that it says."""
    if not self.is_equal:
      raise DifferenceError("; ".join(" ".join(line.split()) for line in self.lines()))
    return self

  def to_dict(self) -> dict[str, Any]:
    """Return the content of parity.json."""
    logits = None if self.logits is None else self.logits.to_dict()
    rounding = None if self.rounding is None else self.rounding.to_dict()
    return {
      "equal": self.is_equal,
      "tensors": {
        "compared": self.tensors,
        "parameters": self.parameters,
        "dtypes": list(self.dtypes),
        "differences": list(self.differences),
      },
      "logits": logits,
      "logits_skipped": self.logits_skipped or None,
      "rounding": rounding,
    }

  def lines(self) -> list[str]:
    """Return the verdict in words."""
    what = f"{self.tensors:,} tensors, {self.parameters:,} parameters ({' and '.join(self.dtypes)})"
    differ = len(self.differences)
    lines = [f"tensors   {what}: " + (f"{differ} differences" if differ else "equal, bit for bit")]
    lines += [f"          {difference}" for difference in self.differences]
    if self.logits is not None:
      lines.append(f"logits    {self.logits.describe()}")
    if self.rounding is not None:
      lines.append(f"rounding  {self.rounding.describe(verdict=False)}")
    if self.logits_skipped:
      lines.append(f"logits    not compared: {self.logits_skipped}")
    return lines


def verify(
  a: epath.PathLike,
  b: epath.PathLike,
  *,
  step_a: int | None = None,
  step_b: int | None = None,
  num_tokens: int = 256,
  report: Report = silent,
) -> Verdict:
  """Compare all tensors, then the logits of `num_tokens` random tokens (0: tensors alone).

  Args:
    a, b: workdirs or directories of PyTorch tensors.
    step_a, step_b: of a workdir; by default its newest good step.

  Raises:
    ValueError: one of them cannot be read; names all that is wrong with it.
  """

  def compare(
    left: Source, confirm_left: Confirm, right: Source, confirm_right: Confirm
  ) -> Verdict:
    verdict = compare_tensors(left, right, report)
    confirm_left()
    confirm_right()
    return with_logits(verdict, left, right, report, num_tokens)

  return use_source(
    a,
    step_a,
    lambda *left: use_source(b, step_b, lambda *right: compare(*left, *right)),
  )


def with_logits(verdict: Verdict, a: Source, b: Source, report: Report, num_tokens: int) -> Verdict:
  """Return the verdict on tensors with that on logits, or why there is none."""
  if num_tokens == 0:
    return dataclasses.replace(verdict, logits_skipped="it was not asked for")
  if _shapes(a) != _shapes(b):
    return dataclasses.replace(verdict, logits_skipped="the models have different tensors")
  if reason := parity.reason_to_skip(a, b):
    return dataclasses.replace(verdict, logits_skipped=reason)
  logits, rounding = parity.compare_logits(a, b, num_tokens, report)
  return dataclasses.replace(verdict, logits=logits, rounding=rounding)


def compare_tensors(a: Source, b: Source, report: Report = silent) -> Verdict:
  """Compare the configurations and every tensor of two sources."""
  comparison = Comparison(a, b)
  stage = Stage("comparing", comparison.num_bytes, report)
  comparison.run(comparison.names, stage, NUM_THREADS)
  return comparison.verdict()


class Comparison:
  """Compares two sources: configurations and shapes at once, values tensor by tensor."""

  def __init__(self, a: Source, b: Source) -> None:
    self._a, self._b, self._findings = a, b, _Findings()
    self._differences = _config_differences(a, b)
    for one, other in ((a, b), (b, a)):
      missing = [name for name in one.tensors if name not in other.tensors]
      self._differences += [f"{name} is missing in {other.label}" for name in missing]
    self.names = []  # Of the tensors whose values can be compared.
    for name in [name for name in a.tensors if name in b.tensors]:
      shapes = [list(source.tensors[name].shape) for source in (a, b)]
      if shapes[0] == shapes[1]:
        self.names.append(name)
      else:
        self._differences.append(f"{name} is {shapes[0]} in {a.label} and {shapes[1]} in {b.label}")

  @property
  def num_bytes(self) -> int:
    """Return what all values take in the narrower dtype of each tensor: a stage's total."""
    a, b = self._a, self._b
    itemsizes = {name: narrower(a.dtype(name), b.dtype(name)).itemsize for name in self.names}
    return sum(a.tensors[name].size * itemsize for name, itemsize in itemsizes.items())

  def run(self, names: Iterable[str], stage: Stage, num_threads: int) -> None:
    """Compare the values of some of the tensors."""
    run_all(self._tasks(names, stage), num_threads)

  def run_here(self, name: str, stage: Stage) -> None:
    """Compare the values of one tensor on this thread; several threads may do so."""
    for task in self._tasks([name], stage):
      task()

  def _tasks(self, names: Iterable[str], stage: Stage) -> Iterator[Callable[[], None]]:
    a, b = self._a, self._b
    for name in names:
      rows = max(source.rows_per_block(name) for source in (a, b))
      for block in row_blocks(a.tensors[name], rows):
        yield functools.partial(_compare_block, a, b, name, *block, stage, self._findings)

  def verdict(self) -> Verdict:
    """Return what was found so far."""
    found = [self._findings.phrase(name) for name in self.names if name in self._findings.counts]
    return Verdict(
      tensors=len(self.names),
      parameters=sum(self._a.tensors[name].size for name in self.names),
      dtypes=(_dtypes(self._a), _dtypes(self._b)),
      differences=(*self._differences, *found),
    )


class _Findings:
  """Counts the values that differ by tensor, from any thread."""

  def __init__(self) -> None:
    self.counts: dict[str, tuple[int, float]] = {}
    self._lock = threading.Lock()

  def add(self, name: str, count: int, largest: float) -> None:
    with self._lock:
      before = self.counts.get(name, (0, 0.0))
      self.counts[name] = (before[0] + count, max(before[1], largest))

  def phrase(self, name: str) -> str:
    count, largest = self.counts[name]
    return f"{name} differs in {count:,} values, by up to {largest:.3g}"


def _compare_block(
  a: Source, b: Source, name: str, start: int, stop: int, stage: Stage, findings: _Findings
) -> None:
  left, right = a.read(name, start, stop), b.read(name, start, stop)
  dtype = narrower(left.dtype, right.dtype)
  left, right = cast(left, dtype, name), cast(right, dtype, name)
  bits = f"u{dtype.itemsize}"
  unequal = np.ascontiguousarray(left).view(bits) != np.ascontiguousarray(right).view(bits)
  if unequal.any():
    difference = left[unequal].astype(np.float64) - right[unequal].astype(np.float64)
    findings.add(name, int(unequal.sum()), float(np.abs(difference).max()))
  stage.add(left.nbytes)


def _shapes(source: Source) -> dict[str, tuple[int, ...]]:
  return {name: tensor.shape for name, tensor in source.tensors.items()}


def _dtypes(source: Source) -> str:
  return "/".join(sorted({source.dtype(name).name for name in source.tensors}))


def _config_differences(a: Source, b: Source) -> list[str]:
  differences = []
  for theirs, ours in published_config.FIELDS.items():
    mine, other = getattr(a.config, ours), getattr(b.config, ours)
    if mine != other and theirs not in _NOT_COMPARED:
      differences.append(f"{theirs} is {mine} in {a.label} and {other} in {b.label}")
  return differences
