"""Train a ModuleFormer, or go on with a run.

  mfjax train --config=quickstart --workdir=runs/quickstart [--config.train.steps=1000 ...]

It runs alone or as one of several processes, which Slurm, Open MPI, GKE, Cloud TPU or `mfjax
launch` has started, or which flags place; of those one is enough to be asked to stop, or to fail.

A workdir that already has checkpoints is resumed from the newest good one. Ctrl-C finishes the
step, saves and exits with 0; SIGTERM (preemption) does so with 75, on which launchers requeue. A
second signal exits at once. Exit code 1: the run failed (too many non-finite steps, a checkpoint or
metrics that could not be saved, processes that did not come together); 2: the configuration, the
data or the workdir cannot be used; 76: no step within cluster.watchdog_timeout.
"""

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import MutableMapping, Sequence

from absl import flags

from launch import _cluster
from launch import flags as shared
from mfjax import describe
from mfjax.cluster import exit_codes
from mfjax.cluster.start import StartError
from mfjax.cluster.stop import Exit, StopSignal
from mfjax.train import TrainingFailedError, train

_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Print config, parameter counts, memory and shardings; allocate nothing."
)
_NUM_DEVICES = flags.DEFINE_integer(
  "num_devices",
  None,
  "Devices of --dry_run's mesh. Default: the product of the mesh's fixed axes.",
  lower_bound=1,
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  "allow_config_change", False, "Go on in a workdir whose saved config differs in what it computes."
)

EXIT_CODES = {
  Exit.FINISHED: exit_codes.FINISHED,
  Exit.INTERRUPTED: exit_codes.FINISHED,
  Exit.PREEMPTED: exit_codes.PREEMPTED,
}
_REQUESTS = {signal.SIGINT: Exit.INTERRUPTED, signal.SIGTERM: Exit.PREEMPTED}
_VIRTUAL_DEVICES = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
_SHOW_CURSOR = b"\x1b[?25h"


def main(argv: Sequence[str]) -> int:
  """Train as the flags say and return the exit code."""
  if len(argv) > 1:
    raise ValueError(f"unexpected argument {argv[1]!r}: all of train's settings are flags")
  config = shared.run_config()
  if _DRY_RUN.value:
    print(describe.describe(config, _NUM_DEVICES.value))
    return 0
  if _NUM_DEVICES.value is not None:
    raise ValueError("--num_devices is for --dry_run: a run takes all the devices there are")
  workdir = shared.workdir()
  size_thread_pool(os.environ)
  try:
    with _cluster.open_session(config.cluster) as session:
      listen(session.stop)  # After JAX's runtime is up: it has signal handlers of its own.
      outcome = train(
        config,
        workdir,
        session=session,
        resume_command=_cluster.resume_command(shlex.join(["mfjax", *sys.argv[1:]])),
        allow_config_change=_ALLOW_CONFIG_CHANGE.value,
      )
  except (StartError, TrainingFailedError) as error:
    print(f"mfjax train: error: {error}", file=sys.stderr)
    return exit_codes.FAILED
  return EXIT_CODES[outcome]


def size_thread_pool(environment: MutableMapping[str, str]) -> None:
  """Give XLA's CPU client two threads per virtual device; NPROC, if set, is left as it is.

  The client has as many threads as the machine has cores. On more virtual devices than that, each
  thread ends up waiting in a collective for devices whose computation no thread is left to run: the
  program hangs, or XLA ends it. NPROC is read when the client is made, so after this.
  """
  found = _VIRTUAL_DEVICES.findall(environment.get("XLA_FLAGS", ""))
  num_devices = int(found[-1]) if found else 1
  if num_devices > 1:
    environment.setdefault("NPROC", str(max(2 * num_devices, os.cpu_count() or 1)))


def listen(stop: StopSignal) -> None:
  """Turn the first SIGINT or SIGTERM into a request to `stop`, the second into an exit at once.

  Python runs signal handlers in the main thread between bytecodes, so not while XLA compiles. Its
  C handler, though, writes to the wakeup descriptor right away, and a thread of its own reads that.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer)
  for number in _REQUESTS:
    signal.signal(number, lambda *_: None)
  threading.Thread(target=_answer, args=(reader, stop), name="signals", daemon=True).start()


def _answer(reader: int, stop: StopSignal) -> None:
  asked = False
  while True:
    number = os.read(reader, 1)[0]
    if number not in _REQUESTS:
      continue
    if asked:
      if os.isatty(1):
        os.write(1, _SHOW_CURSOR)  # The live line had hidden it.
      os._exit(128 + number)
    asked, request = True, _REQUESTS[signal.Signals(number)]
    notice = f"\n{request.value}: finishing the step and saving; again to exit at once\n"
    os.write(2, notice.encode())
    stop.ask(request)
