"""Eight virtual CPU devices for every test; JAX reads these variables when it is first used."""

import os

# Unoptimised code: the tests compile far longer than they run.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# Sizes XLA's thread pool: fewer threads than twice the devices can deadlock an unblocked loop.
os.environ.setdefault("NPROC", "16")
