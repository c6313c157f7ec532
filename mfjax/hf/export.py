"""A checkpoint of a workdir as a Hugging Face directory, streamed block by block, then proven."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from mfjax.data.index import DataIndex, open_index
from mfjax.hf import directory, layout, model_card, published_config, safetensors, tokenizer_files
from mfjax.hf.progress import Report, Stage, silent, until
from mfjax.hf.source import Checkpoint, Confirm, cast, row_blocks, use_checkpoint
from mfjax.hf.staging import check_absent, staged
from mfjax.hf.verify import NUM_THREADS, Comparison, Verdict, with_logits
from mfjax.parallel import run_all

DTYPES = {
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype(np.float16),
  "float32": np.dtype(np.float32),
}
SHARD_BYTES = 2 * 10**9  # What is compared while the next is written.
IMPORTED = "imported"  # Of a workdir: what an import kept that is no tensor.
_MODEL_FILES = ("configuration_moduleformer.py", "modeling_moduleformer.py")
_ROOM = 64 * 2**20  # For headers, tokenizer and the other small files.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
  """What an export left: the step it is of, the verdict, and what a person should know."""

  step: int
  dtype: str
  num_bytes: int
  verdict: Verdict
  notes: tuple[str, ...]


def export(
  workdir: epath.PathLike,
  out: pathlib.Path,
  *,
  step: int | None = None,
  dtype: str = "",
  num_tokens: int = 256,
  report: Report = silent,
) -> Exported:
  """Write the newest good step of `workdir`, or `step`, as the directory `out`.

  Args:
    dtype: `bfloat16`, `float16` or `float32`; by default what the model computes in.
    num_tokens: of the comparison of logits; 0 leaves it out.

  Raises:
    ValueError: `workdir` has no such step or it is damaged, `out` exists, values do not fit
      `dtype`, or the disk is full.
    DifferenceError: `out` read back differs from the checkpoint.
  """
  check_absent(out)

  def use(source: Checkpoint, confirm: Confirm) -> Exported:
    return _export(source, out, dtype, num_tokens, report, confirm)

  return use_checkpoint(workdir, step, use)


def _export(
  source: Checkpoint,
  out: pathlib.Path,
  dtype: str,
  num_tokens: int,
  report: Report,
  confirm: Confirm,
) -> Exported:
  dtype = dtype or source.config.compute_dtype.value
  shards = _plan(source, DTYPES[dtype])
  num_bytes = sum(_size(shard) for shard in shards.values())
  with staged(out, num_bytes + _ROOM) as pending:
    with _writers(shards, pending) as writers:
      # The headers are there, so the directory can be opened, and read where it is written.
      notes = _write_rest(source, shards, pending, dtype)
      with contextlib.closing(directory.open_directory(pending)) as written:
        verdict = _write_and_prove(source, writers, written, report)
        confirm()
        verdict = with_logits(verdict, source, written, report, num_tokens).require_equal()
    fields = {"step": source.opened.step, "dtype": dtype} | verdict.to_dict()
    _write_json(pending / "parity.json", fields)
    card = model_card.text(source, dtype, verdict, out.name)
    (pending / "README.md").write_text(card, encoding="utf-8")
  return Exported(
    step=source.opened.step,
    dtype=dtype,
    num_bytes=num_bytes,
    verdict=verdict,
    notes=tuple(notes),
  )


_Shard = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


def _size(shard: _Shard) -> int:
  return sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in shard.values())


def _plan(source: Checkpoint, dtype: np.dtype) -> dict[str, _Shard]:
  """Return {file: {tensor: (dtype, shape)}} of all parameters and buffers, in order."""
  side = published_config.context_length({})
  buffers = dict(zip(layout.BUFFERS, (np.dtype(np.int8), dtype), strict=True))
  groups: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
  for tensor in source.tensors.values():
    made = {tensor.name: (dtype, tensor.shape)}
    if tensor.layer is not None and tensor.name.endswith("ln_1.bias"):
      layer = f"transformer.h.{tensor.layer}."
      made |= {layer + name: (kind, (side, side)) for name, kind in buffers.items()}
    if groups[-1] and _size(groups[-1]) + _size(made) > SHARD_BYTES:
      groups.append({})
    groups[-1] |= made
  if len(groups) == 1:
    return {"model.safetensors": groups[0]}
  return {
    f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
    for number, group in enumerate(groups, 1)
  }


@contextlib.contextmanager
def _writers(shards: Mapping[str, _Shard], out: pathlib.Path) -> Iterator[list[safetensors.Writer]]:
  with contextlib.ExitStack() as closing:
    yield [
      closing.enter_context(contextlib.closing(safetensors.Writer(out / file, shard)))
      for file, shard in shards.items()
    ]


def _write_and_prove(
  source: Checkpoint,
  writers: Iterable[safetensors.Writer],
  written: directory.Directory,
  report: Report,
) -> Verdict:
  """Write the shards one by one; read each back, and compare it, while the next is written.

  So what the comparison reads of the checkpoint was read a moment ago and is still in memory.
  """
  comparison, stop = Comparison(source, written), threading.Event()
  sizes = [entry.nbytes for writer in writers for entry in writer.entries.values()]
  total = sum(sizes) + comparison.num_bytes
  stage = Stage("writing and comparing", total, until(stop, report))

  def prove(writer: safetensors.Writer) -> None:
    writer.sync()
    comparison.run([name for name in writer.entries if name in source.tensors], stage, NUM_THREADS)

  with concurrent.futures.ThreadPoolExecutor(1, "prover") as prover:
    try:
      proofs = []
      for writer in writers:
        run_all(_write_tasks(source, writer, stage), NUM_THREADS)
        proofs.append(prover.submit(prove, writer))
        for proof in proofs[:-2]:  # One shard's proof may lag behind, not more.
          proof.result()
      for proof in proofs:
        proof.result()
    except BaseException:  # Ctrl-C as well.
      stop.set()
      raise
  return comparison.verdict().require_equal()


def _write_tasks(
  source: Checkpoint, writer: safetensors.Writer, stage: Stage
) -> Iterator[Callable[[], None]]:
  for name in writer.entries:
    tensor = source.tensors.get(name)
    if tensor is None:
      yield functools.partial(_write_buffer, writer, name, stage)
      continue
    for start, stop in row_blocks(tensor, source.rows_per_block(name)):
      yield functools.partial(_write_block, source, writer, name, start, stop, stage)


def _write_block(
  source: Checkpoint,
  writer: safetensors.Writer,
  name: str,
  start: int,
  stop: int,
  stage: Stage,
) -> None:
  values = cast(source.read(name, start, stop), writer.entries[name].dtype, name)
  writer.write(name, start, values)
  stage.add(values.nbytes)


def _write_buffer(writer: safetensors.Writer, name: str, stage: Stage) -> None:
  entry = writer.entries[name]
  values = layout.buffer(name, entry.shape[0], entry.dtype)
  writer.write(name, 0, values)
  stage.add(values.nbytes)


def _write_rest(
  source: Checkpoint, shards: Mapping[str, _Shard], out: pathlib.Path, dtype: str
) -> list[str]:
  """Write all but the tensors; return notes about what is missing."""
  if len(shards) > 1:
    total = {"total_size": sum(_size(shard) for shard in shards.values())}
    places = {name: file for file, shard in shards.items() for name in shard}
    _write_json(out / "model.safetensors.index.json", {"metadata": total, "weight_map": places})
  for name in _MODEL_FILES:
    shutil.copyfile(pathlib.Path(__file__).with_name(name), out / name)
  special, notes = _write_tokenizer(source, out)
  config = published_config.to_published(source.config, dtype=dtype)
  _write_json(out / directory.CONFIG_FILE, config | special)
  generation = {"pad_token_id": special["eos_token_id"], **special}
  _write_json(out / "generation_config.json", generation)
  return notes


def _write_tokenizer(source: Checkpoint, out: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
  """Write the tokenizer's files if they can be had; return its special ids, and notes."""
  kept = source.path / IMPORTED
  if kept.exists():
    published = json.loads((kept / directory.CONFIG_FILE).read_text())
    special = {key: published.get(key) for key in ("bos_token_id", "eos_token_id")}
    if tokenizer_files.copy(pathlib.Path(kept), out):
      return special, []
    return special, ["no tokenizer files: the import brought none"]
  index, problem = _open_data(source)
  if index is None:
    return {"bos_token_id": None, "eos_token_id": None}, [f"no tokenizer files: {problem}"]
  tokenizer_files.write(index, out, source.run_config.data.sequence_length)
  return {"bos_token_id": index.end_of_text, "eos_token_id": index.end_of_text}, []


def _open_data(source: Checkpoint) -> tuple[DataIndex | None, str]:
  try:
    return open_index(source.run_config.data.path), ""
  except ValueError as error:  # The run's data may be on another machine.
    return None, str(error)


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
