"""A request to stop takes effect at the same poll on every process, whoever was asked and when."""

import random
import threading
import time

import pytest

from mfjax.cluster.notices import Board, Kind
from mfjax.cluster.processes import Process
from mfjax.cluster.stop import AgreedStop, Exit, StopSignal
from tests.cluster.fake_store import FakeStore


class Rank:
  """A process of a fake job: a loop that polls, and a thread that reads the notices."""

  def __init__(self, store, index, count):
    process = Process(index, count, f"host{index}")
    self.board = Board(store, process)
    self.stop = AgreedStop(store, process, lambda asked: self.board.post(Kind.STOP, asked.value))
    self.polls, self.outcome = 0, None
    self.watcher = threading.Thread(target=self.board.watch, args=(self.receive,), daemon=True)
    self.watcher.start()

  def receive(self, notice):
    self.stop.announced(Exit(notice.text))

  def run(self, barrier, seed, most):
    """Go round like a training loop: no process is more than a step ahead of another."""
    pause = random.Random(seed)
    while self.polls < most:
      self.polls += 1
      self.outcome = self.stop.poll()
      if self.outcome is not None:
        return
      time.sleep(pause.uniform(0, 0.002))
      barrier.wait()


@pytest.mark.parametrize("seed", range(8))
def test_all_stop_at_the_same_poll(seed):
  count, store, chance = 4, FakeStore(), random.Random(seed)
  ranks = [Rank(store, index, count) for index in range(count)]
  barrier = threading.Barrier(count, timeout=20)
  loops = [
    threading.Thread(target=rank.run, args=(barrier, seed * 10 + i, 2000))
    for i, rank in enumerate(ranks)
  ]
  for loop in loops:
    loop.start()
  for rank in chance.sample(ranks, chance.randint(1, count)):
    time.sleep(chance.uniform(0, 0.03))
    threading.Thread(target=rank.stop.ask, args=(chance.choice([*Exit][1:]),)).start()
  for loop in loops:
    loop.join(20)
  assert len({(rank.polls, rank.outcome) for rank in ranks}) == 1
  assert ranks[0].outcome is not None
  assert ranks[0].outcome is ranks[0].stop.request


def test_polling_asks_the_coordinator_nothing():
  store = FakeStore()
  stop = AgreedStop(store, Process(0, 2), lambda asked: None)
  assert [stop.poll() for _ in range(1000)] == [None] * 1000
  assert store.requests == 0


def test_processes_that_cannot_agree_fail_instead_of_waiting():
  store = FakeStore()
  stop = AgreedStop(store, Process(1, 2), lambda asked: None)
  store.lose()
  stop.announced(Exit.PREEMPTED)
  with pytest.raises(ConnectionError, match="could not agree where to stop"):
    stop.poll()


def test_a_process_alone_stops_at_once():
  stop = StopSignal()
  assert stop.poll() is None
  stop.ask(Exit.PREEMPTED)
  assert stop.poll() is Exit.PREEMPTED
