"""Compile kernels for TPUs that are not there, and count the cycles of their loop bodies.

libtpu compiles for any topology on a machine without a TPU. It reads its flags once, so that the
dump, which the cycles are read from, needs a process of its own:
`static_cycles("tests.pallas_kernels.test_x:program", "v6e", "512")` imports `program` there, calls
it with the further strings and compiles the (function, shapes) that it returns.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.experimental import topologies

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def needs_libtpu(test: Callable[..., None]) -> Callable[..., None]:
  """Mark a test that compiles for a TPU; skip it where the compiler is missing."""
  skip = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu to compile for a TPU: pip install 'mfjax[tpu]'",
  )
  return pytest.mark.target(skip(test))


# No TPU is asked for here: several processes may compile, and no metadata server answers.
_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_DUMP_FLAGS = (
  "--xla_jf_dump_to={directory}",
  "--xla_jf_dump_llo_text=true",
  "--xla_jf_dump_llo_html=false",
  "--xla_jf_dump_llo_static_gaps=true",
  "--xla_jf_emit_annotations=true",
  "--xla_jf_debug_level=2",
)
_ROOT = pathlib.Path(__file__).parents[2]

Program = tuple[Callable[..., object], tuple[jax.ShapeDtypeStruct, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
  """Straight stretch of a kernel's schedule with matrix products: one case of its loop body."""

  cycles: int
  shares: dict[str, float]  # Unit -> used slots / slots.


@functools.cache
def _mesh(target: str) -> jax.sharding.Mesh:
  os.environ.update(_ENVIRONMENT)
  topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[target])
  return jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))


def compile_kernel(
  function: Callable[..., object], *shapes: jax.ShapeDtypeStruct, target: str
) -> jax.stages.Compiled:
  """Compile for one chip of `target`, a key of TOPOLOGIES, and assert that a kernel is in it."""
  mesh = _mesh(target)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  with jax.set_mesh(mesh):
    compiled = jax.jit(function, in_shardings=sharding).lower(*shapes).compile()
  assert "tpu_custom_call" in compiled.as_text()
  return compiled


def static_cycles(program: str, target: str, *arguments: str) -> dict[str, list[Body]]:
  """Return the loop bodies of every kernel of a program, longest first; no memory waits.

  Args:
    program: "module:function" whose call with `arguments` gives (function, shapes) to compile.
    target: key of TOPOLOGIES.
    arguments: passed on to the function.
  """
  with tempfile.TemporaryDirectory() as directory:
    flags = " ".join(_DUMP_FLAGS).format(directory=directory)
    environment = {**os.environ, **_ENVIRONMENT, "LIBTPU_INIT_ARGS": flags}
    command = [sys.executable, "-m", "tests.pallas_kernels.tpu_target", program, target]
    done = subprocess.run(
      [*command, *arguments],
      cwd=_ROOT,
      env=environment,
      capture_output=True,
      text=True,
      timeout=600,
      check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return _read_dump(pathlib.Path(directory))


def _read_dump(directory: pathlib.Path) -> dict[str, list[Body]]:
  kernels = {}
  # Before the final pass, which folds idle bundles into delays.
  for path in directory.glob("*-pre-delay_hlo-static-per-bundle-utilization.txt"):
    kernel = re.sub(r"-\d+-pre-delay_hlo-.*", "", path.name)
    (bundles,) = directory.glob(f"{kernel}-[0-9]*-packed-bundles-post-ra.txt")
    bodies = _bodies(path.read_text().splitlines(), bundles.read_text())
    if bodies:
      kernels[re.sub(r"^\d+-", "", kernel)] = bodies
  return kernels


def _bodies(utilization: list[str], bundles: str) -> list[Body]:
  """Return the innermost regions that use the matrix unit; a row or bundle is one cycle."""
  heading = utilization.index("== CAPACTIY:")  # As the dump spells it.
  units = [unit.strip() for unit in utilization[heading + 1].split(",")]
  slots = np.array(utilization[heading + 2].split(), np.int64)
  rows = utilization[heading + 4 :]
  used = np.array([row.split() for row in rows if row.strip()], np.int64)
  # One unit in libtpu 0.0.42, two (MATMUL, MATPUSH) in 0.0.52.
  busy = used[:, [unit.startswith(("MXU", "MAT")) for unit in units]].any(axis=1)
  bodies, first = [], 0
  starts: dict[str, int] = {}
  for address, comment in re.findall(r"^ *(0x[0-9a-f]+|0) .*/\* (.*region.*?) \*/", bundles, re.M):
    cycle = int(address, 16)
    for edge, region in re.findall(r"(Start|End) region (\d+)", comment):
      if edge == "Start":
        starts[region] = first = cycle
      elif starts.get(region) == first and busy[first : cycle + 1].any():
        shares = used[first : cycle + 1].sum(axis=0) / slots / (cycle + 1 - first)
        named = dict(zip(units, shares.tolist(), strict=True))
        bodies.append(Body(cycles=cycle + 1 - first, shares=named))
        first = cycle + 1
  return sorted(bodies, key=lambda body: -body.cycles)


def _main(program: str, target: str, *arguments: str) -> None:
  module, function = program.split(":")
  call, shapes = getattr(importlib.import_module(module), function)(*arguments)
  compile_kernel(call, *shapes, target=target)


if __name__ == "__main__":
  _main(*sys.argv[1:])
