"""Tokenizer files that transformers' PreTrainedTokenizerFast loads."""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mfjax.data.index import DataIndex
from mfjax.data.tokenizer import BYTES, END_OF_TEXT_NAMES

# What transformers reads; an import keeps them, so that an export has them again.
KNOWN = (
  *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
  *("vocab.json", "merges.txt", "tokenizer.model"),
)


def write(index: DataIndex, out: pathlib.Path, max_length: int) -> None:
  """Write the tokenizer of prepared data into the directory `out`."""
  if index.tokenizer == BYTES:
    tokenizer = byte_tokenizer()
    (out / KNOWN[0]).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
  else:
    (out / KNOWN[0]).write_bytes((index.path / index.tokenizer).read_bytes())
    tokenizer = tokenizers.Tokenizer.from_file(str(out / KNOWN[0]))
  end_of_text = tokenizer.id_to_token(index.end_of_text)
  _write_json(
    out / KNOWN[1],
    {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "bos_token": end_of_text,
      "eos_token": end_of_text,
      "unk_token": end_of_text,
      # Batches for `generate` need one; attention masks make it count for nothing.
      "pad_token": end_of_text,
      "padding_side": "left",
      "clean_up_tokenization_spaces": False,
      "model_max_length": max_length,
    },
  )


def copy(source: pathlib.Path, out: pathlib.Path) -> list[str]:
  """Copy the tokenizer files that are in `source`; return their names."""
  found = [name for name in KNOWN if (source / name).is_file()]
  for name in found:
    shutil.copyfile(source / name, out / name)
  return found


def byte_tokenizer() -> tokenizers.Tokenizer:
  """Return the byte tokenizer: id b is the byte b, and 256 end-of-text.

  Byte-level BPE without merges. It names bytes by characters: printable ones by themselves, the
  others by 256, 257, ... in order (GPT-2's table).
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  names = {byte: chr(byte) for byte in printable}
  names |= {byte: chr(256 + number) for number, byte in enumerate(others)}
  vocabulary = {names[byte]: byte for byte in range(256)}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([END_OF_TEXT_NAMES[0]])
  return tokenizer


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
