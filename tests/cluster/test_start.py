"""Finding the other processes, and what is said when they do not come."""

import socket
import time

import pytest

from mfjax.cluster import start
from mfjax.config import ClusterConfig

CONFIG = ClusterConfig(initialization_timeout=1)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
  """No cluster around, whatever the tests run on."""
  for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
    monkeypatch.delenv(name, raising=False)


def test_a_process_alone_has_no_coordinates():
  assert start.find(CONFIG) is None
  assert start.find(CONFIG, num_processes=1) is None


def test_given_coordinates_are_taken():
  assert start.find(CONFIG, "host:1", 4, 3) == start.Coordinates("host:1", 4, 3)


def test_slurm_is_detected(monkeypatch):
  for name, value in {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-5]", "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
  }.items():  # fmt: skip
    monkeypatch.setenv(name, value)
  found = start.find(CONFIG)
  assert found == start.Coordinates("node3:61447", 3, 2, (0,))
  monkeypatch.setenv("SLURM_NTASKS", "1")
  assert start.find(CONFIG) is None


def test_half_of_the_coordinates_is_not_enough():
  with pytest.raises(ValueError, match="--coordinator_address, --process_id must be given too"):
    start.find(CONFIG, num_processes=4)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (("host:1", 4, 4), "--process_id=4 must be at least 0 and below --num_processes=4"),
    (("host", 4, 0), "--coordinator_address='host': give HOST:PORT"),
  ],
)
def test_coordinates_that_cannot_be(given, message):
  with pytest.raises(ValueError, match=message):
    start.find(CONFIG, *given)


def test_a_detection_that_fails_says_how_to_do_without(monkeypatch):
  def fail(*_):
    raise RuntimeError("no such service account")

  monkeypatch.setattr(start.clusters.ClusterEnv, "auto_detect_unset_distributed_params", fail)
  with pytest.raises(start.StartError, match="no such service account.*--num_processes=1"):
    start.find(CONFIG)


def test_a_silent_coordinator_is_one_sentence_within_the_time():
  with socket.socket() as closed:  # Bound, and no one listens.
    closed.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{closed.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(start.StartError) as error:
      start.start(CONFIG, start.Coordinates(address, 2, 1))
  assert time.monotonic() - began < 5
  assert f"the coordinator at {address} did not answer within 1 s" in str(error.value)
  assert "Connection refused" in str(error.value)


def test_an_unknown_host_is_one_sentence():
  with pytest.raises(start.StartError, match="no-such-host.invalid:1 did not answer"):
    start.start(CONFIG, start.Coordinates("no-such-host.invalid:1", 2, 1))


def test_a_taken_port_is_one_sentence():
  with socket.socket(socket.AF_INET6) as taken:
    taken.bind(("", 0))
    taken.listen()
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(start.StartError, match="in use by another program: choose another"):
      start.start(CONFIG, start.Coordinates(address, 2, 0))
