"""The exchange compiled for a TPU that is not there: its volume, and what runs beside it."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from mfjax import collectives, communication, compiler_options, experts, sharding, transport
from mfjax.communication import ExpertKind
from mfjax.config import KernelConfig, MeshConfig, ModelConfig, Placement, Remat, Transport
from mfjax.sharding import P
from pallas_kernels.implementation import Implementation
from tests.pallas_kernels.tpu_target import needs_libtpu

TOKENS, TOP_K, NUM, D_MODEL, INNER = 512, 2, 8, 256, 512  # Tokens of one device.
LAYERS = 3
KERNELS = KernelConfig(grouped_matmul=Implementation.PALLAS_TPU)


def compile_layers(kind: str, config: MeshConfig, options: dict) -> str:
  """Return the scheduled program of some layers' experts and their gradients, on v5p."""
  topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2")
  mesh = sharding.make_mesh(config, topology.devices)
  with jax.set_mesh(mesh):
    layout = experts.expert_layout(NUM, TOP_K, Placement.EXPERT, config, KERNELS)

    def local(x, p, w_in, w_out, ids):
      plan = experts.make_plan(layout, ids)
      if kind == "ff":
        return experts.feed_forward(layout, x, p, w_in, w_out, plan)
      hidden = experts.project_in(layout, x, w_in, plan)
      return experts.project_out(layout, jnp.sin(hidden), p, w_out, plan)

    rows, weights = sharding.BATCH, (P("expert", "fsdp"), P("expert", None, "fsdp"))
    layer = jax.shard_map(
      local, in_specs=(rows, rows, *weights, rows), out_specs=rows, check_vma=False
    )

    def loss(x, p, w_in, w_out, ids):
      y, _ = jax.lax.scan(lambda x, w: (x + layer(x, p, *w, ids), None), x, (w_in, w_out))
      return jnp.sin(y).sum(dtype=jnp.float32)

    def shape(spec, dtype, *sizes):
      return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.NamedSharding(mesh, spec))

    tokens = TOKENS * mesh.size
    stacked = [P(None, *spec) for spec in weights]
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), compiler_options=options)
    return (
      step.lower(
        shape(rows, jnp.bfloat16, tokens, D_MODEL),
        shape(rows, jnp.float32, tokens, TOP_K),
        shape(stacked[0], jnp.float32, LAYERS, NUM, D_MODEL, INNER),
        shape(stacked[1], jnp.float32, LAYERS, NUM, INNER, D_MODEL),
        shape(rows, jnp.int32, tokens, TOP_K),
      )
      .compile()
      .as_text()
    )


@pytest.fixture(autouse=True)
def _no_tpu_is_asked_for(monkeypatch):
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def beside(text: str, operation: str) -> int:
  """Return how many kernels are scheduled between starts of an operation and their ends."""
  found = 0
  for start in re.finditer(rf"(%{operation}-start[.\d]*) = ", text):
    end = re.search(rf"{operation}-done\({re.escape(start[1])}\)", text[start.end() :])
    found += text[start.end() :][: end.start()].count('custom_call_target="tpu_custom_call"')
  return found


@needs_libtpu
@pytest.mark.parametrize("kind", ["ff", "attention"])
def test_ragged_volume_is_the_predicted_one_and_experts_run_beside_it(kind):
  config = MeshConfig(data=1, fsdp=2, expert=4, transport=transport.resolve(Transport.AUTO, "tpu"))
  text = compile_layers(kind, config, compiler_options.options("tpu", True))
  found: dict[str, int] = {}
  for c in collectives.collectives(text, [collectives.Place(0, ())] * 8):
    if not c.dynamic and c.count == LAYERS:
      found[c.kind] = found.get(c.kind, 0) + c.operand_bytes
  expected: dict[str, int] = {}
  for t in communication.layer_transfers(
    ExpertKind(kind, NUM, TOP_K, D_MODEL, INNER, Placement.EXPERT),
    tokens=TOKENS,
    axis_sizes=config.axis_sizes,
    mesh=config,
    model=ModelConfig(),
    remat=Remat.NONE,
  ):
    expected[t.collective.value] = expected.get(t.collective.value, 0) + t.buffer_bytes
  print(kind, found, expected)
  for collective in ("ragged-all-to-all", "all-gather"):
    assert found[collective] == pytest.approx(expected[collective], rel=0.02), collective
  assert beside(text, "ragged-all-to-all") > 0


@needs_libtpu
def test_without_the_preset_nothing_runs_beside_the_exchange():
  config = MeshConfig(data=1, fsdp=2, expert=4, transport=Transport.RAGGED)
  text = compile_layers("ff", config, compiler_options.options("tpu", False))
  assert "ragged-all-to-all(" in text
  assert beside(text, "ragged-all-to-all") == 0
