"""An output directory that appears under its name only when it is complete."""

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from mfjax.digests import sync, sync_tree


@contextlib.contextmanager
def staged(out: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
  """Yield a hidden directory beside `out`; rename it to `out` at the end, or remove it.

  Raises:
    ValueError: `out` is there already and is no empty directory, or its parent is missing or full.
  """
  check_absent(out)
  parent, created = out.parent, [path for path in out.parents if not path.exists()]
  parent.mkdir(parents=True, exist_ok=True)
  try:
    with _pending(out, num_bytes) as pending:
      yield pending
  finally:
    for path in created:
      with contextlib.suppress(OSError):  # Not empty: `out` is in it.
        path.rmdir()


@contextlib.contextmanager
def _pending(out: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
  parent = out.parent
  free = shutil.disk_usage(parent).free
  if free < num_bytes:
    raise ValueError(
      f"{out} takes about {num_bytes:,} bytes and {free:,} are free: make room or choose another "
      "disk"
    )
  pending = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=parent))
  try:
    try:
      yield pending
      pending.chmod(0o777 & ~_umask())
      sync_tree(epath.Path(pending))
      pending.rename(out)  # Also replaces an empty directory.
      sync(epath.Path(parent))
    except OSError as error:
      if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise ValueError(
          f"the disk filled while {out} was written (about {num_bytes:,} bytes): make room or "
          "choose another disk"
        ) from error
      raise
  finally:
    shutil.rmtree(pending, ignore_errors=True)


def check_absent(out: pathlib.Path) -> None:
  """Raise ValueError unless `out` is free: missing, or an empty directory."""
  if out.is_dir() and not any(out.iterdir()):
    return
  if out.exists() or out.is_symlink():
    raise ValueError(f"{out} is there already: give another directory, or remove it first")


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
