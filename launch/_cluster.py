"""Flags and environment of a process that is one of several.

What starts the processes may set variables instead of flags, so that all run the same command:
MFJAX_COORDINATOR_ADDRESS, MFJAX_NUM_PROCESSES and MFJAX_PROCESS_ID; and MFJAX_RESUME_COMMAND, what
a person types to go on. Without either, JAX's detection looks for a cluster: Slurm, Open MPI, GKE,
Cloud TPU.
"""

import os
import sys

import jax
from absl import flags, logging

from mfjax.cluster import session
from mfjax.cluster.processes import LabelFormatter, Process
from mfjax.cluster.start import find
from mfjax.config import ClusterConfig

COORDINATOR_ADDRESS = "coordinator_address"
NUM_PROCESSES = "num_processes"
PROCESS_ID = "process_id"
RESUME_COMMAND = "resume_command"

_ADDRESS = flags.DEFINE_string(
  COORDINATOR_ADDRESS, None, "HOST:PORT at which process 0 of several listens. Default: detected."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  NUM_PROCESSES,
  None,
  "Processes of this run, on all machines; 1: alone, without a look around. Default: detected.",
  lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
  PROCESS_ID, None, "Which of the processes this is, from 0 on. Default: detected.", lower_bound=0
)


def variable(name: str) -> str:
  """Return the environment variable that stands for a flag."""
  return f"MFJAX_{name.upper()}"


def open_session(config: ClusterConfig) -> session.Session:
  """Connect with the run's other processes, if it has any.

  Raises:
    ValueError: the coordinates do not fit.
    StartError: the processes do not come together.
  """
  coordinates = find(
    config,
    _ADDRESS.value or os.environ.get(variable(COORDINATOR_ADDRESS)),
    _integer(_NUM_PROCESSES),
    _integer(_PROCESS_ID),
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
  return os.environ.get(variable(RESUME_COMMAND), default)


def _integer(flag: flags.FlagHolder[int | None]) -> int | None:
  name = variable(flag.name)
  if flag.value is not None or name not in os.environ:
    return flag.value
  if not os.environ[name].isdecimal():
    raise ValueError(f"{name}={os.environ[name]!r}: give a number")
  return int(os.environ[name])
