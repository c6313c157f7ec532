"""What the commands that convert and compare checkpoints share."""

import contextlib
import ctypes
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax

from mfjax.hf.progress import Progress

DIFFERENT = 1  # Exit code: converted or compared, and not the same.
_EVERY_SECONDS = 10
_STOPPING = (signal.SIGINT, signal.SIGTERM)
# glibc's malloc.h: options of mallopt, and what to set them to.
_KEEP_FREED_MEMORY = {-1: 2**31 - 1, -4: 0, -8: 1}  # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX.


def positional(argv: Sequence[str], *names: str) -> list[str]:
  """Return the positional arguments.

  Raises:
    ValueError: there are more or fewer than `names`.
  """
  given = list(argv[1:])
  if len(given) != len(names):
    said = " ".join(given) or "nothing"
    raise ValueError(f"give {' '.join(names)} and flags; given: {said}")
  return given


@contextlib.contextmanager
def converting() -> Iterator[None]:
  """Compute on the CPU, leave accelerators alone, and clean up on SIGTERM as on Ctrl-C.

  Only the first of these signals counts: another one would end the cleaning up.
  """
  jax.config.update("jax_platforms", "cpu")

  def stop(number: int, _: Any) -> NoReturn:
    for each in _STOPPING:
      signal.signal(each, signal.SIG_IGN)
    if number == signal.SIGINT:
      raise KeyboardInterrupt
    raise SystemExit(128 + number)

  _keep_freed_memory()
  before = {number: signal.signal(number, stop) for number in _STOPPING}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _keep_freed_memory() -> None:
  """Let malloc use freed blocks again instead of asking the kernel for new pages.

  Blocks of 32 MiB would each be mapped anew: reading 1 GB through TensorStore then takes 1.2 s of
  page faults on a virtual machine, and 0.2 s without them.
  """
  library = ctypes.CDLL(None)
  if hasattr(library, "mallopt"):  # Other C libraries than glibc have none.
    for option, value in _KEEP_FREED_MEMORY.items():
      library.mallopt(option, value)


def reporter() -> Callable[[Progress], None]:
  """Return a function that prints progress: a live line on a terminal, else one every 10 s."""
  live, began = sys.stderr.isatty(), time.perf_counter()
  shown: dict[str, float] = {}

  def report(progress: Progress) -> None:
    finished, now = progress.done >= progress.total, time.perf_counter()
    pause = 0.1 if live else _EVERY_SECONDS
    if not finished and now - shown.get(progress.stage, began) < pause:
      return
    shown[progress.stage] = now
    left = progress.seconds_left
    text = (
      f"{progress.stage}  {progress.done / 1e6:,.1f} of {progress.total / 1e6:,.1f} MB  "
      f"{progress.done / 1e6 / max(progress.seconds, 1e-9):,.0f} MB/s  "
    )
    text += f"{progress.seconds:.0f} s" if finished or left is None else f"{left:.0f} s left"
    print(
      f"\r\033[K{text}" if live else text,
      end="" if live and not finished else "\n",
      file=sys.stderr,
      flush=True,
    )

  return report
