"""Many small tasks on a few threads, a bounded number of them at a time."""

import concurrent.futures
from collections.abc import Callable, Iterable


def run_all(tasks: Iterable[Callable[[], None]], num_threads: int) -> None:
  """Run `tasks` on threads; at most twice as many are waiting or running, so memory is bounded.

  Raises:
    Exception: the first one that a task raised; tasks not begun then are not run.
  """
  with concurrent.futures.ThreadPoolExecutor(num_threads, "blocks") as threads:
    pending: set[concurrent.futures.Future[None]] = set()
    try:
      for task in tasks:
        if len(pending) >= 2 * num_threads:
          done, pending = concurrent.futures.wait(
            pending, return_when=concurrent.futures.FIRST_COMPLETED
          )
          for future in done:
            future.result()
        pending.add(threads.submit(task))
      for future in concurrent.futures.as_completed(pending):
        future.result()
    except BaseException:
      threads.shutdown(wait=True, cancel_futures=True)
      raise
