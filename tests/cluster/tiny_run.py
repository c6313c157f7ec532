"""A run that takes seconds, for jobs of real processes: its data, config, command and losses."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 60
_CONFIG = '''\
"""A run for tests."""

from mfjax.config import *


def get_config():
  return RunConfig(
    model=ModelConfig(
      vocab_size=257, d_model=32, num_layers=2, d_attention=32, d_ff=48, num_attention_experts=8,
      num_ff_experts=8, d_gate=16, init=Init.TRUNCATED_NORMAL, compute_dtype=DType.FLOAT32,
    ),
    mesh=MeshConfig(data=2, fsdp=2),
    data=DataConfig(path={data!r}, sequence_length=64, batch_rows=8),
    optimizer=OptimizerConfig(warmup_steps=2, learning_rate=3e-3),
    train=TrainConfig(steps={steps}, log_every=1, tensorboard=False),
    evaluate=EvalConfig(every=1000, max_tokens=500, sample_tokens=0),
    checkpoint=CheckpointConfig(every=1000),
    cluster=ClusterConfig(initialization_timeout=120),
  )
'''


def mfjax(*words: str) -> list[str]:
  """Return the command line of an mfjax command."""
  return [sys.executable, "-m", "launch.main", *words]


def environment(**variables: str) -> dict[str, str]:
  """Return what a process of a run on CPUs is started with."""
  inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  return inherited | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "NPROC": "16"} | variables


@functools.cache
def config() -> pathlib.Path:
  """Prepare the data, once, and return the run's config file."""
  directory = pathlib.Path(tempfile.mkdtemp(prefix="mfjax-run-"))
  texts = [ROOT / "README.md", ROOT / "BUILD.md"]
  for number, part in enumerate("".join(t.read_text() for t in texts).split("\n\n")):
    (directory / "texts").mkdir(exist_ok=True)
    (directory / "texts" / f"{number}.txt").write_text(part)
  prepare = ["prepare", f"--out={directory / 'data'}", f"--input=docs={directory / 'texts'}"]
  subprocess.run(mfjax(*prepare), env=environment(), check=True, capture_output=True)
  file = directory / "run.py"
  file.write_text(_CONFIG.format(data=str(directory / "data"), steps=STEPS))
  return file


def train(workdir: pathlib.Path) -> list[str]:
  """Return the command that trains in `workdir`, without `mfjax`."""
  return ["train", f"--config={config()}", f"--workdir={workdir}"]


@functools.cache
def undisturbed() -> dict[int, float]:
  """Run four processes on this machine, once, and return their losses."""
  workdir = pathlib.Path(tempfile.mkdtemp(prefix="mfjax-run-")) / "undisturbed"
  launch = ["launch", "local", "--num_processes=4", "--", *train(workdir)]
  done = subprocess.run(
    mfjax(*launch), env=environment(), capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  found = losses(workdir)
  shutil.rmtree(workdir)
  assert sorted(found) == list(range(1, STEPS + 1))
  return found


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """Return the training loss of each step that the run has logged."""
  file = workdir / "metrics.jsonl"
  if not file.exists():
    return {}
  whole = file.read_text().split("\n")[:-1]  # The last line may be being written.
  records = [json.loads(line) for line in whole]
  return {record["step"]: record["loss"] for record in records if "loss" in record}


def wait_until(
  condition: Callable[[], bool], seconds: float, what: str, describe: Callable[[], str] = str
) -> None:
  """Wait for a condition; fail with `what` and a description when it does not come."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, f"{what} did not come in {seconds:.0f} s: {describe()}"
    time.sleep(0.3)


def read_all(files: Sequence[pathlib.Path]) -> str:
  """Return the ends of log files, for messages of failed tests."""
  return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files if file.is_file())
