"""Submit a command to a Slurm cluster, and let it start again there.

mfjax launch slurm --nodes=4 --gpus_per_node=8 --max_restarts=10 -- train --config=quickstart ...

Writes a batch script to the log directory and submits it with sbatch, from this directory. Each
rank's own log is in LOGS/job-ID/attempt-N. The nodes must see this directory, the log
directory and, without --container_image, this Python.
"""

import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

from absl import flags

from launch.targets import _remote
from launch.targets import flags as shared
from mfjax.cluster import slurm

_NODES = flags.DEFINE_integer("nodes", 1, "Number of nodes.", lower_bound=1)
_GPUS_PER_NODE = flags.DEFINE_integer("gpus_per_node", 0, "GPUs on each.", lower_bound=0)
_TASK_PER_GPU = flags.DEFINE_bool(
  "task_per_gpu", False, "Start a process per GPU instead of one per node that drives all."
)
_CPUS_PER_TASK = flags.DEFINE_integer(
  "cpus_per_task", None, "CPU cores of a process. Default: what the cluster gives.", lower_bound=1
)
_TIME = flags.DEFINE_string("time", None, "Time limit, such as 24:00:00.")
_ACCOUNT = flags.DEFINE_string("account", None, "Account to charge.")
_PARTITION = flags.DEFINE_string("partition", None, "Partition to run in.")
_SBATCH = flags.DEFINE_multi_string("sbatch", [], "Further option of sbatch, such as --qos=high.")
_LOGS = flags.DEFINE_string("logs", "slurm", "Directory for script and logs.")
_CONTAINER_IMAGE = flags.DEFINE_string(
  "container_image", None, "Image to run in, as Slurm's plugin pyxis takes it; has mfjax in it."
)
_CONTAINER_MOUNTS = flags.DEFINE_string("container_mounts", None, "Mounts, as pyxis takes them.")


def run(command: Sequence[str]) -> int:
  """Submit `command` and return 0 once Slurm has it."""
  directory = pathlib.Path(_LOGS.value).absolute()
  job = slurm.SlurmJob(
    name=_remote.JOB_NAME.value,
    nodes=_NODES.value,
    gpus_per_node=_GPUS_PER_NODE.value,
    task_per_gpu=_TASK_PER_GPU.value,
    cpus_per_task=_CPUS_PER_TASK.value,
    time=_TIME.value,
    account=_ACCOUNT.value,
    partition=_PARTITION.value,
    options=tuple(_SBATCH.value),
    grace_seconds=_remote.GRACE_SECONDS.value,
    max_restarts=shared.MAX_RESTARTS.value,
    log_directory=str(directory),
    container_image=_CONTAINER_IMAGE.value,
    container_mounts=_CONTAINER_MOUNTS.value,
  )
  mfjax = ["mfjax"] if job.container_image else [sys.executable, "-m", "launch.main"]
  script = slurm.script(job, [*mfjax, *command])
  _remote.show(script, printed=shared.DRY_RUN.value)
  submit = ["sbatch", str(directory / f"{job.name}.sbatch")]
  if shared.DRY_RUN.value:
    print(f"# {shlex.join(submit)}")
    return 0
  _remote.require("sbatch")
  directory.mkdir(parents=True, exist_ok=True)
  pathlib.Path(submit[1]).write_text(script, encoding="utf-8")
  done = subprocess.run(submit)
  if done.returncode == 0:
    print(f"logs: {directory}/job-ID.log, and {directory}/job-ID/attempt-N/rank-R.log of each rank")
  return done.returncode
