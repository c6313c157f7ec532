import gzip
import io
import json
import pathlib
import tempfile

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfjax.data import documents
from mfjax.data.documents import (
  Document,
  EncodingErrors,
  Reading,
  Unusable,
  list_files,
  make_chunks,
  read_chunk,
  spool,
)

SKIP = Reading(encoding_errors=EncodingErrors.SKIP)


def read_all(path, reading=Reading()):  # noqa: B008 - frozen
  chunks = make_chunks(list_files("d", str(path)))
  return [document for chunk in chunks for document in read_chunk(chunk, reading)]


def texts(path, reading=Reading()):  # noqa: B008 - frozen
  return [d.text if isinstance(d, Document) else d for d in read_all(path, reading)]


def test_a_text_file_is_one_document(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
  assert texts(tmp_path / "a.txt") == ["one\n\ntwo\n"]


def test_directories_and_globs(tmp_path):
  for name in ("b.txt", "a.md", "sub/c.txt", ".hidden", ".git/d.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
  assert texts(tmp_path) == ["a.md", "b.txt", Unusable.BINARY, "sub/c.txt"]
  assert texts(tmp_path / "**" / "*.txt") == ["b.txt", "sub/c.txt"]


@pytest.mark.parametrize("name", ["absent.txt", "*.none"])
def test_absent_inputs_are_named(tmp_path, name):
  with pytest.raises(ValueError, match="does not exist"):
    list_files("d", str(tmp_path / name))
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="holds no files"):
    list_files("d", str(tmp_path / "empty"))


def test_text_that_is_not_utf8(tmp_path):
  (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
  (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n{"text": "a\\ud800b"}\n')
  assert read_all(tmp_path / "latin.txt") == [Document("\ufffd", True, "\ufffd")]
  assert [d.replaced for d in read_all(tmp_path / "latin.jsonl")] == [True, True]
  assert texts(tmp_path / "latin.jsonl") == ["\ufffd", "a\ufffdb"]
  assert texts(tmp_path, SKIP) == [Unusable.SKIPPED] * 3


@pytest.mark.parametrize(
  ("line", "said"),
  [
    ("{", "not valid JSON"),
    ("[1]", "a JSON list, not an object"),
    ('{"body": "x", "id": 3}', "no field 'text' .it has body, id.: choose one with --text_field"),
    ('{"text": 3}', "field 'text' is a int"),
    ("[" * 100_000, "not valid JSON"),
  ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_bad_line_is_named(tmp_path, line, said, suffix):
  file = tmp_path / f"a{suffix}"
  data = f'{{"text": "x"}}\n\n{line}\n'.encode()
  file.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
  with pytest.raises(ValueError, match=rf"a{suffix}, line 3: {said}"):
    read_all(file)


def test_jsonl_is_cut_at_lines_and_keeps_line_numbers(tmp_path, monkeypatch):
  monkeypatch.setattr(documents, "CHUNK_BYTES_MIN", 100)
  lines = [json.dumps({"text": f"{i} " + "x" * (i % 37)}) for i in range(200)]
  file = tmp_path / "a.jsonl"
  file.write_text("\n".join(lines))
  assert len(make_chunks(list_files("d", str(file)))) > 20
  assert texts(file) == [json.loads(line)["text"] for line in lines]
  lines[150] = "{"
  file.write_text("\n".join(lines))
  with pytest.raises(ValueError, match="line 151:"):
    read_all(file)


def test_parquet(tmp_path, monkeypatch):
  monkeypatch.setattr(documents, "CHUNK_BYTES_MIN", 100)
  file = tmp_path / "a.parquet"
  table = pyarrow.table({"body": ["a", "", None, "é" * 50], "n": [1, 2, 3, 4]})
  pyarrow.parquet.write_table(table, file, row_group_size=1)
  assert len(make_chunks(list_files("d", str(file)))) > 1
  found = texts(file, Reading(text_field="body"))
  assert found == ["a", Unusable.EMPTY, Unusable.EMPTY, "é" * 50]
  with pytest.raises(ValueError, match=r"no column 'text' .it has body, n."):
    read_all(file)
  with pytest.raises(ValueError, match="column 'n' holds int64, not text"):
    read_all(file, Reading(text_field="n"))


def test_damaged_files_are_named(tmp_path):
  whole = gzip.compress(b'{"text": "x"}\n' * 1000)
  (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(OSError, match=r"cut\.jsonl\.gz is damaged after line"):
    read_all(tmp_path / "cut.jsonl.gz")
  (tmp_path / "no.parquet").write_bytes(b"PAR1 no")
  with pytest.raises(ValueError, match=r"no\.parquet is no Parquet file"):
    read_all(tmp_path / "no.parquet")


def test_standard_input_is_jsonl_or_one_text(tmp_path):
  file = spool("d", io.BytesIO(b'{"text": "a"}\n{"text": "b"}\n'), tmp_path / "stdin")
  assert [d.text for d in read_chunk(make_chunks([file])[0], Reading())] == ["a", "b"]
  file = spool("d", io.BytesIO(b"one\ntwo"), tmp_path / "stdin")
  assert [d.text for d in read_chunk(make_chunks([file])[0], Reading())] == ["one\ntwo"]


@given(st.binary(max_size=300), st.sampled_from(["jsonl", "jsonl.gz", "parquet", "txt"]))
def test_any_bytes_give_documents_or_a_sentence(data, suffix):
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, f"a.{suffix}")
    file.write_bytes(data)
    try:
      found = read_all(file)
    except (ValueError, OSError) as error:
      assert str(file) in str(error)
    else:
      assert all(isinstance(d, (Document, Unusable)) for d in found)


json_values = st.recursive(
  st.none() | st.booleans() | st.floats() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
  ),
)


@given(st.lists(json_values | st.fixed_dictionaries({"text": json_values}), max_size=5))
def test_any_json_gives_documents_or_a_named_line(records):
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "a.jsonl")
    file.write_text("\n".join(map(json.dumps, records)))
    try:
      found = read_all(file)
    except ValueError as error:
      assert f"{file}, line " in str(error)
    else:
      assert len(found) == len(records)


def test_held_out_share_is_the_fraction():
  held_out = sum(documents.is_held_out(str(i), 0.1) for i in range(10_000))
  assert 900 < held_out < 1100
