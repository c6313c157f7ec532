"""Rows of a batch on the devices of several processes."""

import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from mfjax import sharding
from mfjax.config import MeshConfig

# The device order of a mesh over a pod is chosen for its links: a process's devices need not be
# neighbours in it.
TWO_PROCESSES = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent.parent)!r})
import tests.conftest
import jax, numpy as np
from mfjax import sharding
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
devices = np.array(jax.devices())
for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 1, 2, 0]):
  mesh = jax.make_mesh((2, 1, 2), sharding.AXES, devices=devices[order])
  rows = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
  own = sharding.process_rows(mesh, 8)
  print(order, own.tolist())
  batch = sharding.device_batch(mesh, {{"x": rows[own]}})["x"]
  assert batch.shape == rows.shape
  for shard in batch.addressable_shards:
    np.testing.assert_array_equal(np.asarray(shard.data), rows[shard.index])
"""


def test_one_process_holds_all_rows():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices())
  assert sharding.process_rows(mesh, 16).tolist() == list(range(16))
  rows = np.arange(32).reshape(16, 2)
  batch = sharding.device_batch(mesh, {"x": rows})["x"]
  np.testing.assert_array_equal(np.asarray(batch), rows)


@pytest.mark.slow
def test_each_process_holds_the_rows_of_its_devices():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  commands = [[sys.executable, "-c", TWO_PROCESSES, port, rank] for rank in "01"]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  processes = [subprocess.Popen(command, **pipes) for command in commands]
  try:
    outputs = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert outputs[0][0].splitlines() == [
    "[0, 1, 2, 3] [0, 1, 2, 3]",
    "[0, 2, 1, 3] [0, 1, 4, 5]",
    "[3, 1, 2, 0] [2, 3, 6, 7]",
  ]
