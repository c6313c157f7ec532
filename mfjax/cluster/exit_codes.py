"""Exit codes of a training process; launchers decide by them what to start again."""

FINISHED = 0
FAILED = 1
USAGE = 2  # Config, data or workdir cannot be used: starting again would fail again.
PREEMPTED = 75
HUNG = 76  # The watchdog ended the job.
