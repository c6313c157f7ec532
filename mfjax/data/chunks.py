"""One chunk of input: read it, tokenise what is for training, put what is held out aside."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from mfjax.data.documents import Chunk, Document, Reading, is_held_out, key_hash, read_chunk
from mfjax.data.index import TRAIN, Counts, Shard, write_json
from mfjax.data.shards import ShardWriter
from mfjax.data.tokenizer import BYTES, ByteTokenizer, JsonTokenizer, Tokenizer

# Texts are tokenised in groups: enough for the tokenizer's threads, little in memory.
_GROUP_DOCUMENTS, _GROUP_CHARACTERS = 1024, 4 << 20
CHUNKS_FOLDER = ".chunks"

Count = Callable[[int, int], None]  # Told how many more documents and text bytes are done.


@dataclasses.dataclass(frozen=True)
class Task:
  """What is done to every chunk; `tokenizer_digest` names the tokenizer's content."""

  root: str
  reading: Reading
  tokenizer: str
  tokenizer_digest: str
  end_of_text: int
  validation_fraction: float
  validation_max_bytes: int

  def digest(self, chunk: Chunk) -> str:
    """Return a digest of all that the chunk's result depends on."""
    fields = dataclasses.asdict(dataclasses.replace(self, root="")) | dataclasses.asdict(chunk)
    return hashlib.sha256(repr(fields).encode()).hexdigest()

  def load_tokenizer(self) -> Tokenizer:
    if self.tokenizer == BYTES:
      return ByteTokenizer()
    return JsonTokenizer(pathlib.Path(self.root, self.tokenizer), self.end_of_text)


@dataclasses.dataclass(frozen=True)
class ChunkResult:
  """What a finished chunk left: its shard, lengths, held-out (key hash, text) pairs, counts."""

  shard: Shard
  lengths: np.ndarray
  byte_histogram: np.ndarray
  held_out: list[tuple[int, str]]
  counts: Counts


class HeldOut:
  """Validation texts in the order of their keys' hashes, as many as fit in `max_bytes` (0: all)."""

  def __init__(self, max_bytes: int):
    self._max_bytes, self._bytes = max_bytes, 0
    self._texts: list[tuple[int, str]] = []
    self.held_back = 0

  def add(self, key: int, text: str) -> None:
    self._texts.append((key, text))
    self._bytes += len(text.encode())
    if self._bytes > 2 * self._max_bytes + (1 << 20):
      self.kept()

  def kept(self) -> list[tuple[int, str]]:
    """Return what fits; the rest is dropped and counted in `held_back`."""
    kept, total = [], 0
    for key, text in sorted(self._texts):
      size = len(text.encode())
      if not self._max_bytes or total + size <= self._max_bytes:
        kept.append((key, text))
        total += size
    self.held_back += len(self._texts) - len(kept)
    self._texts, self._bytes = kept, total
    return kept


def groups(texts: Iterator[str]) -> Iterator[list[str]]:
  """Yield the texts in lists of a size that is good to tokenise at once."""
  group, characters = [], 0
  for text in texts:
    group.append(text)
    characters += len(text)
    if len(group) >= _GROUP_DOCUMENTS or characters >= _GROUP_CHARACTERS:
      yield group
      group, characters = [], 0
  if group:
    yield group


def training_texts(
  chunk: Chunk, task: Task, counts: dict[str, int], held_out: HeldOut | None = None
) -> Iterator[str]:
  """Yield a chunk's training texts; count what is unusable, collect what is held out."""
  for document in read_chunk(chunk, task.reading):
    if not isinstance(document, Document):
      counts[document.value] += 1
      continue
    counts["replaced"] += document.replaced
    if not is_held_out(document.key, task.validation_fraction):
      yield document.text
    elif held_out:
      held_out.add(key_hash(document.key), document.text)


def no_counts() -> dict[str, int]:
  return dataclasses.asdict(Counts())


def _stem(root: str, number: int) -> pathlib.Path:
  return pathlib.Path(root, CHUNKS_FOLDER, f"{number:05d}")


def process_chunk(number: int, chunk: Chunk, task: Task, count: Count) -> None:
  """Write the chunk's training shard, its lengths and held-out texts and, last, its record."""
  stem = _stem(task.root, number)
  stem.with_suffix(".json").unlink(missing_ok=True)
  counts, held_out = no_counts(), HeldOut(task.validation_max_bytes)
  file = f"{chunk.domain}/{TRAIN}-{number:05d}.array_record"
  with ShardWriter(pathlib.Path(task.root), file, task.load_tokenizer()) as writer:
    for group in groups(training_texts(chunk, task, counts, held_out)):
      count(len(group), writer.write(group))
  np.save(stem.with_suffix(".npy"), writer.lengths)
  kept = held_out.kept()
  stem.with_suffix(".jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in kept))
  counts["empty"] += writer.empty
  counts["held_back"] += held_out.held_back
  record = {
    "digest": task.digest(chunk),
    "shard": dataclasses.asdict(writer.shard),
    "byte_histogram": writer.byte_histogram.tolist(),
    "counts": counts,
  }
  write_json(stem.with_suffix(".json"), record)


def load_result(number: int, chunk: Chunk, task: Task) -> ChunkResult | None:
  """Return what an earlier `process_chunk` left, or None if it did not finish or was another's."""
  stem = _stem(task.root, number)
  try:
    record = json.loads(stem.with_suffix(".json").read_text())
    shard = Shard(**record["shard"])
    size = pathlib.Path(task.root, shard.file).stat().st_size
  except FileNotFoundError:
    return None
  if record["digest"] != task.digest(chunk) or size != shard.size:
    return None
  lines = stem.with_suffix(".jsonl").read_text().splitlines()
  return ChunkResult(
    shard,
    np.load(stem.with_suffix(".npy")),
    np.array(record["byte_histogram"]),
    [(key, text) for key, text in map(json.loads, lines)],
    Counts(**record["counts"]),
  )
