"""A loop that goes on is left alone; one that does not is noticed."""

import threading
import time

from mfjax.cluster.watchdog import Watchdog


def test_steps_keep_it_quiet_and_their_absence_does_not():
  hung = threading.Event()
  dog = Watchdog(0.5, hung.set)
  dog.start()
  for step in range(12):
    time.sleep(0.1)
    dog.step(step)
  assert not hung.is_set()
  assert hung.wait(5)
  assert dog.last_step == 11


def test_a_closed_one_says_nothing():
  hung = threading.Event()
  dog = Watchdog(0.2, hung.set)
  dog.start()
  dog.close()
  assert not hung.wait(0.5)
