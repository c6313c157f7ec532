"""What TPU kernels cost by their compiler's own schedule, on a machine without a TPU.

libtpu compiles for any TPU and writes, for every kernel, one line per scheduled bundle (cycle) with
the units that it uses. From these come the cycles of each loop body with matrix products and the
share of every unit. Waits for memory are not in them: they bound a kernel from above.

libtpu reads its flags once, so a process of its own compiles: `python -m mfjax.bench.static_cycles
TARGET DIRECTORY SECTION...` leaves DIRECTORY/result.json.
"""

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mfjax.bench import grouped_matmul, stick_breaking
from mfjax.bench.grouped_matmul import GroupedShape
from mfjax.bench.stick_breaking import AttentionShape
from mfjax.schema import unknown_name
from pallas_kernels.grouped_matmul import row_alignment
from pallas_kernels.implementation import Implementation

TARGETS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# All passes of all operations, metadata included, would be minutes and gigabytes of text.
_DUMP = (
  *("--xla_jf_dump_to={}", "--xla_jf_dump_llo_text=true", "--xla_jf_dump_llo_html=false"),
  "--xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra|pre-delay",
  *("--xla_jf_emit_annotations=true", "--xla_jf_debug_level=2"),
)
_GROUPED = (GroupedShape(65536, 1024, 2048, 32), GroupedShape(32768, 2048, 5632, 8))
_ATTENTION = AttentionShape(4, 1, 16, 4096, 128)
_WIDE = AttentionShape(16, 2, 1, 1024, 1024, shares_kv=True)
_SPLASH_BLOCK = 512

Program = tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
  """An innermost stretch of a kernel's schedule with matrix products."""

  cycles: int
  shares: dict[str, float]  # unit -> used / available issue slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """The loop bodies of one kernel of one program, longest first; or why there are none."""

  program: str
  kernel: str
  bodies: tuple[Body, ...]
  error: str = ""


def measure(target: str, sections: Sequence[str], environment: Mapping[str, str]) -> list[Schedule]:
  """Compile our kernels, and JAX's own beside them, for a TPU.

  Args:
    target: a key of TARGETS. sections: of SECTIONS. environment: of the process that compiles.

  Raises:
    ValueError: an unknown target or section, or libtpu is not installed.
    RuntimeError: the process failed.
  """
  if target not in TARGETS:
    raise ValueError(unknown_name(target, TARGETS, "target"))
  for section in sections:
    if section not in SECTIONS:
      raise ValueError(unknown_name(section, SECTIONS, "section of kernels with a --target"))
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError("to compile for a TPU, libtpu is needed: pip install 'mfjax[tpu]'")
  with tempfile.TemporaryDirectory() as directory:
    root = str(pathlib.Path(__file__).parents[2])
    apart = {
      **environment,
      "PYTHONPATH": os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH")))),
      "LIBTPU_INIT_ARGS": " ".join(_DUMP).format(directory),
      "JAX_PLATFORMS": "cpu",  # No TPU is asked for, no metadata server answers,
      "TPU_SKIP_MDS_QUERY": "1",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # and others may do the same.
    }
    command = [sys.executable, "-m", __spec__.name, target, directory, *sections]
    done = subprocess.run(command, env=apart, capture_output=True, text=True, check=False)
    result = pathlib.Path(directory, "result.json")
    if done.returncode or not result.exists():
      raise RuntimeError(f"the compiling process failed: {done.stderr[-2000:]}")
    return [
      Schedule(**entry | {"bodies": tuple(Body(**body) for body in entry["bodies"])})
      for entry in json.loads(result.read_text())
    ]


def _main(target: str, directory: str, *sections: str) -> None:
  topology = topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[target])
  mesh = Mesh(np.array(topology.devices[:1]), ("x",))
  folder = pathlib.Path(directory)
  found: list[Schedule] = []
  for section in sections:
    for name, make in SECTIONS[section]():
      seen = set(folder.iterdir())
      try:
        function, shapes = make()
        with jax.set_mesh(mesh):
          whole = jax.jit(function, in_shardings=NamedSharding(mesh, P()))
          whole.lower(*shapes).compile()
      except Exception as error:  # One program's failure must not hide the others' results.
        text = f"{type(error).__name__}: {str(error)[:300]}"
        found.append(Schedule(program=name, kernel="", bodies=(), error=text))
      else:
        found += _read(name, folder, seen)
  text = json.dumps([dataclasses.asdict(schedule) for schedule in found])
  (folder / "result.json").write_text(text)


def _read(program: str, folder: pathlib.Path, seen: set[pathlib.Path]) -> Iterator[Schedule]:
  """Yield the kernels whose dump is new."""
  # Before the final pass, which folds idle bundles into delays.
  for path in sorted(folder.glob("*-pre-delay_hlo-static-per-bundle-utilization.txt")):
    stem = re.sub(r"-\d+-pre-delay_hlo-.*", "", path.name)
    texts = sorted(folder.glob(f"{stem}-[0-9]*-packed-bundles-post-ra.txt"))
    if path in seen or not texts:
      continue
    bodies = _bodies(path.read_text().splitlines(), texts[0].read_text())
    if bodies:
      kernel = re.sub(r"^\d+-", "", stem)
      yield Schedule(program=program, kernel=kernel, bodies=tuple(bodies))


def _bodies(utilization: Sequence[str], bundles: str) -> list[Body]:
  """Return the innermost regions of a schedule that use a matrix unit, longest first.

  Args:
    utilization: a heading, the units' names, their slots, a heading, then a line per cycle.
    bundles: the program's text; comments say where regions start and end.
  """
  heading = next(i for i, line in enumerate(utilization) if line.startswith("== CAP"))
  units = [unit.strip() for unit in utilization[heading + 1].split(",")]
  slots = np.array(utilization[heading + 2].split(), np.int64)
  rows = [line.split() for line in utilization[heading + 4 :] if line.strip()]
  used = np.array(rows, np.int64)
  matrix_units = [unit.startswith(("MXU", "MAT")) for unit in units]
  busy: np.ndarray = np.any(used[:, matrix_units], axis=1)
  cycle, opened = 0, ("", 0)  # The region that started last, and where.
  bodies = []
  for line in bundles.splitlines():
    if address := re.match(r" *(?:0x)?([0-9a-f]+) ", line):
      cycle = int(address[1], 16)
    for edge, region in re.findall(r"(Start|End) region (\d+)", line):
      if edge == "Start":
        opened = (region, cycle)
      elif opened[0] == region:
        body = slice(opened[1], cycle + 1)
        if busy[body].any():
          shares = used[body].sum(0) / slots / len(used[body])
          named = {unit: float(share) for unit, share in zip(units, shares, strict=True) if share}
          bodies.append(Body(cycles=len(used[body]), shares=named))
  return sorted(bodies, key=lambda body: -body.cycles)


# Programs -----------------------------------------------------------------------------------------


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _grouped_matmul() -> Iterator[tuple[str, Callable[[], Program]]]:
  for shape in _GROUPED:
    for name in ("forward", "rows' gradient", "weights' gradient"):
      yield f"grouped {name}, {shape}", functools.partial(_ours, name, shape)
      yield f"megablox {name}, {shape}", functools.partial(_megablox, name, shape)


def _ours(name: str, shape: GroupedShape) -> Program:
  alignment = row_alignment(Implementation.PALLAS_TPU, shape.m, shape.g)
  sizes = grouped_matmul.balanced(shape)
  rows = grouped_matmul.layout(sizes, alignment).num_rows
  options = {"alignment": alignment, "implementation": Implementation.PALLAS_TPU}
  function = grouped_matmul.operations(options, jnp.float32)[name]
  return function, _operands(name, shape, rows)


def _operands(name: str, shape: GroupedShape, rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
  x, dy = _array(rows, shape.k), _array(rows, shape.n)
  w, sizes = _array(shape.g, shape.k, shape.n), _array(shape.g, dtype=jnp.int32)
  return {
    "forward": (x, w, sizes),
    "rows' gradient": (dy, w, sizes),
    "weights' gradient": (x, dy, sizes),
  }[name]


def _megablox(name: str, shape: GroupedShape) -> Program:
  # The package has a function of the module's name.
  megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

  tiling = (512, min(1024, shape.k), min(1024, shape.n))

  def product(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    if name == "weights' gradient":
      return megablox.tgmm(lhs.T, rhs, sizes, jnp.float32, tiling)
    transpose = name == "rows' gradient"
    return megablox.gmm(lhs, rhs, sizes, jnp.bfloat16, tiling, transpose_rhs=transpose)

  return product, _operands(name, shape, shape.m)


def _stick_breaking() -> Iterator[tuple[str, Callable[[], Program]]]:
  yield f"stick-breaking, {_ATTENTION}", functools.partial(_attention, _ATTENTION)
  yield f"splash attention, {_ATTENTION}", functools.partial(_splash, _ATTENTION)


def _wide() -> Iterator[tuple[str, Callable[[], Program]]]:
  yield f"stick-breaking, {_WIDE}", functools.partial(_attention, _WIDE)


def _attention(shape: AttentionShape) -> Program:
  b, s, h, t, d, shares_kv = shape
  _, training = stick_breaking.functions(Implementation.PALLAS_TPU, 0.0, shares_kv)
  q, k, segments = _array(b, t, s, h, d), _array(b, t, h, d), _array(b, t, dtype=jnp.int32)
  if shares_kv:
    return lambda q, k, segments, d_out: training(q, k, None, segments, d_out), (q, k, segments, q)
  return training, (q, k, k, segments, q)


def _splash(shape: AttentionShape) -> Program:
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  b, _, h, t, d, _ = shape
  names = (
    *("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv"),
    *("block_kv_dkv_compute", "block_q_dq", "block_kv_dq"),
  )
  blocks: Any = dict.fromkeys(names, _SPLASH_BLOCK)
  attend = splash.make_splash_mha_single_device(
    mask=masks.MultiHeadMask([masks.CausalMask((t, t))] * h),
    block_sizes=splash.BlockSizes(**blocks),
  )

  def training(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
    out, backward = jax.vjp(jax.vmap(attend), q, k, v)
    return out, backward(d_out)

  return training, (_array(b, h, t, d),) * 4


SECTIONS: dict[str, Callable[[], Iterator[tuple[str, Callable[[], Program]]]]] = {
  "grouped_matmul": _grouped_matmul,
  "stick_breaking": _stick_breaking,
  "wide": _wide,
}

if __name__ == "__main__":
  _main(*sys.argv[1:])
