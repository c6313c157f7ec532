"""How `mfjax train` learns which of several processes it is."""

import pytest
from absl import logging

from mfjax.cluster import session, start
from mfjax.cluster.processes import Process

PLACES = ("--coordinator_address=host:7", "--num_processes=4", "--process_id=3")


@pytest.fixture
def train(mfjax, monkeypatch):
  """A function that runs `mfjax train` up to the connection, and returns what it connects to."""
  connected = []

  def open_session(config, coordinates):
    connected.append(coordinates)
    place = coordinates or start.Coordinates("", 1, 0)
    opened = session.Session(Process(place.process_id, place.num_processes, "host"))
    return opened

  monkeypatch.setattr(session, "open_session", open_session)
  monkeypatch.setattr("jax.config.update", lambda name, value: None)
  monkeypatch.setattr("signal.set_wakeup_fd", lambda descriptor: None)
  monkeypatch.setattr("signal.signal", lambda number, handler: None)
  monkeypatch.setattr(logging.get_absl_handler(), "setFormatter", lambda formatter: None)
  commands = []

  def trained(*args, resume_command, **kwargs):
    commands.append(resume_command)
    from mfjax.cluster.stop import Exit

    return Exit.FINISHED

  monkeypatch.setattr("mfjax.train.train", trained)

  def run(*args):
    outcome = mfjax("train", "--config=quickstart", "--workdir=w", *args)
    return outcome, connected, commands

  return run


def test_flags_place_a_process(train):
  outcome, connected, _ = train(*PLACES)
  assert outcome.code == 0, outcome.err
  assert connected == [start.Coordinates("host:7", 4, 3)]
  assert outcome.err.startswith("[3/host] process 3 of 4, pid ")


def test_variables_place_a_process_and_say_how_to_go_on(train, monkeypatch):
  monkeypatch.setenv("MFJAX_COORDINATOR_ADDRESS", "other:8")
  monkeypatch.setenv("MFJAX_NUM_PROCESSES", "2")
  monkeypatch.setenv("MFJAX_PROCESS_ID", "1")
  monkeypatch.setenv("MFJAX_RESUME_COMMAND", "mfjax launch local ...")
  _, connected, commands = train()
  assert connected == [start.Coordinates("other:8", 2, 1)]
  assert commands == ["mfjax launch local ..."]


def test_flags_come_before_variables(train, monkeypatch):
  monkeypatch.setenv("MFJAX_PROCESS_ID", "1")
  _, connected, _ = train(*PLACES)
  assert connected == [start.Coordinates("host:7", 4, 3)]


def test_a_process_alone_connects_to_nothing_and_says_nothing(train, monkeypatch):
  monkeypatch.setenv("SLURM_JOB_ID", "7")  # An interactive allocation without srun.
  outcome, connected, _ = train()
  assert (outcome.code, connected, outcome.err) == (0, [None], "")


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("--num_processes=4",), "--coordinator_address, --process_id must be given too"),
    (("--num_processes=4", "--process_id=-1"), "process_id"),
    ((*PLACES[:2], "--process_id=4"), "--process_id=4 must be at least 0 and below"),
  ],
)
def test_mistakes_are_one_sentence(train, args, message):
  outcome, connected, _ = train(*args)
  assert outcome.code == 2
  assert message in outcome.err
  assert not connected


def test_a_variable_that_is_no_number(train, monkeypatch):
  monkeypatch.setenv("MFJAX_NUM_PROCESSES", "two")
  outcome, _, _ = train()
  assert outcome.code == 2
  assert outcome.err == "mfjax train: error: MFJAX_NUM_PROCESSES='two': give a number\n"


def test_processes_that_do_not_come_together_are_a_failure_and_one_sentence(train, monkeypatch):
  def open_session(config, coordinates):
    raise start.StartError("the coordinator at host:7 did not answer")

  monkeypatch.setattr(session, "open_session", open_session)
  outcome, _, _ = train(*PLACES)
  assert outcome.code == 1
  assert outcome.err == "mfjax train: error: the coordinator at host:7 did not answer\n"
