"""Which ends of a job are followed by another start, and after what pause."""

import threading

import pytest

from mfjax.cluster.restart import RestartPolicy, run_with_restarts


@pytest.mark.parametrize("code", [1, 75, 76, 134, 137])
def test_preemption_hang_and_crash_are_tried_again(code):
  assert RestartPolicy(1).pause(code, progressed=False) is not None


@pytest.mark.parametrize("code", [0, 2])
def test_success_and_a_users_mistake_are_final(code):
  assert RestartPolicy(5).pause(code, progressed=True) is None


def test_pauses_double_up_to_the_longest_and_end():
  policy = RestartPolicy(4, first_pause=1, longest_pause=3)
  assert [policy.pause(76, progressed=False) for _ in range(5)] == [1, 2, 3, 3, None]


def test_progress_begins_the_count_anew():
  policy = RestartPolicy(2, first_pause=1)
  assert [policy.pause(75, progressed=p) for p in (False, False, True, False, False)] == [
    1, 2, 1, 2, None,
  ]  # fmt: skip


def test_a_job_is_started_until_it_succeeds():
  codes, starts = {1: 134, 2: 75, 3: 0}, []

  def run(start):
    starts.append(start)
    return codes[start]

  policy = RestartPolicy(5, first_pause=0)
  assert run_with_restarts(run, policy, lambda: -1, threading.Event()) == 0
  assert starts == [1, 2, 3]


def test_checkpoints_are_progress():
  newest, starts = iter([-1, 5, 5, 10, 10, 10]), []

  def run(start):
    starts.append(start)
    return 75

  policy = RestartPolicy(1, first_pause=0)
  assert run_with_restarts(run, policy, lambda: next(newest), threading.Event()) == 75
  assert starts == [1, 2, 3]


def test_a_job_that_was_asked_to_end_is_not_started_again():
  stopped = threading.Event()

  def run(start):
    stopped.set()
    return 75

  assert run_with_restarts(run, RestartPolicy(5), lambda: -1, stopped) == 75
