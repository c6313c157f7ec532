"""Measure one part of the system and print it beside its ceiling and a peer.

  mfjax bench data [--data=DIR] [--sequence_length=2048]
  mfjax bench experts [--tokens=4096] [--d_model=512] [--d_ff=1024] [--num_experts=32] [--top_k=2]

`data`: the input pipeline alone, tokens per second out of ArrayRecord files. Without --data it
reads synthetic documents of log-normal lengths. `experts`: a routed feed-forward layer on one
device, beside a dense layer of the same active FLOPs, under three routings.
"""

import contextlib
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags
from grain.experimental import FirstFitPackIterDataset
from grain.sources import ArrayRecordDataSource

from mfjax.bench import experts
from mfjax.config import DataConfig
from mfjax.data.index import TRAIN, DataIndex, open_index
from mfjax.data.pipeline import TrainStream, empty_batch, load
from mfjax.data.plan import Planner
from mfjax.data.prepare import PrepareOptions, prepare
from mfjax.data.shards import DocumentReader
from mfjax.schema import unknown_name

_DATA = flags.DEFINE_string("data", None, "Prepared data to read. Default: synthetic documents.")
_SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", 2048, "Predictions per row.")
_SECONDS = flags.DEFINE_float("seconds", 5.0, "How long each line is measured.")

_TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens of the expert layer.", lower_bound=4)
_D_MODEL = flags.DEFINE_integer("d_model", 512, "Width of the model.", lower_bound=1)
_D_FF = flags.DEFINE_integer("d_ff", 1024, "Width of an expert.", lower_bound=1)
_NUM_EXPERTS = flags.DEFINE_integer("num_experts", 32, "Number of experts.", lower_bound=2)
_TOP_K = flags.DEFINE_integer("top_k", 2, "Experts chosen per token.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Calls of which the median counts.", lower_bound=1)

_SYNTHETIC_TOKENS = 20_000_000
_BATCH_ROWS = 64


def main(argv: Sequence[str]) -> None:
  """Run the benchmark that the first argument names."""
  if len(argv) != 2:
    raise ValueError(f"name one benchmark: {', '.join(_BENCHMARKS)}")
  if argv[1] not in _BENCHMARKS:
    raise ValueError(unknown_name(argv[1], _BENCHMARKS, "benchmark"))
  _BENCHMARKS[argv[1]]()


def bench_data() -> None:
  """Print tokens per second of the input pipeline, of its parts and of Grain's own packing."""
  with tempfile.TemporaryDirectory() as folder:
    index = open_index(_DATA.value) if _DATA.value else _synthetic(pathlib.Path(folder))
    config = DataConfig(sequence_length=_SEQUENCE_LENGTH.value, batch_rows=_BATCH_ROWS)
    stream = TrainStream(index, config, seed=0)
    next(stream)  # Starts reading ahead.
    whole = _rate(_batch_tokens(batch for batch, _ in stream))
    stream.close()
    parts = _parts(index, config)
    rows: list[tuple[str, float, float | None]] = [("pipeline, read ahead", whole, parts["fill"])]
    seconds = {name: 1 / parts[name] for name in ("plan", "read", "assemble")}
    total = sum(seconds.values())
    rows += [
      (f"  {name} ({seconds[name] / total:.0%} of the work)", parts[name], None) for name in seconds
    ]
    rows.append(("ceiling: records alone", _rate(_record_tokens(index)), None))
    rows.append(("peer: grain FirstFitPack", *_peer(index, config)))
    lines = [f"{'':36}  {'million tokens/s':>16}  {'fill':>6}"]
    for name, rate, fill in rows:
      filled = "" if fill is None else f"{fill:6.3f}"
      lines.append(f"{name:36}  {rate / 1e6:16.2f}  {filled}")
    print("\n".join(line.rstrip() for line in lines))


def bench_experts() -> None:
  """Print time and computed rows of a routed layer relative to a dense one."""
  import jax  # The data benchmark runs without it.

  if _TOP_K.value >= _NUM_EXPERTS.value:
    raise ValueError(f"top_k={_TOP_K.value} must be below num_experts={_NUM_EXPERTS.value}")
  shape = experts.ExpertShape(
    tokens=_TOKENS.value,
    d_model=_D_MODEL.value,
    d_ff=_D_FF.value,
    num_experts=_NUM_EXPERTS.value,
    top_k=_TOP_K.value,
  )
  device = jax.devices()[0]
  print(f"{shape} on {device.device_kind}, jax {jax.__version__}")
  print(f"{'routing':12}  {'rows/active':>11}  {'forward ms':>26}  {'forward + backward ms':>26}")
  for row in experts.measure(shape, device, _REPEATS.value):
    forward = _against(row.forward, row.dense_forward)
    training = _against(row.training, row.dense_training)
    print(f"{row.routing:12}  {row.rows_ratio:11.3f}  {forward:>26}  {training:>26}")


def _against(routed: float, dense: float) -> str:
  return f"{routed * 1e3:.2f} / dense {dense * 1e3:.2f} = {routed / dense:.2f}"


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


def _rate(tokens: Iterator[int]) -> float:
  """Return tokens per second over the measured time."""
  start, count = time.perf_counter(), 0
  for more in tokens:
    count += more
    if time.perf_counter() - start > _SECONDS.value:
      break
  return count / (time.perf_counter() - start)


def _batch_tokens(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[int]:
  for batch in batches:
    yield int(np.count_nonzero(batch["segment_ids"]))


def _parts(index: DataIndex, config: DataConfig) -> dict[str, float]:
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
  while sum(clock.values()) < _SECONDS.value:
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
  return {name: tokens / seconds for name, seconds in clock.items()} | {"fill": tokens / room}


def _source(index: DataIndex) -> ArrayRecordDataSource:
  splits = [index.split(domain, TRAIN) for domain in index.domain_names]
  return ArrayRecordDataSource([str(index.path / s.file) for split in splits for s in split.shards])


def _record_tokens(index: DataIndex) -> Iterator[int]:
  source, rng = _source(index), np.random.default_rng(0)
  while True:
    records = source.__getitems__(np.sort(rng.integers(len(source), size=8192)).tolist())
    yield sum(map(len, records)) // index.dtype.itemsize


def _peer(index: DataIndex, config: DataConfig) -> tuple[float, float]:
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

  return _rate(tokens()), counted / room


_BENCHMARKS = {"data": bench_data, "experts": bench_experts}
