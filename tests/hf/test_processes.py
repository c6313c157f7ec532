"""Real commands in processes of their own: interrupted, out of disk, fed by several hosts."""

import os
import pathlib
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from mfjax.config import ModelConfig
from mfjax.hf.export import export
from tests.hf import models

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent.parent
# 80 million parameters: some blocks of each tensor, and some tenths of a second for each stage.
CONFIG = ModelConfig(vocab_size=1000, d_model=512, d_attention=512, d_ff=1024, num_layers=2)


def files(directory: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> pathlib.Path:
  """A directory of a workdir, `w`, and its export, `out`."""
  folder = tmp_path_factory.mktemp("pair")
  models.make_workdir(folder / "w", CONFIG)
  export(folder / "w", folder / "out", dtype="float32", num_tokens=0)
  return folder


class Command:
  """A running `mfjax`, whose progress is a terminal's: a line that is written anew."""

  def __init__(self, *args: str) -> None:
    self._terminal, end = pty.openpty()
    self.process = subprocess.Popen(
      [sys.executable, "-m", "launch.main", *args],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=end,
    )
    os.close(end)
    self.said = ""

  def _read(self) -> bool:
    if not select.select([self._terminal], [], [], 60)[0]:
      raise TimeoutError(self.said)
    try:
      content = os.read(self._terminal, 65536).decode()
    except OSError:  # Linux's way to say that nobody will write any more.
      return False
    self.said += content
    return bool(content)

  def wait_for(self, stage: str) -> None:
    """Wait until some of a stage is done and some is left."""
    while not re.search(rf"{stage}  .* s left", self.said):
      assert self._read(), self.said

  def end(self) -> str:
    """Return what was said in all."""
    while self._read():
      pass
    self.process.wait(60)
    return self.said

  def __enter__(self) -> "Command":
    return self

  def __exit__(self, *_: object) -> None:
    self.process.kill()
    self.process.wait()
    self.process.stdout.close()
    os.close(self._terminal)


def arguments(command: str, pair: pathlib.Path, out: pathlib.Path) -> list[str]:
  return {
    "export": [command, f"{pair}/w", str(out), "--dtype=float32", "--parity_tokens=0"],
    "import": [command, f"{pair}/out", str(out)],
    "verify": [command, f"{pair}/w", f"{pair}/w", "--parity_tokens=64"],
  }[command]


@pytest.mark.parametrize(
  ("command", "stage", "number"),
  [
    ("export", "writing and comparing", signal.SIGINT),
    ("export", "writing and comparing", signal.SIGTERM),
    ("import", "writing and comparing", signal.SIGINT),
    ("import", "writing and comparing", signal.SIGTERM),
    ("verify", "comparing", signal.SIGINT),
    ("verify", "computing logits", signal.SIGINT),
  ],
)
def test_a_signal_ends_it_soon_and_leaves_nothing(command, stage, number, pair, tmp_path):
  with Command(*arguments(command, pair, tmp_path / "deep/out")) as running:
    running.wait_for(stage)
    begin = time.monotonic()
    running.process.send_signal(number)
    running.process.send_signal(number)  # Impatience does not end the cleaning up.
    said = running.end()
  assert time.monotonic() - begin < 30
  assert running.process.returncode == (130 if number == signal.SIGINT else 143)
  last = said.splitlines()[-1]
  if number == signal.SIGINT:
    assert last.endswith("mfjax: error: interrupted")
  assert "Traceback" not in said
  assert list(tmp_path.iterdir()) == []
  assert sorted(path.name for path in pair.iterdir()) == ["out", "w"]


@pytest.fixture
def small_disk(tmp_path):
  mount = ["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(tmp_path)]
  if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting a small tmpfs needs root")
  yield tmp_path
  subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_disk_that_fills_midway(command, pair, small_disk):
  out = small_disk / "out"
  with Command(*arguments(command, pair, out)) as running:
    while not list(small_disk.glob(".out.*.partial")):  # It found the disk large enough.
      assert running.process.poll() is None, running.end()
      time.sleep(0.001)
    with (small_disk / "ballast").open("wb") as ballast:
      os.posix_fallocate(ballast.fileno(), 0, 300_000_000)
    said = running.end()
  assert running.process.returncode == 2
  *_, last = said.splitlines()
  reason = {
    "export": rf"the disk filled while {out} was written \(about [\d,]+ bytes\): make room or",
    "import": rf"{out} could not be written: No space left on device",
  }[command]
  assert re.search(rf"mfjax {command}: error: {reason}", last), said
  assert "Traceback" not in said
  assert [path.name for path in small_disk.iterdir()] == ["ballast"]


HOST = """
import pathlib, sys
import jax
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
from mfjax.config import MeshConfig
from tests.hf import models
mesh = MeshConfig(data=1, fsdp=2, expert=2)
models.make_workdir(pathlib.Path(sys.argv[1]), models.HEADS, mesh=mesh)
"""


def test_one_host_exports_what_two_hosts_wrote(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  command = [sys.executable, "-c", HOST, str(tmp_path / "two/w"), port]
  two_devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  environment = os.environ | two_devices | {"PYTHONPATH": str(ROOT)}
  hosts = [
    subprocess.Popen([*command, rank], stderr=subprocess.PIPE, env=environment) for rank in "01"
  ]
  try:
    errors = [host.communicate(timeout=120)[1] for host in hosts]
  finally:
    for host in hosts:
      host.kill()
  assert [host.returncode for host in hosts] == [0, 0], errors
  written = {path.name for path in (tmp_path / "two/w/checkpoints/7/params").iterdir()}
  assert {"ocdbt.process_0", "ocdbt.process_1"} <= written
  models.make_workdir(tmp_path / "one/w", models.HEADS)
  for name in ("one", "two"):
    export(tmp_path / name / "w", tmp_path / name / "out", num_tokens=0)
  assert files(tmp_path / "two/out") == files(tmp_path / "one/out")
