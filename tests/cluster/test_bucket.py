"""Four processes train to a bucket and resume from it."""

import os
import re
import signal

import pytest
from etils import epath

from mfjax.config import MeshConfig
from mfjax.storage import upload
from tests.cluster.jobs import Job, make_config, make_data
from tests.cluster.test_local import AFTER_BATCH_6
from tests.test_storage import bucket  # noqa: F401 - a fixture.

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_four_processes_train_to_a_bucket_and_resume_from_it(bucket, tmp_path):  # noqa: F811
  data, cache = make_data(tmp_path), tmp_path / "cache"
  upload(data, epath.Path(bucket) / "data")
  config, local = (
    make_config(path, steps=12, mesh=MeshConfig(fsdp=2)) for path in (f"{bucket}/data", data)
  )
  undisturbed = Job(local, tmp_path / "u", cache, 4, 1).run()
  job = Job(config, tmp_path / "w", cache, 4, 1, AFTER_BATCH_6, url=f"{bucket}/run").start()
  job.await_step(4)
  os.kill(job.pid(2), signal.SIGTERM)
  assert job.wait() == 75, job.all_logs()
  last = job.losses()[-1][0]
  assert job.checkpoints()[-1] == last < 12
  job.run()
  assert re.search(f"resuming after step {last} in {bucket}/run", job.log(0))
  assert job.losses() == undisturbed.losses()
  assert job.checkpoints()[-1] == 12
