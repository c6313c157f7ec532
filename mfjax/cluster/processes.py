"""Which process of how many this is, where it runs, and how its log lines begin."""

import dataclasses
import logging
import socket
from typing import Self


@dataclasses.dataclass(frozen=True)
class Process:
  """Process `index` of `count`, on the machine `host`."""

  index: int = 0
  count: int = 1
  host: str = ""

  @classmethod
  def here(cls, index: int, count: int) -> Self:
    """Return a process on this machine."""
    return cls(index, count, socket.gethostname())

  @property
  def label(self) -> str:
    """Return rank and host as log lines show them: [2/hostc]."""
    return f"[{self.index}/{self.host}]"

  @property
  def is_first(self) -> bool:
    """Whether this process writes what is written once: config, metrics, samples, plots."""
    return self.index == 0


class LabelFormatter(logging.Formatter):
  """Puts a process's label before what another formatter makes of a record."""

  def __init__(self, process: Process, formatter: logging.Formatter):
    super().__init__()
    self._label, self._formatter = process.label, formatter

  def format(self, record: logging.LogRecord) -> str:
    return f"{self._label} {self._formatter.format(record)}"
