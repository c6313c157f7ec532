"""Options of XLA that a train step is compiled with, by platform: the only such table.

They go to `jax.jit`, so that no environment variable is needed. The compilers that tests run on
accept every one; none was timed on a TPU.
"""

Options = dict[str, bool | int | str]

PRESETS: dict[str, Options] = {
  "cpu": {},
  "gpu": {
    # The compiler would first fill with zeros the stacks that the scans over layers write whole
    # (what the backward pass needs, the experts' gradients): 16 GB a step of MoLM-350M-4B.
    "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
    # The compiler computes things twice, kernels as well, once it needs more than this percentage
    # of: 0.8 of the memory, less the program's arguments. 115 is 0.92 of the memory or less.
    "xla_gpu_memory_limit_slop_factor": 115,
    # Start collectives early and wait for them late.
    "xla_gpu_enable_latency_hiding_scheduler": True,
  },
  "tpu": {
    "xla_tpu_enable_latency_hiding_scheduler": True,
    # Exchanges run beside the experts of another chunk.
    "xla_tpu_enable_async_all_to_all": True,
    "xla_tpu_enable_async_ragged_all_to_all": True,
    # Gathers of weights run beside products (github.com/AI-Hypercomputer/maxtext, XLA flags).
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    # Sums of gradients over slices run beside the backward pass (same source).
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
  },
}


def options(platform: str, enabled: bool) -> Options:
  """Return the options of a platform; none if not `enabled`."""
  return PRESETS[platform] if enabled else {}


def as_text(options: Options) -> str:
  """Return options as a command line would have them."""
  return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
