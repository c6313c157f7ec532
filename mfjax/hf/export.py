"""A checkpoint of a workdir as a Hugging Face directory, streamed block by block, then proven."""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from mfjax.data.index import DataIndex, open_index
from mfjax.hf import directory, layout, model_card, published_config, safetensors, tokenizer_files
from mfjax.hf.progress import Report, Stage, silent
from mfjax.hf.source import Checkpoint, cast, open_checkpoint, row_blocks
from mfjax.hf.staging import check_absent, staged
from mfjax.hf.verify import NUM_THREADS, Verdict, verify
from mfjax.parallel import run_all

DTYPES = {
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype(np.float16),
  "float32": np.dtype(np.float32),
}
SHARD_BYTES = 5 * 10**9  # As Hugging Face's own tools cut.
IMPORTED = "imported"  # Of a workdir: what an import kept that is no tensor.
_MODEL_FILES = ("configuration_moduleformer.py", "modeling_moduleformer.py")
_ROOM = 64 * 2**20  # For headers, tokenizer and the other small files.


class DifferenceError(Exception):
  """What was written is not the model that was read; nothing was left behind."""


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
  with open_checkpoint(workdir, step) as source:
    dtype = dtype or source.config.compute_dtype.value
    shards = _plan(source, DTYPES[dtype])
    num_bytes = sum(_size(shard) for shard in shards.values())
    with staged(out, num_bytes + _ROOM) as pending:
      _write_shards(source, shards, pending, report)
      notes = _write_rest(source, shards, pending, dtype)
      verdict = _prove(source, pending, num_tokens, report)
      fields = {"step": source.opened.step, "dtype": dtype} | verdict.to_dict()
      (pending / "parity.json").write_text(json.dumps(fields, indent=2) + "\n")
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


def _write_shards(
  source: Checkpoint, shards: Mapping[str, _Shard], out: pathlib.Path, report: Report
) -> None:
  stage = Stage("writing", sum(_size(shard) for shard in shards.values()), report)
  writers: list[safetensors.Writer] = []

  def tasks() -> Iterator[Callable[[], None]]:
    for file, shard in shards.items():
      writer = safetensors.Writer(out / file, shard)
      writers.append(writer)
      for name in shard:
        tensor = source.tensors.get(name)
        if tensor is None:
          yield functools.partial(_write_buffer, writer, name, stage)
          continue
        for start, stop in row_blocks(tensor, source.rows_per_block(name)):
          yield functools.partial(_write_block, source, writer, name, start, stop, stage)

  try:
    run_all(tasks(), NUM_THREADS)
  finally:
    for writer in writers:
      writer.close()


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


def _prove(source: Checkpoint, out: pathlib.Path, num_tokens: int, report: Report) -> Verdict:
  """Read `out` back and compare it with the checkpoint."""
  written = directory.open_directory(out)
  try:
    verdict = verify(source, written, report, num_tokens=num_tokens)
  finally:
    written.close()
  if not verdict.is_equal:
    raise DifferenceError("; ".join(" ".join(line.split()) for line in verdict.lines()))
  return verdict


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
