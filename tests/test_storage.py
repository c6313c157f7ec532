"""Checkpoints, metrics and data in a bucket of a GCS emulator; corruption there and on disk."""

import dataclasses
import importlib.util
import json
import random

import numpy as np
import pytest
from etils import epath

from mfjax import checkpoint, digests, storage, writers
from mfjax.config import CheckpointConfig, DataConfig, RunConfig
from mfjax.data.index import open_index
from mfjax.data.pipeline import TrainStream
from mfjax.data.prepare import PrepareOptions, prepare
from tests import gcs
from tests.test_checkpoint import abstract, assert_same, make_state

# Not importorskip: gcsfs reads its environment when it is imported.
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not importlib.util.find_spec("gcsfs"), reason="needs gcsfs, which the extra test installs"
  ),
]
NUM_FLIPS = 20


@pytest.fixture(scope="module")
def bucket():
  """The URL of an emulated bucket."""
  with gcs.emulator() as port, pytest.MonkeyPatch.context() as patch:
    for name, value in (gcs.environment(port) | {"FSSPEC_GCS": storage.GCS_OPTIONS}).items():
      patch.setenv(name, value)
    import fsspec

    fsspec.config.set_conf_env(fsspec.config.conf)
    yield f"gs://{gcs.BUCKET}"


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path):
  """A directory on disk, then one in the bucket."""
  if request.param == "disk":
    return epath.Path(tmp_path)
  return epath.Path(request.getfixturevalue("bucket")) / tmp_path.name


def open_checkpointer(workdir):
  config = RunConfig(checkpoint=CheckpointConfig(every=1, keep_last=2))
  return checkpoint.Checkpointer(workdir, config.checkpoint, config)


def flip(path: epath.Path, place: int) -> None:
  content = bytearray(path.read_bytes())
  content[place] ^= 1
  path.write_bytes(bytes(content))


def test_a_byte_flipped_anywhere_is_named_and_the_step_before_used(workdir, caplog):
  states = {step: make_state(step) for step in (1, 2)}
  checkpointer = open_checkpointer(workdir)
  for step, state in states.items():
    checkpointer.save(step, state, {"seen": step})
  checkpointer.wait()
  newest = workdir / "checkpoints" / "2"
  names = [*sorted(digests._names(newest)), digests.FILE_NAME]
  sizes = [(newest / name).stat().length for name in names]
  choice = random.Random(0)
  # Half of the places by bytes (arrays, mostly), half by files.
  files = choice.choices(names, sizes, k=NUM_FLIPS // 2) + choice.choices(names, k=NUM_FLIPS // 2)
  for name in files:
    place = choice.randrange((newest / name).stat().length)
    flip(newest / name, place)
    caplog.clear()
    restored = checkpointer.restore(abstract(states[1]))
    assert restored.step == 1, (name, place)
    assert_same(restored.state, states[1])
    assert f"step 2 in {workdir}/checkpoints is corrupt: {name}" in caplog.text
    flip(newest / name, place)
  assert checkpointer.restore(abstract(states[2])).step == 2
  checkpointer.close()


def test_steps_are_replaced_and_deleted(workdir):
  checkpointer = open_checkpointer(workdir)
  for step in (1, 2, 3):
    checkpointer.save(step, make_state(step), {})
  checkpointer.wait()
  assert checkpointer.complete_steps() == [3, 2]
  again = open_checkpointer(workdir)
  assert again.restore(abstract(make_state(0)), step=2).step == 2
  again.save(3, make_state(4), {})
  again.wait()
  assert_same(again.restore(abstract(make_state(0))).state, make_state(4))
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "3"]
  for one in (checkpointer, again):
    one.close()


def test_metrics_go_on_in_further_objects(workdir, monkeypatch):
  monkeypatch.setattr(writers, "_OBJECT_BYTES", 40)
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / writers.METRICS_FILE
  for start, steps in ((0, range(1, 8)), (4, range(5, 11))):
    writer = writers.JsonlWriter(path, start)
    for step in steps:
      writer.log({"step": step, "loss": 1.5})
    writer.close()
  assert [record["step"] for record in writers.read_records(path)] == list(range(1, 11))


def test_prepared_data_is_read_from_a_bucket(bucket, tmp_path):
  source = tmp_path / "text.jsonl"
  source.write_text(
    "".join(json.dumps({"text": f"{i} " * (i % 50 + 1)}) + "\n" for i in range(300))
  )
  options = PrepareOptions(out=str(tmp_path / "data"), inputs=(("d", str(source)),), train_bpe=300)
  local = prepare(options)
  away = dataclasses.replace(options, out=f"{bucket}/data")
  assert prepare(away).digest == local.digest
  assert prepare(away).digest == local.digest  # Again: it is there.
  config = DataConfig(sequence_length=32, batch_rows=4)
  streams = [TrainStream(open_index(i.path), config, seed=1) for i in (local, prepare(away))]
  for _ in range(10):
    (one, _), (other, _) = map(next, streams)
    np.testing.assert_array_equal(one["tokens"], other["tokens"])
  for stream in streams:
    stream.close()


@pytest.mark.parametrize(
  ("path", "said"),
  [
    (f"gs://{gcs.FORBIDDEN}/run", "gs://forbidden cannot be read .*roles/storage.objectAdmin"),
    ("gs://absent-bucket/run", "gs://absent-bucket cannot be read .*create it"),
    ("s3://bucket/run", "give a local path or gs://BUCKET/FOLDER"),
    ("gs://", "give a local path or gs://BUCKET/FOLDER"),
  ],
)
def test_a_bucket_that_refuses_is_one_sentence(bucket, path, said):
  with pytest.raises(ValueError, match=f"--workdir={path}: .*{said}"):
    storage.check_access(path, "--workdir")
