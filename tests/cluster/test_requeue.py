import subprocess

import pytest

from mfjax.cluster import requeue


def test_pauses_double_up_to_the_longest():
  pauses = [requeue.pause(restarts) for restarts in range(8)]
  assert pauses == [10, 20, 40, 80, 160, 300, 300, 300]
  assert requeue.pause(10**9) == 300


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("restarts", [0, 1, 4, 5, 6, 100])
def test_shells_compute_the_same_pause(shell, restarts):
  script = f'restarts="$0"; echo {requeue.shell_pause("restarts")} {requeue.shell_pause("$0 - 0")}'
  done = subprocess.run([shell, "-c", script, str(restarts)], capture_output=True, text=True)
  assert done.stdout.split() == [str(requeue.pause(restarts))] * 2


@pytest.mark.parametrize(
  ("codes", "outcome", "final"),
  [
    ((0, 0), 0, True),
    ((75, 75), 75, False),
    ((0, 76), 76, False),
    ((1, 134), 134, False),
    ((137, 2, 134), 2, True),
    ((), 0, True),
  ],
)
def test_outcome_of_several_processes(codes, outcome, final):
  assert requeue.outcome(codes) == outcome
  assert requeue.is_final(outcome) == final
