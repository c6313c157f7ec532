"""The volumes function against compiled programs; equal gradients and flat memory under skew."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfjax import collectives, communication, experts, sharding
from mfjax.communication import Collective, ExpertKind, Phase
from mfjax.config import KernelConfig, MeshConfig, ModelConfig, Placement, Remat, Transport
from mfjax.sharding import P
from pallas_kernels.implementation import Implementation

KERNELS = KernelConfig(grouped_matmul=Implementation.XLA)
TOKENS, TOP_K, NUM, D_MODEL, INNER = 16, 2, 16, 32, 48  # Tokens of one device.
LAYERS = 3
MODEL = ModelConfig(compute_dtype="float32")


def layer(kind: str, placement: Placement, mesh: MeshConfig):
  """Return (x, p, w_in, w_out, ids) -> y of one layer's experts over the mesh in context."""
  layout = experts.expert_layout(NUM, TOP_K, placement, mesh, KERNELS)

  def local(x, p, w_in, w_out, ids):
    plan = experts.make_plan(layout, ids)
    if kind == "ff":
      return experts.feed_forward(layout, x, p, w_in, w_out, plan)
    hidden = experts.project_in(layout, x, w_in, plan)
    return experts.project_out(layout, jnp.sin(hidden), p, w_out, plan)

  split = placement is Placement.EXPERT
  first, gathered = ("expert", "fsdp") if split else (None, ("fsdp", "expert"))
  weights = (P(first, gathered), P(first, None, gathered))
  rows = sharding.BATCH
  return jax.shard_map(
    local, in_specs=(rows, rows, *weights, rows), out_specs=rows, check_vma=False
  ), (rows, rows, *weights, rows)


def compiled(kind: str, placement: Placement, config: MeshConfig, num_layers: int = 1):
  """Return the compiled value and gradients of equal layers, and its arguments' shardings."""
  mesh = sharding.make_mesh(config, jax.devices()[: int(np.prod(list(config.axis_sizes.values())))])
  with jax.set_mesh(mesh):
    function, specs = layer(kind, placement, config)
    placed = sharding.shardings(mesh, specs)
    tokens = TOKENS * 8
    shapes = [(tokens, D_MODEL), (tokens, TOP_K), (NUM, D_MODEL, INNER), (NUM, INNER, D_MODEL)]
    if num_layers > 1:
      shapes[2:] = [(num_layers, *shape) for shape in shapes[2:]]
      stacked = [P(None, *spec) for spec in specs[2:4]]
      placed = sharding.shardings(mesh, (*specs[:2], *stacked, specs[4]))
    dtypes = [jnp.float32] * 4 + [jnp.int32]
    arguments = [
      jax.ShapeDtypeStruct(shape, dtype, sharding=s)
      for shape, dtype, s in zip([*shapes, (tokens, TOP_K)], dtypes, placed, strict=True)
    ]

    def loss(x, p, w_in, w_out, ids):
      run = lambda x, w: (x + function(x, p, *w, ids), None)  # noqa: E731
      y, _ = run(x, (w_in, w_out)) if num_layers == 1 else jax.lax.scan(run, x, (w_in, w_out))
      return (y * jnp.cos(x)).sum()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    return step.lower(*arguments).compile(), placed


def counted(program, num_devices: int) -> dict[str, int]:
  """Return {collective: operand bytes} of one layer, of the rounds that always happen."""
  places = [collectives.Place(0, ())] * num_devices
  found = collectives.collectives(program.as_text(), places)
  totals: dict[str, int] = {}
  for c in found:
    if not c.dynamic and c.group_size > 1 and c.count > 1:
      totals[c.kind] = totals.get(c.kind, 0) + c.count * c.operand_bytes // LAYERS
  return totals


def predicted(kind: str, placement: Placement, config: MeshConfig) -> dict[str, int]:
  inner = dataclasses.replace(MODEL, d_model=D_MODEL, d_attention=INNER, d_ff=INNER)
  transfers = communication.layer_transfers(
    ExpertKind(kind, NUM, TOP_K, D_MODEL, INNER, placement),
    tokens=TOKENS,
    axis_sizes=config.axis_sizes,
    mesh=config,
    model=inner,
    remat=Remat.NONE,
  )
  totals: dict[str, int] = {}
  for t in transfers:
    totals[t.collective.value] = totals.get(t.collective.value, 0) + t.buffer_bytes
  return totals


@pytest.mark.parametrize("kind", ["ff", "attention"])
@pytest.mark.parametrize(
  ("placement", "transport", "chunks"),
  [
    (Placement.EXPERT, Transport.PADDED, 2),
    (Placement.EXPERT, Transport.RAGGED_STAND_IN, 2),
    (Placement.FSDP, Transport.PADDED, 2),
  ],
)
def test_prediction_is_what_the_compiled_program_moves(kind, placement, transport, chunks):
  config = MeshConfig(data=1, fsdp=2, expert=4, transport=transport, exchange_chunks=chunks)
  program, _ = compiled(kind, placement, config, LAYERS)
  found, expected = counted(program, 8), predicted(kind, placement, config)
  assert found.keys() == expected.keys()
  for collective, num_bytes in expected.items():
    assert found[collective] == pytest.approx(num_bytes, rel=0.02), collective
  if placement is Placement.EXPERT and transport is Transport.PADDED:
    # Crossings of rows in buffers of 1.5 balanced shares, by hand; ff has p and dp, too.
    width = {"ff": 4 * D_MODEL + 2, "attention": 4 * D_MODEL + 4 * INNER + 1}[kind]
    by_hand = 1.5 * TOKENS * TOP_K * width * 4
    assert expected["all-to-all"] == pytest.approx(by_hand, rel=0.02)


def routing(skew: int, num_tokens: int, num_devices: int) -> np.ndarray:
  """Return ids [T, K] by which the first device's experts get `skew` times their balanced share."""
  slots = np.arange(num_tokens * TOP_K)
  ids = slots % NUM
  mine = NUM // num_devices
  extra = (skew - 1) / (num_devices - 1)
  chosen = np.random.default_rng(0).permutation(len(slots)) < extra * len(slots)
  ids[chosen] = slots[chosen] % mine
  return ids.reshape(num_tokens, TOP_K).astype(np.int32)


@functools.cache
def arguments(skew: int) -> tuple[np.ndarray, ...]:
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  tokens = 8 * TOKENS
  weights = draw(NUM, D_MODEL, INNER), draw(NUM, INNER, D_MODEL)
  return draw(tokens, D_MODEL), draw(tokens, TOP_K), *weights, routing(skew, tokens, 8)


@functools.cache
def on_one_device(kind: str):
  return compiled(kind, Placement.FSDP, MeshConfig(data=1))


@pytest.mark.parametrize(
  ("kind", "transport"),
  [
    ("ff", Transport.RAGGED_STAND_IN),
    ("attention", Transport.PADDED),
    pytest.param("ff", Transport.PADDED, marks=pytest.mark.slow),
    pytest.param("attention", Transport.RAGGED_STAND_IN, marks=pytest.mark.slow),
  ],
)
def test_skewed_routing_gives_one_devices_gradients_in_the_same_memory(kind, transport):
  config = MeshConfig(data=1, expert=8, transport=transport, exchange_chunks=2)
  program, placed = compiled(kind, Placement.EXPERT, config)
  single, there = on_one_device(kind)
  memory = program.memory_analysis().temp_size_in_bytes
  for skew in (1, 2, 8):
    # One program for every routing: what it allocates is what it allocates under skew.
    ours = jax.device_get(program(*jax.device_put(arguments(skew), placed)))
    expected = jax.device_get(single(*jax.device_put(arguments(skew), there)))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * np.abs(b).max())
  # A buffer for the worst case, which would need no rounds, takes much more.
  worst = dataclasses.replace(config, exchange_buffer=8.0)
  more = compiled(kind, Placement.EXPERT, worst)[0].memory_analysis().temp_size_in_bytes
  assert more > 1.5 * memory


def test_rounds_follow_the_skew():
  ids = {skew: np.bincount(routing(skew, 8 * TOKENS, 8).reshape(-1) // 2) for skew in (1, 2, 8)}
  mean = 8 * TOKENS * TOP_K / 8
  for skew, per_device in ids.items():
    assert per_device[0] == pytest.approx(skew * mean, rel=0.1)


def test_totals_by_phase_and_axis():
  config = MeshConfig(data=1, fsdp=2, expert=4, transport=Transport.RAGGED)
  kind = ExpertKind("ff", NUM, TOP_K, D_MODEL, INNER, Placement.EXPERT)
  transfers = communication.layer_transfers(
    kind,
    tokens=TOKENS,
    axis_sizes=config.axis_sizes,
    mesh=config,
    model=MODEL,
    remat=Remat.FULL,
  )
  both = communication.total(transfers)
  assert both == sum(communication.total(transfers, phase) for phase in Phase)
  assert both == sum(communication.total(transfers, axis=axis) for axis in ("fsdp", "expert"))
  # Even routing: three of four slots leave the device.
  rows = [t for t in transfers if t.collective is Collective.RAGGED_ALL_TO_ALL and t.what == "x"]
  assert [t.sent_bytes for t in rows] == [TOKENS * TOP_K * 3 // 4 * D_MODEL * 4] * 2
  gathered = dataclasses.replace(kind, placement=Placement.FSDP)
  weights = communication.layer_transfers(
    gathered, tokens=1, axis_sizes=config.axis_sizes, mesh=config, model=MODEL, remat=Remat.NONE
  )
  matrix = NUM * D_MODEL * INNER * 4
  assert communication.total(weights, Phase.FORWARD) == 2 * matrix * 7 // 8
  assert communication.total(weights, Phase.BACKWARD) == 4 * matrix * 7 // 8
