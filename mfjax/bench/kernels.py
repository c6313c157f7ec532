"""The kernels on the present device, each beside other ways to do the same work.

Every operation's result is compared with the oracle before it is timed. On a CPU the shapes are
small, so that the command works anywhere; their times say nothing about an accelerator.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from mfjax import sharding
from mfjax.bench import experts, grouped_matmul, stick_breaking
from mfjax.bench.experts import ExpertShape
from mfjax.bench.grouped_matmul import GroupedShape
from mfjax.bench.stick_breaking import AttentionShape
from mfjax.bench.timing import Call, Comparison, compare, jit_local, matmul_ceiling
from mfjax.config import MeshConfig
from pallas_kernels import grouped_matmul as grouped_kernels
from pallas_kernels import stick_breaking as stick_kernels
from pallas_kernels.implementation import Implementation

EARLY_EXIT_EPS = 2.0**-14

# Each section's flag value means: the names of a shape's sizes, and the defaults.
SHAPES = {
  "grouped_matmul": "MxKxNxG",
  "gather": "MxDxR",
  "experts": "TOKENSxD_MODELxD_FFxEXPERTSxTOP_K",
  "stick_breaking": "BxHEADSxTxD",
  "wide": "BxSLOTSxTxD",
}
_DEFAULTS = {
  "grouped_matmul": ("65536x1024x2048x32", "131072x1024x2048x32", "32768x2048x5632x8"),
  "gather": ("65536x1024x135168", "133120x1024x131072", "16384x1024x36864"),
  "experts": ("32768x1024x2048x32x2", "32768x1024x2048x32x4", "16384x2048x5632x8x2"),
  "stick_breaking": (
    *("64x32x512x64", "16x32x1024x64", "8x32x2048x64"),
    *("4x32x4096x64", "4x16x4096x128", "1x16x16384x128"),
  ),
  "wide": ("64x2x512x1024", "32x2x1024x1024", "16x2x2048x1024"),
}
_CPU_DEFAULTS = {
  "grouped_matmul": ("1024x64x128x8",),
  "gather": ("256x128x512",),
  "experts": ("256x64x128x8x2",),
  "stick_breaking": ("2x4x128x64",),
  "wide": ("2x2x128x256",),
}


def ceiling(device: jax.Device, repeats: int) -> float:
  """Return the FLOP/s of a square matmul: 8192^3 in bf16, or 512^3 in float32 on a CPU."""
  is_cpu = device.platform == "cpu"
  return matmul_ceiling(jnp.float32 if is_cpu else jnp.bfloat16, 512 if is_cpu else 8192, repeats)


def shapes_of(section: str, given: Sequence[str], platform: str) -> list[tuple[int, ...]]:
  """Return a section's shapes: those given, or the defaults of a platform.

  Raises:
    ValueError: a shape does not read as the section's form.
  """
  defaults = _CPU_DEFAULTS if platform == "cpu" else _DEFAULTS
  form = SHAPES[section]
  found = []
  for text in given or defaults[section]:
    sizes = tuple(map(int, text.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text) else ()
    if len(sizes) != form.count("x") + 1:
      example = _DEFAULTS[section][0]
      raise ValueError(f"shape {text!r}: {section} needs {form}, such as {example}")
    found.append(sizes)
  return found


def measure(
  section: str, shapes: Sequence[tuple[int, ...]], device: jax.Device, repeats: int
) -> Iterator[Comparison]:
  """Yield a section's results as they come.

  Args:
    section: a key of SHAPES. shapes: its sizes, as SHAPES says. device: measured. repeats: turns.

  Raises:
    AssertionError: a result is wrong.
  """
  with jax.set_mesh(sharding.make_mesh(MeshConfig(), [device])):
    for sizes in shapes:
      yield from _SECTIONS[section](sizes, device, repeats)


def _grouped_matmul(
  sizes: tuple[int, ...], device: jax.Device, repeats: int
) -> Iterator[Comparison]:
  shape = GroupedShape(*sizes)
  dtype = _dtype(device)
  products = ((shape.g, shape.k, shape.n),)
  chosen = grouped_kernels.resolve(Implementation.AUTO, device.platform, dtype, products)
  yield from grouped_matmul.measure(shape, chosen, dtype, repeats)


def _gather(sizes: tuple[int, ...], device: jax.Device, repeats: int) -> Iterator[Comparison]:
  """Time the gather of r rows of [m, d], all about as often, beside a copy of as many bytes."""
  m, d, r = sizes
  dtype = jnp.dtype(_dtype(device))
  chosen = grouped_kernels.resolve(Implementation.AUTO, device.platform, dtype, ((1, d, d),))
  keys = jax.random.split(jax.random.key(0))
  index = jax.random.permutation(keys[1], jnp.arange(r, dtype=jnp.int32) % m)
  args = (jax.random.normal(keys[0], (m, d), dtype), index)
  calls = {
    choice: Call(
      jit_local(functools.partial(grouped_kernels.take_rows, implementation=choice)), args
    )
    for choice in (chosen, Implementation.XLA)
  }
  results = [call.function(*args) for call in calls.values()]
  assert all((result == results[-1]).all() for result in results), "the gather takes wrong rows"
  rows = min(m, r) + r  # Read and written.
  half = jnp.ones((rows // 2, d), dtype)
  is_xla = chosen is Implementation.XLA
  alternatives: dict[str, Call | str] = {
    "xla": "it is what is measured" if is_xla else calls[Implementation.XLA],
    "copy": Call(jax.jit(jnp.negative), (half,)),
  }
  moved = float(rows * d * dtype.itemsize)
  name = f"{r} rows of {m} x {d}"
  yield compare("gather", name, 0.0, calls[chosen], alternatives, repeats, moved)


def _experts(sizes: tuple[int, ...], device: jax.Device, repeats: int) -> Iterator[Comparison]:
  tokens, d_model, d_ff, num_experts, top_k = sizes
  if top_k >= num_experts:
    raise ValueError(f"top_k={top_k} must be below the number of experts, {num_experts}")
  shape = ExpertShape(
    tokens=tokens, d_model=d_model, d_ff=d_ff, num_experts=num_experts, top_k=top_k
  )
  name = f"{tokens} x {d_model} -> {d_ff} -> {d_model}, top {top_k} of {num_experts}"
  flops = 4.0 * tokens * top_k * d_model * d_ff
  for timing in experts.measure(shape, device, repeats):
    for what, seconds, dense, cost in (
      ("forward", timing.forward, timing.dense_forward, flops),
      ("forward + backward", timing.training, timing.dense_training, 3 * flops),
    ):
      yield Comparison(
        operation=f"experts {what}, {timing.routing}",
        shape=name,
        flops=cost,
        seconds=seconds,
        beside={"dense": dense},
        missing={},
      )


def _stick_breaking(
  sizes: tuple[int, ...], device: jax.Device, repeats: int
) -> Iterator[Comparison]:
  b, h, t, d = sizes
  yield from _attention(AttentionShape(b, 1, h, t, d), device, repeats)


def _wide(sizes: tuple[int, ...], device: jax.Device, repeats: int) -> Iterator[Comparison]:
  b, s, t, d = sizes
  yield from _attention(AttentionShape(b, s, 1, t, d, shares_kv=True), device, repeats)


def _attention(shape: AttentionShape, device: jax.Device, repeats: int) -> Iterator[Comparison]:
  """Yield exact results and, where a kernel computes, those with an early exit."""
  dtype = _dtype(device)
  heads = (shape.h, shape.d)
  chosen = stick_kernels.resolve(
    Implementation.AUTO, device.platform, dtype, heads, shape.s, shape.shares_kv
  )
  for eps in (0.0,) if chosen is Implementation.XLA else (0.0, EARLY_EXIT_EPS):
    yield from stick_breaking.measure(shape, eps, chosen, dtype, repeats)


def _dtype(device: jax.Device) -> jax.typing.DTypeLike:
  return jnp.float32 if device.platform == "cpu" else jnp.bfloat16


_SECTIONS: dict[str, Callable[[tuple[int, ...], jax.Device, int], Iterator[Comparison]]] = {
  "grouped_matmul": _grouped_matmul,
  "gather": _gather,
  "experts": _experts,
  "stick_breaking": _stick_breaking,
  "wide": _wide,
}
