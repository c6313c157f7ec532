"""Stick-breaking attention, forward and backward, beside softmax attention or its own products.

Shapes: b rows, t positions, s query slots that share keys and values, h heads, d head dim.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mfjax.bench.timing import Call, Comparison, compare, jit_local
from pallas_kernels.implementation import Implementation
from pallas_kernels.stick_breaking import reference, stick_breaking_attention

# The portable path holds a block of scores: an eighth of [b, s, h, t, t] in float32, several times.
_MOST_SCORES_BYTES = 2**32
_WINDOW = 64  # Queries that are compared with the oracle at once.


class AttentionShape(NamedTuple):
  """Sizes of one attention layer; with `shares_kv` the values are the keys."""

  b: int
  s: int
  h: int
  t: int
  d: int
  shares_kv: bool = False

  def __str__(self) -> str:
    slots = f", {self.s} slots" if self.s > 1 else ""
    shared = ", K = V" if self.shares_kv else ""
    return f"{self.b} rows, {self.h} heads, T {self.t}, d {self.d}{slots}{shared}"


def measure(
  shape: AttentionShape,
  eps: float,
  implementation: Implementation,
  dtype: Any,
  repeats: int,
) -> Iterator[Comparison]:
  """Time forward, and forward with backward, at logits N(0, 1); inside `set_mesh`.

  FLOPs count the causal half of the two products, and twice as much for the backward pass.

  Raises:
    AssertionError: a value or gradient is wrong.
  """
  args = draw(shape, dtype)
  forward, training = functions(implementation, eps, shape.shares_kv)
  check(shape, eps, args, training)
  flops = 2 * 2.0 * shape.b * shape.s * shape.h * shape.d * shape.t * (shape.t + 1) / 2
  exactness = f", eps {eps:.2g}" if eps else ""
  for number, (name, function, cost) in enumerate(
    (("forward", forward, flops), ("forward + backward", training, 3 * flops))
  ):
    alternatives: dict[str, Call | str] = {
      name: other if isinstance(other, str) else other[number]
      for name, other in _alternatives(shape, implementation, args).items()
    }
    call = Call(function, args)
    operation = f"stick-breaking {name}{exactness}"
    yield compare(operation, str(shape), cost, call, alternatives, repeats)


def draw(shape: AttentionShape, dtype: Any) -> tuple[Any, ...]:
  """Return random q, k, v (None: the keys), segments of one document, and a gradient."""
  b, s, h, t, d, shares_kv = shape
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, d_out = (
    jax.random.normal(key, size, dtype)
    for key, size in zip(
      keys, ((b, t, s, h, d), (b, t, h, d), (b, t, h, d), (b, t, s, h, d)), strict=True
    )
  )
  return q, k, None if shares_kv else v, jnp.ones((b, t), jnp.int32), d_out


def functions(
  implementation: Implementation, eps: float, shares_kv: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Return jitted (q, k, v, segments, d_out) -> out, and -> (out, (dq, dk[, dv]))."""

  def attend(q: jax.Array, k: jax.Array, v: jax.Array | None, segments: jax.Array) -> jax.Array:
    return stick_breaking_attention(
      q, k, v, segments, segments, implementation=implementation, eps=eps
    )

  return passes(attend, shares_kv)


def passes(
  attend: Callable[..., jax.Array], shares_kv: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Return what `functions` does for any attention of (q, k, v or None, segments)."""

  def forward(q: Any, k: Any, v: Any, segments: jax.Array, d_out: jax.Array) -> jax.Array:
    return attend(q, k, v, segments)

  def training(q: Any, k: Any, v: Any, segments: jax.Array, d_out: jax.Array) -> Any:
    operands = (q, k) if shares_kv else (q, k, v)
    out, backward = jax.vjp(lambda q, k, v=None: attend(q, k, v, segments), *operands)
    return out, backward(d_out)

  return jit_local(forward), jit_local(training)


def check(
  shape: AttentionShape, eps: float, args: tuple[Any, ...], training: Callable[..., Any]
) -> None:
  """Compare windows of queries of one head with the oracle, values and gradients.

  The gradient that comes in is zero outside of the window, so that the oracle needs no more than
  the window's scores.

  Raises:
    AssertionError: something is off by more than rounding and `eps`.
  """
  q, k, v, segments, d_out = args
  size = min(_WINDOW, shape.t)
  tolerance = (1e-3 if q.dtype == jnp.float32 else 2e-2) + 4 * eps
  for end in sorted({shape.t, max(size, shape.t // 2 + 5)}):
    window = slice(end - size, end)
    inside = (jnp.arange(shape.t) >= end - size) & (jnp.arange(shape.t) < end)
    masked = jnp.where(inside[:, None, None, None], d_out, 0)
    out, (dq, *d_shared) = training(q, k, v, segments, masked)
    one = (slice(0, 1), window, slice(None), slice(0, 1))
    head = (slice(0, 1), slice(None), slice(0, 1))
    expected = _oracle(end, q[one], k[head], None if v is None else v[head], masked[one])
    actual = (out[one], dq[one], *(gradient[head] for gradient in d_shared))
    for name, a, b in zip(("values", "dq", "dk", "dv"), actual, expected, strict=False):
      a = a.astype(jnp.float32)
      worst = float(jnp.abs(a - b).max() / jnp.abs(b).max())
      assert worst < tolerance, f"stick-breaking {name} of {shape}: error {worst:.2g}"


@functools.partial(jax.jit, static_argnums=0)
def _oracle(end: int, q: Any, k: Any, v: Any, d_out: Any) -> tuple[jax.Array, ...]:
  """Return out, dq, dk[, dv] of the queries before `end`."""
  position = jnp.arange(end - q.shape[1], end)
  allowed = jnp.arange(k.shape[1])[None, None, :] <= position[None, :, None]
  operands = [x.astype(jnp.float32) for x in (q, k, v) if x is not None]

  def attend(q: jax.Array, k: jax.Array, v: jax.Array | None = None) -> jax.Array:
    return reference.attention(q, k, k if v is None else v, allowed, q.shape[-1] ** -0.5)

  out, backward = jax.vjp(attend, *operands)
  return out, *backward(d_out.astype(jnp.float32))


def _alternatives(
  shape: AttentionShape, implementation: Implementation, args: tuple[Any, ...]
) -> dict[str, tuple[Call, Call] | str]:
  """Return {name: (forward, forward + backward), or why it cannot be measured}."""
  q, k, v, _, d_out = args
  found: dict[str, tuple[Call, Call] | str] = {}
  if shape.shares_kv:
    found["products"] = _timed(_products, (q, k), d_out)
  else:
    platform = next(iter(q.devices())).platform
    name = "cudnn" if platform == "gpu" else "xla"
    softmax = functools.partial(_softmax, name)
    found[f"softmax by {name}"] = _timed(softmax, (q, k, v), d_out)
  scores = 4 * shape.b * shape.s * shape.h * shape.t**2
  if implementation is Implementation.XLA:
    found["xla"] = "it is what is measured"
  elif scores >= _MOST_SCORES_BYTES:
    found["xla"] = f"{scores / 2**30:.0f} GiB of scores"
  else:
    forward, training = functions(Implementation.XLA, 0.0, shape.shares_kv)
    found["xla"] = Call(forward, args), Call(training, args)
  return found


def _timed(
  function: Callable[..., jax.Array], operands: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[Call, Call]:
  def training(d_out: jax.Array, *operands: jax.Array) -> Any:
    out, backward = jax.vjp(function, *operands)
    return out, backward(d_out)

  return Call(jit_local(function), operands), Call(jit_local(training), (d_out, *operands))


def _softmax(name: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Return causal softmax attention; slots become heads of their own."""
  b, t, s, h, d = q.shape
  k, v = (jnp.repeat(x, s, axis=2) if s > 1 else x for x in (k, v))
  q = q.swapaxes(2, 3).reshape(b, t, h * s, d)
  out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=name)
  return out.reshape(b, t, h, s, d).swapaxes(2, 3)


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
  """Return attention's two products alone, on half of the keys: as many as the causal half."""
  half = k[:, : max(1, k.shape[1] // 2)]
  scores = jnp.einsum("bqshd,bthd->bhsqt", q, half)
  return jnp.einsum("bhsqt,bthd->bqshd", scores, half)
