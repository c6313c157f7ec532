"""Checkpoints of a run: asynchronous, sharded, verified; and the workdir that holds them.

  WORKDIR/config.json                    the run's configuration
  WORKDIR/checkpoints/STEP/params        parameters (readable alone)
  WORKDIR/checkpoints/STEP/optimizer     optimizer state
  WORKDIR/checkpoints/STEP/run/run.json  step, data state, RNG, configuration, versions
  WORKDIR/checkpoints/STEP/digests.json  written last: the step is complete and can be verified

Orbax writes a step under a temporary name and renames it; then the digests are written, and only
then are older steps deleted. So whatever the moment of a crash, a step with digests was complete,
and the newest one whose files match them is the one to resume from.

Orbax's `AsyncCheckpointer` writes one directory; which steps exist, count and go is decided here,
because its `CheckpointManager` knows no digests: it would call a corrupt step the latest, count it
among the kept and refuse to write it again. Its v1 API is still `experimental` and being renamed.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mfjax import digests, step_format, workdir
from mfjax.config import CheckpointConfig, RunConfig
from mfjax.step_format import ARRAY_ITEMS, RUN_FILE, RUN_ITEM
from mfjax.storage import is_remote
from mfjax.stored_arrays import BlockArrayHandler, Proof, StoredArray, open_array

_LOG = logging.getLogger(__name__)

_PARTIAL = ocp.utils.TMP_DIR_SUFFIX
_REPLACED = ".replaced"
_BARRIER_SECONDS = 600  # A process that waits this long for the others' digests gives up.
_WRITING_THREADS = 4  # Of a `BlockArray`'s blocks.

_Result = TypeVar("_Result")


class _CorruptStepError(Exception):
  """A step's files are not as they were written."""


class CheckpointSaveError(Exception):
  """A step could not be saved, for this `reason`; earlier steps are as they were.

  `is_of_system`: the reason is the operating system's, such as a full disk.
  """

  def __init__(self, message: str, reason: str = "", *, is_of_system: bool = False) -> None:
    super().__init__(message)
    self.reason, self.is_of_system = reason, is_of_system


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
  """A step read back: `state` has the structure and shardings of the abstract tree."""

  step: int
  state: Any
  data_state: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
  """A step whose parameters are read array by array: `arrays` by their keys in the tree.

  `run` is the step's record: its configuration, its state, who wrote it.
  """

  step: int
  directory: epath.Path
  arrays: Mapping[tuple[str, ...], StoredArray]
  run: Mapping[str, Any]


class Checkpointer:
  """Writes and reads the steps of one workdir.

  Every process of a run calls every method at the same step, on storage that all of them see. Each
  measures and checks its share of the files; process 0 alone makes room and deletes; all take the
  same step for good. Methods are called from one thread.
  """

  def __init__(
    self, directory: epath.PathLike, checkpoint_config: CheckpointConfig, run_config: RunConfig
  ) -> None:
    self._directory = workdir.absolute(directory) / "checkpoints"
    self._config = checkpoint_config
    self._run_config = run_config
    self._blocks = BlockArrayHandler(_WRITING_THREADS)
    self._orbax = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(handler_registry=step_format.handlers(self._blocks))
    )
    self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._pending: concurrent.futures.Future[int] | None = None
    self._abandoned = threading.Event()
    self._newest: int | None = None  # The step that this run last restored or saved.
    self._num_saves = 0  # Begun here: the same on every process, so it names a save to all.
    self.blocked_seconds = 0.0  # How long the last `save` kept its caller.

  def latest_steps(self) -> list[int]:
    """Return the steps on disk, newest first, good or not."""
    if not self._directory.exists():
      return []
    names = [path.name for path in self._directory.iterdir() if path.is_dir()]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

  def complete_steps(self) -> list[int]:
    """Return the steps that were written to the end, digests included, newest first."""
    return [step for step in self.latest_steps() if digests.exist(self._path(step))]

  def save(
    self,
    step: int,
    state: Mapping[str, Any],
    data_state: dict[str, Any],
    *,
    force: bool = False,
    proof: Proof | None = None,
  ) -> bool:
    """Copy `state` to the host and write it in the background; return whether a save began.

    Nothing is saved if `step` is not due by the configuration and not forced, or is the step last
    saved or restored. `state` holds `params`, `optimizer` and scalars; its buffers may be donated
    as soon as this returns. Without `optimizer` the step is one to begin from: its leaves may be
    `BlockArray`s, which are computed as they are written. A previous save that is still running is
    waited for. `proof` is told of every block of a `BlockArray` that is written, and judges the
    committed step while digests are computed; if it raises, the save fails and the step goes.

    Raises:
      CheckpointSaveError: this save could not begin, or the previous one failed (then this one was
        not begun; call again).
    """
    if not force and step % self._config.every:
      return False
    begin = time.perf_counter()
    self.wait()
    arrays = {name: state[name] for name in ARRAY_ITEMS if name in state}
    scalars = {k: jax.device_get(v).item() for k, v in state.items() if k not in ARRAY_ITEMS}
    items: dict[str, Any] = {
      name: ocp.args.PyTreeSave(tree, save_args=step_format.storage_args(tree))
      for name, tree in arrays.items()
    }
    items[RUN_ITEM] = ocp.args.JsonSave(
      step_format.run_record(self._run_config, step, arrays, scalars, data_state)
    )
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    self._blocks.error, self._blocks.proof = None, proof
    try:
      if not self._make_room(step, num_bytes):
        return False
      self._num_saves += 1
      self._orbax.save(self._path(step), args=ocp.args.Composite(**items))
    except Exception as error:
      raise self._save_error(step, num_bytes, error) from error
    self._pending = self._background.submit(self._finish, step, num_bytes, self._num_saves, proof)
    self.blocked_seconds = time.perf_counter() - begin
    return True

  def check(self) -> None:
    """Raise the error of a save that has failed in the background; never waits."""
    if self._pending is not None and self._pending.done():
      self.wait()

  def wait(self) -> None:
    """Wait until the save under way is committed and its digests are written.

    Raises:
      CheckpointSaveError: the save failed, for instance on a full disk.
    """
    if self._pending is not None:
      pending, self._pending = self._pending, None
      self._newest = pending.result()

  def abandon(self) -> None:
    """Let the save under way fail soon, if it is at its digests; the step goes."""
    self._abandoned.set()

  def close(self) -> None:
    """Wait as `wait` does, then release all threads."""
    try:
      self.wait()
    finally:
      self._background.shutdown()
      self._orbax.close()
      self._blocks.early.close()

  def restore(self, abstract_state: Mapping[str, Any], step: int | None = None) -> Restored | None:
    """Read the newest good step, or `step`, onto the shardings of `abstract_state`.

    Args:
      abstract_state: the saved tree of `jax.ShapeDtypeStruct` with shardings, of any mesh.
      step: a step to read instead of the newest good one; later ones are replaced by later saves.

    Returns:
      None if no step was ever completed.

    Raises:
      ValueError: steps exist but none is usable, or the good one does not fit `abstract_state` or
        drew from another random generator.
    """
    found = self._read({name: abstract_state[name] for name in ARRAY_ITEMS}, step)
    if found is None:
      return None
    trees, run = found
    drew, draws = run["rng"]["implementation"], step_format.rng_implementation()
    if drew != draws:
      raise ValueError(
        f"step {run['step']} in {self._directory} drew random numbers from {drew} and this run "
        f"draws from {draws}: set JAX_DEFAULT_PRNG_IMPL as it was"
      )
    scalars = {
      name: step_format.place(run["state"][name], abstract)
      for name, abstract in abstract_state.items()
      if name not in ARRAY_ITEMS
    }
    self._newest = run["step"]
    return Restored(step=run["step"], state=trees | scalars, data_state=run["data_state"])

  def restore_params(self, abstract_params: Any, step: int | None = None) -> Restored | None:
    """Read parameters alone, as `restore` does: `state` is then the tree of parameters."""
    found = self._read({"params": abstract_params}, step)
    if found is None:
      return None
    trees, run = found
    return Restored(step=run["step"], state=trees["params"], data_state=run["data_state"])

  def use_params(
    self, use: Callable[[Opened, Callable[[], None]], _Result], step: int | None = None
  ) -> _Result | None:
    """Return what `use` makes of the parameters of the newest good step, or of `step`.

    `use(opened, confirm)` begins while the step's files are still being read and held against their
    digests. It calls `confirm` before anything of what it makes can be seen: that waits for the end
    of the check, and raises if a file is not as it was written. Then the next older step is used.
    For one process alone.

    Returns:
      None if no step was ever completed.

    Raises:
      ValueError: steps exist but none is usable.
      Exception: `use` failed, on a step that is good.
    """
    if step is None and not self.latest_steps():
      return None
    rejected: list[str] = []
    for candidate, has_digests in self._order(step):
      if not has_digests:
        self._warn_unverified(candidate)
        return use(self.open_step(candidate), lambda: None)
      with contextlib.closing(digests.Check(self._path(candidate), ("params", RUN_ITEM))) as check:

        def confirm(step: int = candidate, check: digests.Check = check) -> None:
          if problems := check.problems():
            raise _CorruptStepError(self._corruption(step, problems))

        try:
          return use(self.open_step(candidate), confirm)
        except Exception:  # Of a damaged file, maybe.
          if not check.problems():
            raise
          rejected.append(self._corruption(candidate, check.problems()))
          _LOG.warning("%s: passed over", rejected[-1])
    raise self._none_usable(step, rejected)

  def open_step(self, step: int) -> Opened:
    """Open the parameters of a step whose files are not held against their digests first."""
    run = self._read_run(step)
    directory = self._path(step) / "params"
    leaves = [tuple(re.findall(r"\['([^']*)'\]", name)) for name in run["layout"]["params"]]
    arrays = {keys: open_array(directory, keys) for keys in leaves}
    return Opened(step=step, directory=directory, arrays=arrays, run=run)

  def _path(self, step: int) -> epath.Path:
    return self._directory / str(step)

  def _make_room(self, step: int, num_bytes: int) -> bool:
    """Return whether `step` is to be saved, and clear its place; process 0 decides for all.

    Raises:
      OSError: there is no room, or no place to write.
    """
    failure: Exception | None = None
    due = step != self._newest
    if due and jax.process_index() == 0:
      try:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._delete_partial()
        self._check_space(num_bytes)
        self._set_aside(step)
      except Exception as error:
        failure = error
    if jax.process_count() > 1:
      verdict = np.array([due, failure is not None])
      due, failed = multihost_utils.broadcast_one_to_all(verdict).tolist()
      if failed and failure is None:
        raise OSError("process 0 could not begin it, its log says why")
    if failure is not None:
      raise failure
    return due

  def _finish(self, step: int, num_bytes: int, save: int, proof: Proof | None) -> int:
    """Commit `step`, write its digests, delete what is due; runs in the background."""
    try:
      self._orbax.wait_until_finished()
      self._write_digests(step, save, proof)
    except Exception as raised:
      error = self._blocks.error or raised
      if jax.process_index() == 0:
        _remove(self._path(step))
      raise self._save_error(step, num_bytes, error) from error
    if jax.process_index() == 0:
      self._delete_old(step)
    return step

  def _write_digests(self, step: int, save: int, proof: Proof | None) -> None:
    """Write the digests of a committed step, each process those of its share of the files."""
    path, num_processes = self._path(step), jax.process_count()
    if num_processes == 1:
      judge = None if proof is None else lambda: proof.finish(self.open_step(step).arrays)
      digests.write(path, meanwhile=judge, stop=self._abandoned, early=self._blocks.early)
      return
    assert proof is None, "a conversion is one process"
    barrier = ocp.multihost.get_barrier_sync_fn()  # Of the coordinator: fit for a thread.
    timeout_ms = 1000 * _BARRIER_SECONDS
    barrier(key=f"mfjax committed {save}", timeout_ms=timeout_ms)
    try:
      digests.write_part(path, jax.process_index(), num_processes)
    finally:
      barrier(key=f"mfjax measured {save}", timeout_ms=timeout_ms)
    if jax.process_index() == 0:
      digests.merge_parts(path, num_processes)

  def _save_error(self, step: int, num_bytes: int, error: BaseException) -> CheckpointSaveError:
    """Remove what a failed save left unfinished and return what to tell the user."""
    if jax.process_index() == 0:
      self._delete_partial()
    free = self._free_bytes()
    free_text = "" if free is None else f", {free:,} are free"
    reason = _reason(error)
    return CheckpointSaveError(
      f"step {step} could not be saved in {self._directory}: {reason} (it takes about "
      f"{num_bytes:,} bytes{free_text}); earlier checkpoints are intact",
      reason,
      is_of_system=bool(_system_reason(error)),
    )

  def _delete_partial(self) -> None:
    for path in self._directory.glob(f"*{_PARTIAL}"):
      _remove(path)

  def _check_space(self, num_bytes: int) -> None:
    """Raise what a full disk would, before Orbax's many threads run into it one by one."""
    free = self._free_bytes()
    if jax.process_count() == 1 and free is not None and free < num_bytes:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def _free_bytes(self) -> int | None:
    local = not is_remote(self._directory) and self._directory.exists()
    return shutil.disk_usage(self._directory).free if local else None

  def _set_aside(self, step: int) -> None:
    """Rename what bars `step`, and steps after the one this run goes on from."""
    for other in self.latest_steps():
      if other == step or (self._newest is not None and other > self._newest):
        aside = self._directory / f"{other}{_REPLACED}"
        _remove(aside)
        self._path(other).rename(aside)
        _LOG.warning("%s is not of this run's line: moved to %s", self._path(other), aside.name)

  def _delete_old(self, newest: int) -> None:
    """Apply the keep rules to `newest`, just verified, and all before it."""
    steps = [step for step in self.latest_steps() if step <= newest]
    complete = [step for step in self.complete_steps() if step <= newest]
    keep_every = self._config.keep_every
    kept = {step for step in complete if keep_every and step % keep_every == 0}
    kept.update(complete[: self._config.keep_last])
    for step in steps:
      if step not in kept:
        _remove(self._path(step))
    for path in self._directory.glob(f"*{_REPLACED}"):
      _remove(path)

  def _read(
    self, abstract: Mapping[str, Any], step: int | None
  ) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the trees named in `abstract` and the run record of the newest good step."""
    return self._use(abstract, step, lambda candidate: self._read_step(candidate, abstract))

  def _use(
    self, items: Iterable[str], step: int | None, read: Callable[[int], _Result]
  ) -> _Result | None:
    """Return what `read` makes of the newest step whose `items` are good, or of `step`."""
    self.wait()
    for path in self._directory.glob(f"*{_PARTIAL}"):
      _LOG.warning("%s was never completed: passed over", path)
    if step is None and not self._steps():
      return None
    rejected: list[str] = []
    for candidate, verified in self._candidates(items, step, rejected):
      try:
        return read(candidate)
      except (ValueError, TypeError, KeyError, OSError) as error:
        problem = f"step {candidate} in {self._directory} cannot be read: {_reason(error)}"
        if verified:  # The files are as they were written, so the run is another one.
          raise ValueError(problem) from error
        rejected.append(problem)
        _LOG.warning("%s: passed over", rejected[-1])
    raise self._none_usable(step, rejected)

  def _none_usable(self, step: int | None, rejected: Iterable[str]) -> ValueError:
    wanted = "" if step is None else f" as step {step}"
    problems = "; ".join(rejected) or f"there are {self.latest_steps()}"
    return ValueError(
      f"no checkpoint in {self._directory} is usable{wanted}: {problems}: "
      "bring back a copy of one, or begin in another workdir"
    )

  def _candidates(
    self, items: Iterable[str], only: int | None, rejected: list[str]
  ) -> Iterator[tuple[int, bool]]:
    """Yield (step, whether it is verified), best first; append what is wrong with the others."""
    for step, has_digests in self._order(only):
      if not has_digests:
        self._warn_unverified(step)
        yield step, False
      elif problems := self._find_problems(step, (*items, RUN_ITEM)):
        rejected.append(self._corruption(step, problems))
        _LOG.warning("%s: passed over", rejected[-1])
      else:
        yield step, True

  def _order(self, only: int | None) -> list[tuple[int, bool]]:
    """Return (step, whether it has digests) in the order in which steps are tried."""
    has_digests = {step: has for step, has in self._steps().items() if only in (None, step)}
    for step, has in has_digests.items():
      if not has:
        _LOG.warning("step %d in %s is unverified: it has no digests", step, self._directory)
    return sorted(has_digests.items(), key=lambda item: not item[1])

  def _warn_unverified(self, step: int) -> None:
    _LOG.warning("no verified step is left: trying step %d, which nothing verifies", step)

  def _corruption(self, step: int, problems: Sequence[str]) -> str:
    named = ", ".join(problems[:3]) + (f" and {len(problems) - 3} more" * (len(problems) > 3))
    return f"step {step} in {self._directory} is corrupt: {named}"

  def _steps(self) -> dict[int, bool]:
    """Return whether each step on disk is complete, newest first, as process 0 sees them."""
    found = {step: digests.exist(self._path(step)) for step in self.latest_steps()}
    texts = _all_gather(json.dumps(list(found.items())))
    return dict(json.loads(texts[0]))

  def _find_problems(self, step: int, items: Sequence[str]) -> list[str]:
    """Return what is wrong with the files of a step; each process looks at its share."""
    share = jax.process_index(), jax.process_count()
    texts = _all_gather(json.dumps(digests.find_problems(self._path(step), items, *share)))
    return list(dict.fromkeys(problem for text in texts for problem in json.loads(text)))

  def _read_step(
    self, step: int, abstract: Mapping[str, Any]
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    run = self._read_run(step)
    stored = {name: tree for name, tree in abstract.items() if name in run["layout"]}
    for name, tree in stored.items():
      step_format.check_layout(name, run["layout"][name], step_format.layout_of(tree))
    items = {
      name: ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
      for name, tree in stored.items()
    }
    read = dict(self._orbax.restore(self._path(step), args=ocp.args.Composite(**items)))
    # A step to begin from holds parameters alone; an optimizer's state begins with zeros.
    read |= {
      k: jax.tree.map(step_format.zeros, tree) for k, tree in abstract.items() if k not in stored
    }
    then, now = run["versions"], workdir.versions()
    changed = [f"{k} {then.get(k)} -> {now[k]}" for k in now if then.get(k) != now[k]]
    if changed:
      _LOG.info("step %d was saved by other versions: %s", step, ", ".join(changed))
    return {name: read[name] for name in abstract}, run

  def _read_run(self, step: int) -> dict[str, Any]:
    return json.loads((self._path(step) / RUN_ITEM / RUN_FILE).read_text())


def _all_gather(text: str) -> list[str]:
  """Return every process's text, on every process, by rank."""
  if jax.process_count() == 1:
    return [text]
  mine = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(mine.size)).tolist()
  padded = np.zeros(max(sizes), np.uint8)
  padded[: mine.size] = mine
  rows = multihost_utils.process_allgather(padded)
  return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def _reason(error: BaseException) -> str:
  """Return the system's words for an error if it is one, or its own."""
  return _system_reason(error) or f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _system_reason(error: BaseException) -> str:
  """Return the system's words for an error of its own, which TensorStore's may hide, or nothing."""
  if isinstance(error, OSError) and error.errno:
    return os.strerror(error.errno)
  match = re.search(r"os_error_code='(\d+)'", str(error))
  return os.strerror(int(match[1])) if match else ""


def _remove(directory: epath.Path) -> None:
  """Delete a directory, digests first: what a crash leaves of it must not look complete."""
  try:
    if directory.exists():
      (directory / digests.FILE_NAME).unlink(missing_ok=True)
      directory.rmtree()
  except OSError as error:
    _LOG.warning("%s could not be deleted: %s", directory, _reason(error))
