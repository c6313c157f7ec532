"""Inputs to documents: text files, directories, globs, JSONL, Parquet; cut into chunks of work."""

import dataclasses
import enum
import glob
import gzip
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

TEXT, JSONL, PARQUET = "text", "jsonl", "parquet"
# Work per chunk, in input bytes: enough chunks to share out, and shards that are not too many.
CHUNK_BYTES_MIN, CHUNK_BYTES_MAX, CHUNKS = 4 << 20, 1 << 30, 256
_TEXT_FILES_PER_CHUNK = 4096


class EncodingErrors(enum.Enum):
  """What happens to text that is not UTF-8."""

  REPLACE = "replace"
  SKIP = "skip"


class Unusable(enum.Enum):
  """Why a document is left out; the values are the names in the index's counts."""

  SKIPPED = "skipped"
  EMPTY = "empty"
  BINARY = "binary"


@dataclasses.dataclass(frozen=True)
class Document:
  """One text, whether replacement characters stand in it, and what decides its split."""

  text: str
  replaced: bool
  key: str


@dataclasses.dataclass(frozen=True)
class InputFile:
  """One file of a domain; `version` changes when its content does."""

  domain: str
  path: str
  format: str
  size: int
  version: str


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Files of one domain and format, or the part [start, stop) of one file.

  The part counts bytes of a JSONL file and row groups of a Parquet file; a line belongs to the
  chunk in which it starts. stop < 0 means all.
  """

  files: tuple[InputFile, ...]
  start: int = 0
  stop: int = -1
  size: int = 0

  @property
  def domain(self) -> str:
    return self.files[0].domain


@dataclasses.dataclass(frozen=True)
class Reading:
  """How documents are read: fields of JSONL and Parquet, and what is not UTF-8."""

  text_field: str = "text"
  split_field: str = ""
  encoding_errors: EncodingErrors = EncodingErrors.REPLACE


def is_held_out(key: str, fraction: float) -> bool:
  """Return whether the documents of this key belong to the validation split.

  Decided by a hash: equal texts land in the same split, on every machine and in every order.
  """
  return key_hash(key) < fraction * 2**64


def key_hash(key: str) -> int:
  """Return a 64-bit hash that does not depend on the Python process."""
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])


def _format_of(path: str) -> str:
  name = path.lower()
  if name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")):
    return JSONL
  return PARQUET if name.endswith(".parquet") else TEXT


def list_files(domain: str, path: str) -> list[InputFile]:
  """Return the files of an input: a file, a directory (hidden files left out) or a glob.

  Raises:
    ValueError: there are none.
    OSError: one cannot be read.
  """
  if os.path.isdir(path):
    paths = []
    for folder, folders, names in os.walk(path, onerror=_raise):
      folders[:] = [name for name in folders if not name.startswith(".")]
      paths += [os.path.join(folder, name) for name in names if not name.startswith(".")]
  elif os.path.exists(path):
    paths = [path]
  else:
    paths = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
  if not paths:
    found = "holds no files" if os.path.isdir(path) else "does not exist"
    raise ValueError(f"input {domain}={path} {found}: give a file, a directory or a glob")
  files = []
  for name in sorted(paths):
    with open(name, "rb"):  # Unreadable files are found here, not after hours.
      status = os.stat(name)
    version = f"{status.st_size}-{status.st_mtime_ns}"
    files.append(InputFile(domain, name, _format_of(name), status.st_size, version))
  return files


def _raise(error: OSError) -> None:
  raise error


def spool(domain: str, stream: BinaryIO, path: pathlib.Path) -> InputFile:
  """Copy a stream to `path`, so that it can be read twice, and return it as an input.

  It is JSONL if its first line is a JSON object, and else one text.
  """
  digest, size, first_line = hashlib.sha256(), 0, b""
  with open(path, "wb") as file:
    while block := stream.read(1 << 20):
      file.write(block)
      digest.update(block)
      size += len(block)
      if b"\n" not in first_line:
        first_line += block
  try:
    is_object = isinstance(json.loads(first_line.partition(b"\n")[0]), dict)
  except (ValueError, RecursionError):
    is_object = False
  return InputFile(domain, str(path), JSONL if is_object else TEXT, size, digest.hexdigest())


def make_chunks(files: Iterable[InputFile]) -> list[Chunk]:
  """Cut inputs into chunks; the cut depends on the files alone, so it is the same every time.

  Raises:
    ValueError: a Parquet file is damaged.
  """
  files = list(files)
  per_chunk = sum(file.size for file in files) // CHUNKS
  per_chunk = min(max(per_chunk, CHUNK_BYTES_MIN), CHUNK_BYTES_MAX)
  chunks: list[Chunk] = []
  group: list[InputFile] = []
  for file in files:
    if file.format == TEXT:
      full = (
        sum(f.size for f in group) + file.size > per_chunk or len(group) >= _TEXT_FILES_PER_CHUNK
      )
      if group and (full or group[0].domain != file.domain):
        chunks.append(_text_chunk(group))
        group = []
      group.append(file)
    elif file.format == PARQUET:
      chunks += _parquet_chunks(file, per_chunk)
    elif file.path.endswith(".gz"):
      chunks.append(Chunk((file,), size=file.size))
    else:
      for start in range(0, file.size, per_chunk):
        stop = min(start + per_chunk, file.size)
        chunks.append(Chunk((file,), start, stop, stop - start))
  return chunks + ([_text_chunk(group)] if group else [])


def _text_chunk(group: list[InputFile]) -> Chunk:
  return Chunk(tuple(group), size=sum(file.size for file in group))


def _parquet_file(path: str) -> Any:
  import pyarrow.parquet  # Slow to import, and only Parquet needs it.

  try:
    return pyarrow.parquet.ParquetFile(path)
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f"{path} is no Parquet file: {error}") from error


def _parquet_chunks(file: InputFile, per_chunk: int) -> list[Chunk]:
  with _parquet_file(file.path) as parquet:
    sizes = [
      parquet.metadata.row_group(i).total_byte_size for i in range(parquet.metadata.num_row_groups)
    ]
  chunks, start = [], 0
  while start < len(sizes):
    stop, size = start + 1, sizes[start]
    while stop < len(sizes) and size + sizes[stop] <= per_chunk:
      size += sizes[stop]
      stop += 1
    chunks.append(Chunk((file,), start, stop, size))
    start = stop
  return chunks


def read_chunk(chunk: Chunk, reading: Reading) -> Iterator[Document | Unusable]:
  """Yield a chunk's documents in order, and in place of an unusable one the reason.

  Raises:
    ValueError: a record is malformed; names file and line or row.
    OSError: a file cannot be read.
  """
  for file in chunk.files:
    if file.format == TEXT:
      yield _read_text(file.path, reading)
    elif file.format == JSONL:
      yield from _read_jsonl(file.path, chunk.start, chunk.stop, reading)
    else:
      yield from _read_parquet(file.path, chunk.start, chunk.stop, reading)


def _read_text(path: str, reading: Reading) -> Document | Unusable:
  raw = pathlib.Path(path).read_bytes()
  if b"\0" in raw[:8192] and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
    return Unusable.BINARY
  return _document(raw.removeprefix(b"\xef\xbb\xbf"), None, reading)


def _document(raw: bytes | str, key: str | None, reading: Reading) -> Document | Unusable:
  """Return the document of raw text, which may not be UTF-8 (str: may hold lone surrogates)."""
  replaced = False
  try:
    text = raw.decode() if isinstance(raw, bytes) else raw
    text.encode()
  except UnicodeError:
    if reading.encoding_errors is EncodingErrors.SKIP:
      return Unusable.SKIPPED
    replaced = True
    if isinstance(raw, str):
      text = raw.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    else:
      text = raw.decode("utf-8", "replace")
  if not text.strip():
    return Unusable.EMPTY
  return Document(text, replaced, text if key is None else key)


def _read_jsonl(
  path: str, start: int, stop: int, reading: Reading
) -> Iterator[Document | Unusable]:
  opener = gzip.open if path.endswith(".gz") else open
  with opener(path, "rb") as file:
    if start:  # The line that holds byte start-1 belongs to the chunk before.
      file.seek(start - 1)
      file.readline()
    position, number = file.tell(), 0
    try:
      for line in file:
        if 0 <= stop <= position:
          return
        position += len(line)
        number += 1
        if line.strip():
          yield _jsonl_document(line, reading)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
      raise OSError(f"{path} is damaged after line {number}: {error}") from error
    except ValueError as error:
      number += _lines_before(path, start)
      raise ValueError(f"{path}, line {number}: {error}") from error


def _lines_before(path: str, start: int) -> int:
  """Return how many lines start before byte `start` of a plain file."""
  if not start:
    return 0
  lines, left = 0, start - 1
  with open(path, "rb") as file:
    while left and (block := file.read(min(left, 1 << 20))):
      lines += block.count(b"\n")
      left -= len(block)
  return lines + 1


def _jsonl_document(line: bytes, reading: Reading) -> Document | Unusable:
  replaced = False
  try:
    text = line.decode()
  except UnicodeDecodeError:
    if reading.encoding_errors is EncodingErrors.SKIP:
      return Unusable.SKIPPED
    text, replaced = line.decode("utf-8", "replace"), True
  try:
    record = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"not valid JSON ({error})") from error
  if not isinstance(record, dict):
    raise ValueError(f"a JSON {type(record).__name__}, not an object with {reading.text_field!r}")
  value = _field(record, reading.text_field, "--text_field")
  key = _field(record, reading.split_field, "--split_field") if reading.split_field else None
  document = _document(value, None if key is None else str(key), reading)
  if isinstance(document, Document) and replaced:
    return dataclasses.replace(document, replaced=True)
  return document


def _field(record: dict[str, Any], name: str, flag: str) -> Any:
  if name not in record:
    fields = ", ".join(sorted(record)) or "no fields"
    raise ValueError(f"no field {name!r} (it has {fields}): choose one with {flag}")
  value = record[name]
  if flag == "--text_field" and not isinstance(value, str):
    if value is None:
      return ""
    raise ValueError(f"field {name!r} is a {type(value).__name__}, not text: choose with {flag}")
  return value


def _read_parquet(
  path: str, start: int, stop: int, reading: Reading
) -> Iterator[Document | Unusable]:
  import pyarrow

  columns = [reading.text_field] + ([reading.split_field] if reading.split_field else [])
  with _parquet_file(path) as parquet:
    schema = parquet.schema_arrow
    for name in columns:
      if name not in schema.names:
        known = ", ".join(schema.names)
        raise ValueError(f"{path}: no column {name!r} (it has {known}): choose --text_field")
    kind = schema.field(reading.text_field).type
    if not any(
      test(kind)
      for test in (
        pyarrow.types.is_string,
        pyarrow.types.is_large_string,
        pyarrow.types.is_binary,
        pyarrow.types.is_large_binary,
      )
    ):
      raise ValueError(f"{path}: column {reading.text_field!r} holds {kind}, not text")
    groups = list(range(start, stop))
    try:
      # As binary: pyarrow does not check that a string column is UTF-8 until it converts it.
      for batch in parquet.iter_batches(1024, row_groups=groups, columns=columns):
        texts = batch.column(reading.text_field).cast(pyarrow.large_binary()).to_pylist()
        keys = batch.column(reading.split_field).to_pylist() if reading.split_field else texts
        for text, key in zip(texts, keys, strict=True):
          yield _document(text or b"", str(key) if reading.split_field else None, reading)
    except (pyarrow.ArrowException, OSError) as error:
      raise OSError(f"{path} is damaged: {error}") from error
