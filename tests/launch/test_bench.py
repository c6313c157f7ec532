"""`mfjax bench` measures the input pipeline, kernels and models, and refuses wrong results."""

import functools
import importlib.util
import json
import pathlib
import re
import shutil
import sys

import grain  # noqa: F401 - registers flags, which must outlive one command
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs.quickstart
from mfjax.bench import (
  breakdown,
  conversion,
  grouped_matmul,
  kernels,
  static_cycles,
  stick_breaking,
  timing,
)
from mfjax.bench.grouped_matmul import GroupedShape
from mfjax.data.prepare import PrepareOptions, prepare
from pallas_kernels.implementation import Implementation


def test_input_pipeline_meets_its_target(mfjax, tmp_path):
  done = mfjax("bench", "data", "--seconds=1")
  assert done.code == 0, done.err
  found = re.search(r"pipeline, read ahead +([\d.]+) +([\d.]+)", done.out)
  assert float(found[1]) > 2
  assert float(found[2]) > 0.96
  assert "peer: grain" in done.out


def test_own_data(mfjax, tmp_path):
  for number in range(300):
    (tmp_path / f"{number}.txt").write_text(f"text {number} " * 20)
  prepare(PrepareOptions(out="data", inputs=(("web", str(tmp_path / "*.txt")),)))
  done = mfjax("bench", "data", "--data=data", "--sequence_length=64", "--seconds=0.1")
  assert done.code == 0, done.err


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ("dat", "did you mean 'data'"),
    ("", "name one benchmark: data"),
    ("kernels --only=wid", "did you mean 'wide'"),
    ("kernels --shapes=4x4x4x4", "--only with one section"),
    ("kernels --only=wide --shapes=4x4", "'4x4': wide needs BxSLOTSxTxD, such as 64x2x512x1024"),
    ("kernels --only=experts --shapes=8x8x8x2x2", "top_k=2 must be below the number of experts, 2"),
    ("kernels --target=v6", "did you mean 'v6e'"),
    ("kernels --target=v6e --only=experts", "unknown section 'experts'"),
    ("kernels --target=v6e --only=wide --shapes=4x4x4x4", "with --target they are fixed"),
    ("model --config=quickstart --rows=4,x", "--rows=4,x: give positive numbers"),
    ("model --config=quickstart --rows=4 --microbatches=3", "4 rows do not divide into 3"),
    ("model --config=quickstart --rows=4 --microbatches=1,2", "has 2 numbers for 1 of --rows"),
  ],
)
def test_mistakes_are_sentences(mfjax, args, message):
  done = mfjax("bench", *args.split())
  assert message in done.err
  assert done.code == 2


# Kernels ------------------------------------------------------------------------------------------


def test_kernels_print_a_table_and_write_json(mfjax, tmp_path):
  args = ("--only=grouped_matmul", "--shapes=96x16x24x6", "--repeats=1")
  done = mfjax("bench", "kernels", *args, "--json=k.json")
  assert done.code == 0, done.err
  rows = json.loads((tmp_path / "k.json").read_text())["rows"]
  names = ("forward", "rows' gradient", "weights' gradient")
  assert [row["operation"] for row in rows] == [
    f"grouped {name}, {groups}" for groups in ("balanced", "skewed") for name in names
  ]
  for row in rows:
    assert row["seconds"] > 0
    assert row["flops"] == 2 * 96 * 16 * 24
    assert set(row["beside"]) == {"dense", "ragged_dot"}
    assert f"{row['operation']:38} 96 x 16 -> 24, 6 groups" in done.out
  assert "not measured, torch: " in done.out


def test_a_gather_is_shown_in_bytes_beside_a_copy(mfjax, tmp_path):
  args = ("--only=gather", "--shapes=96x128x300", "--repeats=1")
  done = mfjax("bench", "kernels", *args, "--json=k.json")
  assert re.search(r"^gather +300 rows of 96 x 128 .* TB/s +copy \d", done.out, re.MULTILINE), (
    done.err
  )
  [row] = json.loads((tmp_path / "k.json").read_text())["rows"]
  assert row["moved_bytes"] == (96 + 300) * 128 * 4
  assert set(row["beside"]) == {"copy"}


def test_json_alone_on_request(mfjax):
  args = ("--only=wide", "--shapes=1x2x16x32", "--repeats=1")
  done = mfjax("bench", "kernels", *args, "--json=-")
  rows = json.loads(done.out)["rows"]
  assert [row["operation"] for row in rows] == [
    "stick-breaking forward",
    "stick-breaking forward + backward",
  ]
  assert rows[0]["flops"] == 2 * 2 * 1 * 2 * 32 * 16 * 17 / 2
  assert rows[1]["flops"] == 3 * rows[0]["flops"]
  assert "products" in rows[0]["beside"]


def test_experts_and_attention_sections(mfjax):
  done = mfjax("bench", "kernels", "--only=experts", "--shapes=32x16x16x4x2", "--repeats=1")
  assert done.out.count("experts forward + backward, ") == 3, done.err
  done = mfjax("bench", "kernels", "--only=stick_breaking", "--shapes=1x2x16x8", "--repeats=1")
  assert "softmax by xla" in done.out, done.err


@pytest.mark.parametrize("name", ["forward", "rows' gradient", "weights' gradient"])
def test_a_wrong_product_is_not_timed(name):
  shape = GroupedShape(64, 16, 24, 4)
  rows = grouped_matmul.layout(grouped_matmul.skewed(shape), 8)
  x = grouped_matmul.draw_rows(jax.random.key(0), rows, 16, jnp.float32)
  dy = grouped_matmul.draw_rows(jax.random.key(1), rows, 24, jnp.float32)
  w = jax.random.normal(jax.random.key(2), (4, 16, 24))
  args = {"forward": (x, w), "rows' gradient": (dy, w), "weights' gradient": (x, dy)}[name]
  options = {"alignment": 8, "implementation": Implementation.XLA}
  with jax.set_mesh(jax.sharding.Mesh(jax.devices()[:1], ("x",))):
    result = np.array(grouped_matmul.operations(options, jnp.float32)[name](*args, rows.sizes))
  grouped_matmul.check(name, jnp.asarray(result), args, rows)
  row, column = (0, 0), (..., 3)  # The first row and the first group are used.
  for place, damage in ((..., 0.05), (row, 1.0), (column, 1.0), (row, np.nan)):
    wrong = result.copy()
    wrong[place] += damage * (np.abs(wrong[place]) + 1)
    with pytest.raises(AssertionError, match="of the results' size"):
      grouped_matmul.check(name, jnp.asarray(wrong), args, rows)


def test_wrong_attention_is_not_timed():
  shape = stick_breaking.AttentionShape(1, 1, 2, 90, 8)
  args = stick_breaking.draw(shape, jnp.float32)
  with jax.set_mesh(jax.sharding.Mesh(jax.devices()[:1], ("x",))):
    _, training = stick_breaking.functions(Implementation.XLA, 0.0, False)
    stick_breaking.check(shape, 0.0, args, training)

    def damaged(wrong, *args):
      out, gradients = training(*args)
      named = dict(zip(("values", "dq", "dk", "dv"), (out, *gradients), strict=True))
      named[wrong] = named[wrong] * 1.05
      return named["values"], (named["dq"], named["dk"], named["dv"])

    for wrong in ("values", "dq", "dk", "dv"):
      with pytest.raises(AssertionError, match=f"stick-breaking {wrong} of"):
        stick_breaking.check(shape, 0.0, args, functools.partial(damaged, wrong))


@pytest.mark.parametrize("shape", [(65536, 1, 1, 32), (100, 1, 1, 7), (9, 1, 1, 2), (5, 1, 1, 1)])
def test_group_sizes(shape):
  shape = GroupedShape(*shape)
  even, uneven = grouped_matmul.balanced(shape), grouped_matmul.skewed(shape)
  for sizes in (even, uneven):
    assert sizes.sum() == shape.m
    assert len(sizes) == shape.g
  assert even.max() - even.min() <= 1
  if shape.g > 5:
    assert uneven[0] == shape.m // 2
    assert (uneven == 0).sum() == 3


# Turns --------------------------------------------------------------------------------------------


def test_alternatives_take_turns(monkeypatch):
  monkeypatch.setattr(timing, "_SLOW", float("inf"))  # These are too short to be compared.
  monkeypatch.setattr(timing, "_MOST_CALLS", 100)
  order = []

  def call(name):
    return timing.Call(lambda: order.append(name), (), lambda _: order.append("wait"))

  seconds = timing.take_turns({"a": call("a"), "b": call("b")}, repeats=3)
  assert set(seconds) == {"a", "b"}
  # Once to compile, once and then many times to find out how short they are.
  a, b = (([name] * timing._MOST_CALLS) + ["wait"] for name in ("a", "b"))
  assert order[: 2 * len(a) + 8] == ["a", "wait"] * 2 + a + ["b", "wait"] * 2 + b
  # Each is called for a while before it is timed.
  assert order[2 * len(a) + 8 :] == (a + a + b + b) * 3


def test_the_clock_settles_before_anything_is_timed(monkeypatch):
  made = []

  def seconds(call, count=1):
    made.append(count)
    return 1e-3

  monkeypatch.setattr(timing.Call, "seconds", seconds)
  timing.take_turns({"a": timing.Call(lambda: None)}, repeats=2)
  assert made == [1, 1, 50] + [200, 50] * 2, "0.2 s before 0.05 s"


def test_much_slower_alternatives_take_turns_of_their_own(monkeypatch):
  order = []
  seconds_of = {"ours": 1e-3, "dense": 2e-3, "slow": 1e-1}

  def seconds(call, count=1):
    order.append(call.args[0])
    return seconds_of[call.args[0]]

  monkeypatch.setattr(timing.Call, "seconds", seconds)
  calls = {name: timing.Call(lambda: None, (name,)) for name in seconds_of}
  found = timing.take_turns(calls, repeats=2)
  assert found == seconds_of
  assert list(found) == list(calls)
  turns = order[3 * len(calls) :: 2]  # One call before each that is timed.
  assert turns == ["slow", "slow", "ours", "dense", "ours", "dense"]


def test_an_alternative_that_cannot_is_named():
  def cannot():
    raise NotImplementedError("No shape of 3. Use another.")

  fine = timing.Call(lambda: jnp.zeros(()))
  others = {"broken": timing.Call(cannot), "absent": "not installed", "fine": fine}
  found = timing.compare("x", "3", 1.0, fine, others, repeats=1)
  assert set(found.beside) == {"fine"}
  assert found.missing == {
    "broken": "NotImplementedError: No shape of 3",
    "absent": "not installed",
  }


# Static cycles ------------------------------------------------------------------------------------


def test_missing_libtpu_is_named(mfjax, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  done = mfjax("bench", "kernels", "--target=v6e")
  assert "pip install 'mfjax[tpu]'" in done.err
  assert done.code == 2


def test_loop_bodies_are_read_from_the_schedule():
  # Bundles 2 to 4 are a loop's body; its last one's text spans lines. Region 1 has no product.
  bundles = """
     0   :  { a } /* Start region 1 :: Start region 2 */
   0x1   :  { b } /* End region 2 */
   0x2 LB: > { c } /* Start region 3 */
   0x3   : > { d }
   0x4   : > { e = f /* vector
 of two */ } /* End region 3 */
   0x5 PF: > { g } /* Start/End empty region 4 */
   0x6   :  {} /* End region 1 */
"""
  utilization = ["== CAPACTIY:", "MXU, VALU", "2 4", "== UTILIZATION:"]
  utilization += ["0 1", "0 0", "1 4", "2 0", "1 0", "0 0", "0 0"]
  (body,) = static_cycles._bodies(utilization, bundles)
  assert body.cycles == 3
  assert body.shares == pytest.approx({"MXU": 4 / 6, "VALU": 4 / 12})


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'mfjax[tpu]'"
)
def test_kernels_compiled_for_a_tpu(mfjax):
  done = mfjax("bench", "kernels", "--target=v5e", "--only=stick_breaking", "--json=-")
  schedules = json.loads(done.out)["schedules"]
  assert {s["program"].partition(",")[0] for s in schedules} == {
    "stick-breaking",
    "splash attention",
  }
  for schedule in schedules:
    assert not schedule["error"]
    assert 0.1 < schedule["bodies"][0]["shares"]["MXU"] <= 1


# Models -------------------------------------------------------------------------------------------


def test_model_times_and_parts_add_up(mfjax, tmp_path):
  sizes = ("num_layers=2", "d_model=32", "d_attention=32", "d_ff=32", "vocab_size=256")
  done = mfjax(
    "bench",
    "model",
    "--config=quickstart",
    *(f"--config.model.{size}" for size in sizes),
    *("--config.train.remat=full", "--sequence_length=32", "--repeats=1"),
    *("--forward_rows=2", "--rows=4", "--microbatches=2", "--json=m.json"),
  )
  assert done.code == 0, done.err
  report = json.loads((tmp_path / "m.json").read_text())
  forward, step = report["rows"]
  assert [row["setting"]["microbatches"] for row in report["rows"]] == [0, 2]
  for row in report["rows"]:
    tokens = row["setting"]["rows"] * 32
    assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
    assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / report["peak_flops"])
    assert 1 <= row["imbalance"] < 8
    assert row["compiled_bytes"] > 0
    spent = sum(p["forward"] + p["recomputed"] + p["backward"] for p in row["parts"])
    assert spent == pytest.approx(row["seconds"])
    assert all(p["kernels"] >= 0 for p in row["parts"])
  # Forward: a third of a step's FLOPs but for lm_head, 2 d_model vocab_size a token.
  assert forward["flops"] == pytest.approx(step["flops"] / 6 - 64 * 2 * 32 * 256)
  parts = {part["name"]: part for part in step["parts"]}
  both = {"attention core", "attention projections", "feed-forward experts", "router", "norms"}
  for name in both:
    assert parts[name]["forward"] > 0, name
    assert parts[name]["recomputed"] > 0, name
    assert parts[name]["backward"] > 0, name
  assert {"embedding", "loss head", "optimizer", "waiting"} < set(parts)
  assert not any(part["backward"] for part in forward["parts"])
  assert "optimizer" not in {part["name"] for part in forward["parts"]}
  assert "train step, 4 x 32 in 2 microbatches: " in done.out


def test_too_little_memory_is_a_sentence(mfjax, monkeypatch, tmp_path):
  def measure(config, mesh, settings, repeats):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying")

  monkeypatch.setattr("mfjax.bench.model.measure", measure)
  done = mfjax("bench", "model", "--config=quickstart", "--json=m.json")
  assert "has too little memory for this: fewer --rows" in done.err
  assert json.loads((tmp_path / "m.json").read_text())["rows"] == []


def test_what_is_fused_counts_where_its_last_step_comes_from():
  text = """HloModule jit_step

FileNames
1 "/x/mfjax/router.py"
2 "/x/optax/adam.py"

FunctionNames
1 "Router.__call__"
2 "update"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
3 {file_location_id=2 parent_frame_id=3}

%inner (p: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  ROOT %tanh.1 = f32[] tanh(%p), metadata={op_name="transpose(jvp())/tanh" stack_frame_id=2}
}

ENTRY %main (a: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %fusion.1 = f32[] fusion(%a), kind=kLoop, calls=%inner
  %copy.1 = f32[] copy(%fusion.1)
  ROOT %add.7 = f32[]{:T(256)} add(%copy.1, %copy.1), metadata={op_name="add" stack_frame_id=1}
}
"""
  found = breakdown.read_origins(text)
  assert found["fusion.1"] == breakdown.Origin("fusion", "router", "backward")
  assert found["copy.1"] == breakdown.Origin("copy", breakdown.OTHER, "forward")
  assert found["add.7"] == breakdown.Origin("add", "optimizer", "forward")


def test_defaults_read_as_their_sections_say():
  for section in kernels.SHAPES:
    for platform in ("cpu", "gpu"):
      for sizes in kernels.shapes_of(section, [], platform):
        assert len(sizes) == kernels.SHAPES[section].count("x") + 1
        assert np.prod(sizes) > 0


# Conversion ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_conversion_is_measured_beside_a_copy(mfjax, tmp_path):
  sizes = ("num_layers=2", "d_model=256", "d_attention=256", "d_ff=512", "vocab_size=256")
  args = [f"--config.model.{size}" for size in sizes]
  (tmp_path / "disk").mkdir()
  args += ["--only=float32", "--scratch=disk", "--json=c.json"]
  done = mfjax("bench", "conversion", "--config=quickstart", *args)
  assert done.code == 0, done.err
  exported, imported = json.loads((tmp_path / "c.json").read_text())["rows"]
  assert (exported["job"], imported["job"]) == (
    "export float32 to bfloat16",
    "import bfloat16 to float32",
  )
  assert exported["bytes_written"] == imported["bytes_read"]
  assert exported["bytes_read"] > exported["bytes_written"]
  assert imported["bytes_written"] == pytest.approx(exported["bytes_read"], rel=0.01)
  for row in (exported, imported):
    assert 0 < row["copy_seconds"] < row["seconds"]
    assert row["copy_seconds"] == pytest.approx(sum(row["copies_seconds"]) / 2)
    assert row["share_of_copy"] == pytest.approx(row["copy_seconds"] / row["seconds"])
    assert 50e6 < row["peak_bytes"] < 8e9
    assert f"{row['job']:28} " in done.out
  assert list((tmp_path / "disk").iterdir()) == []


def test_a_conversion_that_fails_ends_the_benchmark(tmp_path):
  config = configs.quickstart.get_config()
  command = (sys.executable, "-c", "import sys; sys.exit('no such ' + sys.argv[1])")
  with pytest.raises(ValueError, match=r"failed: no such export"):
    next(conversion.measure(config, "bfloat16", tmp_path, command, lambda _: None))


def test_a_copy_reads_and_writes_what_it_should(tmp_path):
  for number, size in enumerate((50_000_000, 7)):
    (tmp_path / str(number)).write_bytes(bytes(size))
  files = [tmp_path / "0", tmp_path / "1"]
  written = []
  unlink = pathlib.Path.unlink

  def record(path):
    written.append(path.stat().st_size)
    unlink(path)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pathlib.Path, "unlink", record)
    for size in (25_000_000, 50_000_007, 120_000_000):
      assert conversion._copy(files, size, tmp_path / "copy") > 0
  assert written == [25_000_000, 50_000_007, 120_000_000]


def test_too_small_a_disk_is_noticed_first(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
  config = configs.quickstart.get_config()
  with pytest.raises(ValueError, match=r"has 0.0 GB free and this takes 0.0: choose another"):
    next(conversion.measure(config, "float32", tmp_path, ("false",), lambda _: None))


def test_the_peak_is_the_commands_own():
  ballast = np.ones(300_000_000, np.uint8)
  hold = "import time; x = b'1' * {}; time.sleep(0.5)"
  peaks = [conversion._run([sys.executable, "-c", hold.format(n)])[1] for n in (1, 200_000_000)]
  assert peaks[0] < 100_000_000 < ballast.nbytes
  assert 200_000_000 <= peaks[1] < 300_000_000
