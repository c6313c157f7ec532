"""What reaches metrics.jsonl, TensorBoard's files and the terminal."""

import contextlib
import io
import json
import resource
import struct

import numpy as np
import pytest
import rich.console
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from mfjax import writers
from mfjax.cluster.processes import Process
from mfjax.config import TrainConfig


def train_record(step, loss=2.5):
  load = {
    "share": np.array([[0.25, 0.75], [1.0, 0.0]]),
    "entropy": np.array([0.6, 0.0]),
    "mutual_information": np.array([1.23456789e-6, np.nan]),
    "dead": np.array([0, 1]),
  }
  return {
    "step": step,
    "loss": loss,
    "cross_entropy": loss,
    "z_loss": 0.0,
    "aux_loss": -0.5,
    "gradient_norm": 0.3,
    "learning_rate": 1e-3,
    "tokens": 100,
    "skipped": 0,
    "tokens_per_second": 12345.6,
    "tokens_per_second_per_device": 12345.6,
    "mfu": 0.25,
    "mfu_of": "test",
    "router": {"attention": load, "ff": load},
  }


def evaluation_record(step):
  return {"step": step, "evaluation": {"code": {"nats_per_token": 1.5, "bits_per_byte": 2.1}}}


def test_jsonl_holds_every_record_as_strict_json(tmp_path):
  path = epath.Path(tmp_path / "metrics.jsonl")
  writer = writers.JsonlWriter(path, start_step=0)
  writer.log(train_record(1, loss=float("nan")))
  writer.log(evaluation_record(1))
  first, second = (json.loads(line, parse_constant=pytest.fail) for line in open_lines(path))
  writer.close()
  assert first["loss"] is None
  assert first["router"]["ff"]["share"] == [[0.25, 0.75], [1.0, 0.0]]
  assert first["router"]["ff"]["mutual_information"] == [1.23457e-6, None]
  assert first["router"]["ff"]["dead"] == [0, 1]
  assert second == evaluation_record(1)


def open_lines(path):
  return path.read_text().splitlines()


def test_jsonl_on_resume_drops_later_and_unfinished_lines(tmp_path):
  path = epath.Path(tmp_path / "metrics.jsonl")
  writer = writers.JsonlWriter(path, start_step=0)
  for step in (1, 2, 3):
    writer.log(train_record(step))
  writer.log(evaluation_record(2))
  writer.close()
  with path.open("a") as file:
    file.write('{"step": 4, "lo')  # Killed while writing.
  resumed = writers.JsonlWriter(path, start_step=2)
  resumed.log(evaluation_record(2))  # A finished run evaluates again.
  resumed.log(train_record(3, loss=9.0))
  resumed.close()
  records = [json.loads(line) for line in open_lines(path)]
  assert [(r["step"], r.get("loss")) for r in records] == [(1, 2.5), (2, 2.5), (2, None), (3, 9.0)]


def test_a_damaged_line_is_named(tmp_path):
  path = epath.Path(tmp_path / "metrics.jsonl")
  path.write_text('{"step": 1}\nnot a record\n{"step": 2}\n')
  with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a metrics record"):
    writers.read_records(path)


def read_events(directory):
  """Read TFRecord files: length, its checksum, an Event, its checksum."""
  for path in sorted(directory.iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      yield Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]


def test_tensorboard_has_scalars_by_layer_and_purges_on_resume(tmp_path):
  writer = writers.TensorBoardWriter(epath.Path(tmp_path), start_step=7)
  writer.log(train_record(8))
  writer.log(evaluation_record(8))
  writer.close()
  events = list(read_events(tmp_path))
  values = {v.tag: v.simple_value for e in events for v in e.summary.value}
  assert values["train/loss"] == 2.5
  assert values["held_out_bits_per_byte/code"] == pytest.approx(2.1)
  assert values["ff_dead/layer_01"] == 1
  assert values["attention_largest_share_over_balanced/layer_00"] == 1.5
  assert "ff_mutual_information/layer_00" in values
  assert "ff_mutual_information/layer_01" not in values  # NaN.
  assert all(e.step == 8 for e in events if e.summary.value)
  assert [e.step for e in events if e.HasField("session_log")] == [8]


@contextlib.contextmanager
def file_size_limit(size):
  """Let writes past `size` fail halfway, as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_jsonl_keeps_whole_lines_on_a_full_disk(tmp_path):
  path = epath.Path(tmp_path / "metrics.jsonl")
  writer = writers.JsonlWriter(path, start_step=0)
  writer.log(train_record(1))
  whole = path.read_bytes()
  with file_size_limit(len(whole) + 20):
    for step in (2, 3):
      with pytest.raises(OSError, match="too large"):
        writer.log(train_record(step))
      assert path.read_bytes() == whole
  writer.log(train_record(4))
  with file_size_limit(10):
    with pytest.raises(OSError, match="too large"):
      writer.log(train_record(5))
    writer.close()
  assert [record["step"] for record in writers.read_records(path)] == [1, 4]


def test_tensorboard_goes_on_in_a_new_file_after_a_full_disk(tmp_path, monkeypatch):
  monkeypatch.setattr(writers, "_FLUSH_SECONDS", -1)
  writer = writers.TensorBoardWriter(epath.Path(tmp_path), start_step=0)
  writer.log(train_record(1))
  [file] = tmp_path.iterdir()
  with file_size_limit(10):
    for step in range(2, 40):  # More than a queue holds: nothing may wait for a dead thread.
      with pytest.raises(OSError, match="too large"):
        writer.log(train_record(step))
      for torn in set(tmp_path.iterdir()) - {file}:
        torn.unlink()
  writer.log(train_record(40))
  writer.close()
  assert [e.step for e in read_events(tmp_path) if e.summary.value] == [1, 40]


def test_every_writer_is_closed_whichever_fails():
  closed = []

  class Closing(writers.Writer):
    def close(self):
      closed.append(self)
      raise OSError("full")

  both = [Closing(), Closing()]
  with pytest.raises(OSError, match="full"):
    writers.Writers(both).close()
  assert set(closed) == set(both)


@pytest.mark.parametrize("error", [OSError(28, "full"), BrokenPipeError()])
def test_only_a_closed_pipe_ends_the_run(error, monkeypatch):
  stream = io.StringIO()
  monkeypatch.setattr(stream, "flush", lambda: exec("raise error", {"error": error}))
  broken = isinstance(error, BrokenPipeError)
  with pytest.raises(BrokenPipeError) if broken else contextlib.nullcontext():
    writers.LineWriter(10, stream).say("a line")


def test_plain_lines_for_a_pipe(tmp_path):
  stream = io.StringIO()
  writer = writers.terminal_writer(1000, stream)
  writer.progress(9)
  writer.log(train_record(10))
  writer.log(evaluation_record(10))
  lines = stream.getvalue().splitlines()
  assert lines[0].startswith("step   10/1000  loss 2.5000")
  assert "12,346 tokens/s" in lines[0]
  assert "MFU 25.0 %" in lines[0]
  assert "2 dead experts" in lines[0]
  assert "code 1.5000 nats/token 2.1000 bits/byte" in lines[1]
  assert len(lines) == 2


def test_live_line_on_a_terminal():
  stream = io.StringIO()
  console = rich.console.Console(file=stream, force_terminal=True, width=120)
  writer = writers.LiveWriter(1000, console)
  writer.say("a [line] above")
  writer.progress(9)
  writer.log(train_record(10))
  writer.progress(10)
  writer.close()
  text = stream.getvalue()
  assert "a [line] above" in text
  assert "10/1000" in text
  assert "loss 2.5000  12,346 tokens/s  MFU 25.0 %" in text


def test_lines_of_one_of_several_processes_begin_with_its_label():
  stream = io.StringIO()
  writers.LineWriter(10, stream, "[0/host]").say("a line\nand another")
  assert stream.getvalue() == "[0/host] a line\n[0/host] and another\n"


def test_only_the_first_process_writes(tmp_path):
  directory = epath.Path(tmp_path)
  writer = writers.open_writers(directory, TrainConfig(), 0, Process(1, 2))
  writer.log(train_record(1))
  writer.close()
  assert list(tmp_path.iterdir()) == []
  writer = writers.open_writers(directory, TrainConfig(), 0, Process(0, 2))
  writer.log(train_record(1))
  writer.close()
  assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}
