"""`mfjax bench data` measures the input pipeline."""

import re

import grain  # noqa: F401 - registers flags, which must outlive one command

from mfjax.data.prepare import PrepareOptions, prepare


def test_input_pipeline_meets_its_target(mfjax, tmp_path):
  done = mfjax("bench", "data", "--seconds=1")
  assert done.code == 0, done.err
  found = re.search(r"pipeline, read ahead +([\d.]+) +([\d.]+)", done.out)
  assert float(found[1]) > 2
  assert float(found[2]) > 0.96
  assert "peer: grain" in done.out


def test_own_data(mfjax, tmp_path):
  for number in range(300):
    (tmp_path / f"{number}.txt").write_text(f"text {number} " * 20)
  prepare(PrepareOptions(out="data", inputs=(("web", str(tmp_path / "*.txt")),)))
  done = mfjax("bench", "data", "--data=data", "--sequence_length=64", "--seconds=0.1")
  assert done.code == 0, done.err


def test_mistakes_are_sentences(mfjax):
  assert "did you mean 'data'" in mfjax("bench", "dat").err
  assert "name one benchmark: data" in mfjax("bench").err
