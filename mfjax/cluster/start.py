"""Bring up JAX's distributed runtime, or say in one sentence why it does not come up.

JAX ends the process from C++ when the coordinator does not answer in time: no `except` runs. So the
coordinator's port is tried first, and a timer of our own runs out before JAX's.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import jax
from jax._src import clusters  # `initialize` finds the coordinator with it, but does not tell.

from mfjax.cluster import exit_codes
from mfjax.cluster.processes import Process
from mfjax.config import ClusterConfig

_LOG = logging.getLogger(__name__)

_RETRY_SECONDS = 0.2
_JAX_LATER_SECONDS = 60  # How long after our own timer JAX's runs out.


class StartError(Exception):
  """The processes did not come together; the message says why and what to look at."""


@dataclasses.dataclass(frozen=True)
class Coordinates:
  """Where the coordinator listens, how many processes there are and which one this is."""

  coordinator: str
  num_processes: int
  process_id: int
  local_device_ids: tuple[int, ...] | None = None


def find(
  config: ClusterConfig,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Coordinates | None:
  """Return this process's coordinates; what is not given comes from JAX's own cluster detection.

  Returns None for a single process.

  Raises:
    ValueError: some coordinates are given, and nothing tells the rest, or they do not fit.
    StartError: the detection failed.
  """
  if num_processes == 1:
    return None
  given = {
    "coordinator_address": coordinator,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  local_devices: Sequence[int] | None = None
  if None in given.values():
    try:
      coordinator, num_processes, process_id, local_devices = (
        clusters.ClusterEnv.auto_detect_unset_distributed_params(
          coordinator, num_processes, process_id, None, None, config.initialization_timeout
        )
      )
    except Exception as error:  # Whatever a cluster's own library raises.
      raise StartError(
        f"JAX's cluster detection failed ({type(error).__name__}: {error}): give "
        "--coordinator_address, --num_processes and --process_id, or --num_processes=1"
      ) from error
  if coordinator is None or num_processes is None or process_id is None:
    if all(value is None for value in given.values()):
      return None
    missing = ", ".join(f"--{name}" for name, value in given.items() if value is None)
    raise ValueError(f"this is no cluster that JAX knows, so {missing} must be given too")
  if num_processes == 1:
    return None
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f"--process_id={process_id} must be at least 0 and below --num_processes={num_processes}"
    )
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal():
    raise ValueError(f"--coordinator_address={coordinator!r}: give HOST:PORT")
  ids = None if local_devices is None else tuple(local_devices)
  return Coordinates(coordinator, num_processes, process_id, ids)


def start(config: ClusterConfig, coordinates: Coordinates) -> Process:
  """Connect this process with all others; JAX's devices are all processes' from then on.

  Ends the process, after a sentence in the log, if not all processes come within
  `initialization_timeout`.

  Raises:
    StartError: the coordinator does not answer, or its port is taken.
  """
  process = Process.here(coordinates.process_id, coordinates.num_processes)
  deadline = time.monotonic() + config.initialization_timeout
  if process.is_first:
    _check_port(coordinates.coordinator)
  else:
    _await_coordinator(coordinates.coordinator, config.initialization_timeout)
  with _ending_at(deadline, process, coordinates.coordinator, config.initialization_timeout):
    jax.distributed.initialize(
      coordinates.coordinator,
      coordinates.num_processes,
      coordinates.process_id,
      local_device_ids=coordinates.local_device_ids,
      cluster_detection_method="deactivate",
      initialization_timeout=config.initialization_timeout + _JAX_LATER_SECONDS,
      heartbeat_timeout_seconds=config.heartbeat_timeout,
      shutdown_timeout_seconds=config.shutdown_timeout,
    )
  return process


def _check_port(coordinator: str) -> None:
  """Raise StartError if process 0 cannot listen at the coordinator's port: JAX would crash."""
  port = int(coordinator.rpartition(":")[2])
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  with socket.socket(family) as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(("", port))
      probe.listen()
    except OSError as error:
      why = "is in use by another program" if error.errno == errno.EADDRINUSE else error.strerror
      raise StartError(
        f"process 0 cannot be the coordinator at {coordinator}: port {port} {why}: "
        "choose another port"
      ) from error


def _await_coordinator(coordinator: str, timeout: float) -> None:
  host, _, port = coordinator.rpartition(":")
  deadline, why = time.monotonic() + timeout, "no answer"
  while (left := deadline - time.monotonic()) > 0:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=left).close()
      return
    except OSError as error:
      why = error.strerror or str(error) or type(error).__name__
      time.sleep(_RETRY_SECONDS)
  raise StartError(
    f"the coordinator at {coordinator} did not answer within {timeout:.0f} s "
    f"(config.cluster.initialization_timeout), last: {why}: is process 0 running there, "
    "and is the port open?"
  )


@contextlib.contextmanager
def _ending_at(
  deadline: float, process: Process, coordinator: str, timeout: float
) -> Iterator[None]:
  """End the process at the deadline unless the block is done by then."""
  done = threading.Event()

  def end() -> None:
    if not done.wait(deadline - time.monotonic()):
      _LOG.error(
        "not all of the %d processes came to the coordinator at %s within %.0f s "
        "(config.cluster.initialization_timeout): see which of them did not start",
        process.count, coordinator, timeout,
      )  # fmt: skip
      os._exit(exit_codes.FAILED)

  threading.Thread(target=end, name="start-up timer", daemon=True).start()
  try:
    yield
  finally:
    done.set()
