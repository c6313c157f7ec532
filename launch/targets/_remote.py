"""Flags that the targets on other machines share."""

from absl import flags

JOB_NAME = flags.DEFINE_string("job_name", "mfjax", "Name of the job on its cluster.")
