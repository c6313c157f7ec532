"""`mfjax prepare`: inputs -> documents -> tokens -> ArrayRecord shards and an index.

All work happens in a hidden folder beside the output, which takes the output's name when everything
is there. A finished chunk of input leaves a record with a digest of what it was made from; a later
run with the same options and inputs goes on after the finished chunks.
"""

import concurrent.futures
import dataclasses
import enum
import hashlib
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from mfjax.data import chunks as chunks_lib
from mfjax.data import index as data_index
from mfjax.data.chunks import CHUNKS_FOLDER, ChunkResult, HeldOut, Task, process_chunk
from mfjax.data.documents import Chunk, InputFile, Reading, list_files, make_chunks, spool
from mfjax.data.index import TOKENIZER_NAME, TRAIN, VALIDATION, Counts, DataIndex, Shard
from mfjax.data.shards import ShardWriter, token_dtype
from mfjax.data.stdlib_corpus import SPLIT_FIELD, write_stdlib_corpus
from mfjax.data.tokenizer import BYTES, JsonTokenizer, train_bpe
from mfjax.storage import check_access, is_remote, upload

_BPE_SAMPLE_BYTES = 256 << 20
_BYTES_PER_PROCESS = 16 << 20
_UPLOADING = "UPLOADING"  # In a bucket, while files are on their way.


class Corpus(enum.Enum):
  """Text that is made on the spot."""

  NONE = ""
  STDLIB = "stdlib"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
  """What to prepare: `inputs` are (domain, path) pairs, or a corpus that needs none.

  `tokenizer` is `bytes` or a tokenizer.json; `train_bpe` a vocabulary size (0: train none).
  `validation_max_bytes` caps each domain's validation split (0: no cap); documents beyond it are
  left out of both splits. `overwrite` replaces data prepared with other options.
  """

  out: str
  inputs: tuple[tuple[str, str], ...] = ()
  corpus: Corpus = Corpus.NONE
  reading: Reading = dataclasses.field(default_factory=Reading)
  tokenizer: str = BYTES
  train_bpe: int = 0
  end_of_text: str = ""
  validation_fraction: float = 0.01
  validation_max_bytes: int = 64 << 20
  num_processes: int = 1
  overwrite: bool = False

  def __post_init__(self) -> None:
    if not self.out:
      raise ValueError("out is empty: give --out=DIR")
    if bool(self.inputs) == (self.corpus is not Corpus.NONE):
      raise ValueError("give --input=NAME=PATH (one or several) or --corpus=stdlib")
    for domain, _ in self.inputs:
      if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", domain):
        raise ValueError(f"domain {domain!r}: use letters, digits, '_', '-' and '.'")
    if [path for _, path in self.inputs].count("-") > 1:
      raise ValueError("standard input ('-') can be given once")
    if not 0 <= self.validation_fraction < 1:
      raise ValueError(
        f"validation_fraction={self.validation_fraction} must be at least 0 and below 1"
      )
    if self.validation_max_bytes < 0:
      raise ValueError(f"validation_max_bytes={self.validation_max_bytes} must not be negative")
    if self.num_processes < 1:
      raise ValueError(f"num_processes={self.num_processes} must be positive")
    if self.train_bpe and self.tokenizer != BYTES:
      raise ValueError(f"train_bpe={self.train_bpe} and tokenizer={self.tokenizer!r}: give one")
    if self.train_bpe and self.train_bpe < 257:
      raise ValueError(f"train_bpe={self.train_bpe} must be at least 257: the bytes, end-of-text")
    if self.tokenizer != BYTES and not os.path.isfile(self.tokenizer):
      raise ValueError(f"tokenizer={self.tokenizer!r} is neither 'bytes' nor a tokenizer.json file")


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far it is: documents and text bytes so far, the share of the input finished, seconds."""

  documents: int
  text_bytes: int
  fraction: float
  seconds: float


Report = Callable[[Progress], None]


def prepare(
  options: PrepareOptions, report: Report = lambda progress: None, stdin: BinaryIO | None = None
) -> DataIndex:
  """Prepare data in `options.out` and return its index; the same request again returns at once.

  Args:
    report: called about twice a second with the progress.
    stdin: what the input '-' reads (the process's standard input by default).

  Raises:
    ValueError: an input is missing, empty or malformed (names file and line), the output holds
      something else, or no text remains to train on.
    OSError: a file cannot be read or written.
  """
  check_access(options.out, "out")
  out = epath.Path(options.out)
  _check_output(out)
  work = _work_folder(out)
  (work / CHUNKS_FOLDER).mkdir(parents=True, exist_ok=True)
  try:
    files = _input_files(options, work, stdin or sys.stdin.buffer)
    chunks = make_chunks(files)
    task = _task(options, work, chunks)
    request = hashlib.sha256("".join(map(task.digest, chunks)).encode()).hexdigest()
    if (out / data_index.INDEX_NAME).exists():
      done = _already_prepared(options, out, request)
      if done is not None:
        shutil.rmtree(work)
        return done
    results = _process(chunks, task, options.num_processes, report)
    fields = _finish(results, chunks, task) | {"request": request}
    _publish(fields, work, out)
  except BaseException:
    if not any((work / CHUNKS_FOLDER).glob("*.json")):  # Nothing that a later run could use.
      shutil.rmtree(work, ignore_errors=True)
    raise
  return data_index.open_index(out)


def _work_folder(out: epath.Path) -> pathlib.Path:
  """Return where the work is done: beside the output, or for a bucket in the user's cache."""
  if is_remote(out):
    name = hashlib.sha256(str(out).encode()).hexdigest()[:16]
    return pathlib.Path.home() / ".cache" / "mfjax" / f"prepare-{name}"
  return pathlib.Path(out.parent / f".{out.name}.partial")


def _check_output(out: epath.Path) -> None:
  if out.exists() and not out.is_dir():
    raise ValueError(f"out={str(out)!r} is a file: give a directory")
  if not out.is_dir() or (out / _UPLOADING).exists():
    return
  if any(out.iterdir()) and not (out / data_index.INDEX_NAME).exists():
    raise ValueError(f"out={str(out)!r} holds other files: give a new or empty directory")


def _already_prepared(options: PrepareOptions, out: epath.Path, request: str) -> DataIndex | None:
  try:
    index = data_index.open_index(out)
    if index.request == request:
      return index
    problem = "holds data prepared from other inputs or with other options"
  except ValueError as error:
    problem = f"holds damaged data ({error})"
  if options.overwrite:
    return None
  raise ValueError(f"out={str(out)!r} {problem}: give another directory, or --overwrite")


def _input_files(
  options: PrepareOptions, work: pathlib.Path, stdin: BinaryIO
) -> Iterator[InputFile]:
  if options.corpus is Corpus.STDLIB:
    yield from write_stdlib_corpus(work / CHUNKS_FOLDER, options.validation_fraction)
  for domain, path in options.inputs:
    if path == "-":
      yield spool(domain, stdin, work / CHUNKS_FOLDER / "stdin")
    else:
      yield from list_files(domain, path)


def _task(options: PrepareOptions, work: pathlib.Path, chunks: Sequence[Chunk]) -> Task:
  """Return what to do with each chunk; the tokenizer is in its place afterwards."""
  reading = options.reading
  if options.corpus is Corpus.STDLIB:
    reading = dataclasses.replace(reading, text_field="text", split_field=SPLIT_FIELD)
  task = Task(
    root=str(work),
    reading=reading,
    tokenizer=BYTES,
    tokenizer_digest=BYTES,
    end_of_text=256,
    validation_fraction=options.validation_fraction,
    validation_max_bytes=options.validation_max_bytes,
  )
  file = work / TOKENIZER_NAME
  if options.train_bpe:
    train_bpe(_bpe_sample(chunks, task), options.train_bpe, file)
  elif options.tokenizer != BYTES:
    JsonTokenizer(options.tokenizer, options.end_of_text)  # Errors name the file that was given.
    shutil.copyfile(options.tokenizer, file)
  else:
    file.unlink(missing_ok=True)
    return task
  return dataclasses.replace(
    task,
    tokenizer=TOKENIZER_NAME,
    tokenizer_digest=hashlib.sha256(file.read_bytes()).hexdigest(),
    end_of_text=JsonTokenizer(file, options.end_of_text).end_of_text,
  )


def _bpe_sample(chunks: Sequence[Chunk], task: Task) -> Iterator[str]:
  """Yield training texts, as many from each chunk, up to a sample's size in all."""
  for chunk in chunks:
    left = _BPE_SAMPLE_BYTES // len(chunks)
    for text in chunks_lib.training_texts(chunk, task, chunks_lib.no_counts()):
      yield text
      left -= len(text)
      if left <= 0:
        break


class _Counters:
  """Documents and text bytes done so far by all workers, in shared memory."""

  def __init__(self, context: Any):
    self.documents, self.text_bytes = context.Value("q", 0), context.Value("q", 0)

  def add(self, documents: int, text_bytes: int) -> None:
    for value, more in (self.documents, documents), (self.text_bytes, text_bytes):
      with value.get_lock():
        value.value += more


_worker_counters: _Counters | None = None


def _start_worker(counters: _Counters) -> None:
  global _worker_counters
  _worker_counters = counters
  parent = multiprocessing.parent_process()
  if parent is not None:  # A killed parent cannot say so: its workers would wait for ever.
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: Any) -> None:
  parent.join()
  os._exit(1)


def _work(number: int, chunk: Chunk, task: Task) -> None:
  assert _worker_counters is not None
  process_chunk(number, chunk, task, _worker_counters.add)


def _process(
  chunks: Sequence[Chunk], task: Task, num_processes: int, report: Report
) -> list[ChunkResult]:
  """Process the chunks that no earlier run finished, and return the results of all."""
  todo = [n for n, chunk in enumerate(chunks) if chunks_lib.load_result(n, chunk, task) is None]
  total = sum(chunk.size for chunk in chunks)
  done = total - sum(chunks[n].size for n in todo)
  started, context = time.monotonic(), multiprocessing.get_context("spawn")
  counters = _Counters(context)
  # Starting a process takes a second or two, as long as a few megabytes of text.
  useful = math.ceil((total - done) / _BYTES_PER_PROCESS)
  with _executor(min(num_processes, len(todo), useful), context, counters) as executor:
    pending = {executor.submit(_work, n, chunks[n], task): chunks[n] for n in todo}
    try:
      while pending:
        finished, _ = concurrent.futures.wait(
          pending, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for future in finished:
          future.result()
          done += pending.pop(future).size
        seconds = time.monotonic() - started
        fraction = done / total if total else 1.0
        report(Progress(counters.documents.value, counters.text_bytes.value, fraction, seconds))
    except concurrent.futures.BrokenExecutor as error:
      raise OSError(
        "a worker process was killed (out of memory?): run the same command again, perhaps with "
        "fewer --num_processes; finished chunks are kept"
      ) from error
    except BaseException:
      executor.shutdown(cancel_futures=True)
      raise
  return [_finished(number, chunk, task) for number, chunk in enumerate(chunks)]


def _finished(number: int, chunk: Chunk, task: Task) -> ChunkResult:
  result = chunks_lib.load_result(number, chunk, task)
  assert result is not None, chunk
  return result


def _executor(workers: int, context: Any, counters: _Counters) -> concurrent.futures.Executor:
  if workers > 1:
    return concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (counters,))
  return concurrent.futures.ThreadPoolExecutor(1, "prepare", _start_worker, (counters,))


def _finish(results: Sequence[ChunkResult], chunks: Sequence[Chunk], task: Task) -> dict[str, Any]:
  """Join the chunks' results, write the validation shards, and return the index's fields."""
  tokenizer = task.load_tokenizer()
  domains: dict[str, Any] = {}
  all_counts: dict[str, Any] = {}
  for domain in sorted({chunk.domain for chunk in chunks}):
    own = [r for r, chunk in zip(results, chunks, strict=True) if chunk.domain == domain]
    counts = sum((result.counts for result in own), Counts())
    held_out = HeldOut(task.validation_max_bytes)
    for result in own:
      for key, text in result.held_out:
        held_out.add(key, text)
    file = f"{domain}/{VALIDATION}-00000.array_record"
    with ShardWriter(pathlib.Path(task.root), file, tokenizer) as writer:
      for group in chunks_lib.groups(text for _, text in held_out.kept()):
        writer.write(group)
    more = Counts(held_back=held_out.held_back, empty=writer.empty)
    all_counts[domain] = dataclasses.asdict(counts + more)
    lengths = np.concatenate([result.lengths for result in own])
    histogram = sum((result.byte_histogram for result in own), np.zeros(256, np.int64))
    shards = [result.shard for result in own]
    domains[domain] = {
      TRAIN: _split(task, domain, TRAIN, shards, lengths, histogram),
      VALIDATION: _split(
        task, domain, VALIDATION, [writer.shard], writer.lengths, writer.byte_histogram
      ),
    }
  if not any(splits[TRAIN]["documents"] for splits in domains.values()):
    shutil.rmtree(task.root)  # To go on from here would lead here.
    found = sum((result.counts for result in results), Counts())
    raise ValueError(
      f"the inputs hold no document to train on ({found.empty} empty, {found.skipped} not UTF-8, "
      f"{found.binary} binary files, the rest held out): give more text"
    )
  return {
    "format": data_index.FORMAT,
    "version": data_index.VERSION,
    "vocab_size": tokenizer.vocab_size,
    "end_of_text": tokenizer.end_of_text,
    "tokenizer": task.tokenizer,
    "dtype": token_dtype(tokenizer.vocab_size).name,
    "domains": domains,
    "counts": all_counts,
  }


def _split(
  task: Task,
  domain: str,
  split: str,
  shards: Sequence[Shard],
  lengths: np.ndarray,
  histogram: np.ndarray,
) -> dict[str, Any]:
  file = f"{domain}/{split}.lengths.npy"
  np.save(pathlib.Path(task.root, file), lengths)
  tokens, num_bytes = lengths.sum(axis=0, dtype=np.int64).tolist()
  return {
    "documents": len(lengths),
    "tokens": tokens,
    "bytes": num_bytes,
    "byte_histogram": histogram.tolist(),
    "lengths": file,
    "shards": [dataclasses.asdict(shard) for shard in shards if shard.documents],
  }


def _publish(fields: dict[str, Any], work: pathlib.Path, out: epath.Path) -> None:
  """Drop what the index does not name, write the index, and give the folder its final name."""
  named = {work / data_index.INDEX_NAME, work / TOKENIZER_NAME}
  for splits in fields["domains"].values():
    for split in splits.values():
      named |= {work / split["lengths"], *(work / shard["file"] for shard in split["shards"])}
  data_index.write_json(work / data_index.INDEX_NAME, fields)
  for path in work.glob("*/*"):
    if path not in named and path.parent.name != CHUNKS_FOLDER:
      path.unlink()
  if is_remote(out):
    shutil.rmtree(work / CHUNKS_FOLDER)
    _upload(work, out)
    shutil.rmtree(work)
    return
  if out.is_dir() and any(out.iterdir()):
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(out, old)
    os.replace(work, out)
    shutil.rmtree(old)
  else:
    os.replace(work, out)
  shutil.rmtree(out / CHUNKS_FOLDER)


def _upload(work: pathlib.Path, out: epath.Path) -> None:
  """Copy a prepared folder to a bucket, the index last: until then there is no prepared data."""
  if out.exists():
    (out / data_index.INDEX_NAME).unlink(missing_ok=True)
    out.rmtree()
  (out / _UPLOADING).write_text("mfjax prepare was interrupted here: run it again\n")
  upload(work, out, last=lambda path: path.name == data_index.INDEX_NAME)
  (out / _UPLOADING).unlink()
