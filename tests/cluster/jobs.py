"""Small training jobs of several real processes, started as a person would start them."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from mfjax.config import (
  CheckpointConfig,
  ClusterConfig,
  DataConfig,
  DType,
  EvalConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TrainConfig,
)
from mfjax.data.prepare import PrepareOptions, prepare
from mfjax.writers import METRICS_FILE, read_records

ROOT = pathlib.Path(__file__).parent.parent.parent
_PID = re.compile(r"\[(\d+)/\S+\] process \d+ of \d+, pid (\d+)")
_PATIENCE_SECONDS = 300


def make_data(
  directory: pathlib.Path, count: int = 200, domains: Sequence[str] = ("numbers",)
) -> pathlib.Path:
  """Prepare a corpus of short texts of each domain."""
  for domain in domains:
    (directory / domain).mkdir(parents=True)
    for number in range(count):
      text = f"{number} times {number} in {domain} " * (1 + number % 10)
      (directory / domain / f"{number}.txt").write_text(text)
  inputs = tuple((domain, str(directory / domain)) for domain in domains)
  prepare(PrepareOptions(out=str(directory / "data"), inputs=inputs, validation_fraction=0.1))
  return directory / "data"


def make_config(data: pathlib.Path, /, *, steps: int, **sections: Any) -> RunConfig:
  """Return a run that takes seconds; keyword arguments replace whole sections."""
  defaults: dict[str, Any] = {
    "model": ModelConfig(
      vocab_size=257, d_model=8, num_layers=1, num_heads=2, d_attention=8, d_ff=8,
      num_attention_experts=2, num_ff_experts=2, d_gate=4, compute_dtype=DType.FLOAT32,
    ),
    "mesh": MeshConfig(fsdp=2, expert=2),
    "data": DataConfig(path=str(data), sequence_length=32, batch_rows=8),
    "optimizer": OptimizerConfig(warmup_steps=1),
    "train": TrainConfig(steps=steps, log_every=1, tensorboard=False),
    "evaluate": EvalConfig(every=0),
    "checkpoint": CheckpointConfig(every=5),
    # Not the default: on two cores with other work, a process is not scheduled for seconds.
    "cluster": ClusterConfig(heartbeat_timeout=25),
  }  # fmt: skip
  return RunConfig(**defaults | sections)


_LAUNCHERS: list[subprocess.Popen[str]] = []


def kill_all() -> None:
  """Kill the jobs that a failed test left; their processes die with the launcher."""
  while _LAUNCHERS:
    launcher = _LAUNCHERS.pop()
    if launcher.poll() is None:
      launcher.kill()
      launcher.communicate()


@dataclasses.dataclass
class Job:
  """A run in `workdir`; started again, it goes on."""

  config: RunConfig
  workdir: pathlib.Path
  cache: pathlib.Path
  processes: int
  devices: int
  extra: str = ""  # Python that each process runs first.
  launch_flags: tuple[str, ...] = ()
  url: str = ""  # Of the run itself, if it is not in `workdir`, where its logs are.

  def start(self) -> "Job":
    """Start `mfjax launch local`."""
    file = self.workdir.parent / f"{self.workdir.name}.py"
    logs = (f"--logs={self.workdir}/logs",) if self.url else ()
    file.write_text(
      f"from mfjax.config import RunConfig\n{self.extra}\n\n"
      f"def get_config():\n  return RunConfig.from_dict({self.config.to_dict()!r})\n"
    )
    self.process = subprocess.Popen(
      [
        sys.executable, "-m", "launch.main", "launch", "local",
        f"--num_processes={self.processes}", f"--devices_per_process={self.devices}",
        *self.launch_flags, *logs, "--", "train", f"--config={file}", f"--workdir={self._run}",
      ],
      env=os.environ
      | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(self.cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      },
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )  # fmt: skip
    _LAUNCHERS.append(self.process)
    return self

  @property
  def _run(self) -> epath.Path:
    return epath.Path(self.url or self.workdir)

  def wait(self) -> int:
    """Wait for the job's end and return its exit code."""
    try:
      _, self.errors = self.process.communicate(timeout=_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
      self.process.kill()
      raise AssertionError(f"the job did not end:\n{self.all_logs()}") from None
    return self.process.returncode

  def run(self) -> "Job":
    """Run to a successful end."""
    code = self.start().wait()
    assert code == 0, f"{self.errors}\n{self.all_logs()}"
    return self

  def log(self, rank: int) -> str:
    """Return what a rank wrote since its newest start."""
    path = self.workdir / "logs" / f"rank_{rank}.log"
    text = path.read_text(errors="replace") if path.exists() else ""
    return text.rpartition("\n--- ")[2]

  def all_logs(self) -> str:
    return "\n".join(f"=== {rank}\n{self.log(rank)}" for rank in range(self.processes))

  def pid(self, rank: int) -> int:
    """Return the process id of a rank that has started."""
    match = _PID.search(self.log(rank))
    assert match is not None
    return int(match[2])

  def await_step(self, step: int) -> None:
    """Wait until the metrics of a step are there."""
    self._await(lambda: any(record["step"] >= step for record in self.records()))

  def newest_checkpoint(self) -> int:
    """Return the step of the newest complete checkpoint, -1 without any."""
    complete = (self.workdir / "checkpoints").glob("*/digests.json")
    return max((int(path.parent.name) for path in complete), default=-1)

  def await_checkpoint(self, after: int = -1) -> None:
    """Wait until there is one to go on from, of a later step than `after`."""
    self._await(lambda: self.newest_checkpoint() > after)

  def await_start(self, number: int) -> None:
    """Wait until every process of the launcher's n-th start has found the others."""

    def started() -> bool:
      logs = [self.log(rank) for rank in range(self.processes)]
      return all(f", start {number}: " in log and _PID.search(log) for log in logs)

    self._await(started)

  def _await(self, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
      assert self.process.poll() is None, self.all_logs()
      assert time.monotonic() < deadline, self.all_logs()
      time.sleep(0.05)

  def records(self) -> list[dict[str, Any]]:
    """Return the whole records of metrics.jsonl."""
    return read_records(self._run / METRICS_FILE)

  def losses(self) -> list[tuple[int, float]]:
    """Return the loss of every step, as logged."""
    return [(record["step"], record["loss"]) for record in self.records() if "loss" in record]

  def checkpoints(self) -> list[int]:
    return sorted(int(p.name) for p in (self._run / "checkpoints").iterdir())
