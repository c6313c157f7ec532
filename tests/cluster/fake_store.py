"""The coordinator's memory inside one process, for threads that play the processes of a job."""

import threading


class FakeStore:
  """Answers as `mfjax.cluster.store.CoordinatorStore` does, and counts what it is asked."""

  def __init__(self) -> None:
    self._texts: dict[str, str] = {}
    self._changed = threading.Condition()
    self._arrived: dict[str, int] = {}
    self.requests = 0
    self.lost = False

  def _ask(self) -> None:
    self.requests += 1
    if self.lost:
      raise ConnectionError("the coordinator is gone")

  def set(self, key: str, text: str) -> bool:
    with self._changed:
      self._ask()
      if key in self._texts:
        return False
      self._texts[key] = text
      self._changed.notify_all()
      return True

  def get(self, key: str, timeout: float) -> str:
    with self._changed:
      self._ask()
      if not self._changed.wait_for(lambda: key in self._texts or self.lost, timeout):
        raise TimeoutError(key)
      if self.lost:
        raise ConnectionError("the coordinator is gone")
      return self._texts[key]

  def under(self, prefix: str) -> dict[str, str]:
    with self._changed:
      self._ask()
      start = f"{prefix}/"
      return {k.removeprefix(start): v for k, v in self._texts.items() if k.startswith(start)}

  def barrier(self, name: str, timeout: float) -> None:
    raise NotImplementedError

  def lose(self) -> None:
    with self._changed:
      self.lost = True
      self._changed.notify_all()
