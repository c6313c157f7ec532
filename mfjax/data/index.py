"""What `mfjax prepare` leaves behind: ArrayRecord shards and the small `index.json` beside them.

A record is one document: its token ids, little-endian, without end-of-text. Layout:

    DIR/index.json                          vocabulary, domains, splits, shards, counts
    DIR/tokenizer.json                      unless the tokenizer is `bytes`
    DIR/DOMAIN/SPLIT-00000.array_record     documents
    DIR/DOMAIN/SPLIT.lengths.npy            uint32 [documents, 2]: tokens and UTF-8 bytes
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mfjax.schema import coerce, unknown_name
from mfjax.storage import check_access, is_remote

INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
FORMAT = "mfjax-data"
VERSION = 1
TRAIN, VALIDATION = "train", "validation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
  """One ArrayRecord file; `file` is relative to the index, `size` in bytes."""

  file: str
  documents: int
  size: int
  sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
  """One split of one domain; `bytes` and `byte_histogram` [256] are of its UTF-8 text."""

  documents: int
  tokens: int
  bytes: int
  byte_histogram: tuple[int, ...]
  lengths: str
  shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
  """Documents of a domain that were changed or left out.

  `replaced`: not UTF-8, kept with replacement characters; `skipped`: not UTF-8, left out;
  `empty`; `binary`: files that hold no text; `held_back`: held out, but beyond the cap.
  """

  replaced: int = 0
  skipped: int = 0
  empty: int = 0
  binary: int = 0
  held_back: int = 0

  def __add__(self, other: "Counts") -> "Counts":
    mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
    return Counts(**{name: mine[name] + theirs[name] for name in mine})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataIndex:
  """Prepared data; `digest` names its content, whatever the directory or the machine."""

  path: epath.Path
  digest: str
  vocab_size: int
  end_of_text: int
  tokenizer: str
  dtype: np.dtype
  domains: dict[str, dict[str, Split]]
  counts: dict[str, Counts]
  request: str

  @property
  def domain_names(self) -> list[str]:
    """Return the domains in the order of the batches' `domain_ids`."""
    return sorted(self.domains)

  def split(self, domain: str, split: str) -> Split:
    """Return one domain's split.

    Raises:
      ValueError: the domain is unknown (with the nearest known one).
    """
    if domain not in self.domains:
      raise ValueError(f"{self.path}: {unknown_name(domain, self.domains, 'domain')}")
    return self.domains[domain][split]

  def lengths(self, domain: str, split: str) -> np.ndarray:
    """Return uint32 [documents, 2]: tokens and UTF-8 bytes of each document.

    Memory-mapped on a local disk; read once from a bucket.
    """
    name = self.split(domain, split).lengths
    try:
      if is_remote(self.path):
        array = _remote_array(str(self.path / name), self.digest)
      else:
        array = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
      raise ValueError(f"{self.path / name} is damaged: prepare the data again") from error
    if array.shape != (self.split(domain, split).documents, 2):
      raise ValueError(f"{self.path / name} does not fit index.json: prepare the data again")
    return array


@functools.lru_cache(maxsize=64)
def _remote_array(path: str, _digest: str) -> np.ndarray:
  return np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False)


def content_digest(fields: Mapping[str, Any]) -> str:
  """Return the digest of an index's content: everything but who asked for it, and file names."""
  shards = {
    (domain, split): [shard["sha256"] for shard in part["shards"]]
    for domain, splits in fields["domains"].items()
    for split, part in splits.items()
  }
  content = [fields["vocab_size"], fields["end_of_text"], fields["dtype"], sorted(shards.items())]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  """Write a JSON file that is either whole or not there."""
  partial = path.with_name(f"{path.name}.{os.getpid()}")
  partial.write_text(json.dumps(fields, indent=1) + "\n")
  os.replace(partial, path)


def _split_from(fields: Any, name: str) -> Split:
  values = {k: coerce(fields[k], int, f"{name}.{k}") for k in ("documents", "tokens", "bytes")}
  histogram = tuple(coerce(n, int, f"{name}.byte_histogram") for n in fields["byte_histogram"])
  if len(histogram) != 256:
    raise ValueError(f"{name}.byte_histogram has {len(histogram)} entries, not 256")
  shards = tuple(
    Shard(
      file=coerce(shard["file"], str, f"{name}.file"),
      documents=coerce(shard["documents"], int, f"{name}.documents"),
      size=coerce(shard["size"], int, f"{name}.size"),
      sha256=coerce(shard["sha256"], str, f"{name}.sha256"),
    )
    for shard in fields["shards"]
  )
  if sum(shard.documents for shard in shards) != values["documents"]:
    raise ValueError(f"{name}.documents={values['documents']} is not the sum over its shards")
  lengths = coerce(fields["lengths"], str, f"{name}.lengths")
  return Split(**values, byte_histogram=histogram, lengths=lengths, shards=shards)


def _index_from(path: epath.Path, fields: Any) -> DataIndex:
  if fields["format"] != FORMAT:
    raise ValueError(f"format={fields['format']!r} is not {FORMAT!r}")
  if fields["version"] != VERSION:
    raise ValueError(f"version={fields['version']!r}: this mfjax reads version {VERSION}")
  if fields["dtype"] not in ("uint16", "uint32"):
    raise ValueError(f"dtype={fields['dtype']!r} must be uint16 or uint32")
  vocab_size = coerce(fields["vocab_size"], int, "vocab_size")
  end_of_text = coerce(fields["end_of_text"], int, "end_of_text")
  if not 0 <= end_of_text < vocab_size:
    raise ValueError(f"end_of_text={end_of_text} lies outside vocab_size={vocab_size}")
  return DataIndex(
    path=path,
    digest=content_digest(fields),
    vocab_size=vocab_size,
    end_of_text=end_of_text,
    tokenizer=coerce(fields["tokenizer"], str, "tokenizer"),
    dtype=np.dtype(fields["dtype"]).newbyteorder("<"),
    domains={
      domain: {split: _split_from(splits[split], f"{domain}.{split}") for split in _SPLITS}
      for domain, splits in fields["domains"].items()
    },
    counts={domain: Counts(**counts) for domain, counts in fields["counts"].items()},
    request=coerce(fields["request"], str, "request"),
  )


_SPLITS = (TRAIN, VALIDATION)


def open_index(path: epath.PathLike) -> DataIndex:
  """Open prepared data and check what is cheap to check: versions, counts, files' sizes.

  A `gs://` path is read through gcsfs and ArrayRecord.

  Raises:
    ValueError: the directory is missing, no prepared data, empty, or a file in it is missing,
      truncated or damaged; names it.
  """
  if not os.fspath(path):
    raise ValueError("data.path is empty: give a directory that `mfjax prepare` wrote")
  check_access(path, "data.path")
  path = epath.Path(path)
  if not path.is_dir():
    raise ValueError(
      f"data.path={str(path)!r} is no directory: run `mfjax prepare --out={path}` with --input "
      "or --corpus"
    )
  file = path / INDEX_NAME
  if not file.exists():
    raise ValueError(f"{path} holds no {INDEX_NAME}: it is not a directory `mfjax prepare` wrote")
  try:
    index = _index_from(path, json.loads(file.read_bytes()))
  except KeyError as error:
    raise ValueError(f"{file} is damaged (no {error}): prepare the data again") from error
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(f"{file} is damaged ({error}): prepare the data again") from error
  _check_files(index)
  return index


def _check_files(index: DataIndex) -> None:
  sizes: dict[str, int | None] = {}
  if index.tokenizer != "bytes":
    sizes[index.tokenizer] = None
  for splits in index.domains.values():
    for split in splits.values():
      sizes |= {shard.file: shard.size for shard in split.shards}
      # .npy: a 128-byte header, then the array.
      sizes[split.lengths] = 128 + 8 * split.documents
  for name, size in sizes.items():
    file = index.path / name
    try:
      found = file.stat().length
    except FileNotFoundError:
      raise ValueError(f"{file} is missing: prepare the data again") from None
    if size is not None and found != size:
      raise ValueError(f"{file} is damaged: {found} bytes, not {size}: prepare the data again")
  if not any(splits[TRAIN].documents for splits in index.domains.values()):
    raise ValueError(f"{index.path} holds no document to train on: prepare more text")
