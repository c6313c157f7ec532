"""Collectives counted in compiled text: exactly what small programs contain, in every notation."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mfjax.collectives import Place, bytes_sent, collectives, num_bytes

NAMES = ("outer", "inner")
ONE_SLICE = [Place(0, (i // 4, i % 4)) for i in range(8)]
TWO_SLICES = [Place(i // 4, (i % 4,)) for i in range(8)]


def _compiled(function, *shapes):
  """Compile for a mesh of outer=2 x inner=4, every argument sharded over both."""
  mesh = jax.make_mesh((2, 4), NAMES, axis_types=(AxisType.Auto,) * 2)
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=P(NAMES), out_specs=P(NAMES), check_vma=False
  )
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(mapped).lower(*arguments).compile().as_text()


def _summary(found):
  return sorted(
    (one.kind, one.count, one.operand_bytes, one.group_size, one.slices) for one in found
  )


def test_every_kind_inside_nested_loops():
  def program(x):
    def inner(x, _):
      whole = jax.lax.all_gather(x, "inner", axis=0, tiled=True)
      part = jax.lax.psum_scatter(whole, "inner", scatter_dimension=0, tiled=True)
      return jax.lax.ppermute(part, "inner", [(i, (i + 1) % 4) for i in range(4)]), None

    def outer(x, _):
      x, _ = jax.lax.scan(inner, x, None, length=3)
      return x + jax.lax.psum(x, NAMES), None

    x, _ = jax.lax.scan(outer, x, None, length=5)
    return jax.lax.all_to_all(x.reshape(2, -1), "outer", 0, 0).reshape(x.shape)

  part = 16 * 32 * 4
  found = collectives(_compiled(program, (8 * 16, 32)), ONE_SLICE)
  assert _summary(found) == [
    ("all-gather", 15, part, 4, 1),
    ("all-reduce", 5, part, 8, 1),
    ("all-to-all", 1, part, 2, 1),
    ("collective-permute", 15, part, 2, 1),
    ("reduce-scatter", 15, 4 * part, 4, 1),
  ]
  by_kind = {one.kind: one for one in found}
  assert not any(one.dynamic for one in found)
  assert by_kind["all-gather"].ici_bytes == 3 * part
  assert by_kind["reduce-scatter"].ici_bytes == 3 * part
  assert by_kind["all-reduce"].ici_bytes == 2 * part * 7 / 8
  assert by_kind["all-to-all"].ici_bytes == part / 2
  assert "all_gather" in by_kind["all-gather"].source
  # `inner` runs along one dimension of 2 x 4 devices, both axes together along two.
  assert by_kind["all-gather"].dimensions == 1
  assert by_kind["all-reduce"].dimensions == 2


def test_a_loop_whose_length_is_data_counts_once_and_is_marked():
  def program(x, n):
    return jax.lax.fori_loop(0, n[0, 0].astype(int), lambda _, x: jax.lax.psum(x, "outer"), x)

  (found,) = collectives(_compiled(program, (8, 32), (8, 1)), ONE_SLICE)
  assert (found.kind, found.count, found.dynamic) == ("all-reduce", 1, True)


def test_link_class_follows_the_slices_of_the_group():
  def program(x):
    inside = jax.lax.psum(x, "inner")
    across = jax.lax.psum(x, "outer")
    return inside + 2 * across + jax.lax.psum(x, NAMES)

  found = {one.group_size: one for one in collectives(_compiled(program, (8, 32)), TWO_SLICES)}
  size = 32 * 4
  assert {group: one.links for group, one in found.items()} == {4: "ICI", 2: "DCN", 8: "ICI+DCN"}
  assert (found[4].ici_bytes, found[4].dcn_bytes) == (2 * size * 3 / 4, 0)
  assert (found[2].ici_bytes, found[2].dcn_bytes) == (0, size)
  # Inside a slice of four, then a quarter of the data between the two slices.
  assert (found[8].ici_bytes, found[8].dcn_bytes) == (2 * size * 3 / 4, size / 4)


@pytest.mark.parametrize(
  "kind", ["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]
)
def test_one_device_a_slice_sends_over_dcn_what_it_would_over_ici(kind):
  assert bytes_sent(kind, 1024, 4, 4) == (0, bytes_sent(kind, 1024, 4, 1)[0])


def _module(line, condition=""):
  return f"""HloModule test

{condition}
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0:T(8)}} parameter(0)
  {line}
}}
"""


@pytest.mark.parametrize(
  ("groups", "size", "slices"),
  [
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2, 1),
    ("replica_groups={}", 8, 2),
    ("replica_groups=[2,4]<=[8]", 4, 1),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, 2),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4, 1),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", 2, 2),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", 4, 2),
    ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'c'}", 2, 2),
    ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'b'}", 4, 1),
    ("replica_groups=mesh['a'=8], device_ids=([8]) {'a':(1)2}", 2, 2),
    ("replica_groups=mesh['a'=8] {'a':(2)4}", 4, 1),
  ],
)
def test_notations_of_groups(groups, size, slices):
  line = f"ROOT %y = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add"
  add = "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %c = f32[] add(%a, %b)\n}\n"
  (found,) = collectives(_module(line, add), TWO_SLICES)
  assert (found.operand_bytes, found.group_size, found.slices) == (32, size, slices)


def test_an_unknown_notation_of_groups_is_refused():
  line = "ROOT %y = f32[8] all-reduce(%x), replica_groups=new{0}"
  with pytest.raises(ValueError, match="groups are not understood: .*new"):
    collectives(_module(line), TWO_SLICES)


def test_libtpu_hands_transfers_between_slices_to_the_hosts():
  line = (
    "%t = token[] after-all()\n"
    "  %send = (f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=3, is_host_transfer=true, "
    'frontend_attributes={_xla_megascale_target="{1:2}x{0:3}",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}\n'
    "  ROOT %done = token[] send-done(%send), channel_id=3, is_host_transfer=true"
  )
  (found,) = collectives(_module(line), TWO_SLICES)
  assert (found.kind, found.links, found.dcn_bytes) == ("all-reduce", "DCN", 32)


def test_libtpu_writes_a_fused_collective_into_each_fusion_it_runs_beside():
  gather = (
    "  %g = bf16[64]{0} all-gather(%p), replica_groups={}, dimensions={0}, "
    'frontend_attributes={chain_id="0"}\n'
  )
  fusions = (
    "%start (p: bf16[8]) -> u32[] {\n  %p = bf16[8]{0} parameter(0)\n"
    f"{gather}"
    '  ROOT %c = u32[] custom-call(%g), custom_call_target="AsyncCollectiveStart"\n}\n\n'
    "%beside (p: bf16[8]) -> u32[] {\n  %p = bf16[8]{0} parameter(0)\n"
    f"{gather}"
    "  ROOT %c = u32[] constant(0)\n}\n"
  )
  lines = (
    "%a = u32[] fusion(%x), kind=kCustom, calls=%start\n"
    "  ROOT %b = u32[] fusion(%x), kind=kCustom, calls=%beside"
  )
  (found,) = collectives(_module(lines, fusions), ONE_SLICE)
  assert (found.kind, found.count, found.operand_bytes) == ("all-gather", 1, 16)


def test_trip_count_of_a_loop_without_a_note_is_what_its_counter_is_compared_with():
  loop = (
    "%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {\n"
    "  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)\n"
    "  %v = f32[8]{0} get-tuple-element(%p), index=1\n"
    "  ROOT %r = f32[8]{0} all-reduce(%v), replica_groups={}\n}\n\n"
    "%condition (p: (s32[], f32[8])) -> pred[] {\n"
    "  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)\n"
    "  %limit = s32[]{:T(128)} constant(24)\n"
    "  %i = s32[]{:T(128)} get-tuple-element(%p), index=0\n"
    "  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT\n}\n"
  )
  line = "ROOT %w = (s32[], f32[8]) while(%x), condition=%condition, body=%body"
  (found,) = collectives(_module(line, loop), ONE_SLICE)
  assert (found.count, found.dynamic) == (24, False)


@pytest.mark.parametrize(
  ("shape", "size"),
  [
    ("f32[]", 4),
    ("bf16[16,32]{1,0:T(8,128)(2,1)S(1)}", 1024),
    ("(pred[3]{0}, s8[5], /*index=2*/u32[])", 12),
    ("f8e4m3fn[10]", 10),
    ("token[]", 0),
  ],
)
def test_bytes_of_shapes(shape, size):
  assert num_bytes(shape) == size
