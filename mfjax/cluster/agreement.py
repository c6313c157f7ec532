"""Whether all processes are about to compute the same thing: config, code, data, tokenizer."""

import collections
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import mfjax
import pallas_kernels
from mfjax import workdir
from mfjax.cluster.processes import Process
from mfjax.cluster.store import Store, settle
from mfjax.config import RunConfig
from mfjax.data.index import DataIndex
from mfjax.schema import flatten

Facts = Mapping[str, Mapping[str, Any]]

_NAMED_VALUES = 3
_NAMED_RANKS = 8


def facts(config: RunConfig, index: DataIndex) -> Facts:
  """Return what must be the same on all processes, by kind; JSON-able.

  Not the data's path: hosts may keep the same data in different places.
  """
  leaves = flatten(config.to_dict())
  del leaves["data.path"]
  tokenizer = index.path / index.tokenizer
  digest = _digest(tokenizer.read_bytes()) if index.tokenizer != "bytes" else "bytes"
  return {
    "config": leaves,
    "code": workdir.versions() | {"source": source_digest()},
    "data": {"digest": index.digest},
    "tokenizer": {"digest": digest},
  }


@functools.cache
def source_digest() -> str:
  """Return the digest of the Python files that computations come from."""
  found = hashlib.sha256()
  for package in (mfjax, pallas_kernels):
    root = pathlib.Path(package.__path__[0])
    for file in sorted(root.rglob("*.py")):
      found.update(str(file.relative_to(root)).encode())
      found.update(hashlib.sha256(file.read_bytes()).digest())
  return found.hexdigest()[:16]


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]


def check(
  store: Store, process: Process, mine: Facts, timeout: float, name: str = "agreement"
) -> None:
  """Compare `facts` with those of all other processes; `name` can be used once.

  Raises:
    ValueError: a process differs from most; the same sentence on every process, with its rank.
    TimeoutError: a process did not come to compare in time.
  """
  value = {"host": process.host, "facts": {kind: dict(leaves) for kind, leaves in mine.items()}}
  problem = settle(store, process, name, value, differences, timeout)
  if problem:
    raise ValueError(problem)


def differences(values: Sequence[Mapping[str, Any]]) -> str:
  """Return a sentence about the ranks whose facts differ from those of most ranks, or ''.

  Without a majority, the lowest rank's facts are what the others are held against.
  """
  sentences = []
  for kind in values[0]["facts"]:
    texts = [json.dumps(value["facts"][kind], sort_keys=True) for value in values]
    usual, _ = collections.Counter(texts).most_common(1)[0]  # The first of equally frequent ones.
    others = [rank for rank, text in enumerate(texts) if text != usual]
    if others:
      ranks = ", ".join(str(Process(r, 0, values[r]["host"]).label) for r in others[:_NAMED_RANKS])
      more = f" and {len(others) - _NAMED_RANKS} more" if len(others) > _NAMED_RANKS else ""
      detail = _detail(json.loads(texts[others[0]]), json.loads(usual))
      sentences.append(f"{ranks}{more}: another {kind} than the others ({detail})")
  if not sentences:
    return ""
  return (
    f"the processes do not agree: {'; '.join(sentences)}: "
    "start all of them with the same command, code and data"
  )


def _detail(mine: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
  names = [n for n in dict.fromkeys([*mine, *usual]) if mine.get(n) != usual.get(n)]
  shown = [f"{n} {mine.get(n)!r} != {usual.get(n)!r}" for n in names[:_NAMED_VALUES]]
  return ", ".join(shown) + (", ..." if len(names) > _NAMED_VALUES else "")
