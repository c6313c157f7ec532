import hashlib
import io
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mfjax.data import documents
from mfjax.data import prepare as prepare_lib
from mfjax.data.documents import EncodingErrors, Reading
from mfjax.data.index import TRAIN, VALIDATION, open_index
from mfjax.data.prepare import Corpus, PrepareOptions, prepare
from mfjax.data.shards import DocumentReader, ShardWriter
from mfjax.data.stdlib_corpus import without_repeats
from mfjax.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe


def run(folder, *inputs, **kwargs):
  pairs = tuple((domain, str(path)) for domain, path in inputs)
  return prepare(PrepareOptions(out=str(folder / "out"), inputs=pairs, **kwargs))


def texts_of(index, domain, split):
  tokenizer = load_tokenizer(index.path)
  reader = DocumentReader(index, split, [domain])
  text, first = reader.read(np.arange(index.split(domain, split).documents))
  bounds = [*first.tolist(), len(text) - 1]
  return [tokenizer.decode(text[a + 1 : b].tolist()) for a, b in itertools.pairwise(bounds)]


def files_of(folder):
  folder = pathlib.Path(folder)
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def jsonl(path, texts):
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return path


@pytest.fixture
def small_chunks(monkeypatch):
  monkeypatch.setattr(documents, "CHUNK_BYTES_MIN", 4000)
  monkeypatch.setattr(prepare_lib, "_BYTES_PER_PROCESS", 1)


WORDS = [f"document {i} " + "word " * (i % 50) + "é" * (i % 3) for i in range(1000)]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "json"])
def test_round_trip(tmp_path, tokenizer):
  kwargs = {"train_bpe": 400} if tokenizer == "bpe" else {}
  if tokenizer == "json":
    train_bpe(iter(WORDS), 300, tmp_path / "own.json")
    kwargs = {"tokenizer": str(tmp_path / "own.json")}
  index = run(tmp_path, ("d", jsonl(tmp_path / "a.jsonl", WORDS)), **kwargs)
  train, held_out = texts_of(index, "d", TRAIN), texts_of(index, "d", VALIDATION)
  assert train == [text for text in WORDS if text not in set(held_out)]
  assert sorted(train + held_out) == sorted(WORDS)
  assert 1 <= len(held_out) <= 30
  split = index.split("d", TRAIN)
  assert split.bytes == sum(len(text.encode()) for text in train)
  histogram = np.bincount(np.frombuffer("".join(train).encode(), np.uint8), minlength=256)
  assert split.byte_histogram == tuple(histogram)
  assert not list(tmp_path.glob(".*"))


def test_equal_texts_never_stand_in_both_splits(tmp_path):
  index = run(
    tmp_path,
    ("d", jsonl(tmp_path / "a.jsonl", WORDS * 2)),
    ("e", jsonl(tmp_path / "b.jsonl", WORDS)),
    validation_fraction=0.3,
  )
  train = {text for d in "de" for text in texts_of(index, d, TRAIN)}
  held_out = {text for d in "de" for text in texts_of(index, d, VALIDATION)}
  assert train
  assert held_out
  assert not train & held_out


def test_split_field_keeps_documents_together(tmp_path):
  file = tmp_path / "a.jsonl"
  file.write_text(
    "".join(json.dumps({"text": text, "site": i % 40}) + "\n" for i, text in enumerate(WORDS))
  )
  reading = Reading(split_field="site")
  index = run(tmp_path, ("d", file), validation_fraction=0.3, reading=reading)
  sites = [
    {WORDS.index(text) % 40 for text in texts_of(index, "d", split)}
    for split in (TRAIN, VALIDATION)
  ]
  assert all(sites)
  assert not sites[0] & sites[1]


def test_validation_cap_keeps_the_rest_out_of_training(tmp_path):
  file = jsonl(tmp_path / "a.jsonl", WORDS)
  index = run(tmp_path, ("d", file), validation_fraction=0.3, validation_max_bytes=3000)
  split = index.split("d", VALIDATION)
  assert 2500 < split.bytes <= 3000
  assert index.counts["d"].held_back > 100
  kept = index.split("d", TRAIN).documents + split.documents
  assert kept + index.counts["d"].held_back == len(WORDS)
  assert not any(documents.is_held_out(text, 0.3) for text in texts_of(index, "d", TRAIN))


def test_unusable_documents_are_counted(tmp_path):
  file = tmp_path / "a.jsonl"
  file.write_bytes(b'{"text": "good"}\n{"text": ""}\n{"text": "\xe9 bad"}\n{"text": null}\n')
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "x.bin").write_bytes(b"\0\1")
  inputs = [("d", file), ("d", tmp_path / "b")]
  counts = run(tmp_path, *inputs, validation_fraction=0.0).counts["d"]
  assert (counts.replaced, counts.skipped, counts.empty, counts.binary) == (1, 0, 2, 1)
  index = run(
    tmp_path,
    *inputs,
    validation_fraction=0.0,
    reading=Reading(encoding_errors=EncodingErrors.SKIP),
    overwrite=True,
  )
  assert (index.counts["d"].replaced, index.counts["d"].skipped) == (0, 1)
  assert texts_of(index, "d", TRAIN) == ["good"]


def test_standard_input(tmp_path):
  options = PrepareOptions(out=str(tmp_path / "out"), inputs=(("d", "-"),), validation_fraction=0.0)
  index = prepare(options, stdin=io.BytesIO(b'{"text": "a"}\n{"text": "b"}\n'))
  assert texts_of(index, "d", TRAIN) == ["a", "b"]


def test_processes_do_not_change_the_result(tmp_path, small_chunks):
  file = jsonl(tmp_path / "a.jsonl", WORDS)
  (tmp_path / "one").mkdir()
  (tmp_path / "two").mkdir()
  one = run(tmp_path / "one", ("d", file), train_bpe=300)
  seen = []
  options = PrepareOptions(
    out=str(tmp_path / "two/out"), inputs=(("d", str(file)),), train_bpe=300, num_processes=2
  )
  two = prepare(options, seen.append)
  assert len(one.split("d", TRAIN).shards) > 10
  assert files_of(one.path) == files_of(two.path)
  assert seen[-1].fraction == 1
  assert seen[-1].documents == two.split("d", TRAIN).documents


def test_finished_chunks_are_not_redone(tmp_path, small_chunks, monkeypatch):
  file = jsonl(tmp_path / "a.jsonl", WORDS)
  whole = run(tmp_path, ("d", file))
  expected = files_of(whole.path)
  os.rename(tmp_path / "out", tmp_path / "whole")
  done, process_chunk = [], prepare_lib.process_chunk

  def fail_at_5(number, *args):
    if number == 5:
      raise OSError(28, "No space left on device", "out")
    done.append(number)
    process_chunk(number, *args)

  monkeypatch.setattr(prepare_lib, "process_chunk", fail_at_5)
  with pytest.raises(OSError, match="No space left"):
    run(tmp_path, ("d", file))
  assert not (tmp_path / "out").exists()
  monkeypatch.setattr(
    prepare_lib, "process_chunk", lambda n, *args: (done.append(n), process_chunk(n, *args))
  )
  index = run(tmp_path, ("d", file))
  assert sorted(done) == list(range(len(whole.split("d", TRAIN).shards)))
  assert files_of(index.path) == expected


def test_chunks_of_other_options_are_redone(tmp_path, small_chunks, monkeypatch):
  file = jsonl(tmp_path / "a.jsonl", WORDS)
  expected = files_of(run(tmp_path, ("d", file), validation_fraction=0.2).path)
  os.rename(tmp_path / "out", tmp_path / "whole")
  with monkeypatch.context() as patch:
    patch.setattr(prepare_lib, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path, ("d", file), train_bpe=300)
  assert list(tmp_path.glob(".out.partial/.chunks/*.json"))
  assert files_of(run(tmp_path, ("d", file), validation_fraction=0.2).path) == expected


KILLED = """
import sys, time
from mfjax.data import documents, prepare as p
documents.CHUNK_BYTES_MIN = 4000
process_chunk = p.process_chunk
def slow(*args):
  process_chunk(*args)
  time.sleep(0.05)
p.process_chunk = slow
p.prepare(p.PrepareOptions(out=sys.argv[1], inputs=(("d", sys.argv[2]),)))
"""


@pytest.mark.parametrize("chunks_before", [1, 8])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, small_chunks, chunks_before):
  file = jsonl(tmp_path / "a.jsonl", WORDS)
  expected = files_of(run(tmp_path, ("d", file)).path)
  out = tmp_path / "killed"
  process = subprocess.Popen([sys.executable, "-c", KILLED, str(out), str(file)])
  work = tmp_path / ".killed.partial"
  while len(list(work.glob(".chunks/*.json"))) < chunks_before:
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not out.exists()
  assert work.exists()
  index = prepare(PrepareOptions(out=str(out), inputs=(("d", str(file)),)))
  assert files_of(index.path) == expected
  assert not work.exists()


def test_the_same_request_again_does_nothing(tmp_path):
  file = jsonl(tmp_path / "a.jsonl", WORDS)
  first = run(tmp_path, ("d", file))
  before = pathlib.Path(first.path, "index.json").stat().st_mtime_ns
  assert run(tmp_path, ("d", file)) == first
  assert pathlib.Path(first.path, "index.json").stat().st_mtime_ns == before
  with pytest.raises(ValueError, match="other inputs or with other options.*--overwrite"):
    run(tmp_path, ("d", file), train_bpe=300)
  assert open_index(first.path) == first
  assert run(tmp_path, ("d", file), train_bpe=300, overwrite=True).vocab_size == 300
  assert not list(tmp_path.glob(".*"))


def test_foreign_output_is_left_alone(tmp_path):
  file = jsonl(tmp_path / "a.jsonl", WORDS)
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "thesis.tex").write_text("x")
  with pytest.raises(ValueError, match="holds other files"):
    run(tmp_path, ("d", file))
  assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ("", "no document to train on"),
    ('{"text": "   "}\n', r"no document to train on .1 empty"),
    ('{"text": "x"}\n{"txt": "y"}\n', "line 2: no field 'text'"),
    ('{"text": "x"}\n{"text": "y"', "line 2: not valid JSON"),
  ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, content, said):
  (tmp_path / "a.jsonl").write_text(content)
  with pytest.raises(ValueError, match=said):
    run(tmp_path, ("d", tmp_path / "a.jsonl"))
  assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"inputs": ()}, "give --input"),
    ({"corpus": Corpus.STDLIB}, "give --input"),
    ({"inputs": (("../x", "a"),)}, "domain '../x': use letters"),
    ({"inputs": (("a", "-"), ("b", "-"))}, "once"),
    ({"out": ""}, "out is empty"),
    ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
    ({"validation_max_bytes": -1}, "validation_max_bytes=-1"),
    ({"num_processes": 0}, "num_processes=0"),
    ({"train_bpe": 100}, "train_bpe=100 must be at least 257"),
    ({"tokenizer": "gpt2"}, "tokenizer='gpt2' is neither"),
    ({"tokenizer": "x.json", "train_bpe": 300}, "give one"),
  ],
)
def test_impossible_options_are_named(change, said):
  with pytest.raises(ValueError, match=said):
    PrepareOptions(**({"out": "x", "inputs": (("d", "a"),)} | change))


class _OffByOne(ByteTokenizer):
  def encode_batch(self, texts):
    return [ids + 200 for ids in super().encode_batch(texts)]


def test_a_token_outside_the_vocabulary_is_never_stored(tmp_path):
  with pytest.raises(ValueError, match="token id 297 lies outside vocab_size=257"):  # noqa: SIM117
    with ShardWriter(tmp_path, "a.array_record", _OffByOne()) as writer:
      writer.write(["a"])
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
  folder = tmp_path_factory.mktemp("stdlib")
  options = PrepareOptions(
    out=str(folder / "out"),
    corpus=Corpus.STDLIB,
    validation_fraction=0.08,
    validation_max_bytes=200_000,
  )
  return prepare(options)


def test_repeated_text_is_said_once_and_where_it_is_held_out():
  keys = [str(i) for i in range(20)]
  held_out = {key for key in keys if documents.is_held_out(key, 0.3)}
  assert held_out
  assert max(held_out) > min(set(keys) - held_out)
  kept = dict(without_repeats({key: ["same", f"own {key}"] for key in keys}, 0.3))
  assert {key for key, text in kept.items() if "same" in text} == {min(held_out)}
  assert all(f"own {key}" in kept[key] for key in keys)


def test_stdlib_corpus_has_code_and_prose(stdlib):
  assert stdlib.domain_names == ["code", "prose"]
  assert stdlib.split("code", TRAIN).bytes > 5_000_000
  assert stdlib.split("prose", TRAIN).bytes > 1_000_000
  for domain in stdlib.domain_names:
    assert 50_000 < stdlib.split(domain, VALIDATION).bytes <= 200_000


def test_stdlib_held_out_files_and_their_docstrings_are_not_trained_on(stdlib):
  held_out = "\n".join(texts_of(stdlib, "code", VALIDATION))
  prose = [p for text in texts_of(stdlib, "prose", TRAIN) for p in text.split("\n\n")]
  flat = " ".join(held_out.split())
  leaked = [p for p in prose if len(p) > 200 and " ".join(p.split()) in flat]
  assert not leaked
  assert not set(texts_of(stdlib, "code", VALIDATION)) & set(texts_of(stdlib, "code", TRAIN))
  assert not set(texts_of(stdlib, "prose", VALIDATION)) & set(texts_of(stdlib, "prose", TRAIN))
