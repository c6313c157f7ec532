"""Flags that all targets share."""

from absl import flags

DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Print, or write, exactly what would run, and run nothing."
)
MAX_RESTARTS = flags.DEFINE_integer(
  "max_restarts",
  0,
  "How often a job that was preempted, hung or crashed is started again from its last checkpoint.",
  lower_bound=0,
)
