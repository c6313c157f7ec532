import copy
import json
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfjax.data.index import TRAIN, VALIDATION, open_index
from mfjax.data.pipeline import evaluation_batches


@pytest.fixture
def data(two_domains, tmp_path):
  """A copy to spoil."""
  return pathlib.Path(shutil.copytree(two_domains.path, tmp_path / "data"))


def test_counts_agree_with_the_lengths(two_domains):
  for domain in two_domains.domain_names:
    for name, split in two_domains.domains[domain].items():
      lengths = two_domains.lengths(domain, name)
      assert lengths[:, 0].sum() == split.tokens == split.bytes == sum(split.byte_histogram)
      assert len(lengths) == split.documents > 0


def test_digest_names_the_content_not_the_place(two_domains, data):
  assert open_index(data).digest == two_domains.digest


def test_directories_that_are_no_data(tmp_path):
  with pytest.raises(ValueError, match="data.path is empty"):
    open_index("")
  with pytest.raises(ValueError, match=r"no directory: run `mfjax prepare --out="):
    open_index(tmp_path / "absent")
  with pytest.raises(ValueError, match=r"holds no index\.json"):
    open_index(tmp_path)


@pytest.mark.parametrize("name", ["code/train-00000.array_record", "prose/validation.lengths.npy"])
def test_missing_and_truncated_files_are_named(data, name):
  content = (data / name).read_bytes()
  (data / name).write_bytes(content[:-1])
  with pytest.raises(ValueError, match=f"{name} is damaged: {len(content) - 1} bytes, not"):
    open_index(data)
  (data / name).unlink()
  with pytest.raises(ValueError, match=f"{name} is missing"):
    open_index(data)


def test_damaged_records_are_an_error_when_they_are_read(data):
  file = data / "code/validation-00000.array_record"
  content = np.frombuffer(file.read_bytes(), np.uint8).copy()
  content[100 : len(content) // 2] ^= 0x55
  file.write_bytes(content.tobytes())
  with pytest.raises(OSError, match="damaged"):
    list(evaluation_batches(open_index(data), "code", rows=4, sequence_length=64))


def test_another_version_is_refused(data):
  fields = json.loads((data / "index.json").read_text())
  (data / "index.json").write_text(json.dumps(fields | {"version": 99}))
  with pytest.raises(ValueError, match="version=99: this mfjax reads version 1"):
    open_index(data)


def test_unknown_domain_has_a_suggestion(two_domains):
  with pytest.raises(ValueError, match="did you mean 'prose'"):
    two_domains.split("pros", TRAIN)


def _paths(fields, prefix=()):
  """Yield the path of every value inside nested dicts and lists."""
  items = fields.items() if isinstance(fields, dict) else enumerate(fields)
  for key, value in items:
    yield (*prefix, key)
    if isinstance(value, (dict, list)) and key != "byte_histogram":
      yield from _paths(value, (*prefix, key))


@given(st.data())
def test_any_damage_to_the_index_is_a_sentence(two_domains, draw):
  fields = json.loads((two_domains.path / "index.json").read_text())
  *parents, last = draw.draw(st.sampled_from(list(_paths(fields))))
  spoilt = copy.deepcopy(fields)
  owner = spoilt
  for key in parents:
    owner = owner[key]
  if draw.draw(st.booleans()):
    del owner[last]
  else:
    owner[last] = draw.draw(st.sampled_from([None, -1, 1.5, "x", "../../x", [], {}, [1]]))
  with tempfile.TemporaryDirectory() as folder:
    data = pathlib.Path(folder)
    for domain in two_domains.domain_names:
      (data / domain).symlink_to(two_domains.path / domain)
    (data / "index.json").write_text(json.dumps(spoilt))
    try:
      index = open_index(data)
    except ValueError as error:
      assert str(data) in str(error)
    else:
      assert index.domains[index.domain_names[0]][VALIDATION].documents >= 0
