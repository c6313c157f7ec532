"""`mfjax compile` as a user runs it: bad input here; real compiles for real targets (`target`)."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from mfjax import ahead_of_time, fit, roofline, search, train_step
from tests.pallas_kernels.tpu_target import needs_libtpu

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = '''"""A model whose kernels compile in seconds."""

from mfjax.config import *


def get_config():
  return RunConfig(
    model=ModelConfig(
      vocab_size=500, d_model=128, num_layers=3, d_attention=128, d_ff=128,
      num_attention_experts=4, num_ff_experts=4, d_gate=32,
    ),
    mesh=MeshConfig(fsdp=4, attention_placement=Placement.FSDP, ff_placement=Placement.FSDP),
    data=DataConfig(sequence_length=128, batch_rows=32),
    train=TrainConfig(microbatches=2),
  )
'''

# Logits of 64 Ki tokens at once: 14 GiB and more.
LARGE = ("--config.loss.chunk_tokens=65536",)


@pytest.mark.parametrize(
  ("args", "text"),
  [
    ((), "--target is missing; known targets: v5e"),
    (("--target=v5e:4x5",), "v5e has no topology '4x5'; known targets: v5e, v6e with 1x1, 2x2"),
    (("--target=k80:8",), "unknown target 'k80'; known targets:"),
    (("--target=v5e:4x4", "--num_slices=0"), "--num_slices=0: give at least 1"),
    (("--target=v5e:4x4", "v5p:4x4x4"), "unexpected argument 'v5p:4x4x4'"),
    (("--target=v5e:4x4", "--search_compiles=0"), "--search_compiles=0"),
    (("--target=v5e:4x4", "--routing=none.json"), "none.json"),
    (("--target=v5e:4x4", "--routing=bad.json"), "--routing=bad.json"),
  ],
)
def test_malformed_is_one_sentence(mfjax, tmp_path, args, text):
  (tmp_path / "bad.json").write_text('{"ff": [[1, 2]]}')
  done = mfjax("compile", "--config=quickstart", *args)
  assert (done.code, done.out) == (2, "")
  assert len(done.err.splitlines()) == 1, done.err
  assert done.err.startswith("mfjax compile: error: ")
  assert text in done.err


@pytest.fixture
def machine(monkeypatch):
  """Let every target be eight CPU devices, and the compiler answer at once with estimates."""
  for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"):
    monkeypatch.setenv(name, "")  # Restored afterwards: the command sets them.
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "")
  monkeypatch.setenv("JAX_PLATFORMS", os.environ["JAX_PLATFORMS"])
  devices = tuple(jax.devices())
  monkeypatch.setattr(fit.Machine, "of", classmethod(lambda cls, target: cls(target, devices)))
  made = []

  def check(config, machine, **_):
    """Need twice the estimated memory; take longer with every further layout."""
    mesh = machine.mesh(config)
    sizes = dict(mesh.shape)
    peak = 2 * search.memory(config, sizes)
    program = ahead_of_time.Program(
      name="train step",
      memory=(ahead_of_time.Memory("parameters", peak),),
      peak_bytes=peak,
      limit_bytes=None,
      num_kernels=0,
      collectives=(),
      lower_seconds=1.0,
      compile_seconds=2.0,
      compile_cpu_seconds=3.0,
    )
    resolved = train_step.resolve(config, mesh)
    bounds = roofline.roofline(resolved, 8, sizes, machine.facts, [])
    made.append(
      fit.Report(
        config=resolved,
        machine=machine,
        axis_sizes=sizes,
        programs=(program,),
        bounds=dataclasses.replace(bounds, dcn=10.0 - len(made)),
        measured_bounds=None,
        assumptions=(),
        remedies=search.remedies(resolved, sizes, 1),
      )
    )
    return made[-1]

  monkeypatch.setattr(fit, "check", check)
  return made


def test_search_lists_the_best_first_as_compiled(mfjax, machine, tmp_path):
  (tmp_path / "small.py").write_text(CONFIG)
  flags = ("--search", "--search_compiles=3", "--json=found.json")
  done = mfjax("compile", "--config=small.py", "--target=v5e:2x4", *flags)
  assert done.code == 0
  assert len(machine) == 3
  table = done.out.partition("best first, as compiled")[2].strip().splitlines()
  # The last one compiled takes the shortest time.
  assert [row.split()[0] for row in table] == ["fits", "yes", "yes", "yes"]
  last = machine[-1].config
  assert f"--config.train.remat={last.train.remat.value}" in table[1]
  found = json.loads((tmp_path / "found.json").read_text())["layouts"]
  bounds = [layout["bounds"]["balanced"]["at_least"] for layout in found]
  assert bounds == sorted(bounds)


def test_search_reports_layouts_that_turn_out_too_large(mfjax, machine, tmp_path):
  (tmp_path / "small.py").write_text(CONFIG)
  # By estimate some of these fit 16 GiB; with twice as much none does.
  flags = ("--search", "--config.data.sequence_length=131072", "--config.model.vocab_size=30000")
  done = mfjax("compile", "--config=small.py", "--target=v5e:2x4", *flags, *LARGE)
  assert done.code == 3, done.err
  table = done.out.partition("best first, as compiled")[2].strip().splitlines()
  assert {row.split()[0] for row in table[1:]} == {"no"}


def test_one_that_does_not_fit_says_how_short_it_is_and_what_would_help(mfjax, machine, tmp_path):
  (tmp_path / "small.py").write_text(CONFIG)
  flags = ("--config.data.sequence_length=131072", "--config.model.vocab_size=30000", *LARGE)
  done = mfjax("compile", "--config=small.py", "--target=v5e:2x4", *flags)
  assert done.code == 3, done.err
  assert "does not fit: " in done.out
  assert "--config.loss.chunk_tokens=16384 saves about" in done.out


def _compile(cwd: pathlib.Path, *args: str) -> subprocess.CompletedProcess[str]:
  (cwd / "small.py").write_text(CONFIG)
  return subprocess.run(
    [sys.executable, "-m", "launch.main", "compile", "--config=small.py", *args],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=600,
  )


@needs_libtpu
def test_two_slices_of_a_tpu(tmp_path):
  skewed = {"attention": np.ones((3, 4)).tolist(), "ff": [[5, 1, 1, 1]] * 3}
  (tmp_path / "routing.json").write_text(json.dumps(skewed))
  flags = ("--target=v5e:2x2", "--num_slices=2", "--json=report.json", "--routing=routing.json")
  done = _compile(tmp_path, *flags)
  assert (done.returncode, done.stderr) == (0, "")
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["mesh"] == {"data": 2, "fsdp": 4, "expert": 1}
  assert report["config"]["kernels"]["grouped_matmul"] == "pallas_tpu"
  train, evaluation = report["programs"]
  assert train["pallas_kernels"] >= 13  # Forward, again for the backward pass, and backward.
  assert evaluation["pallas_kernels"] >= 5
  for program in report["programs"]:
    total = sum(program["memory"].values())
    assert total == pytest.approx(program["peak_bytes"], rel=0.05)
    assert min(program["memory"].values()) > 0
  # The compiler counts the arguments of the shapes; tiles pad the small ones of a small model.
  padding = train["memory"].get("padding of their layouts", 0)
  assert padding < 0.15 * (train["memory"]["parameters"] + train["memory"]["optimizer state"])
  links = {(row["kind"], row["link"]) for row in report["collectives"]}
  assert ("all-gather", "ICI") in links
  assert ("all-reduce", "DCN") in links
  # Each device's part of the gradients crosses once per microbatch, in float32; small ones whole.
  assert 2 <= report["sent_bytes"]["DCN"] / train["memory"]["parameters"] < 3
  assert report["bounds"]["measured"]["compute"] >= report["bounds"]["balanced"]["compute"]
  for text in ("fits: ", "collectives of the train step", "bounds of a train step", "assumed:"):
    assert text in done.stdout


@needs_libtpu
@pytest.mark.parametrize(
  ("flags", "code", "text"),
  [
    (
      ("--target=v5e:2x2", "--num_slices=2", "--config.mesh.fsdp=8"),
      *(2, "no data axis over its 2 slices"),
    ),
    (("--target=v5e:4x4", "--config.mesh.fsdp=3"), 2, "does not fit 16 devices"),
    (("--target=v5e:8x8",), 2, "data.batch_rows=128 works"),
  ],
)
def test_a_mesh_that_does_not_fit_the_target(tmp_path, flags, code, text):
  done = _compile(tmp_path, *flags)
  assert (done.returncode, done.stdout) == (code, "")
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert text in done.stderr


@pytest.mark.target
@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="needs a compiler for GPUs: pip install 'mfjax[cuda]'",
)
def test_gpus(tmp_path):
  done = _compile(tmp_path, "--target=h200:4", "--json=report.json", "--noevaluation")
  assert (done.returncode, done.stderr) == (0, "")
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["config"]["kernels"]["grouped_matmul"] == "pallas_gpu"
  (train,) = report["programs"]
  assert train["pallas_kernels"] >= 13
  assert sum(train["memory"].values()) == pytest.approx(train["peak_bytes"], rel=0.05)
  assert {row["link"] for row in report["collectives"]} == {"ICI"}
