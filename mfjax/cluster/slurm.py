"""The batch script that runs a command on the nodes of a Slurm cluster and restarts it."""

import dataclasses
import re
import shlex
from collections.abc import Sequence

from mfjax.cluster import exit_codes, requeue

_STRAGGLERS_SECONDS = 120  # Ranks end together; one that does not is ended by srun.
_WORD = re.compile(r"[^\s\"'\\#]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmJob:
  """What a job asks of Slurm, and how it ends and starts again.

  `gpus_per_node` may be 0. One task per node drives all its GPUs; with `task_per_gpu` each GPU has
  a task of its own. Without `cpus_per_task` a task gets what the cluster gives, often one core.
  `time` is a limit such as 24:00:00; the ranks get SIGTERM `grace_seconds` before it. `options` are
  further options of sbatch, such as '--qos=high'. `log_directory` must be seen by every node. With
  `container_image`, ranks run in it (Slurm's plugin pyxis).
  """

  name: str
  nodes: int
  gpus_per_node: int = 0
  task_per_gpu: bool = False
  cpus_per_task: int | None = None
  time: str | None = None
  account: str | None = None
  partition: str | None = None
  options: tuple[str, ...] = ()
  grace_seconds: int
  max_restarts: int
  log_directory: str
  container_image: str | None = None
  container_mounts: str | None = None

  def __post_init__(self) -> None:
    words = {name: getattr(self, name) for name in ("name", "time", "account", "partition")}
    words |= {f"option {option!r}": option for option in self.options}
    for name, word in words.items():
      if word is not None and not _WORD.fullmatch(word):
        raise ValueError(f"{name}={word!r}: it must be one word, without quotes, \\ and #")
    for option in self.options:
      if not option.startswith("-"):
        raise ValueError(f"option {option!r}: write it as sbatch has it, such as --qos=high")
    if self.task_per_gpu and not self.gpus_per_node:
      raise ValueError("a task per GPU needs GPUs: set gpus_per_node as well")
    if self.container_mounts and not self.container_image:
      raise ValueError("container_mounts needs a container_image to mount into")
    # Slurm replaces %x in file names, and takes \\ as the end of that.
    if re.search(r"[%\\\n]", self.log_directory):
      raise ValueError(
        f"log_directory={self.log_directory!r}: Slurm gives % and \\ a meaning there"
      )

  @property
  def tasks_per_node(self) -> int:
    """Return the number of processes on a node."""
    return self.gpus_per_node if self.task_per_gpu else 1


def script(job: SlurmJob, program: Sequence[str]) -> str:
  """Return the text of the batch script that runs `program`, a list of words, as `job` says."""
  return "\n".join([*_header(job), "", *_body(job, program), ""])


def _header(job: SlurmJob) -> list[str]:
  options = {
    "job-name": job.name,
    "nodes": job.nodes,
    "ntasks-per-node": job.tasks_per_node,
    "gpus-per-node": job.gpus_per_node or None,
    "cpus-per-task": job.cpus_per_task,
    "time": job.time,
    "account": job.account,
    "partition": job.partition,
    "signal": f"TERM@{job.grace_seconds}",
    "open-mode": "append",
    "output": shlex.quote(f"{job.log_directory}/job-%j.log"),
  }
  lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
  return ["#!/bin/bash", *lines, "#SBATCH --requeue", *(f"#SBATCH {o}" for o in job.options)]


# Each rank notes its exit code: srun returns only the greatest, and a rank that gave up (2) takes
# its peers along, who end with greater ones. The traps let both shells outlive a signal that is
# meant for the ranks.
_RANK = 'trap : TERM INT; "$@"; code=$?; echo "$code" > "$0/rank-$SLURM_PROCID.exit"; exit "$code"'


def _body(job: SlurmJob, program: Sequence[str]) -> list[str]:
  lines = [
    "trap : TERM INT",
    "restarts=${SLURM_RESTART_COUNT:-0}",
    f'ranks={shlex.quote(job.log_directory)}/"job-$SLURM_JOB_ID/attempt-$restarts"',
    'mkdir -p "$ranks"',
  ]
  if job.gpus_per_node and not job.task_per_gpu:
    devices = ",".join(str(device) for device in range(job.gpus_per_node))
    lines += [f"export JAX_LOCAL_DEVICE_IDS={devices}  # Otherwise JAX takes one GPU per process."]
  srun = ["srun", "--kill-on-bad-exit=0", f"--wait={_STRAGGLERS_SECONDS}"]
  if job.cpus_per_task:  # Slurm does not hand this on to srun.
    srun.append(f"--cpus-per-task={job.cpus_per_task}")
  if job.container_image:
    srun.append(f"--container-image={job.container_image}")
  if job.container_mounts:
    srun.append(f"--container-mounts={job.container_mounts}")
  return [
    *lines,
    "",
    f'{shlex.join(srun)} --output="$ranks/rank-%t.log" \\',
    f'  bash -c {shlex.quote(_RANK)} "$ranks" \\',
    f"  {shlex.join(program)}",
    "code=$?",
    "",
    *_restart(job),
  ]


def _restart(job: SlurmJob) -> list[str]:
  final = exit_codes.USAGE
  return [
    f'if grep -qx {final} "$ranks"/*.exit; then code={final}; fi',
    f'case $code in {exit_codes.FINISHED} | {final}) exit "$code" ;; esac',
    f'if [ "$restarts" -ge {job.max_restarts} ]; then',
    '  echo "ended with code $code after $restarts restarts, and is not started again"',
    '  exit "$code"',
    "fi",
    f"pause={requeue.shell_pause('restarts')}",
    'echo "ended with code $code: restart $((restarts + 1)) in $pause s"',
    # Slurm alone would wait two minutes, also for a time that is past when the job has ended. It
    # ends this script, too: the script ignores that until it has named a time.
    "trap '' TERM",
    'scontrol requeue "$SLURM_JOB_ID"',
    'scontrol update JobId="$SLURM_JOB_ID" StartTime="now+$pause"',
  ]
