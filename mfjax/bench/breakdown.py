"""Where a compiled step spends its time, part by part, from a profiler's trace of real steps.

Every operation that the device ran is in the trace by its name in the compiled program. The
program's text knows the Python calls that made each operation; the innermost one that a rule of
PARTS names decides its part. So what is measured is the step itself, nothing is run in its place.
A fused operation counts where its last step comes from. What the step took beyond the sum of its
operations is `waiting`: gaps between operations, or less than nothing where some ran side by side.
On a CPU they do, and small operations take longer under the profiler: its parts are a rough guide.
"""

import collections
import dataclasses
import functools
import linecache
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.stages import Compiled, Lowered

# (file, function, called expression) -> part; tried from an operation's innermost call outwards.
PARTS = (
  (r"layers\.py \S*(embed|_lookup)", "embedding"),
  (r"layers\.py LayerNorm", "norms"),
  (r"mfjax/router\.py", "router"),
  (r"mfjax/dispatch\.py|\bmake_plan$", "routing plan"),
  (r"\bproject_(in|out)$", "attention projections"),
  (r"stick_breaking/|\bstick_breaking_attention$", "attention core"),
  (r"attention\.py", "attention projections"),
  (r"\bfeed_forward$|FeedForwardExperts", "feed-forward experts"),
  (r"losses\.py \S*aux", "router losses"),
  (r"losses\.py", "loss head"),
  (r"mfjax/model\.py", "residual and layer loop"),
  (r"/optax/|optimizer\.py|train_step\.py make_train_step", "optimizer"),
  (r"train_step\.py", "gradient accumulation"),
)
OTHER, WAITING = "zeros and copies", "waiting"  # The compiler adds operations without a source.

# These hold other operations, which are in the trace themselves.
_CONTAINERS = {"while", "call", "conditional", "async-start", "async-done"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """Seconds per step of one part; `recomputed` is the forward pass again, under remat.

  `kernels` of them are spent in custom calls: our kernels and the libraries', not XLA's own loops.
  """

  name: str
  forward: float = 0.0
  recomputed: float = 0.0
  backward: float = 0.0
  kernels: float = 0.0

  @property
  def seconds(self) -> float:
    """All of it."""
    return self.forward + self.recomputed + self.backward


def traceable(compiled: Compiled, lowered: Lowered, platform: str) -> Compiled:
  """Return a program whose trace names each operation: on a GPU, not joined into CUDA graphs."""
  if platform != "gpu":
    return compiled
  return lowered.compile(compiler_options={"xla_gpu_graph_min_graph_size": "1000000"})


def measure(compiled: Compiled, run: Callable[[], None], steps: int, seconds: float) -> list[Part]:
  """Trace steps and return their parts, largest first; they add up to `seconds`.

  Args:
    compiled: the step, from `traceable`, already called once.
    run: calls it `steps` times and waits for the last.
    steps: number of them. seconds: what a step takes without the profiler.
  """
  text = compiled.as_text()
  assert text is not None
  origins = read_origins(text)
  totals: dict[str, dict[str, float]] = collections.defaultdict(
    lambda: dict.fromkeys(("forward", "recomputed", "backward", "kernels"), 0.0)
  )
  module = re.match(r"HloModule ([\w.-]+)", text)
  with tempfile.TemporaryDirectory() as directory:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(directory, profiler_options=options):
      run()
    for name, duration in _operations(directory, module[1] if module else ""):
      origin = origins.get(name, Origin("", OTHER, "forward"))
      if origin.opcode not in _CONTAINERS:
        totals[origin.part][origin.phase] += duration / steps
      if origin.opcode == "custom-call":
        totals[origin.part]["kernels"] += duration / steps
  parts = [Part(name=name, **sums) for name, sums in totals.items()]
  rest = seconds - sum(part.seconds for part in parts)
  parts.sort(key=lambda part: -part.seconds)
  return [*parts, Part(name=WAITING, forward=rest)]


def _operations(directory: str, module: str) -> Iterator[tuple[str, float]]:
  """Yield (name, seconds) of every operation of a module in a trace."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # jaxlib's own, on Python 3.12.
    for path in pathlib.Path(directory).rglob("*.xplane.pb"):
      for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
          for event in line.events:
            stats: dict[str, Any] = dict(event.stats)
            if "hlo_op" in stats and stats.get("hlo_module", module) == module:
              yield str(stats["hlo_op"]), event.duration_ns * 1e-9


# The program's text -------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.-]+) = (.*)$", re.MULTILINE)
_SOURCE = re.compile(r'op_name="([^"]*)"[^}]*? stack_frame_id=(\d+)')


@dataclasses.dataclass(frozen=True)
class Origin:
  """What an operation is and where it comes from."""

  opcode: str
  part: str
  phase: str


def read_origins(text: str) -> dict[str, Origin]:
  """Return {operation: its origin} of a compiled program's text."""
  calls = _read_calls(text)

  @functools.cache
  def part_of(frame: int) -> str:
    while frame in calls:
      call, frame = calls[frame]
      for pattern, part in PARTS:
        if re.search(pattern, call):
          return part
    return OTHER

  bodies = dict(re.findall(r"^%?([\w.-]+) \(.*\{\n((?: .*\n)*)", text, re.MULTILINE))

  def source(definition: str) -> tuple[str, str] | None:
    """Return (frame, scope); a fusion without its own has those of its last operation."""
    if own := _SOURCE.findall(definition):
      return own[0]
    inner = re.search(r"calls=%?([\w.-]+)", definition)
    inherited = _SOURCE.findall(bodies.get(inner[1], "")) if inner else []
    return inherited[-1] if inherited else None

  found = {}
  for name, definition in _INSTRUCTION.findall(text):
    opcode = re.search(r"(?<![\w%])([a-z][\w-]*)\(", definition)
    scope, frame = source(definition) or ("", "0")
    part, phase = part_of(int(frame)), _phase(scope)
    found[name] = Origin(opcode[1] if opcode else "", part, phase)
  return found


def _phase(scope: str) -> str:
  if "rematted_computation" in scope:
    return "recomputed"
  return "backward" if "transpose(" in scope else "forward"


def _read_calls(text: str) -> dict[int, tuple[str, int]]:
  """Return {frame: ('file function called', the frame around it, 0 for none)}."""
  files, functions = _table(text, "FileNames"), _table(text, "FunctionNames")
  locations = {}
  for number, fields in _table(text, "FileLocations").items():
    at = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", fields)}
    file, function = files[at["file_name_id"]].strip('"'), functions[at["function_name_id"]]
    called = _called(file, at.get("line", 0), at.get("column", 0))
    locations[number] = f"{file} {function.strip(chr(34))} {called}"
  frames = {}
  for number, fields in _table(text, "StackFrames").items():
    at = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", fields)}
    # One more than the frame's number, so that 1, or no field, means none.
    frames[number] = (locations[at["file_location_id"]], at.get("parent_frame_id", 1) - 1)
  return frames


def _table(text: str, name: str) -> dict[int, str]:
  """Return {number: the rest of its line} of one of the tables ahead of the program."""
  found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
  lines = found[1].splitlines() if found else []
  return {int(number): rest for number, _, rest in (line.partition(" ") for line in lines)}


def _called(file: str, line: int, column: int) -> str:
  """Return what a source line calls at a column, counted from 0 or 1: 'experts.project_in'."""
  names = re.finditer(r"[\w.]+", linecache.getline(file, line))
  return next((name[0] for name in names if name.start() in (column - 1, column)), "")
