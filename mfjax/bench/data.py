"""The input pipeline alone: tokens per second, beside its parts, a ceiling and a peer."""

import contextlib
import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset
from grain.sources import ArrayRecordDataSource

from mfjax.config import DataConfig
from mfjax.data.index import TRAIN, DataIndex, open_index
from mfjax.data.pipeline import TrainStream, empty_batch, load
from mfjax.data.plan import Planner
from mfjax.data.prepare import PrepareOptions, prepare
from mfjax.data.shards import DocumentReader

_SYNTHETIC_TOKENS = 20_000_000
_BATCH_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Rate:
  """Tokens per second of one way to read, and how much of its rows is filled, if it makes rows."""

  name: str
  tokens_per_second: float
  fill: float | None = None


def measure(path: str | None, sequence_length: int, seconds: float) -> list[Rate]:
  """Measure the pipeline, its parts, and Grain's own packing, each for so many seconds.

  Args:
    path: prepared data; None for synthetic documents of log-normal lengths.
    sequence_length: predictions per row.
    seconds: of each measurement.
  """
  with tempfile.TemporaryDirectory() as folder:
    index = open_index(path) if path else _synthetic(pathlib.Path(folder))
    config = DataConfig(sequence_length=sequence_length, batch_rows=_BATCH_ROWS)
    stream = TrainStream(index, config, seed=0)
    next(stream)  # Starts reading ahead.
    whole = _rate(_batch_tokens(batch for batch, _ in stream), seconds)
    stream.close()
    parts, fill = _parts(index, config, seconds)
    times = {name: 1 / rate for name, rate in parts.items()}
    total = sum(times.values())
    return [
      Rate("pipeline, read ahead", whole, fill),
      *(Rate(f"  {name} ({times[name] / total:.0%} of the work)", parts[name]) for name in parts),
      Rate("ceiling: records alone", _rate(_record_tokens(index), seconds)),
      Rate("peer: grain FirstFitPack", *_peer(index, config, seconds)),
    ]


def _synthetic(folder: pathlib.Path) -> DataIndex:
  """Prepare random text with document lengths as in web text: median 400 tokens, mean 740."""
  rng = np.random.default_rng(0)
  text = rng.integers(97, 123, _SYNTHETIC_TOKENS, np.uint8).tobytes().decode()
  position, file = 0, folder / "synthetic.jsonl"
  with open(file, "w", encoding="utf-8") as lines:
    while position < len(text):
      length = 1 + int(rng.lognormal(6.0, 1.1))
      lines.write(json.dumps({"text": text[position : position + length]}) + "\n")
      position += length
  options = PrepareOptions(out=str(folder / "data"), inputs=(("synthetic", str(file)),))
  return prepare(options)


def _rate(tokens: Iterator[int], seconds: float) -> float:
  """Return tokens per second over the measured time."""
  start, count = time.perf_counter(), 0
  for more in tokens:
    count += more
    if time.perf_counter() - start > seconds:
      break
  return count / (time.perf_counter() - start)


def _batch_tokens(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[int]:
  for batch in batches:
    yield int(np.count_nonzero(batch["segment_ids"]))


def _parts(index: DataIndex, config: DataConfig, seconds: float) -> tuple[dict[str, float], float]:
  """Return tokens per second of planning, reading and assembling, each alone, and the fill."""
  planner = Planner(index, config, seed=0)
  reader = DocumentReader(index, TRAIN, planner.domains)
  clock: dict[str, float] = dict.fromkeys(("plan", "read", "assemble"), 0.0)

  @contextlib.contextmanager
  def timed(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    clock[name] += time.perf_counter() - start

  position, tokens, room = planner.start(), 0, 0
  while sum(clock.values()) < seconds:
    with timed("plan"):
      window = planner.next_window(position)
    assert window is not None, "the stream repeats"
    layout, position = window
    with timed("read"):
      loaded = load(reader, layout)
    with timed("assemble"):
      batch = empty_batch(layout.num_rows, config.sequence_length)
      loaded.fill(batch, 0, layout.row.size)
    tokens += int(layout.pieces.length.sum())
    room += layout.num_rows * config.sequence_length
  return {name: tokens / spent for name, spent in clock.items()}, tokens / room


def _source(index: DataIndex) -> ArrayRecordDataSource:
  splits = [index.split(domain, TRAIN) for domain in index.domain_names]
  return ArrayRecordDataSource([str(index.path / s.file) for split in splits for s in split.shards])


def _record_tokens(index: DataIndex) -> Iterator[int]:
  source, rng = _source(index), np.random.default_rng(0)
  while True:
    records = source.__getitems__(np.sort(rng.integers(len(source), size=8192)).tolist())
    yield sum(map(len, records)) // index.dtype.itemsize


def _peer(index: DataIndex, config: DataConfig, seconds: float) -> tuple[float, float]:
  """Return tokens per second and fill of Grain's first-fit packing, set up as fast as it goes."""
  length = config.sequence_length

  def cut(record: bytes) -> dict[str, np.ndarray]:
    return {"tokens": np.frombuffer(record, index.dtype)[:length]}  # It takes no longer pieces.

  documents = grain.MapDataset.source(_source(index)).shuffle(seed=0).repeat().map(cut)
  options = grain.ReadOptions(num_threads=0)
  rows = FirstFitPackIterDataset(
    documents.to_iter_dataset(options), length_struct={"tokens": length}, num_packing_bins=16
  ).batch(_BATCH_ROWS)
  counted, room = 0, 0

  def tokens() -> Iterator[int]:
    nonlocal counted, room
    for batch in rows:
      more = int(np.count_nonzero(batch["tokens_segment_ids"]))
      counted += more
      room += batch["tokens"].size
      yield more

  return _rate(tokens(), seconds), counted / room
