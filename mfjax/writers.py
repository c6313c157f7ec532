"""Where metrics go: the terminal, metrics.jsonl and TensorBoard event files.

A train record is what `metrics.Meter.record` returns. An evaluation record is
{'step': n, 'evaluation': {domain: {'nats_per_token': ..., 'bits_per_byte': ..., ...}}}.
"""

import contextlib
import itertools
import json
import math
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
import rich.console
import rich.progress
from etils import epath
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from mfjax.cluster.processes import Process
from mfjax.config import TrainConfig
from mfjax.storage import is_remote

METRICS_FILE = "metrics.jsonl"
_OBJECT_BYTES = 1 << 20  # Of metrics in one object of a bucket, about: each record writes it anew.
_FLUSH_SECONDS = 10  # TensorBoard's files; on an object store each flush may upload them whole.


class Writer:
  """Receives what a run has to tell; this base class drops it."""

  def log(self, record: Mapping[str, Any]) -> None:
    """Write a train or evaluation record."""

  def say(self, text: str) -> None:
    """Tell the person at the terminal."""

  def progress(self, step: int) -> None:
    """Note that `step` steps are done."""

  def close(self) -> None:
    """Write what is left."""


class Writers(Writer):
  """Passes everything to each of several writers."""

  def __init__(self, writers: Sequence[Writer]):
    self._writers = writers

  def log(self, record: Mapping[str, Any]) -> None:
    for writer in self._writers:
      writer.log(record)

  def say(self, text: str) -> None:
    for writer in self._writers:
      writer.say(text)

  def progress(self, step: int) -> None:
    for writer in self._writers:
      writer.progress(step)

  def close(self) -> None:
    with contextlib.ExitStack() as stack:  # Closes all of them, whichever fails.
      for writer in self._writers:
        stack.callback(writer.close)


def describe_record(record: Mapping[str, Any]) -> str:
  """Return a train or evaluation record as one line of text, without its step."""
  if "evaluation" in record:
    return "held-out  " + "  ".join(
      f"{domain} {values['nats_per_token']:.4f} nats/token {values['bits_per_byte']:.4f} bits/byte"
      for domain, values in record["evaluation"].items()
    )
  parts = [
    f"loss {record['loss']:.4f}",
    f"aux {record['aux_loss']:.4f}",
    f"grad {record['gradient_norm']:.3g}",
    f"lr {record['learning_rate']:.3g}",
    f"{record['tokens_per_second']:,.0f} tokens/s",
    f"MFU {100 * record['mfu']:.1f} %",
  ]
  dead = sum(int(np.sum(load["dead"])) for load in record["router"].values())
  parts += [f"{dead} dead experts"] if dead else []
  parts += [f"{record['skipped']} skipped"] if record["skipped"] else []
  return "  ".join(parts)


class LineWriter(Writer):
  """Prints a line per record: for logs and pipes; `label` begins each line."""

  def __init__(self, num_steps: int, stream: TextIO, label: str = ""):
    self._num_steps = num_steps
    self._stream, self._start = stream, f"{label} " if label else ""

  def log(self, record: Mapping[str, Any]) -> None:
    width = len(str(self._num_steps))
    self.say(f"step {record['step']:{width}d}/{self._num_steps}  {describe_record(record)}")

  def say(self, text: str) -> None:
    try:
      self._stream.write("".join(f"{self._start}{line}\n" for line in text.split("\n")))
      self._stream.flush()
    except BrokenPipeError:
      raise
    except OSError:  # A log on a full disk loses lines; it does not end the run.
      pass


class LiveWriter(Writer):
  """Keeps one live line with progress and time left; what else is said scrolls above it."""

  def __init__(self, num_steps: int, console: rich.console.Console):
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn("step"),
      rich.progress.MofNCompleteColumn(),
      rich.progress.BarColumn(bar_width=20),
      rich.progress.TextColumn("{task.description}"),
      rich.progress.TimeRemainingColumn(compact=True),
      rich.progress.TextColumn("left"),
      console=console,
      refresh_per_second=4,
      speed_estimate_period=120,
    )
    self._num_steps = num_steps
    self._task = self._progress.add_task("compiling", total=num_steps, start=False)

  def log(self, record: Mapping[str, Any]) -> None:
    if "evaluation" in record:
      self.say(f"step {record['step']}  {describe_record(record)}")
      return
    line = (
      f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  "
      f"MFU {100 * record['mfu']:.1f} %"
    )
    self._progress.update(self._task, description=line)

  def say(self, text: str) -> None:
    self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

  def progress(self, step: int) -> None:
    if not self._progress.live.is_started:
      # Starts at the first finished step: a resumed run must not count the earlier ones as speed.
      self._progress.reset(self._task, total=self._num_steps, completed=step, description="")
      self._progress.start()
    self._progress.update(self._task, completed=step)

  def close(self) -> None:
    self._progress.stop()


def terminal_writer(num_steps: int, stream: TextIO | None = None, label: str = "") -> Writer:
  """Return a live line for a terminal, plain lines that begin with `label` for anything else."""
  stream = stream or sys.stdout
  if stream.isatty():
    return LiveWriter(num_steps, rich.console.Console(file=stream))
  return LineWriter(num_steps, stream, label)


def _plain(value: Any) -> Any:
  """Make a record JSON: arrays become lists of 6 significant digits, non-finite numbers None."""
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim == 1:
    return _plain([float(f"{x:.6g}") for x in value])
  if isinstance(value, np.ndarray):
    return _plain(list(value) if value.ndim > 1 else value.tolist())
  if isinstance(value, list):
    return [_plain(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


class JsonlWriter(Writer):
  """Appends one JSON object per record to metrics.jsonl.

  Opening drops the lines after `start_step`, which a resumed run will write again, and a last line
  that a killed process left unfinished.
  """

  def __init__(self, path: epath.Path, start_step: int):
    kept = [record for record in read_records(path) if record["step"] <= start_step]
    text = "".join(json.dumps(record) + "\n" for record in kept).encode()
    self._evaluated = {record["step"] for record in kept if "evaluation" in record}
    self._lines = _ObjectLines(path, text) if is_remote(path) else _FileLines(path, text)

  def log(self, record: Mapping[str, Any]) -> None:
    if "evaluation" in record and record["step"] in self._evaluated:
      return  # A finished run that is started again evaluates its last step again.
    self._lines.append((json.dumps(_plain(record), allow_nan=False) + "\n").encode())

  def close(self) -> None:
    self._lines.close()


class _FileLines:
  """A local file of whole lines that begins as `text`."""

  def __init__(self, path: epath.Path, text: bytes):
    partial = path.with_suffix(".partial")
    partial.write_bytes(text)
    partial.replace(path)
    self._path, self._size = path, len(text)
    self._file = path.open("ab")

  def append(self, line: bytes) -> None:
    try:
      if self._file.closed:
        self._reopen()
      self._file.write(line)
      self._file.flush()
    except OSError:
      with contextlib.suppress(OSError):  # Then the next record tries again.
        self._reopen()
      raise
    self._size += len(line)

  def _reopen(self) -> None:
    """Go back to the whole lines: drop what a failed write left in the file and in its buffer."""
    with contextlib.suppress(OSError):
      self._file.close()
    file = self._path.open("ab")
    try:
      file.truncate(self._size)
    except OSError:
      file.close()
      raise
    self._file = file

  def close(self) -> None:
    with contextlib.suppress(OSError):  # Every record that did not fail was flushed.
      self._file.close()


class _ObjectLines:
  """Lines in a bucket, whose objects cannot be appended to: the last of several is written anew."""

  def __init__(self, path: epath.Path, text: bytes):
    self._path, self._part, self._text = path, 0, text
    path.write_bytes(text)
    for later in _later_parts(path):
      later.unlink()

  def append(self, line: bytes) -> None:
    if len(self._text) > _OBJECT_BYTES:
      self._part, self._text = self._part + 1, b""
    text = self._text + line
    part = _part(self._path, self._part) if self._part else self._path
    part.write_bytes(text)
    self._text = text

  def close(self) -> None:
    """Do nothing: every line was written."""


def _part(path: epath.Path, number: int) -> epath.Path:
  return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _later_parts(path: epath.Path) -> list[epath.Path]:
  """Return what follows `path` in a bucket: metrics.1.jsonl, metrics.2.jsonl, ..."""
  if not is_remote(path):
    return []
  parts = (_part(path, number) for number in itertools.count(1))
  return list(itertools.takewhile(lambda part: part.exists(), parts))


def read_records(path: epath.Path) -> list[dict[str, Any]]:
  """Return the records of a metrics.jsonl without an unfinished last line; [] if there is none.

  Raises:
    ValueError: a line that is not a record; names the file and the line.
  """
  if not path.exists():
    return []
  records: list[dict[str, Any]] = []
  for part in (path, *_later_parts(path)):
    records += _read_part(part)
  return records


def _read_part(path: epath.Path) -> list[dict[str, Any]]:
  records = []
  lines = path.read_bytes().splitlines(keepends=True)
  for number, line in enumerate(lines, start=1):
    try:
      record = json.loads(line)
      record["step"] + 0
    except (ValueError, KeyError, TypeError) as error:
      if number == len(lines) and not line.endswith(b"\n"):
        break
      raise ValueError(f"{path}:{number} is not a metrics record: delete that line") from error
    records.append(record)
  return records


class TensorBoardWriter(Writer):
  """Writes scalars to TensorBoard event files; per layer, only what sums up its experts.

  Every expert's share of picks is in metrics.jsonl and in `mfjax plot`. tensorboardX's own
  SummaryWriter is not used: on a full disk its thread dies, and its caller waits for it forever.
  """

  def __init__(self, directory: epath.Path, start_step: int):
    directory.mkdir(parents=True, exist_ok=True)
    self._directory, self._num_files = directory, 0
    self._events: RecordWriter | None = None
    self._flushed = 0.0
    # Events from this step on, left by a run that got further than its checkpoint, are hidden.
    self._write(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))

  def log(self, record: Mapping[str, Any]) -> None:
    event = Event(step=record["step"], wall_time=time.time())
    for tag, value in self._scalars(record):
      if math.isfinite(value):  # A skipped step's loss is not; tensorboardX warns each time.
        event.summary.MergeFrom(summary.scalar(tag, value))
    self._write(event)

  def _scalars(self, record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for domain, values in record.get("evaluation", {}).items():
      for name in ("nats_per_token", "bits_per_byte"):
        yield f"held_out_{name}/{domain}", values[name]
    for kind, load in record.get("router", {}).items():
      balanced = 1 / load["share"].shape[-1]
      per_layer = {**load, "largest_share_over_balanced": load["share"].max(-1) / balanced}
      del per_layer["share"]
      for name, values in per_layer.items():
        for layer, value in enumerate(values):
          yield f"{kind}_{name}/layer_{layer:02d}", float(value)
    for name, value in record.items():
      if name != "step" and isinstance(value, int | float):
        yield f"train/{name}", value

  def _write(self, event: Event) -> None:
    try:
      if self._events is None:
        self._events = self._open()
      self._events.write(event.SerializeToString())
      if time.monotonic() - self._flushed > _FLUSH_SECONDS:
        self._events.flush()
        self._flushed = time.monotonic()
    except OSError:
      self.close()  # What follows a torn event is not read: the next one begins another file.
      raise

  def _open(self) -> RecordWriter:
    now, self._num_files = time.time(), self._num_files + 1
    name = f"events.out.tfevents.{now:.0f}.{socket.gethostname()}.{self._num_files}"
    events = RecordWriter(str(self._directory / name))
    events.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    return events

  def close(self) -> None:
    events, self._events = self._events, None
    if events is not None:
      with contextlib.suppress(OSError):
        events.close()


def open_writers(
  workdir: epath.Path, config: TrainConfig, start_step: int, process: Process
) -> Writer:
  """Open a run's writers, `start_step` being the restored step; only the first process writes."""
  if not process.is_first:
    return Writer()
  label = process.label if process.count > 1 else ""
  terminal = terminal_writer(config.steps, label=label)
  writers = [terminal, JsonlWriter(workdir / METRICS_FILE, start_step)]
  if config.tensorboard:
    writers.append(TensorBoardWriter(workdir / "tensorboard", start_step))
  return Writers(writers)
