"""A real Slurm on this machine: one controller and four nodes. It installs nothing; needs root."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

NODES = 4
# Four cores and 8 GB are what the nodes say; the machine needs neither.
_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
SlurmctldPort={controller_port}
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=4 RealMemory=8000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_TOOLS = {
  "slurmctld": "slurmctld",
  "slurmd": "slurmd",
  "sbatch": "slurm-client",
  "munged": "munge",
}


def missing() -> str:
  """Return what this machine lacks for a lab, as a reason to skip; empty if nothing."""
  if os.geteuid() != 0:
    return "needs root"
  lacking = [package for tool, package in _TOOLS.items() if _find(tool) is None]
  return f"needs the Debian packages {' '.join(lacking)}" if lacking else ""


def _find(tool: str) -> str | None:
  return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
  """Start Slurm and yield the environment in which its commands find it."""
  directory = pathlib.Path(tempfile.mkdtemp(prefix="mfjax-slurm-"))
  first = _free_ports(NODES + 1)
  host = socket.gethostname()
  nodes = [f"lab{index}" for index in range(NODES)]
  configuration = directory / "slurm.conf"
  configuration.write_text(
    _CONF.format(
      directory=directory,
      host=host,
      nodes=f"lab[0-{NODES - 1}]",
      controller_port=first,
      node_ports=f"[{first + 1}-{first + NODES}]",
    )
  )
  environment = {**os.environ, "SLURM_CONF": str(configuration)}
  for name in ("state", *nodes):
    (directory / name).mkdir()
  daemons: list[subprocess.Popen[bytes]] = []
  with contextlib.ExitStack() as ending:
    ending.callback(shutil.rmtree, directory, ignore_errors=True)
    ending.enter_context(_names(nodes))
    ending.callback(_stop, daemons)
    daemons.append(_munge(directory))
    daemons.append(_start(environment, "slurmctld", "-D", "-c"))
    daemons += [_start(environment, "slurmd", "-D", "-N", node) for node in nodes]
    _await_nodes(environment, directory)
    ending.callback(_end_jobs, environment)
    yield environment


def _free_ports(count: int) -> int:
  """Return the first of `count` adjacent ports that nobody listens at."""
  for first in range(16817, 17817, count):
    with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
      for port in range(first, first + count):
        opened.enter_context(socket.create_server(("127.0.0.1", port)))
      return first
  raise AssertionError("no free ports for Slurm")


@contextlib.contextmanager
def _names(nodes: list[str]) -> Iterator[None]:
  """Let the nodes' names resolve: JAX's coordinator is named so."""
  hosts = pathlib.Path("/etc/hosts")  # Written in place: it may be a mount.
  before = hosts.read_text()
  hosts.write_text(before + "".join(f"127.0.0.1 {node}  # Slurm lab\n" for node in nodes))
  try:
    yield
  finally:
    lines = hosts.read_text().splitlines(keepends=True)
    hosts.write_text("".join(line for line in lines if not line.endswith("# Slurm lab\n")))


def _munge(directory: pathlib.Path) -> subprocess.Popen[bytes]:
  """Start a munge of the lab's own: authentication between Slurm's daemons."""
  directory.chmod(0o755)
  (directory / "munge.key").write_bytes(os.urandom(128))
  (directory / "munge.key").chmod(0o400)
  options = {
    "key-file": directory / "munge.key",
    "socket": directory / "munge.socket",
    "pid-file": directory / "munge.pid",
    "log-file": directory / "munge.log",
    "seed-file": directory / "munge.seed",
  }
  words = [f"--{name}={value}" for name, value in options.items()]
  return _start(dict(os.environ), "munged", "--foreground", "--force", *words)


def _start(environment: dict[str, str], tool: str, *words: str) -> subprocess.Popen[bytes]:
  program = _find(tool)
  assert program
  return subprocess.Popen(
    [program, *words],
    env=environment,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )


def _await_nodes(environment: dict[str, str], directory: pathlib.Path) -> None:
  deadline = time.monotonic() + 60
  seen = ""
  while time.monotonic() < deadline:
    done = subprocess.run(
      ["sinfo", "--noheader", "--format=%D %t"], env=environment, capture_output=True, text=True
    )
    seen = done.stdout + done.stderr
    if done.stdout.split() == [str(NODES), "idle"]:
      return
    time.sleep(0.5)
  raise AssertionError(f"Slurm did not start: {seen} {(directory / 'slurmctld.log').read_text()}")


def _end_jobs(environment: dict[str, str]) -> None:
  """End what a failed test left behind: without the daemons it would live on."""
  deadline = time.monotonic() + 30
  squeue = ["squeue", "--noheader", "--format=%A"]
  while time.monotonic() < deadline:
    left = subprocess.run(squeue, env=environment, capture_output=True, text=True).stdout.split()
    if not left:
      return
    subprocess.run(["scancel", *left], env=environment, stderr=subprocess.DEVNULL)
    time.sleep(1)


def _stop(daemons: list[subprocess.Popen[bytes]]) -> None:
  for daemon in reversed(daemons):
    daemon.terminate()
  for daemon in reversed(daemons):
    try:
      daemon.wait(timeout=20)
    except subprocess.TimeoutExpired:
      daemon.kill()
      daemon.wait()
