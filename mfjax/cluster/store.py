"""The job's small shared memory: texts by key, kept by the coordinator of JAX's runtime."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax._src import distributed  # The client has no public name.

from mfjax.cluster.processes import Process

_PREFIX = "mfjax/"


class StoreLostError(ConnectionError):
  """The coordinator does not answer any more."""


class Store(Protocol):
  """Texts by key; every process sees what any of them has set."""

  def set(self, key: str, text: str) -> bool:
    """Set a key once and for all; return False if it was set before."""

  def get(self, key: str, timeout: float) -> str:
    """Return the text of a key as soon as it is set, or raise TimeoutError."""

  def under(self, prefix: str) -> dict[str, str]:
    """Return what is set at 'prefix/NAME', by NAME."""

  def barrier(self, name: str, timeout: float) -> None:
    """Wait until every process is here, or raise TimeoutError."""


class CoordinatorStore:
  """The key-value store of JAX's coordination service; needs `jax.distributed` to be up."""

  def __init__(self) -> None:
    self._client: Any = distributed.global_state.client
    assert self._client is not None, "jax.distributed was not initialized"

  def set(self, key: str, text: str) -> bool:
    try:
      self._client.key_value_set(_PREFIX + key, text)
    except jax.errors.JaxRuntimeError as error:
      if "ALREADY_EXISTS" in str(error):
        return False
      raise StoreLostError(_first_line(error)) from error
    return True

  def get(self, key: str, timeout: float) -> str:
    try:
      return str(self._client.blocking_key_value_get(_PREFIX + key, int(timeout * 1000)))
    except jax.errors.JaxRuntimeError as error:
      raise self._error(error, key) from error

  def under(self, prefix: str) -> dict[str, str]:
    try:
      found = self._client.key_value_dir_get(f"{_PREFIX}{prefix}/")
    except jax.errors.JaxRuntimeError as error:
      raise StoreLostError(_first_line(error)) from error
    return {key.rpartition("/")[2]: text for key, text in found}

  def barrier(self, name: str, timeout: float) -> None:
    try:
      self._client.wait_at_barrier(_PREFIX + name, int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
      raise self._error(error, name) from error

  def _error(self, error: Exception, what: str) -> Exception:
    timed_out = "DEADLINE_EXCEEDED" in str(error)
    return TimeoutError(what) if timed_out else StoreLostError(_first_line(error))


def _first_line(error: Exception) -> str:
  return str(error).partition("\n")[0]


def settle(
  store: Store,
  process: Process,
  name: str,
  mine: Any,
  decide: Callable[[Sequence[Any]], Any],
  timeout: float,
) -> Any:
  """Return what process 0 decides from every process's value, in rank order; all values are JSON.

  Process 0 alone reads them all, so that the work grows with the number of processes and not with
  its square.

  Raises:
    TimeoutError: a process did not bring its value in time; names the first one.
  """
  store.set(f"{name}/{process.index}", json.dumps(mine))
  deadline = time.monotonic() + timeout
  if process.is_first:
    values = []
    for rank in range(process.count):
      try:
        values.append(json.loads(store.get(f"{name}/{rank}", deadline - time.monotonic())))
      except TimeoutError as error:
        raise TimeoutError(f"{name}: no word from rank {rank} in {timeout:.0f} s") from error
    store.set(f"{name}/decision", json.dumps(decide(values)))
  return json.loads(store.get(f"{name}/decision", timeout))
