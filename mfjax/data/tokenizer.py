"""Tokenizers: built-in bytes, any Hugging Face tokenizer.json, and training a byte-level BPE."""

import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from mfjax.data import index as data_index
from mfjax.schema import unknown_name

BYTES = "bytes"
END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>")


class Tokenizer(Protocol):
  """Text to token ids and back; `end_of_text` is the id that separates documents."""

  @property
  def vocab_size(self) -> int: ...

  @property
  def end_of_text(self) -> int: ...

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Return each text's ids, int64, without end-of-text."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """Return the text of the ids; end-of-text is left out."""
    ...


class ByteTokenizer:
  """One token per UTF-8 byte, and 256 for end-of-text."""

  vocab_size = 257
  end_of_text = 256

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class JsonTokenizer:
  """A Hugging Face `tokenizer.json`."""

  def __init__(self, file: str | os.PathLike[str], end_of_text: str | int = ""):
    """Load the file; `end_of_text` is a token or its id (empty: the usual names are tried).

    Raises:
      ValueError: the file is no tokenizer.json, or it has no such end-of-text token.
    """
    text = epath.Path(file).read_bytes()
    try:
      self._tokenizer = tokenizers.Tokenizer.from_buffer(text)
    except Exception as error:  # The library raises bare Exception for what it cannot parse.
      raise ValueError(f"{file} is no tokenizer.json: {error}") from error
    # A file may ask for both: documents are never shortened here, nor padded.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    # Text that spells a special token stays text: it must not end a document.
    self._tokenizer.encode_special_tokens = True
    self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    if not self._vocabulary:
      raise ValueError(f"{file} has an empty vocabulary")
    self.vocab_size = max(self._vocabulary.values()) + 1
    self.end_of_text = self._find_end_of_text(file, end_of_text)

  def _find_end_of_text(self, file: str | os.PathLike[str], wanted: str | int) -> int:
    if isinstance(wanted, int):
      return wanted
    if wanted and wanted not in self._vocabulary:
      raise ValueError(f"{file}: {unknown_name(wanted, self._special_tokens(), 'end_of_text')}")
    for name in (wanted,) if wanted else END_OF_TEXT_NAMES:
      if name in self._vocabulary:
        return self._vocabulary[name]
    raise ValueError(
      f"{file} has none of the end-of-text tokens {', '.join(END_OF_TEXT_NAMES)}: "
      f"name one with --end_of_text; its special tokens: {', '.join(self._special_tokens())}"
    )

  def _special_tokens(self) -> list[str]:
    return [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int64) for encoding in encodings]

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode([i for i in ids if i != self.end_of_text])


def train_bpe(texts: Iterator[str], vocab_size: int, file: str | os.PathLike[str]) -> None:
  """Train a byte-level BPE (end-of-text included in `vocab_size`) and save it to `file`.

  Raises:
    ValueError: `vocab_size` cannot hold the 256 bytes and end-of-text.
  """
  if vocab_size < 257:
    raise ValueError(f"train_bpe={vocab_size} must be at least 257: 256 bytes and end-of-text")
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_TEXT_NAMES[0]],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  pathlib.Path(file).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
  """Return the tokenizer of the prepared data in directory `path`.

  Raises:
    ValueError: the directory is no prepared data, or tokenizer and index disagree.
  """
  index = data_index.open_index(path)
  if index.tokenizer == BYTES:
    tokenizer: Tokenizer = ByteTokenizer()
  else:
    tokenizer = JsonTokenizer(index.path / index.tokenizer, index.end_of_text)
  if (tokenizer.vocab_size, tokenizer.end_of_text) != (index.vocab_size, index.end_of_text):
    raise ValueError(
      f"{index.path}: its tokenizer has vocab_size={tokenizer.vocab_size}, "
      f"its index {index.vocab_size}: prepare the data again"
    )
  return tokenizer
