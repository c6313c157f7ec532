"""Where files live: on a local disk or in a bucket.

A `gs://` path is read and written by gcsfs, by TensorStore (arrays) and by ArrayRecord (documents).
"""

import pathlib
import shutil
from collections.abc import Callable

from etils import epath

# For `FSSPEC_GCS`: a listing that is kept does not see what other processes write.
GCS_OPTIONS = '{"use_listings_cache": false}'
# The packages whose errors are those of a bucket.
CLIENTS = ("gcsfs", "google", "aiohttp")


def is_remote(path: epath.PathLike) -> bool:
  """Return whether `path` is a URL and not a file of this machine."""
  return "://" in str(path)


def check_access(path: epath.PathLike, name: str) -> None:
  """Raise one sentence now if the bucket of `path` cannot be listed; a local path is not looked at.

  Args:
    path: where something is read or written. name: what it is, for the message.

  Raises:
    ValueError: no gs:// URL, gcsfs is not installed, or the bucket is missing or refuses.
  """
  if not is_remote(path):
    return
  scheme, _, rest = str(path).partition("://")
  if scheme != "gs" or not rest.strip("/"):
    raise ValueError(f"{name}={path}: give a local path or gs://BUCKET/FOLDER")
  bucket = f"gs://{rest.partition('/')[0]}"
  try:
    next(epath.Path(bucket).iterdir(), None)
  except ImportError as error:
    raise ValueError(f"{name}={path} needs gcsfs: pip install 'mfjax[gcs]'") from error
  except Exception as error:  # Each of the libraries below has errors of its own.
    raise ValueError(
      f"{name}={path}: bucket {bucket} cannot be read ({type(error).__name__}: "
      f"{str(error).partition(chr(10))[0]}): create it, or give this account the role "
      "roles/storage.objectAdmin on it"
    ) from error


def upload(
  source: pathlib.Path,
  target: epath.Path,
  last: Callable[[pathlib.Path], bool] = lambda path: False,
) -> None:
  """Copy every file below `source` to its place below `target`; `last` says which come last."""
  files = [path for path in source.rglob("*") if path.is_file()]
  for path in sorted(files, key=lambda path: (last(path), path)):
    with path.open("rb") as file, (target / path.relative_to(source).as_posix()).open("wb") as copy:
      shutil.copyfileobj(file, copy, 16 << 20)
