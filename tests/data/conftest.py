"""Prepared data that the tests share."""

import json
import pathlib

import numpy as np
import pytest

from mfjax.data.index import DataIndex
from mfjax.data.prepare import PrepareOptions, prepare


def write_jsonl(path: pathlib.Path, texts: list[str]) -> pathlib.Path:
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return path


def random_texts(seed: int, count: int, mean: float, letters: str) -> list[str]:
  rng = np.random.default_rng(seed)
  lengths = 1 + rng.lognormal(np.log(mean), 1.0, count).astype(int)
  return ["".join(rng.choice(list(letters), length)) for length in lengths]


@pytest.fixture(scope="session")
def two_domains(tmp_path_factory: pytest.TempPathFactory) -> DataIndex:
  """Bytes; 'code' in capitals with some long documents, 'prose' in small letters."""
  folder = tmp_path_factory.mktemp("two_domains")
  code = write_jsonl(folder / "code.jsonl", random_texts(1, 150, 80, "ABCDEFGHIJ"))
  prose = write_jsonl(folder / "prose.jsonl", random_texts(2, 400, 20, "abcdefghij"))
  inputs = (("code", str(code)), ("prose", str(prose)))
  options = PrepareOptions(out=str(folder / "data"), inputs=inputs, validation_fraction=0.1)
  return prepare(options)
