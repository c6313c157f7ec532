"""Several hosts on this machine: network namespaces, each with an address and a name.

Needs root and iproute2; `drop` needs nftables. It installs nothing.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_LABS = itertools.count()
_NETNS_FILES = pathlib.Path("/etc/netns")  # `ip netns exec` mounts NAME/hosts over /etc/hosts.


def missing() -> str:
  """Return what this machine lacks for a lab, as a reason to skip; empty if nothing."""
  if os.geteuid() != 0:
    return "needs root"
  packages = {"ip": "iproute2", "nft": "nftables"}
  lacking = [package for tool, package in packages.items() if shutil.which(tool) is None]
  return f"needs the Debian packages {' '.join(lacking)}" if lacking else ""


@dataclasses.dataclass(frozen=True)
class Host:
  """One host: its name and address, and the namespaces behind them."""

  name: str
  address: str
  namespace: str
  switch: str
  port: str  # The switch's end of its cable.

  def command(self, words: Sequence[str]) -> list[str]:
    """Return the command that runs `words` on this host, under its name; it becomes `words`."""
    rename = 'hostname "$0" && exec "$@"'
    return [*_inside(self.namespace), "unshare", "--uts", "sh", "-c", rename, self.name, *words]

  def start(
    self, words: Sequence[str], environment: Mapping[str, str], **options: Any
  ) -> subprocess.Popen[str]:
    """Start `words` on this host; signals to the process reach it."""
    return subprocess.Popen(self.command(words), env=dict(environment), text=True, **options)

  def cut(self) -> None:
    """Pull the cable."""
    _run("ip", "-n", self.switch, "link", "set", self.port, "down")

  def heal(self) -> None:
    """Plug the cable in again."""
    _run("ip", "-n", self.switch, "link", "set", self.port, "up")

  def drop(self) -> None:
    """Lose every packet that comes in, without a word to who sent it."""
    chain = "{ type filter hook input priority 0; policy drop; }"
    inside = _inside(self.namespace)
    _run(*inside, "nft", "add", "table", "inet", "lab")
    _run(*inside, "nft", "add", "chain", "inet", "lab", "input", chain)
    _run(*inside, "nft", "add", "rule", "inet", "lab", "input", "iif", "lo", "accept")

  def undrop(self) -> None:
    """Take packets in again."""
    _run(*_inside(self.namespace), "nft", "delete", "table", "inet", "lab")


@contextlib.contextmanager
def network(count: int) -> Iterator[list[Host]]:
  """Make `count` hosts, host0 to host{count - 1}, that reach each other and nothing else."""
  lab = f"mfjax-{os.getpid()}-{next(_LABS)}"
  switch = f"{lab}-switch"
  hosts = [
    Host(f"host{i}", f"10.231.0.{i + 10}", f"{lab}-host{i}", switch, f"port{i}")
    for i in range(count)
  ]
  names = "".join(f"{host.address} {host.name}\n" for host in hosts)
  try:
    _run("ip", "netns", "add", switch)
    _run("ip", "-n", switch, "link", "add", "bridge0", "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "bridge0", "up")
    for host in hosts:
      _connect(host)
      files = _NETNS_FILES / host.namespace
      files.mkdir(parents=True)
      (files / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    yield hosts
  finally:
    for namespace in (switch, *(host.namespace for host in hosts)):
      subprocess.run(["ip", "netns", "del", namespace], stderr=subprocess.DEVNULL)
      shutil.rmtree(_NETNS_FILES / namespace, ignore_errors=True)


def _connect(host: Host) -> None:
  inside = ("ip", "-n", host.namespace)
  _run("ip", "netns", "add", host.namespace)
  cable = ("type", "veth", "peer", "name", host.port, "netns", host.switch)
  _run("ip", "link", "add", "eth0", "netns", host.namespace, *cable)
  _run("ip", "-n", host.switch, "link", "set", host.port, "master", "bridge0", "up")
  _run(*inside, "link", "set", "lo", "up")
  _run(*inside, "addr", "add", f"{host.address}/24", "dev", "eth0")
  _run(*inside, "link", "set", "eth0", "up")


def _inside(namespace: str) -> list[str]:
  return ["ip", "netns", "exec", namespace]


def _run(*words: str) -> None:
  done = subprocess.run(words, capture_output=True, text=True)
  assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
