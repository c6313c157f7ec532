"""The gcloud commands that order TPU VMs, run a command on all of them, and give them back."""

import dataclasses
import pathlib
import re
import shlex
import time
from collections.abc import Callable, Sequence

from mfjax.cluster import requeue
from mfjax.cluster.tpu import TpuSlice

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")
_CODE = (
  "mfjax exit code"  # Before each worker's code at the end of its log: gcloud loses the codes.
)
_LOST = 255  # As ssh has it: the worker did not say how it ended.
_POLL_SECONDS = 30
_OVER = ("FAILED", "SUSPENDING", "SUSPENDED")

Execute = Callable[[Sequence[Sequence[str]]], list[tuple[int, str]]]
"""Runs commands at the same time and returns the exit code and standard output of each."""


class TpuVmError(RuntimeError):
  """The cloud did not do what a command asked of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVmJob:
  """What a job asks of the Cloud TPU service: a queued resource of one or more slices.

  `options` are further options of `queued-resources create`, such as '--spot'. The workers need
  Docker and access to `image`. `log_directory` is on the machine that launches.
  """

  name: str
  slice: TpuSlice
  num_slices: int = 1
  image: str
  zone: str
  project: str | None = None
  runtime_version: str | None = None
  options: tuple[str, ...] = ()
  environment: tuple[tuple[str, str], ...] = ()
  grace_seconds: int
  max_restarts: int
  log_directory: str

  def __post_init__(self) -> None:
    if self.slice.type.accelerator_type is None:
      raise ValueError(f"{self.slice.type.name} cannot be ordered as TPU VMs: launch it with gke")
    if not _NAME.fullmatch(self.name):
      raise ValueError(
        f"name={self.name!r}: Google Cloud takes lower-case letters, digits and -, beginning with "
        "a letter, up to 52 characters"
      )
    if not self.zone:
      raise ValueError("zone is missing: give one that has the type, such as us-east5-a")
    for option in self.options:
      if not option.startswith("--"):
        raise ValueError(f"option {option!r}: write it as gcloud has it, such as --spot")

  @property
  def nodes(self) -> list[str]:
    """Return the names of the slices: the service numbers those that it makes together."""
    if self.num_slices == 1:
      return [self.name]
    return [f"{self.name}-{index}" for index in range(self.num_slices)]

  def logs(self, attempt: int, node: str) -> pathlib.Path:
    """Return the directory that gets a log per worker of `node`."""
    return pathlib.Path(self.log_directory, self.name, f"attempt-{attempt}", node)


def create(job: TpuVmJob) -> list[str]:
  """Return the command that orders the slices."""
  kind = job.slice.type
  if job.slice.topology.count("x") == 1:
    machine = [f"--accelerator-type={kind.accelerator_type}-{job.slice.chips}"]
  else:
    machine = [f"--type={kind.accelerator_type}", f"--topology={job.slice.topology}"]
  if job.num_slices == 1:
    nodes = [f"--node-id={job.name}"]
  else:
    nodes = [f"--node-count={job.num_slices}", f"--node-prefix={job.name}"]
  version = f"--runtime-version={job.runtime_version or kind.runtime_version}"
  command = _gcloud(job, "queued-resources", "create", job.name)
  return [*command, *machine, version, *nodes, *job.options]


def describe(job: TpuVmJob) -> list[str]:
  """Return the command that prints the order's state, ACTIVE when all slices are there."""
  return [
    *_gcloud(job, "queued-resources", "describe", job.name),
    "--format=value(state.state)",
  ]


def delete(job: TpuVmJob) -> list[str]:
  """Return the command that gives everything back."""
  return [*_gcloud(job, "queued-resources", "delete", job.name), "--force", "--quiet"]


def install(job: TpuVmJob) -> list[list[str]]:
  """Return the commands, one per slice, that pull the image onto all its workers."""
  registry = job.image.partition("/")[0]
  pull = f"sudo docker pull --quiet {shlex.quote(job.image)}"
  if registry.endswith(("gcr.io", "pkg.dev")):  # Those of Google Cloud: with the VM's account.
    pull = f"sudo gcloud auth configure-docker --quiet {shlex.quote(registry)} && {pull}"
  return [_ssh(job, node, pull) for node in job.nodes]


def execute(job: TpuVmJob, program: Sequence[str], attempt: int) -> list[list[str]]:
  """Return the commands, one per slice and to run together, that run `program` on all workers."""
  docker = ["sudo", "docker", "run", "--rm", f"--name={job.name}", "--privileged"]
  docker += ["--network=host", "--volume=/dev/shm:/dev/shm", f"--stop-timeout={job.grace_seconds}"]
  docker += [f"--env={name}={value}" for name, value in job.environment]
  remote = (  # A connection that was lost may have left its container behind.
    f"sudo docker rm --force {job.name} > /dev/null 2>&1; "
    f"{shlex.join([*docker, job.image, *program])} 2>&1; "
    f'echo "{_CODE} $?"'
  )
  return [
    [*_ssh(job, node, remote), f"--output-directory={job.logs(attempt, node)}"]
    for node in job.nodes
  ]


def lines(job: TpuVmJob, program: Sequence[str]) -> list[str]:
  """Return what `run` would run, as lines for a shell."""
  found = [shlex.join(create(job)), f"{shlex.join(describe(job))}  # Until it prints ACTIVE."]
  found += [shlex.join(command) for command in install(job)]
  found += [f"mkdir -p {shlex.quote(str(job.logs(0, node)))}" for node in job.nodes]
  together = " &" if job.num_slices > 1 else ""
  found += [f"{shlex.join(command)}{together}" for command in execute(job, program, 0)]
  if together:
    found.append("wait")
  return [*found, shlex.join(delete(job))]


def run(
  job: TpuVmJob,
  program: Sequence[str],
  execute_all: Execute,
  report: Callable[[str], None],
  sleep: Callable[[float], None] = time.sleep,
) -> int:
  """Order the slices, run `program` until it ends for good, and return its exit code.

  Nothing is left running (and paid for), however this ends.

  Raises:
    TpuVmError: a command of gcloud failed, or the order did.
  """
  try:
    _order(job, execute_all, report, sleep)
    for attempt in range(job.max_restarts + 1):
      for node in job.nodes:
        job.logs(attempt, node).mkdir(parents=True, exist_ok=True)
      report(f"running; logs in {job.logs(attempt, job.nodes[0]).parent}")
      execute_all(execute(job, program, attempt))
      code = requeue.outcome(_codes(job, attempt))
      if requeue.is_final(code) or attempt == job.max_restarts:
        break
      pause = requeue.pause(attempt)
      report(f"ended with code {code}: restart {attempt + 1} in {pause} s")
      sleep(pause)
      if _state(job, execute_all) != "ACTIVE":  # Preempted: the machines are gone.
        _one(delete(job), execute_all)
        _order(job, execute_all, report, sleep)
    report(f"ended with code {code}")
    return code
  finally:
    report(f"giving back {job.name}")
    execute_all([delete(job)])


def _order(
  job: TpuVmJob,
  execute_all: Execute,
  report: Callable[[str], None],
  sleep: Callable[[float], None],
) -> None:
  """Create the slices, wait for them and pull the image."""
  report(f"ordering {job.num_slices} x {job.slice} as {job.name}")
  _one(create(job), execute_all)
  reported = ""
  while (state := _state(job, execute_all)) != "ACTIVE":
    if state in _OVER:
      raise TpuVmError(f"the order {job.name} is {state}: gcloud's describe of it says why")
    if state != reported:
      report(f"{job.name} is {state or 'new'}")
      reported = state
    sleep(_POLL_SECONDS)
  for command, (code, _) in zip(install(job), execute_all(install(job)), strict=True):
    _check(command, code)


def _state(job: TpuVmJob, execute_all: Execute) -> str:
  return _one(describe(job), execute_all).strip()


def _one(command: Sequence[str], execute_all: Execute) -> str:
  [(code, output)] = execute_all([command])
  _check(command, code)
  return output


def _check(command: Sequence[str], code: int) -> None:
  if code != 0:
    raise TpuVmError(f"gcloud ended with code {code}: {shlex.join(command)}")


def _codes(job: TpuVmJob, attempt: int) -> list[int]:
  """Return the exit codes that the workers' logs end with; those that have none were lost."""
  codes = []
  for node in job.nodes:
    for log in sorted(job.logs(attempt, node).iterdir()):
      found = re.findall(rf"^{_CODE} (\d+)$", log.read_text(errors="replace"), re.MULTILINE)
      codes += [int(found[-1])] if found else []
  return codes + [_LOST] * (job.slice.hosts * job.num_slices - len(codes))


def _ssh(job: TpuVmJob, node: str, remote: str) -> list[str]:
  return [*_gcloud(job, "tpu-vm", "ssh", node), "--worker=all", f"--command={remote}"]


def _gcloud(job: TpuVmJob, group: str, verb: str, name: str) -> list[str]:
  project = [f"--project={job.project}"] if job.project else []
  return ["gcloud", "compute", "tpus", group, verb, name, f"--zone={job.zone}", *project]
