"""`mfjax prepare` as a command: what it prints, and what it answers to mistakes."""

import json
import subprocess
import sys

import grain  # noqa: F401 - registers flags, which must outlive one command
import pytest


def test_prepares_and_says_so(mfjax, tmp_path):
  lines = [json.dumps({"body": f"text {i}"}) for i in range(300)]
  (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"body": ""}']))
  command = ("prepare", "--out=data", "--input=web=a.jsonl", "--text_field=body")
  done = mfjax(*command, "--num_processes=1")
  assert done.code == 0
  assert "web     train" in done.out
  assert "1 empty, skipped" in done.out
  assert "written to data" in done.out
  assert "100%" in done.err
  assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "data"}


def test_reads_standard_input(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "launch.main", "prepare", f"--out={tmp_path}/data", "--input=web=-"],
    input=b"".join(b'{"text": "text %d"}\n' % i for i in range(200)),
    capture_output=True,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "data" / "index.json").exists()


@pytest.mark.parametrize(
  ("args", "said"),
  [
    ([], "out is empty"),
    (["--out=data"], "give --input=NAME=PATH"),
    (["--out=data", "--input=a.txt"], "write --input=DOMAIN=PATH"),
    (["--out=data", "--input=web="], "write --input=DOMAIN=PATH"),
    (["--out=data", "a.txt"], "unexpected argument 'a.txt'"),
    (["--out=data", "--input=web=absent"], "web=absent does not exist"),
    (["--out=data", "--input=web=empty.txt"], "no document to train on (1 empty"),
    (["--out=data", "--input=web=bad.jsonl"], "bad.jsonl, line 2: not valid JSON"),
    (["--out=data", "--input=web=bad.parquet"], "bad.parquet is no Parquet file"),
    (["--out=data", "--input=web=bad.jsonl.gz"], "bad.jsonl.gz is damaged"),
    (["--out=a.txt", "--input=web=a.txt"], "out='a.txt' is a file"),
    (["--out=data", "--corpus=stdlb"], "did you mean 'stdlib'"),
    (["--out=data", "--input=web=a.txt", "--encoding_errors=ignore"], "unknown choice 'ignore'"),
    (["--out=data", "--input=web=a.txt", "--tokenizer=gpt2"], "neither 'bytes' nor"),
    (["--out=data", "--input=web=a.txt", "--tokenizer=a.txt"], "a.txt is no tokenizer.json"),
    (["--out=data", "--input=web=a.txt", "--train_bpe=9"], "at least 257"),
    (["--out=data", "--input=web=a.txt", "--validation_fraction=2"], "validation_fraction=2.0"),
  ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(mfjax, tmp_path, args, said):
  (tmp_path / "a.txt").write_text("text")
  (tmp_path / "empty.txt").write_text("")
  (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": \n')
  (tmp_path / "bad.parquet").write_text("PAR1")
  (tmp_path / "bad.jsonl.gz").write_bytes(b"\x1f\x8b\x08 no")
  before = {path.name for path in tmp_path.iterdir()}
  done = mfjax("prepare", *args)
  assert done.code == 2
  assert done.out == ""
  assert said in done.err
  assert done.err.count("\n") <= 2  # A line of progress may come before.
  assert "Traceback" not in done.err
  assert {path.name for path in tmp_path.iterdir()} == before
