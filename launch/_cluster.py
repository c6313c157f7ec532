"""Flags and environment of a process that is one of several.

Without flags the variables of `launch._environment` count, and without those JAX's own detection
looks for a cluster: Slurm, Open MPI, GKE, Cloud TPU.
"""

import os
import sys

import jax
from absl import flags, logging

from launch import _environment
from mfjax.cluster import session
from mfjax.cluster.processes import LabelFormatter, Process
from mfjax.cluster.start import find
from mfjax.config import ClusterConfig

_ADDRESS = flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT at which process 0 of several listens. Default: detected."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes",
  None,
  "Processes of this run, on all machines; 1: alone, without a look around. Default: detected.",
  lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of the processes this is, from 0 on. Default: detected.", lower_bound=0
)


def open_session(config: ClusterConfig) -> session.Session:
  """Connect with the run's other processes, if it has any.

  Raises:
    ValueError: the coordinates do not fit.
    StartError: the processes do not come together.
  """
  coordinates = find(
    config,
    _ADDRESS.value or os.environ.get(_environment.COORDINATOR_ADDRESS),
    _integer(_NUM_PROCESSES, _environment.NUM_PROCESSES),
    _integer(_PROCESS_ID, _environment.PROCESS_ID),
  )
  if coordinates is not None:
    # Its SIGTERM handler would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    process = Process.here(coordinates.process_id, coordinates.num_processes)
    handler = logging.get_absl_handler()
    handler.setFormatter(LabelFormatter(process, logging.PythonFormatter()))
  opened = session.open_session(config, coordinates)
  if coordinates is not None:
    print(
      f"{opened.process.label} process {opened.process.index} of {opened.process.count}, pid "
      f"{os.getpid()}, coordinator {coordinates.coordinator}",
      file=sys.stderr,
      flush=True,
    )
  return opened


def resume_command(default: str) -> str:
  """Return what a person types to go on with this run."""
  return os.environ.get(_environment.RESUME_COMMAND, default)


def _integer(flag: flags.FlagHolder[int | None], name: str) -> int | None:
  if flag.value is not None or name not in os.environ:
    return flag.value
  if not os.environ[name].isdecimal():
    raise ValueError(f"{name}={os.environ[name]!r}: give a number")
  return int(os.environ[name])
