import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mfjax.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer, train_bpe

TEXTS = ["the cat sat on the mat", "def f(x):\n  return x", "naïve 日本 🙂"] * 20
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
  file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
  train_bpe(iter(TEXTS), 290, file)
  return file


@given(any_text)
def test_bytes_round_trip(text):
  tokenizer = ByteTokenizer()
  (ids,) = tokenizer.encode_batch([text])
  assert ids.tolist() == list(text.encode())
  assert tokenizer.decode([tokenizer.end_of_text, *ids]) == text


@given(any_text)
def test_bpe_round_trip(bpe_file, text):
  tokenizer = JsonTokenizer(bpe_file)
  (ids,) = tokenizer.encode_batch([text])
  assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text
  assert np.all(ids < tokenizer.vocab_size)


def test_bpe_learns_and_is_deterministic(bpe_file, tmp_path):
  again = tmp_path / "tokenizer.json"
  train_bpe(iter(TEXTS), 290, again)
  assert again.read_bytes() == bpe_file.read_bytes()
  tokenizer = JsonTokenizer(bpe_file)
  assert tokenizer.vocab_size == 290
  assert len(tokenizer.encode_batch([TEXTS[0]])[0]) < len(TEXTS[0])


def test_text_that_spells_end_of_text_does_not_end_a_document(bpe_file):
  tokenizer = JsonTokenizer(bpe_file)
  (ids,) = tokenizer.encode_batch(["a<|endoftext|>b"])
  assert tokenizer.end_of_text not in ids
  assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_truncation_in_the_file_is_not_applied(bpe_file, tmp_path):
  library = tokenizers.Tokenizer.from_file(str(bpe_file))
  library.enable_truncation(4)
  library.enable_padding(length=4)
  library.save(str(tmp_path / "short.json"))
  short = JsonTokenizer(tmp_path / "short.json").encode_batch([TEXTS[1], "a"])
  assert [len(ids) for ids in short] == [
    len(ids) for ids in JsonTokenizer(bpe_file).encode_batch([TEXTS[1], "a"])
  ]


def _renamed(bpe_file, tmp_path, name):
  fields = json.loads(bpe_file.read_text().replace("<|endoftext|>", name))
  file = tmp_path / "renamed.json"
  file.write_text(json.dumps(fields))
  return file


def test_end_of_text_is_found_named_or_missed(bpe_file, tmp_path):
  assert JsonTokenizer(_renamed(bpe_file, tmp_path, "</s>")).end_of_text == 0
  odd = _renamed(bpe_file, tmp_path, "<|stop|>")
  assert JsonTokenizer(odd, "<|stop|>").end_of_text == 0
  with pytest.raises(ValueError, match=r"--end_of_text.*<\|stop\|>"):
    JsonTokenizer(odd)
  with pytest.raises(ValueError, match=r"did you mean '<\|stop\|>'"):
    JsonTokenizer(odd, "<|stpo|>")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 3}', b"\xff\xfe", b"[]"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
  file = tmp_path / "tokenizer.json"
  file.write_bytes(content)
  with pytest.raises(ValueError, match=r"tokenizer\.json (is no|has an empty)"):
    JsonTokenizer(file)


def test_too_small_a_vocabulary_is_refused(tmp_path):
  with pytest.raises(ValueError, match="at least 257"):
    train_bpe(iter(TEXTS), 256, tmp_path / "tokenizer.json")


def test_load_tokenizer_of_prepared_data(two_domains):
  assert load_tokenizer(two_domains.path).vocab_size == 257
