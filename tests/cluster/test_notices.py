"""Every process reads every notice, in the same order."""

import threading

import pytest

from mfjax.cluster.notices import Board, Kind
from mfjax.cluster.processes import Process
from tests.cluster.fake_store import FakeStore


def test_all_read_the_same_in_the_same_order_until_the_job_is_closed():
  store, count = FakeStore(), 4
  boards = [Board(store, Process(index, count, f"host{index}")) for index in range(count)]
  read = [[] for _ in boards]
  watchers = [
    threading.Thread(target=board.watch, args=(into.append,))
    for board, into in zip(boards, read, strict=True)
  ]
  posters = [
    threading.Thread(target=board.post, args=(Kind.FAILED, f"word {number}", number))
    for number, board in enumerate(boards)
  ]
  for thread in (*watchers, *posters):
    thread.start()
  for poster in posters:
    poster.join(10)
  boards[0].post(Kind.CLOSED)
  for watcher in watchers:
    watcher.join(10)
    assert not watcher.is_alive()
  assert read[0] == read[1] == read[2] == read[3]
  assert sorted(notice.code for notice in read[0]) == [0, 1, 2, 3]
  for notice in read[0]:
    assert notice.sender == Process(notice.code, count, f"host{notice.code}")
    assert (notice.kind, notice.text) == (Kind.FAILED, f"word {notice.code}")


def test_a_lost_coordinator_ends_the_watch():
  store = FakeStore()
  store.lose()
  with pytest.raises(ConnectionError):
    Board(store, Process(1, 2)).watch(lambda notice: None)
