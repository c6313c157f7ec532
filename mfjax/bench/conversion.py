"""Export and import of a random checkpoint: speed beside the disk's own, and peak memory.

A conversion reads its input and writes its output. The disk's copy speed for the same bytes is
that of one loop that reads all of the input's tensor files, from the first byte to the last, and
writes as many bytes as the output's tensor files have, ending with fsync: what `cp` does, and
exactly `cp` where both sides have one dtype. A share of 60 % means that the conversion, with
starting Python, checking digests, casting, reading back and comparing, took 1 / 0.6 times as long
as that loop. Both begin with nothing of the input in the page cache. The loop runs before and after
the conversion, because a shared disk is not equally fast all the time; the mean of both counts.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mfjax import model, workdir
from mfjax.checkpoint import Checkpointer
from mfjax.config import RunConfig
from mfjax.hf.export import DTYPES
from mfjax.hf.import_checkpoint import block_arrays
from mfjax.hf.layout import Keys
from mfjax.stored_arrays import Index

# Dtype of the checkpoint that is exported, in bfloat16, and imported again in that dtype.
SECTIONS = ("float32", "bfloat16")
_EXPORT_DTYPE = "bfloat16"  # What released models are stored in.
_BUFFER_BYTES = 16 * 2**20
_POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One conversion: bytes of tensor files, seconds, and the most memory that it held.

  `bytes_from_disk` were really read: more than `bytes_read` where what is read again, to be
  digested or compared, was no longer in memory. `largest_tensor` is what the largest stacked tensor
  takes in the checkpoint.
  """

  job: str
  bytes_read: int
  bytes_written: int
  seconds: float
  copies_seconds: tuple[float, float]
  peak_bytes: int
  bytes_from_disk: int
  largest_tensor: int
  load_average: float

  @property
  def copy_seconds(self) -> float:
    """Return the mean of the disk's two copies, before and after."""
    return sum(self.copies_seconds) / len(self.copies_seconds)

  @property
  def share_of_copy(self) -> float:
    return self.copy_seconds / self.seconds


def measure(
  run_config: RunConfig,
  section: str,
  folder: pathlib.Path,
  command: Sequence[str],
  say: Callable[[str], None],
) -> Iterator[Row]:
  """Make a random checkpoint of `section`'s dtype in `folder`; yield its export and its import.

  Args:
    command: what runs `mfjax`, to which the arguments are added.
    say: told what is done next.

  Raises:
    ValueError: a conversion failed, or the disk is too small.
  """
  shapes = jax.tree.leaves_with_path(model.abstract_params(run_config.model))
  by_keys = {tuple(key.key for key in path): leaf.shape for path, leaf in shapes}
  draw = functools.partial(_draw, by_keys, DTYPES[section])
  arrays = block_arrays(run_config, None, DTYPES[section], draw)
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(arrays)]
  num_parameters = sum(sizes) // DTYPES[section].itemsize
  _check_space(folder, sum(sizes), DTYPES[section].itemsize)
  source, out, back = folder / "checkpoint", folder / "exported", folder / "imported"
  say(f"drawing {sum(sizes) / 1e9:.2f} GB of random parameters in {section}")
  _write_checkpoint(source, run_config, arrays)
  jobs = (
    (f"export {section} to {_EXPORT_DTYPE}", source, out, "export", _EXPORT_DTYPE),
    (f"import {_EXPORT_DTYPE} to {section}", out, back, "import", section),
  )
  for job, read, written, name, to in jobs:
    flags = ["--parity_tokens=0"] if name == "export" else []
    args = [*command, name, str(read), str(written), f"--dtype={to}", *flags]
    files = _tensor_files(read)
    size = num_parameters * DTYPES[to].itemsize
    say(f"copying the same bytes: {_size(files) / 1e9:.2f} GB read, {size / 1e9:.2f} GB written")
    before = _copy(files, size, folder / "copy")
    load = os.getloadavg()[0]
    say(job)
    _forget(files)
    seconds, peak, from_disk = _run(args)
    say("copying again")
    after = _copy(files, size, folder / "copy")
    yield Row(
      job=job,
      bytes_read=_size(files),
      bytes_written=_size(_tensor_files(written)),
      seconds=seconds,
      copies_seconds=(before, after),
      peak_bytes=peak,
      bytes_from_disk=from_disk,
      largest_tensor=max(sizes),
      load_average=load,
    )
    shutil.rmtree(read)
  shutil.rmtree(back)


def _check_space(folder: pathlib.Path, num_bytes: int, itemsize: int) -> None:
  exported = num_bytes // itemsize * DTYPES[_EXPORT_DTYPE].itemsize
  needed, free = exported + 2 * num_bytes, shutil.disk_usage(folder).free
  if free < needed:
    raise ValueError(
      f"{folder} has {free / 1e9:.1f} GB free and this takes {needed / 1e9:.1f}: choose another "
      "disk or a smaller --config"
    )


def _write_checkpoint(path: pathlib.Path, run_config: RunConfig, arrays: Any) -> None:
  workdir.write_config(path, run_config)
  state = {"params": arrays, "step": np.int32(1), "skipped": np.int32(0)}
  checkpointer = Checkpointer(path, run_config.checkpoint, run_config)
  with contextlib.closing(checkpointer):
    checkpointer.save(1, state, {}, force=True)


def _draw(shapes: Mapping[Keys, tuple[int, ...]], dtype: np.dtype, keys: Keys, index: Index) -> Any:
  """Return a block of a parameter: the same values for the same block, whoever asks first."""
  shape = shapes[keys]
  lead = sum(isinstance(i, int) for i in index)
  rows = [i.stop - i.start for i in index if isinstance(i, slice)]
  block = (*rows, *shape[lead + len(rows) :])
  place = [i if isinstance(i, int) else i.start for i in index]
  seed = np.random.SeedSequence([zlib.crc32(".".join(keys).encode()), *place])
  rng = np.random.Generator(np.random.SFC64(seed))
  values = rng.standard_normal(block, np.float32)
  if len(shape) - lead > 1:  # A matrix, or several: outputs about as large as inputs.
    values *= np.float32(min(shape[-2:]) ** -0.5)
  else:  # Norms' weights and biases.
    values *= np.float32(0.1)
    if keys[-1] == "weight":
      values += 1
  return values.astype(dtype)


def _tensor_files(path: pathlib.Path) -> list[pathlib.Path]:
  """Return the files that hold tensors: safetensors, or a checkpoint's array data."""
  checkpoints = path / "checkpoints"
  found = checkpoints.glob("*/params/**/*") if checkpoints.exists() else path.glob("*.safetensors")
  return sorted(file for file in found if file.is_file())


def _size(files: Iterable[pathlib.Path]) -> int:
  return sum(file.stat().st_size for file in files)


def _forget(files: Iterable[pathlib.Path]) -> None:
  """Let the page cache forget files: what is read next comes from the disk."""
  for file in files:
    with file.open("rb") as opened:
      os.fsync(opened.fileno())
      os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy(files: Sequence[pathlib.Path], num_bytes: int, target: pathlib.Path) -> float:
  """Read all of `files` and write `num_bytes`, evenly between the reads; return the seconds."""
  _forget(files)
  total, read, written = _size(files), 0, 0
  buffer = memoryview(bytearray(_BUFFER_BYTES))
  begin = time.perf_counter()
  with target.open("wb", buffering=0) as out:
    for file in files:
      with file.open("rb", buffering=0) as source:
        while count := source.readinto(buffer):
          read += count
          due = num_bytes * read // total - written
          while due > 0:
            done = out.write(buffer[: min(due, count)])
            due, written = due - done, written + done
    os.fsync(out.fileno())
  seconds = time.perf_counter() - begin
  target.unlink()
  return seconds


def _run(args: Sequence[str]) -> tuple[float, int, int]:
  """Run a command; return its seconds, its peak of resident memory and its bytes from the disk.

  Both are the kernel's own counts, which never fall: only what a process adds in its last moment is
  missed. `ru_maxrss` would begin with the memory of the process that started it.
  """
  begin, peak, from_disk = time.perf_counter(), 0, 0
  with tempfile.TemporaryFile("w+") as log, subprocess.Popen(args, stdout=log, stderr=log) as child:
    while child.poll() is None:
      peak = max(peak, 1024 * _count(child.pid, "status", "VmHWM"))
      from_disk = max(from_disk, _count(child.pid, "io", "read_bytes"))
      time.sleep(_POLL_SECONDS)
    seconds = time.perf_counter() - begin
    log.seek(0)
    if child.returncode:
      raise ValueError(f"{' '.join(args)} failed: {log.read().strip()}")
  return seconds, peak, from_disk


def _count(pid: int, file: str, name: str) -> int:
  """Return a number of /proc/PID/FILE, 0 if the process is gone."""
  try:
    lines = pathlib.Path(f"/proc/{pid}/{file}").read_text().splitlines()
  except (FileNotFoundError, ProcessLookupError, PermissionError):
    return 0
  return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
