"""The workdir of a run: which configuration it belongs to, and what may change when it resumes."""

import importlib.metadata
import json
import logging
import platform

from etils import epath

from mfjax import digests
from mfjax.cluster.local import LOGS
from mfjax.config import RunConfig, Schedule
from mfjax.storage import is_remote

_LOG = logging.getLogger(__name__)

_CONFIG_FILE = "config.json"
# Fields that change how a run is computed, watched or stored, not what it computes.
_MAY_CHANGE = (
  "mesh.",
  "kernels.",
  "evaluate.",
  "checkpoint.",
  "profile.",
  "cluster.",
  "data.path",  # The data state names the digest of what it was drawn from.
  "data.prefetch_batches",
  "loss.chunk_tokens",
  "train.remat",
  "train.max_skipped_steps",
  "train.log_every",
  "train.tensorboard",
)


def check_config(workdir: epath.PathLike, run_config: RunConfig, *, allow: bool = False) -> None:
  """Check that a run of `run_config` may go on, or begin, in `workdir`.

  A missing or empty directory is fine. Fields that only say how the run is computed, watched or
  stored may differ from the saved ones; so may `train.steps` if the learning rate is constant.
  `allow` turns the refusal of other differences into a warning.

  Raises:
    ValueError: not a directory, other content than a workdir's, or a configuration that disagrees.
  """
  directory = absolute(workdir)
  if not directory.exists():
    return
  if not directory.is_dir():
    raise ValueError(f"workdir {directory} is a file: give a directory")
  passed_over = {f"{_CONFIG_FILE}.tmp", LOGS}
  found = sorted(path.name for path in directory.iterdir() if path.name not in passed_over)
  if not found:
    return
  if _CONFIG_FILE not in found:
    named = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    raise ValueError(
      f"{directory} is not a workdir, it has no {_CONFIG_FILE} but {named}: "
      "give a new or empty directory"
    )
  saved = read_config(directory)
  may_change: tuple[str, ...] = _MAY_CHANGE
  if saved.optimizer.schedule is run_config.optimizer.schedule is Schedule.CONSTANT:
    may_change += ("train.steps",)
  differences = [d for d in saved.differences(run_config) if not d.startswith(may_change)]
  if differences and not allow:
    raise ValueError(
      f"workdir {directory} was begun with another configuration (saved != given): "
      f"{'; '.join(differences)}: give the saved values, another workdir or --allow_config_change"
    )
  for difference in differences:
    _LOG.warning("configuration changed (saved != given): %s", difference)


def write_config(workdir: epath.PathLike, run_config: RunConfig) -> None:
  """Make `workdir` if need be and write `run_config` into it, atomically."""
  directory = absolute(workdir)
  directory.mkdir(parents=True, exist_ok=True)
  record = {"mfjax": versions()["mfjax"], "config": run_config.to_dict()}
  digests.replace_text(directory / _CONFIG_FILE, json.dumps(record, indent=2) + "\n")


def read_config(workdir: epath.PathLike) -> RunConfig:
  """Return the configuration of the run in `workdir`.

  Raises:
    ValueError: `workdir` holds no run, or its configuration is unreadable or of another version.
  """
  path = absolute(workdir) / _CONFIG_FILE
  if not path.exists():
    raise ValueError(f"{path.parent} is not a workdir: it has no {_CONFIG_FILE}")
  try:
    record = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(
      f"{path} is unreadable, {error}: restore it or give another workdir"
    ) from error
  if not isinstance(record, dict) or not {"mfjax", "config"} <= record.keys():
    raise ValueError(f"{path} is not of mfjax: give a workdir, or a new or empty directory")
  try:
    return RunConfig.from_dict(record["config"])
  except ValueError as error:
    raise ValueError(f"{path}, written by mfjax {record['mfjax']}: {error}") from error


def versions() -> dict[str, str]:
  """Return the versions of Python and of the libraries that a run's results depend on."""
  versions = {"python": platform.python_version()}
  for name in ("mfjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "not installed"  # mfjax in a checkout.
  return versions


def absolute(path: epath.PathLike) -> epath.Path:
  """Return `path` as TensorStore wants it: absolute if local, as it is if a URL."""
  path = epath.Path(path)
  return path if is_remote(path) else path.expanduser().resolve()
