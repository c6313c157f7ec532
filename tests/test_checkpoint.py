import errno
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from etils import epath
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from mfjax import checkpoint, digests, step_format
from mfjax.config import CheckpointConfig, RunConfig

MESHES = [(2, 2, 2), (1, 4, 1), (8, 1, 1), None]  # None: a single device without a mesh.
OPTIMIZER = optax.chain(
  optax.clip_by_global_norm(1.0),
  optax.adamw(1e-3, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
)
# name -> shape, dtype, partition
PARAMS = {
  "embedding": ((64, 32), np.float32, P(None, ("fsdp", "expert"))),
  "blocks": {
    "experts": ((3, 8, 16, 32), np.float32, P(None, "expert", "fsdp")),
    "router": ((3, 16, 8), jnp.bfloat16, P(None, ("fsdp", "expert"))),
    "scale": ((3, 16), np.float32, P()),
  },
}


def sharding(mesh_shape: tuple[int, ...] | None, partition: P) -> jax.sharding.Sharding:
  if mesh_shape is None:
    return SingleDeviceSharding(jax.devices()[0])
  devices = jax.devices()[: int(np.prod(mesh_shape))]
  axes = ("data", "fsdp", "expert")
  mesh = jax.make_mesh(mesh_shape, axes, axis_types=(AxisType.Explicit,) * 3, devices=devices)
  return NamedSharding(mesh, partition)


def make_state(seed: int, mesh_shape: tuple[int, ...] | None = (1, 1, 1)) -> dict[str, Any]:
  rng = np.random.default_rng(seed)

  def draw(leaf):
    shape, dtype, partition = leaf
    return jax.device_put(rng.normal(size=shape).astype(dtype), sharding(mesh_shape, partition))

  def fill(leaf):  # Moments, like their parameters; and the count.
    values = (rng.normal(size=leaf.shape) * 100).astype(leaf.dtype)
    return jax.device_put(values, leaf.sharding if leaf.ndim else sharding(mesh_shape, P()))

  params = jax.tree.map(draw, PARAMS, is_leaf=lambda x: isinstance(x, tuple))
  return {
    "params": params,
    "optimizer": jax.tree.map(fill, OPTIMIZER.init(params)),
    "step": jax.device_put(np.int32(seed), sharding(mesh_shape, P())),
    "skipped": jax.device_put(np.int32(2), sharding(mesh_shape, P())),
  }


def abstract(state: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(left: Any, right: Any) -> None:
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def states() -> list[dict[str, Any]]:
  return [make_state(seed) for seed in range(5)]


@pytest.fixture
def open_checkpointer(tmp_path):
  """A function that opens the workdir tmp_path as a new process would."""
  opened = []

  def open_(**config: int) -> checkpoint.Checkpointer:
    run_config = RunConfig(checkpoint=CheckpointConfig(every=1, **config))
    opened.append(checkpoint.Checkpointer(tmp_path, run_config.checkpoint, run_config))
    return opened[-1]

  yield open_
  for checkpointer in opened:
    checkpointer.close()


@pytest.fixture
def two_steps(open_checkpointer, states, tmp_path) -> pathlib.Path:
  """The directory of the steps 1 and 2."""
  writer = open_checkpointer()
  for step in (1, 2):
    writer.save(step, states[step], {"seen": step})
  writer.wait()
  return tmp_path / "checkpoints"


def names(directory: pathlib.Path) -> list[str]:
  return sorted(path.name for path in directory.iterdir())


def files(directory: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in directory.rglob("*") if path.is_file())


def flip_byte(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
def test_restores_bitwise_on_any_mesh(open_checkpointer, mesh_shape):
  state = make_state(7, (2, 2, 2))
  expected = jax.tree.map(np.array, state)
  checkpointer = open_checkpointer()
  assert checkpointer.save(7, state, {"seen": [1, 2]})
  # The next step's donation must not reach the copy that is still being written.
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  jax.block_until_ready(step(state))
  target = abstract(make_state(0, mesh_shape))
  restored = checkpointer.restore(target)
  assert (restored.step, restored.data_state) == (7, {"seen": [1, 2]})
  assert_same(restored.state, expected)
  assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(
    lambda x: x.sharding, target
  )


def test_no_chunk_spans_two_layers(open_checkpointer, tmp_path, monkeypatch):
  monkeypatch.setattr(step_format, "CHUNK_BYTES", 2**20)
  state = make_state(1, (2, 2, 2))
  big = jax.device_put(np.ones((1024, 1024), np.float32), sharding((2, 2, 2), P()))
  state["params"] |= {"big": big}
  checkpointer = open_checkpointer()
  checkpointer.save(1, state, {})
  checkpointer.wait()

  def chunk(item: str, array: str) -> tuple[int, ...]:
    base = {"driver": "file", "path": f"{tmp_path}/checkpoints/1/{item}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{array}/"}
    store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    assert store.chunk_layout.read_chunk.shape == store.chunk_layout.write_chunk.shape
    return store.chunk_layout.read_chunk.shape

  assert chunk("params", "blocks.experts") == (1, 4, 8, 32)
  assert chunk("optimizer", "1.0.mu.blocks.experts") == (1, 4, 8, 32)
  assert chunk("optimizer", "1.0.nu.blocks.router") == (1, 4, 8)
  assert chunk("params", "blocks.scale") == (1, 16)
  assert chunk("params", "embedding") == (64, 8)
  assert np.prod(chunk("params", "big")) * 4 <= 2**20


def test_params_are_restored_alone(two_steps, open_checkpointer, states):
  shutil.rmtree(two_steps / "2/optimizer")
  restored = open_checkpointer().restore_params(abstract(states[2]["params"]))
  assert restored.step == 2
  assert_same(restored.state, states[2]["params"])
  assert open_checkpointer().restore(abstract(states[0])).step == 1


def test_an_empty_workdir_restores_nothing(open_checkpointer, states):
  assert open_checkpointer().restore(abstract(states[0])) is None


def test_run_record_tells_where_a_step_comes_from(two_steps):
  record = json.loads((two_steps / "2/run/run.json").read_text())
  assert record["state"] == {"step": 2, "skipped": 2}
  assert RunConfig.from_dict(record["config"]).train.seed == record["rng"]["seed"]
  assert record["versions"]["jax"] == jax.__version__


def test_a_flipped_byte_in_any_file_is_found(two_steps, open_checkpointer, states, caplog):
  target = abstract(states[0])
  reader = open_checkpointer()
  paths = files(two_steps / "2")
  kinds = {
    re.sub(r"[0-9a-f]{32}", "*", path.relative_to(two_steps / "2").as_posix()) for path in paths
  }
  assert {"params/ocdbt.process_0/d/*", "optimizer/manifest.ocdbt", "run/run.json"} <= kinds
  for path in paths:
    flip_byte(path)
    caplog.clear()
    restored = reader.restore(target)
    assert restored.step == 1, path
    assert re.search(r"step 2 in .* is corrupt: .*: passed over", caplog.text), path
    if path.name != digests.FILE_NAME:
      assert path.relative_to(two_steps / "2").as_posix() in caplog.text
    flip_byte(path)
  assert_same(restored.state, states[1])
  assert reader.restore(target).step == 2  # Each flip was undone: the flips were what was found.


def _truncate(step: pathlib.Path) -> str:
  path = max(files(step / "params"), key=lambda path: path.stat().st_size)
  os.truncate(path, path.stat().st_size - 1)
  return f"{path.name} has {path.stat().st_size} of {path.stat().st_size + 1} bytes"


def _lose_file(step: pathlib.Path) -> str:
  (step / "optimizer/manifest.ocdbt").unlink()
  return "optimizer/manifest.ocdbt is missing"


def _empty(step: pathlib.Path) -> str:
  shutil.rmtree(step)
  step.mkdir()
  return "step 2 .* has no digests"


def _lose_digests(step: pathlib.Path) -> str:
  (step / digests.FILE_NAME).unlink()
  return "step 2 .* has no digests"


def _partial(step: pathlib.Path) -> str:
  step.rename(step.with_name("2.orbax-checkpoint-tmp"))
  return "2.orbax-checkpoint-tmp was never completed"


@pytest.mark.parametrize("damage", [_truncate, _lose_file, _empty, _lose_digests, _partial])
def test_a_damaged_step_is_passed_over_and_written_again(
  two_steps, open_checkpointer, states, caplog, damage
):
  expected = damage(two_steps / "2")
  checkpointer = open_checkpointer()
  restored = checkpointer.restore(abstract(states[0]))
  assert restored.step == 1
  assert_same(restored.state, states[1])
  assert re.search(expected, caplog.text)
  assert checkpointer.save(2, states[3], {})
  checkpointer.wait()
  assert names(two_steps) == ["1", "2"]
  assert_same(open_checkpointer().restore(abstract(states[0])).state, states[3])


def test_an_unverified_step_is_used_if_no_other_is_left(
  two_steps, open_checkpointer, states, caplog
):
  for step in "12":
    (two_steps / step / digests.FILE_NAME).unlink()
  shutil.rmtree(two_steps / "2/optimizer")
  assert open_checkpointer().restore(abstract(states[0])).step == 1
  assert re.search(r"step 2 in .* cannot be read: .*: passed over", caplog.text)
  assert "trying step 1, which nothing verifies" in caplog.text


def test_no_usable_step_is_an_error_that_names_each(two_steps, open_checkpointer, states):
  for step in "12":
    flip_byte(two_steps / step / "run/run.json")
  with pytest.raises(ValueError, match=r"step 2 .*run/run.json differs.* step 1 .*run.json"):
    open_checkpointer().restore(abstract(states[0]))
  with pytest.raises(ValueError, match=r"as step 5: there are \[2, 1\]"):
    open_checkpointer().restore(abstract(states[0]), step=5)


def test_only_a_partial_first_step_begins_anew(open_checkpointer, states, tmp_path):
  (tmp_path / "checkpoints/1.orbax-checkpoint-tmp/params").mkdir(parents=True)
  assert open_checkpointer().restore(abstract(states[0])) is None


def test_a_state_of_another_shape_is_refused(two_steps, open_checkpointer, states):
  state = states[0] | {"params": states[0]["params"] | {"embedding": jnp.ones((64, 31))}}
  with pytest.raises(ValueError, match=r"step 2 .*\['embedding'\] is float32\[64,32\] there and"):
    open_checkpointer().restore(abstract(state))


def test_another_random_generator_is_refused(two_steps, open_checkpointer, states):
  with jax.default_prng_impl("rbg"):
    with pytest.raises(ValueError, match=r"step 2 .* from key<fry> .* from key<rbg>"):
      open_checkpointer().restore(abstract(states[0]))
    assert open_checkpointer().restore_params(abstract(states[0]["params"])).step == 2


def test_going_on_from_an_older_step_replaces_newer_ones(two_steps, open_checkpointer, states):
  checkpointer = open_checkpointer()
  assert checkpointer.restore(abstract(states[0]), step=1).step == 1
  assert not checkpointer.save(1, states[1], {}, force=True)  # There already.
  assert checkpointer.save(3, states[3], {})
  checkpointer.wait()
  assert checkpointer.latest_steps() == [3, 1]
  assert names(two_steps) == ["1", "3"]


def test_keep_rules(open_checkpointer, states):
  checkpointer = open_checkpointer(keep_last=2, keep_every=4)
  for step in range(1, 12):
    checkpointer.save(step, states[0], {})
  checkpointer.wait()
  assert checkpointer.latest_steps() == [11, 10, 8, 4]


def test_digests_are_on_the_disk_before_and_after_they_count(tmp_path, monkeypatch):
  synced, sync = [], os.fsync

  def record(descriptor):
    synced.append((pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, names(tmp_path)))
    sync(descriptor)

  monkeypatch.setattr(os, "fsync", record)
  (tmp_path / "data").write_text("x")
  digests.write(epath.Path(tmp_path))
  assert synced == [
    ("digests.json.tmp", ["data", "digests.json.tmp"]),
    (tmp_path.name, ["data", "digests.json"]),
  ]


def test_a_step_is_used_while_its_files_are_checked(two_steps, open_checkpointer, monkeypatch):
  go_on, find = threading.Event(), digests.find_problems

  def find_late(*args, **options):
    assert go_on.wait(30)
    return find(*args, **options)

  monkeypatch.setattr(digests, "find_problems", find_late)
  seen = []

  def use(opened, confirm):
    seen.append(opened.arrays["embedding",].read().sum())
    go_on.set()  # Begun before the check has ended, and ended after it.
    confirm()
    return opened.step

  assert open_checkpointer().use_params(use) == 2
  assert open_checkpointer().use_params(use, step=1) == 1
  assert len(seen) == 2


@pytest.mark.parametrize("fails", ["when it is confirmed", "before"])
def test_what_was_made_of_a_corrupt_step_does_not_count(
  fails, two_steps, open_checkpointer, caplog
):
  flip_byte(max(files(two_steps / "2/params"), key=lambda path: path.stat().st_size))
  tried, confirmed = [], []

  def use(opened, confirm):
    tried.append(opened.step)
    if fails == "before" and opened.step == 2:
      raise RuntimeError("these values are odd")
    confirm()
    confirmed.append(opened.step)
    return opened.step

  assert open_checkpointer().use_params(use) == 1
  assert (tried, confirmed) == ([2, 1], [1])
  assert re.search("step 2 .* is corrupt: params/.* differs from its digest: passed", caplog.text)
  with pytest.raises(ValueError, match=r"usable as step 2: step 2 .* is corrupt: params/"):
    open_checkpointer().use_params(use, step=2)
  with pytest.raises(ValueError, match=r"usable as step 7: there are \[2, 1\]"):
    open_checkpointer().use_params(use, step=7)


def test_a_mistake_on_a_good_step_is_raised(two_steps, open_checkpointer):
  def use(opened, confirm):
    raise KeyError("a bug")

  with pytest.raises(KeyError, match="a bug"):
    open_checkpointer().use_params(use)


def test_unverified_steps_are_used_last(two_steps, open_checkpointer, caplog):
  (two_steps / "2" / digests.FILE_NAME).unlink()
  assert open_checkpointer().use_params(lambda opened, _: opened.step) == 1
  (two_steps / "1" / digests.FILE_NAME).unlink()
  assert open_checkpointer().use_params(lambda opened, _: opened.step) == 2
  assert "trying step 2, which nothing verifies" in caplog.text


def test_no_step_is_used_of_an_empty_workdir(open_checkpointer):
  assert open_checkpointer().use_params(lambda opened, _: opened.step) is None


def test_a_save_counts_only_once_it_is_proven(open_checkpointer, states, tmp_path):
  checkpointer, step = open_checkpointer(), tmp_path / "checkpoints/1"
  seen = []
  checkpointer.save(1, states[1], {}, proof=mock.Mock(finish=seen.append))
  checkpointer.wait()
  array = seen[0]["embedding",].read()
  assert array.tobytes() == np.asarray(states[1]["params"]["embedding"]).tobytes()
  assert digests.exist(epath.Path(step))

  def refuse(_):
    assert not digests.exist(epath.Path(tmp_path / "checkpoints/2"))
    raise RuntimeError("it is another model")

  checkpointer.save(2, states[2], {}, proof=mock.Mock(finish=refuse))
  with pytest.raises(checkpoint.CheckpointSaveError, match="it is another model"):
    checkpointer.wait()
  assert names(tmp_path / "checkpoints") == ["1"]


def test_digests_taken_early_are_used_of_files_that_have_not_changed(tmp_path, monkeypatch):
  (tmp_path / "was").mkdir()
  for name in ("same", "changed", "gone", "half.__lock"):
    (tmp_path / "was" / name).write_bytes(name.encode())
  early = digests.Early()
  early.look(epath.Path(tmp_path / "was"))
  early.wait()
  (tmp_path / "was/changed").write_bytes(b"another")
  (tmp_path / "was/gone").unlink()
  (tmp_path / "was/half.__lock").rename(tmp_path / "was/half")
  (tmp_path / "was").rename(tmp_path / "is")
  read, directory = [], epath.Path(tmp_path / "is")
  measure = digests._measure
  monkeypatch.setattr(
    digests, "_measure", lambda path, stop: read.append(path.name) or measure(path, stop)
  )
  digests.write(directory, early=early)
  early.close()
  assert sorted(read) == ["changed", "half"]
  assert digests.find_problems(directory) == []
  (tmp_path / "is/same").write_bytes(b"SAME")
  assert digests.find_problems(directory) == ["same differs from its digest"]


def test_a_file_that_early_digests_cannot_bring_to_the_disk_fails_the_rest(tmp_path, monkeypatch):
  (tmp_path / "file").write_bytes(b"content")

  def fail(path):  # The system tells of a lost page once: a later fsync would succeed.
    monkeypatch.undo()
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  monkeypatch.setattr(digests, "sync", fail)
  early = digests.Early()
  early.look(epath.Path(tmp_path))
  with pytest.raises(OSError, match="Input/output error"):
    digests.write(epath.Path(tmp_path), early=early)
  early.close()
  assert not digests.exist(epath.Path(tmp_path))


def test_reading_for_digests_can_be_stopped(tmp_path):
  (tmp_path / "a").write_bytes(bytes(10))
  directory, stop = epath.Path(tmp_path), threading.Event()
  digests.write(directory, stop=stop)
  assert digests.find_problems(directory, stop=stop) == []
  stop.set()
  with pytest.raises(digests.StoppedError):
    digests.find_problems(directory, stop=stop)
  (tmp_path / digests.FILE_NAME).unlink()
  with pytest.raises(digests.StoppedError):
    digests.write(directory, stop=stop)
  assert names(tmp_path) == ["a"]


def test_saves_only_what_is_due_or_forced(tmp_path, states):
  config = RunConfig(checkpoint=CheckpointConfig(every=10))
  checkpointer = checkpoint.Checkpointer(tmp_path, config.checkpoint, config)
  assert [checkpointer.save(step, states[0], {}) for step in (5, 10)] == [False, True]
  assert checkpointer.save(12, states[0], {}, force=True)
  assert not checkpointer.save(12, states[0], {}, force=True)
  checkpointer.close()
  assert checkpointer.latest_steps() == [12, 10]


def test_save_returns_before_the_digests_and_nothing_is_deleted_before_them(
  two_steps, open_checkpointer, states, monkeypatch
):
  go_on, write = threading.Event(), digests.write

  def write_late(directory, **options):
    assert "commit_success.txt" in names(directory)
    assert go_on.wait(30)
    write(directory, **options)

  monkeypatch.setattr(digests, "write", write_late)
  checkpointer = open_checkpointer(keep_last=1)
  assert checkpointer.save(3, states[3], {})
  assert 0 < checkpointer.blocked_seconds < 30
  while "3" not in names(two_steps):
    time.sleep(0.01)
  checkpointer.check()
  assert {"1", "2", "3"} <= set(names(two_steps))
  assert not (two_steps / "3" / digests.FILE_NAME).exists()
  go_on.set()
  checkpointer.wait()
  assert names(two_steps) == ["3"]


def test_a_failed_save_surfaces_and_leaves_nothing(
  two_steps, open_checkpointer, states, monkeypatch
):
  def fail(directory, **_):
    raise OSError(28, "No space left on device")

  checkpointer = open_checkpointer()
  with monkeypatch.context() as patch:
    patch.setattr(digests, "write", fail)
    checkpointer.save(3, states[3], {})
    with pytest.raises(checkpoint.CheckpointSaveError, match=r"step 3 .*No space left on device"):
      checkpointer.save(4, states[3], {})
  assert names(two_steps) == ["1", "2"]
  assert checkpointer.save(4, states[3], {})
  checkpointer.wait()
  assert checkpointer.restore(abstract(states[0])).step == 4


# Each script runs in a process of its own: it is limited, or killed.
PREAMBLE = f"""
import pathlib, resource, sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent.parent)!r})
import tests.conftest
from mfjax import checkpoint
from tests import test_checkpoint as t
config = t.RunConfig(checkpoint=t.CheckpointConfig(every=1, keep_last=2))
"""
OPEN = """
checkpointer = checkpoint.Checkpointer(sys.argv[1], config.checkpoint, config)
"""
FULL_DISK = f"""{OPEN}
directory, ballast = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1]) / "ballast"
state = t.make_state(1)
checkpointer.save(1, state, {{}})
checkpointer.wait()
if sys.argv[2] == "tmpfs":
  ballast.write_bytes(bytes(t.shutil.disk_usage(directory).free - 50_000))
else:
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, -1))
for foresight in (True, False):
  if not foresight:
    checkpointer._check_space = lambda num_bytes: None
  try:
    checkpointer.save(2, state, {{}})
    checkpointer.wait()
    sys.exit("nothing was raised")
  except checkpoint.CheckpointSaveError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
ballast.unlink(missing_ok=True)
t.assert_same(checkpointer.restore(t.abstract(state)).state, state)
checkpointer.save(2, state, {{}})
checkpointer.wait()
print(t.names(directory / "checkpoints"))
checkpointer.close()
"""


def run_script(script: str, *args: str) -> subprocess.Popen[str]:
  command = [sys.executable, "-c", PREAMBLE + script, *args]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def small_disk(tmp_path):
  mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
  if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting a small tmpfs needs root")
  yield tmp_path
  subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_fails_with_one_sentence(small_disk):
  _check_full_disk(small_disk, "tmpfs", "No space left on device")


def test_a_file_too_large_fails_with_one_sentence(tmp_path):
  _check_full_disk(tmp_path, "file size", "File too large")


def _check_full_disk(directory: pathlib.Path, kind: str, reason: str) -> None:
  process = run_script(FULL_DISK, str(directory), kind)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  *errors, left = out.splitlines()
  sentence = rf"step 2 could not be saved in {directory}/checkpoints: {reason} \(it takes about"
  assert len(errors) == 2
  assert all(re.match(sentence, error) for error in errors), errors
  assert left == "['1', '2']"


SAVE_FOREVER = f"""{OPEN}
restored = checkpointer.restore(t.abstract(t.make_state(0)))
step = restored.step if restored else 0
states = [t.make_state(seed) for seed in range(5)]
print("from", step, flush=True)
while True:
  step += 1
  checkpointer.save(step, states[step % 5], {{"seen": step}})
  print(step, flush=True)
"""


@pytest.mark.parametrize(
  "num_kills", [pytest.param(2), pytest.param(25, marks=pytest.mark.slow)], ids=str
)
def test_killed_at_random_moments(open_checkpointer, states, tmp_path, num_kills):
  random_moment = random.Random(num_kills)
  reached = 0
  for _ in range(num_kills):
    process = run_script(SAVE_FOREVER, str(tmp_path))
    assert process.stdout.readline().split() == ["from", str(reached)], process.stderr.read()
    process.stdout.readline()
    time.sleep(random_moment.uniform(0, 0.6))
    process.send_signal(signal.SIGKILL)
    begun = process.communicate()[0].split()
    restored = open_checkpointer().restore(abstract(states[0]))
    # The last save was running, the one before had been waited for.
    safe = max([reached, *(int(step) - 1 for step in begun)])
    if restored is None:  # Killed before the very first save was committed.
      assert safe == 0
      continue
    assert restored.step >= safe
    assert restored.data_state == {"seen": restored.step}
    assert_same(restored.state, states[restored.step % 5])
    reached = restored.step
  assert reached > 0


TWO_PROCESSES = f"""
from jax.experimental import multihost_utils
t.jax.distributed.initialize("localhost:" + sys.argv[2], 2, int(sys.argv[3]))
{OPEN}
state = t.make_state(1, (4, 2, 2))
assert checkpointer.restore(t.abstract(state)) is None
for step in (1, 2):
  checkpointer.save(step, state, {{"seen": step}})
  checkpointer.wait()
multihost_utils.sync_global_devices("saved")
if sys.argv[3] == "0":
  t.flip_byte(pathlib.Path(sys.argv[1]) / "checkpoints/2/run/run.json")
multihost_utils.sync_global_devices("flipped")
restored = checkpointer.restore(t.abstract(state))
for a, b in zip(*map(t.jax.tree.leaves, (restored.state, state)), strict=True):
  for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
    assert t.np.asarray(x.data).tobytes() == t.np.asarray(y.data).tobytes()
print(restored.step)
checkpointer.close()
"""


@pytest.mark.slow
def test_two_processes_agree_on_the_good_step(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  processes = [run_script(TWO_PROCESSES, str(tmp_path), port, rank) for rank in "01"]
  try:
    outputs = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [out.splitlines()[-1] for out, _ in outputs] == ["1", "1"], outputs
