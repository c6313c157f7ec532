"""Turn text into tokens that training reads at random: ArrayRecord shards and an index.

  mfjax prepare --out=data/books --input=books='texts/*.txt' --input=web=web.jsonl.gz
  mfjax prepare --out=data/stdlib --corpus=stdlib
  zcat web.jsonl.gz | mfjax prepare --out=data/web --input=web=-

An input is a file, a directory, a glob or '-' (standard input); JSONL (also .gz) and Parquet hold a
document per record, any other file is one document. The same command again, after an interruption,
goes on after the finished parts.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from mfjax.data.documents import EncodingErrors, Reading
from mfjax.data.index import DataIndex
from mfjax.data.prepare import Corpus, PrepareOptions, Progress, prepare
from mfjax.schema import coerce

_OUT = flags.DEFINE_string("out", None, "Directory to write, new or empty.")
_INPUT = flags.DEFINE_multi_string("input", [], "DOMAIN=PATH. May be repeated, also per domain.")
_CORPUS = flags.DEFINE_string(
  "corpus", "", "'stdlib': the running Python's library, as domains code and prose; no --input."
)
_TEXT_FIELD = flags.DEFINE_string(
  "text_field", "text", "JSONL field or Parquet column of the text."
)
_SPLIT_FIELD = flags.DEFINE_string(
  "split_field", "", "Field whose equal values go to the same split. Default: the text itself."
)
_TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", "'bytes' or a Hugging Face tokenizer.json.")
_TRAIN_BPE = flags.DEFINE_integer(
  "train_bpe", 0, "Train a byte-level BPE with this vocabulary size on the text."
)
_END_OF_TEXT = flags.DEFINE_string(
  "end_of_text", "", "The tokenizer's token between documents. Default: found by the usual names."
)
_VALIDATION_FRACTION = flags.DEFINE_float(
  "validation_fraction", None, "Share of documents held out. Default: 0.01, 0.08 for a corpus."
)
_VALIDATION_MAX_BYTES = flags.DEFINE_integer(
  "validation_max_bytes",
  None,
  "Cap on each domain's held-out text; what exceeds it is left out of training too; 0: no cap. "
  "Default: 64 MiB, 200 kB for a corpus.",
)
_ENCODING_ERRORS = flags.DEFINE_string(
  "encoding_errors", "replace", "Text that is not UTF-8: 'replace' characters or 'skip' it."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "0: one per processor core.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace data prepared with other options.")

# Enough held-out files of each domain for a steady figure, few enough to evaluate in seconds.
_CORPUS_DEFAULTS: dict[str, Any] = {"validation_fraction": 0.08, "validation_max_bytes": 200_000}


def main(argv: Sequence[str]) -> None:
  """Prepare what the flags say and print what came of it."""
  if len(argv) > 1:
    raise ValueError(f"unexpected argument {argv[1]!r}: write --input=DOMAIN={argv[1]}")
  options = _options()
  if options.num_processes > 1:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # The processes are the parallelism.
  print(summary(prepare(options, _reporter())))


def _options() -> PrepareOptions:
  corpus = coerce(_CORPUS.value, Corpus, "corpus")
  defaults: dict[str, Any] = _CORPUS_DEFAULTS if corpus is not Corpus.NONE else {}
  given = {flag.name: flag.value for flag in (_VALIDATION_FRACTION, _VALIDATION_MAX_BYTES)}
  inputs = []
  for text in _INPUT.value:
    domain, equals, path = text.partition("=")
    if not equals or not path:
      raise ValueError(f"--input={text}: write --input=DOMAIN=PATH, such as --input=web={text}")
    inputs.append((domain, path))
  return PrepareOptions(
    out=_OUT.value or "",
    inputs=tuple(inputs),
    corpus=corpus,
    reading=Reading(
      text_field=_TEXT_FIELD.value,
      split_field=_SPLIT_FIELD.value,
      encoding_errors=coerce(_ENCODING_ERRORS.value, EncodingErrors, "encoding_errors"),
    ),
    tokenizer=_TOKENIZER.value,
    train_bpe=_TRAIN_BPE.value,
    end_of_text=_END_OF_TEXT.value,
    num_processes=_NUM_PROCESSES.value or os.cpu_count() or 1,
    overwrite=_OVERWRITE.value,
    **defaults | {name: value for name, value in given.items() if value is not None},
  )


def _reporter() -> Callable[[Progress], None]:
  """Return a function that prints progress: a live line on a terminal, else one every 10 s."""
  live, last = sys.stderr.isatty(), 0.0

  def report(progress: Progress) -> None:
    nonlocal last
    finished = progress.fraction == 1
    if not (live or finished or progress.seconds - last >= 10):
      return
    last = progress.seconds
    left = progress.seconds / progress.fraction - progress.seconds if progress.fraction else 0
    text = (
      f"{progress.fraction:4.0%}  {progress.documents:,} documents  "
      f"{progress.text_bytes / 1e6 / max(progress.seconds, 1e-9):.1f} MB/s  "
      + (f"{left:.0f} s left" if progress.fraction else "")
    )
    print(
      f"\r\033[K{text}" if live else text,
      end="" if live and not finished else "\n",
      file=sys.stderr,
    )

  return report


def summary(index: DataIndex) -> str:
  """Return a table of the domains and splits, and a line about documents changed or left out."""
  width = max(len("domain"), *map(len, index.domains))
  lines = [f"{'domain':{width}}  {'split':10}  {'documents':>12}  {'tokens':>15}  {'bytes':>15}"]
  for domain in index.domain_names:
    for name, split in index.domains[domain].items():
      lines.append(
        f"{domain:{width}}  {name:10}  {split.documents:12,}  {split.tokens:15,}  {split.bytes:15,}"
      )
    counts = index.counts[domain]
    notes = [
      (counts.replaced, "not UTF-8, mended"),
      (counts.skipped, "not UTF-8, skipped"),
      (counts.empty, "empty, skipped"),
      (counts.binary, "binary files, skipped"),
      (counts.held_back, "held out beyond the cap, skipped"),
    ]
    if any(count for count, _ in notes):
      said = "; ".join(f"{count:,} {what}" for count, what in notes if count)
      lines.append(f"{domain:{width}}  {said}")
  lines.append(f"vocabulary {index.vocab_size:,} ({index.tokenizer}); written to {index.path}")
  return "\n".join(lines)
