"""Find the fastest tilings of the kernels for a model on the present device.

Every candidate that a kernel's module names is compared with the portable path, then timed; they
take turns with each other and with what the kernel does by itself, by its default or by an entry
that the table already has. Only what beats that by more than noise becomes an entry.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mfjax.bench import grouped_matmul as grouped_bench
from mfjax.bench import stick_breaking as attention_bench
from mfjax.bench.grouped_matmul import GroupedShape
from mfjax.bench.stick_breaking import AttentionShape
from mfjax.bench.timing import Call, jit_local, take_turns
from mfjax.config import ModelConfig
from pallas_kernels import grouped_matmul as api
from pallas_kernels.implementation import Implementation

GAIN = 0.03  # Less than this is noise: on an H200, the same kernel twice differed by 1.5 %.

Fields = dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """One operation at one shape, as the table names it, and the rows or heads behind it."""

  operation: str
  shape: tuple[int, ...]  # (slots, k, n, g), or (q, t, s, d)
  heads: tuple[int, int] = (1, 1)  # batch rows and heads of attention
  shares_kv: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What tuning one problem found; `fields` None: nothing beats the kernel's own choice."""

  problem: Problem
  shape: tuple[int, ...]  # as the kernel looks it up
  own_seconds: float
  best_seconds: float
  fields: Fields | None
  num_candidates: int
  rejected: Mapping[str, str]  # tiling -> error


def problems(model: ModelConfig, tokens: int, sequence_length: int) -> list[Problem]:
  """Return what one layer's forward and backward pass ask for with so many tokens on a device."""
  found = []
  d, ff, width = model.d_model, model.d_ff, model.d_attention
  for operation, slots, k, n, g in (
    *(
      (name, tokens * model.attention_top_k, k, n, model.num_attention_experts)
      for name in ("matmul", "transposed", "outer")
      for k, n in dict.fromkeys(((d, width), (width, d)))
    ),
    ("matmul_gelu", tokens * model.ff_top_k, d, ff, model.num_ff_experts),
    ("matmul", tokens * model.ff_top_k, ff, d, model.num_ff_experts),
    ("matmul_gelu_backward", tokens * model.ff_top_k, d, ff, model.num_ff_experts),
    ("transposed", tokens * model.ff_top_k, ff, d, model.num_ff_experts),
    ("outer", tokens * model.ff_top_k, d, ff, model.num_ff_experts),
    ("outer", tokens * model.ff_top_k, ff, d, model.num_ff_experts),
  ):
    found.append(Problem(operation=f"grouped_matmul.{operation}", shape=(slots, k, n, g)))
  for operation in ("forward", "backward"):
    found.append(
      Problem(
        operation=f"stick_breaking.{operation}",
        shape=(sequence_length, sequence_length, model.attention_top_k, model.head_dim),
        heads=(max(1, tokens // sequence_length), model.num_heads),
        shares_kv=model.identity_kv,
      )
    )
  return found


def looked_up(problem: Problem, implementation: Implementation) -> tuple[int, ...]:
  """Return the shape that the kernel looks up: with the rows that alignment leaves unused."""
  if problem.operation.startswith("stick_breaking"):
    return problem.shape
  return _rows(problem, implementation).num_rows, *problem.shape[1:]


def _rows(problem: Problem, implementation: Implementation) -> grouped_bench.Rows:
  shape = GroupedShape(*problem.shape)
  alignment = api.row_alignment(implementation, shape.m, shape.g)
  return grouped_bench.layout(grouped_bench.balanced(shape), alignment)


def tune(
  problem: Problem, implementation: Implementation, dtype: Any, repeats: int
) -> Outcome | None:
  """Measure the candidates of one problem inside `set_mesh`; None where there are none."""
  kind = problem.operation.partition(".")[0]
  return _KINDS[kind](problem, implementation, dtype, repeats)


def _race(
  problem: Problem,
  implementation: Implementation,
  tilings: list[Any],
  call_of: Callable[[Any], Call],
  check: Callable[[Any], None],
  repeats: int,
  baseline: Callable[[Any], Call] | None = None,
) -> Outcome | None:
  """Check and time tilings against the kernel's own choice, tiling None.

  Args:
    call_of: tiling -> what is timed. check: raises AssertionError for a wrong tiling.
    baseline: tiling -> a call whose time is part of `call_of`'s and does not count.
  """
  if not tilings:
    return None
  calls, rejected = {"None": call_of(None)}, {}
  by_name = {str(tiling): tiling for tiling in tilings}
  for name, tiling in by_name.items():
    try:
      check(tiling)
    except (AssertionError, ValueError, NotImplementedError, RuntimeError) as error:
      rejected[name] = f"{type(error).__name__}: {str(error)[:200]}"
    else:
      calls[name] = call_of(tiling)
  if baseline is not None:
    calls |= {f"{name} baseline": baseline(by_name.get(name)) for name in list(calls)}
  seconds = take_turns(calls, repeats)
  times = {
    name: seconds[name] - seconds.get(f"{name} baseline", 0)
    for name in ("None", *by_name)
    if name in seconds
  }
  own = times.pop("None")
  best = min(times, key=lambda name: times[name], default="None")
  wins = bool(times) and times[best] < (1 - GAIN) * own
  return Outcome(
    problem=problem,
    shape=looked_up(problem, implementation),
    own_seconds=own,
    best_seconds=times[best] if wins else own,
    fields=dataclasses.asdict(by_name[best]) if wins else None,
    num_candidates=len(by_name),
    rejected=rejected,
  )


def _kernel_options(implementation: Implementation) -> dict[str, Any]:
  return {"interpret": True} if implementation is Implementation.INTERPRET else {}


def _tune_grouped(
  problem: Problem, implementation: Implementation, dtype: Any, repeats: int
) -> Outcome | None:
  name: Any = problem.operation.partition(".")[2]
  shape = GroupedShape(*problem.shape)
  alignment = api.row_alignment(implementation, shape.m, shape.g)
  rows = _rows(problem, implementation)
  if implementation is Implementation.PALLAS_GPU:
    from pallas_kernels.grouped_matmul import gpu

    kernels: Any = gpu
  else:
    from pallas_kernels.grouped_matmul import tpu

    kernels = tpu
  tilings = list(kernels.candidates(name, dtype, looked_up(problem, implementation), alignment))
  args = _grouped_operands(name, shape, rows, dtype)
  options = {"alignment": alignment} | _kernel_options(implementation)
  starts = api.group_starts(rows.sizes, alignment)

  @functools.cache  # Checked and timed: compiled once.
  def call_of(tiling: Any) -> Call:
    function = functools.partial(
      getattr(kernels, "matmul" if name == "transposed" else name),
      **options,
      **({"transpose_rhs": name == "transposed"} if name in ("matmul", "transposed") else {}),
      tiling=tiling,
    )
    return Call(jit_local(function), (*args, starts, rows.sizes))

  expected = _portable(name, alignment)(*args, rows.sizes)
  used = jnp.asarray(rows.group < shape.g)

  def check(tiling: Any) -> None:
    call = call_of(tiling)
    _assert_close(call.function(*call.args), expected, used)

  return _race(problem, implementation, tilings, call_of, check, repeats)


def _grouped_operands(
  name: str, shape: GroupedShape, rows: grouped_bench.Rows, dtype: Any
) -> tuple[jax.Array, ...]:
  """Return what the operation takes ahead of starts and sizes."""
  keys = jax.random.split(jax.random.key(0), 4)
  lhs = grouped_bench.draw_rows(keys[0], rows, shape.k, dtype)
  other_rows = grouped_bench.draw_rows(keys[1], rows, shape.n, dtype)
  swapped = name in ("transposed", "matmul_gelu_backward")
  size = (shape.g, shape.n, shape.k) if swapped else (shape.g, shape.k, shape.n)
  rhs = (jax.random.normal(keys[2], size) * shape.k**-0.5).astype(dtype)
  if name == "outer":
    return lhs, other_rows
  if name == "matmul_gelu_backward":
    return lhs, rhs, other_rows, jax.random.uniform(keys[3], (rows.num_rows,))
  return lhs, rhs


def _portable(name: str, alignment: int) -> Callable[..., Any]:
  functions: dict[str, Callable[..., Any]] = {
    "matmul": api.grouped_matmul,
    "transposed": functools.partial(api.grouped_matmul, transpose_rhs=True),
    "outer": api.grouped_outer,
    "matmul_gelu": api.grouped_matmul_gelu,
    "matmul_gelu_backward": api.grouped_matmul_gelu_backward,
  }
  options: Any = {"alignment": alignment, "implementation": Implementation.XLA}
  return jit_local(functools.partial(functions[name], **options))


def _assert_close(actual: Any, expected: Any, used: jax.Array) -> None:
  """Compare results of the used rows; an array without rows, [g, k, n], is compared whole."""
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    tolerance = 1e-3 if a.dtype == jnp.float32 and b.ndim == 3 else 3e-2
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if b.ndim < 3:
      mask = used.reshape(-1, *(1,) * (b.ndim - 1))
      a, b = jnp.where(mask, a, 0), jnp.where(mask, b, 0)
    worst = float(jnp.abs(a - b).max() / jnp.abs(b).max())
    assert worst < tolerance, f"an error of {worst:.2g} of the largest value"


def _tune_attention(
  problem: Problem, implementation: Implementation, dtype: Any, repeats: int
) -> Outcome | None:
  length, _, slots, dim = problem.shape
  batch, heads = problem.heads
  shape = AttentionShape(batch, slots, heads, length, dim, problem.shares_kv)
  is_forward = problem.operation.endswith("forward")
  kernels, tilings, keyword = _attention_candidates(problem, implementation)
  args = attention_bench.draw(shape, dtype)

  @functools.cache  # Checked and timed: compiled once.
  def functions(tiling: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array | None, segments: jax.Array) -> jax.Array:
      options = {keyword: tiling} | _kernel_options(implementation)
      return kernels.attention(q, k, v, (segments, segments), dim**-0.5, **options)

    return attention_bench.passes(attend, problem.shares_kv)

  def check(tiling: Any) -> None:
    attention_bench.check(shape, 0.0, args, functions(tiling)[1])

  def forward(tiling: Any) -> Call:
    return Call(functions(tiling)[0], args)

  def training(tiling: Any) -> Call:
    return Call(functions(tiling)[1], args)

  if is_forward:
    return _race(problem, implementation, tilings, forward, check, repeats)
  return _race(problem, implementation, tilings, training, check, repeats, baseline=forward)


def _attention_candidates(
  problem: Problem, implementation: Implementation
) -> tuple[Any, list[Any], str]:
  """Return the kernels' module, the candidates and the keyword that takes one."""
  length, _, slots, dim = problem.shape
  is_forward = problem.operation.endswith("forward")
  if implementation is not Implementation.PALLAS_GPU:
    from pallas_kernels.stick_breaking import tpu

    return tpu, list(tpu.candidates(length * slots, length, problem.operation)), "tiling"
  from pallas_kernels.stick_breaking import gpu, gpu_wide

  if dim not in gpu.HEAD_DIMS:
    return gpu_wide, list(gpu_wide.candidates()) if is_forward else [], "tiling"
  if is_forward:
    return gpu, list(gpu.candidates(dim)), "tiling"
  return gpu, list(gpu.backward_candidates(dim)), "backward_tiling"


_KINDS: dict[str, Callable[[Problem, Implementation, Any, int], Outcome | None]] = {
  "grouped_matmul": _tune_grouped,
  "stick_breaking": _tune_attention,
}
