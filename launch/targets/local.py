"""Run a command as several processes on this machine.

  mfjax launch local --num_processes=4 --devices_per_process=2 -- train --config=quickstart ...

Each process has virtual CPU devices of its own, and everything else is as on a cluster. What
process 0 says is shown here; every process has a log, WORKDIR/logs/rank_N.log. The first process
that fails ends the others. Ctrl-C and SIGTERM are passed on. The exit code is that of the first
process that failed; with --max_restarts a job that failed is started again, and goes on from its
last checkpoint.
"""

import os
import pathlib
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence

from absl import flags, logging

from launch import _environment
from launch.targets import flags as shared
from mfjax.cluster import local
from mfjax.cluster.restart import RestartPolicy, run_with_restarts

_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 2, "Processes to start.", lower_bound=1)
_DEVICES = flags.DEFINE_integer(
  "devices_per_process", 1, "Virtual CPU devices of each process.", lower_bound=1
)
_LOGS = flags.DEFINE_string(
  "logs", None, "Directory of the logs. Default: logs in the command's --workdir."
)

_GRACE_SECONDS = 20.0  # Twice the default heartbeat_timeout: then the reason is in every log.
_LEAST_THREADS = 16
_DEVICE_COUNT = re.compile(r"\s*--xla_force_host_platform_device_count=\d+")


def run(command: Sequence[str]) -> int:
  """Run `command` as the flags say and return the job's exit code.

  Raises:
    ValueError: there is no local directory for the logs.
  """
  logs, workdir = log_directory(command), workdir_of(command)
  if shared.DRY_RUN.value:
    for worker in workers(command, logs, "127.0.0.1:PORT"):
      settings = " ".join(f"{name}={shlex.quote(v)}" for name, v in worker.settings.items())
      print(f"{settings} {shlex.join(worker.command)} >> {shlex.quote(str(worker.log))} 2>&1 &")
    return 0
  stopped = threading.Event()
  jobs: list[local.LocalJob] = []

  def forward(number: int, _: object) -> None:
    stopped.set()
    for job in jobs:
      job.signal(number)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, forward)

  def start(attempt: int) -> int:
    started = workers(command, logs, f"127.0.0.1:{local.free_port()}")
    _begin_logs(started, attempt)
    jobs[:] = [local.LocalJob(started, os.environ, sys.stdout.buffer, _GRACE_SECONDS)]
    ending = jobs[0].run()
    if ending.code and ending.rank:  # Process 0's words were seen.
      log = started[ending.rank].log
      print(f"--- the end of {log}\n{local.last_lines(log)}\n---", file=sys.stderr)
    return ending.exit_code

  return run_with_restarts(
    start,
    RestartPolicy(shared.MAX_RESTARTS.value),
    lambda: local.newest_checkpoint(workdir),
    stopped,
  )


def workers(command: Sequence[str], logs: pathlib.Path, coordinator: str) -> list[local.Worker]:
  """Return the processes that `command` becomes."""
  xla_flags = _DEVICE_COUNT.sub("", os.environ.get("XLA_FLAGS", ""))
  devices = f"--xla_force_host_platform_device_count={_DEVICES.value}"
  common = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{xla_flags} {devices}".strip(),
    # Threads of XLA's CPU client: with fewer than twice the devices, collectives can deadlock.
    "NPROC": str(max(_LEAST_THREADS, 2 * _DEVICES.value)),
    _environment.COORDINATOR_ADDRESS: coordinator,
    _environment.NUM_PROCESSES: str(_NUM_PROCESSES.value),
    _environment.RESUME_COMMAND: shlex.join(["mfjax", *sys.argv[1:]]),
  }
  return [
    local.Worker(
      (sys.executable, "-u", "-m", "launch.main", *command),
      {**common, _environment.PROCESS_ID: str(rank)},
      logs / f"rank_{rank}.log",
    )
    for rank in range(_NUM_PROCESSES.value)
  ]


def workdir_of(command: Sequence[str]) -> pathlib.Path | None:
  """Return the local directory that the command's --workdir names, if it has one."""
  for argument, following in zip(command, [*command[1:], ""], strict=True):
    name, equals, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and name == "workdir":
      value = value if equals else following
      return None if "://" in value else pathlib.Path(value).expanduser().absolute()
  return None


def log_directory(command: Sequence[str]) -> pathlib.Path:
  """Return the directory of the logs.

  Raises:
    ValueError: neither --logs nor a local --workdir says where.
  """
  if _LOGS.value:
    return pathlib.Path(_LOGS.value).expanduser().absolute()
  workdir = workdir_of(command)
  if workdir is None:
    raise ValueError(
      f"{shlex.join(command)} has no local --workdir for the logs: give launch --logs=DIR"
    )
  return workdir / local.LOGS


def _begin_logs(started: Sequence[local.Worker], attempt: int) -> None:
  when = time.strftime("%Y-%m-%d %H:%M:%S")
  for worker in started:
    worker.log.parent.mkdir(parents=True, exist_ok=True)
    with worker.log.open("a") as log:
      log.write(f"--- {when}, start {attempt}: mfjax {shlex.join(worker.command[4:])}\n")
  logging.info("logs are in %s", started[0].log.parent)
