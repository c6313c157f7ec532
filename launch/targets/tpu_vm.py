"""Run a command on TPU VMs: order them, run it on all their workers, give them back.

mfjax launch tpu_vm --tpu=v5e:4x4 --zone=us-west4-a --image=HOST/mfjax -- train --config=quickstart

Runs gcloud, and stays until the command ends: start it on a machine that stays up. The machines are
given back however it ends.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from absl import flags

from launch.targets import _cloud, _remote
from launch.targets import flags as shared
from mfjax.cluster import exit_codes, tpu_vm

_ZONE = flags.DEFINE_string("zone", None, "Zone of the TPUs, such as us-west4-a.")
_PROJECT = flags.DEFINE_string("project", None, "Project to charge. Default: gcloud's own.")
_RUNTIME_VERSION = flags.DEFINE_string(
  "runtime_version", None, "Software version of the VMs. Default: the usual one of the TPU type."
)
_GCLOUD = flags.DEFINE_multi_string(
  "gcloud", [], "Further option of `queued-resources create`, such as --spot."
)
_LOGS = flags.DEFINE_string("logs", "tpu_vm", "Directory here for workers' logs.")


def run(command: Sequence[str]) -> int:
  """Run `command` and return its exit code."""
  job = tpu_vm.TpuVmJob(
    name=_remote.JOB_NAME.value,
    slice=_cloud.tpu_slice(),
    num_slices=_cloud.NUM_SLICES.value,
    image=_cloud.image(),
    zone=_ZONE.value or "",
    project=_PROJECT.value,
    runtime_version=_RUNTIME_VERSION.value,
    options=tuple(_GCLOUD.value),
    environment=_remote.pairs("env", _cloud.ENV.value),
    grace_seconds=_remote.GRACE_SECONDS.value,
    max_restarts=shared.MAX_RESTARTS.value,
    log_directory=_LOGS.value,
  )
  program = ["mfjax", *command]
  _remote.show("\n".join(tpu_vm.lines(job, program)) + "\n", printed=shared.DRY_RUN.value)
  if shared.DRY_RUN.value:
    return 0
  _remote.require("gcloud")
  try:
    with _giving_back():
      return tpu_vm.run(job, program, _together, lambda text: print(text, flush=True))
  except tpu_vm.TpuVmError as error:
    print(f"mfjax launch tpu_vm: error: {error}", file=sys.stderr)
    return exit_codes.FAILED


@contextlib.contextmanager
def _giving_back() -> Iterator[None]:
  """Make SIGTERM end the block as Ctrl-C does: what was ordered is given back then."""

  def stop(*_: Any) -> NoReturn:
    raise SystemExit(exit_codes.PREEMPTED)

  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _together(commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
  started = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for words in commands]
  outputs = [process.communicate()[0] for process in started]
  return [(process.returncode, out) for process, out in zip(started, outputs, strict=True)]
