"""Bad input: each fault is named in one sentence, with every other one, and nothing is left."""

import errno
import json
import os
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.numpy

from mfjax import stored_arrays
from mfjax.checkpoint import Checkpointer, CheckpointSaveError
from mfjax.hf import safetensors as own
from mfjax.hf.export import export
from mfjax.hf.import_checkpoint import import_checkpoint
from mfjax.hf.staging import staged
from tests.hf import models

H = "transformer.h"
Fault = Callable[[pathlib.Path], None]


def tensors(edit: Callable[[dict[str, np.ndarray]], Any]) -> Fault:
  """A fault in model.safetensors' tensors."""

  def apply(directory: pathlib.Path) -> None:
    held = safetensors.numpy.load_file(directory / "model.safetensors")
    edit(held)
    safetensors.numpy.save_file(held, directory / "model.safetensors")

  return apply


def config(**values: Any) -> Fault:
  return lambda directory: models.edit_config(directory, **values)


def header(edit: Callable[[dict[str, Any]], Any]) -> Fault:
  """A fault in the header of model.safetensors; the data stays."""

  def apply(directory: pathlib.Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + length])
    edit(fields)
    text = json.dumps(fields).encode()
    (directory / "model.safetensors").write_bytes(
      len(text).to_bytes(8, "little") + text + content[8 + length :]
    )

  return apply


def bytes_of(edit: Callable[[bytes], bytes], name: str = "model.safetensors") -> Fault:
  return lambda directory: (directory / name).write_bytes(edit((directory / name).read_bytes()))


def shards(edit: Callable[[pathlib.Path, dict[str, str]], Any] = lambda *_: None) -> Fault:
  """Two shards and their index, with a fault in them."""

  def apply(directory: pathlib.Path) -> None:
    held = safetensors.numpy.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {}
    for number, part in enumerate((sorted(held)[::2], sorted(held)[1::2]), 1):
      file = f"model-{number:05d}-of-00002.safetensors"
      safetensors.numpy.save_file({name: held[name] for name in part}, directory / file)
      places |= dict.fromkeys(part, file)
    edit(directory, places)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))

  return apply


def _first(fields: dict[str, Any]) -> dict[str, Any]:
  return fields["transformer.ln_f.bias"]


SECOND = "model-00002-of-00002.safetensors"
# Fault: the phrases that name it. The case has 3 layers, 6 and 10 experts, 4 heads, k 2 and 3.
FAULTS: dict[str, tuple[Fault, list[str]]] = {
  "a missing tensor": (
    tensors(lambda t: t.pop("transformer.ln_f.bias")),
    ["transformer.ln_f.bias is missing"],
  ),
  "missing tensors of some layers": (
    tensors(lambda t: [t.pop(f"{H}.{n}.ln_1.bias") for n in (0, 2)] + [t.pop("lm_head.weight")]),
    [f"{H}.{{0,2}}.ln_1.bias is missing", "lm_head.weight is missing"],
  ),
  "an extra tensor": (
    tensors(lambda t: t.update(surprise=np.zeros(3, np.float32))),
    ["surprise is not part of this model"],
  ),
  "a misnamed tensor": (
    tensors(lambda t: t.update({f"{H}.1.ln_3.bias": t.pop(f"{H}.1.ln_2.bias")})),
    [f"{H}.1.ln_2.bias is missing", f"{H}.1.ln_3.bias is not part of this model"],
  ),
  "a misshapen tensor": (
    tensors(lambda t: t.update({f"{H}.1.ln_2.bias": np.zeros(47, np.float32)})),
    [f"{H}.1.ln_2.bias is [47], not [48]"],
  ),
  "a transposed tensor in every layer": (
    tensors(
      lambda t: [
        t.update({k: v.swapaxes(1, 2).copy()})
        for k, v in t.items()
        if k.endswith("mlpf.output_experts.weight")
      ]
    ),
    [f"{H}.{{0-2}}.mlpf.output_experts.weight is [10, 48, 40], not [10, 40, 48]"],
  ),
  "a scalar for a matrix": (
    tensors(lambda t: t.update({"lm_head.weight": np.ones((), np.float32)})),
    ["lm_head.weight is [], not [101, 48]"],
  ),
  "whole numbers for weights": (
    tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(np.int32)})),
    ["lm_head.weight has dtype int32, no floating point"],
  ),
  "a layer too few": (
    tensors(lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{H}.2.")]),
    ["config.json says n_layer=3 and the tensors 2"],
  ),
  "another prefix": (
    tensors(lambda t: [t.update({f"model.{k}": t.pop(k)}) for k in list(t)]),
    ["config.json says n_layer=3 and the tensors 0"],
  ),
  "no tensor at all": (tensors(lambda t: t.clear()), ["n_layer=3 and the tensors 0"]),
  "key and value projections gone": (
    tensors(lambda t: [t.pop(k) for k in list(t) if "k_proj" in k or "v_proj" in k]),
    ["n_head=4, att_hidden=32, n_embd=48 and the tensors lack key and value projections"],
  ),
  "experts": (config(n_mlp_experts=12), ["says n_mlp_experts=12 and the tensors 10"]),
  "attention experts and layers": (
    config(n_att_experts=5, n_layer=2),
    ["says n_layer=2 and the tensors 3", "says n_att_experts=5 and the tensors 6"],
  ),
  "widths": (
    config(n_embd=64, att_hidden=64, ffd_hidden=41, gating_size=8, vocab_size=7),
    [
      "n_embd=64 and the tensors 48",
      "att_hidden=64",
      "ffd_hidden=41",
      "gating_size=8",
      "vocab_size=7 and the tensors 101",
    ],
  ),
  "an absurd number of layers": (config(n_layer=10**9), ["n_layer=1000000000 and the tensors 3"]),
  "a width left to its default": (config(n_embd=None), ["n_embd=1024 and the tensors 48"]),
  "heads": (config(n_head=5), ["att_hidden=32 is not divisible by n_head=5"]),
  "a gate": (config(gate_type="linear"), ["gate_type=linear and the tensors mlp"]),
  "another gate": (config(gate_type="gmm"), ["gate_type=gmm and the tensors mlp"]),
  "an unknown gate": (config(gate_type="noisy"), ["gate_type='noisy'"]),
  "k above experts": (
    config(k_att=7, k_mlp=11),
    ["k_att=7 exceeds n_att_experts=6", "k_mlp=11 exceeds n_mlp_experts=10"],
  ),
  "no k": (config(k_att=0), ["k_att=0 must be positive"]),
  "a word for a number": (config(n_head="four"), ["n_head='four' has type str"]),
  "another model": (config(model_type="gpt2"), ["model_type='gpt2' is not 'moduleformer'"]),
  "another activation": (config(activation_function="relu"), ["activation_function='relu'"]),
  "tied embeddings": (config(tie_word_embeddings=True), ["tie_word_embeddings=True"]),
  "no config": (lambda d: (d / "config.json").unlink(), ["config.json is missing"]),
  "half a config": (bytes_of(lambda b: b[:500], "config.json"), ["config.json is no JSON"]),
  "a list for a config": (bytes_of(lambda _: b"[1]", "config.json"), ["is no JSON object"]),
  "no weights": (
    lambda d: (d / "model.safetensors").unlink(),
    ["neither model.safetensors or pytorch_model.bin nor an index"],
  ),
  "a truncated file": (
    bytes_of(lambda b: b[:-1000]),
    ["model.safetensors is damaged: truncated: "],
  ),
  "half a header": (bytes_of(lambda b: b[:200]), ["model.safetensors is truncated or no safeten"]),
  "an empty file": (bytes_of(lambda _: b""), ["model.safetensors is truncated or no safetensors"]),
  "a text file": (
    bytes_of(lambda _: b"version https://git-lfs " * 9),
    ["is truncated or no safet"],
  ),
  "bytes too many": (bytes_of(lambda b: b + b"xyz"), ["3 bytes after the last tensor"]),
  "no JSON in a header": (bytes_of(lambda b: b[:8] + b"?" + b[9:]), ["header is no JSON object"]),
  "a dtype of the future": (
    header(lambda f: _first(f).update(dtype="F4")),
    ["model.safetensors is damaged: transformer.ln_f.bias: unknown dtype 'F4'"],
  ),
  "a negative size": (
    header(lambda f: _first(f).update(shape=[-48])),
    ["transformer.ln_f.bias: shape [-48] is no list of sizes"],
  ),
  "offsets that are none": (
    header(lambda f: _first(f).update(data_offsets=[9, "x"])),
    ["transformer.ln_f.bias: data_offsets [9, 'x'] are no range"],
  ),
  "a shape that does not fit its bytes": (
    header(lambda f: _first(f).update(shape=[49])),
    ["transformer.ln_f.bias: F32[49] takes 196 bytes, its range has 192"],
  ),
  "tensors that overlap": (
    header(lambda f: _first(f).update(data_offsets=[0, 192])),
    ["overlaps the one before", "leaves a gap before it"],
  ),
  "two damaged tensors": (
    header(lambda f: [f[f"{H}.{n}.ln_1.bias"].update(dtype="X") for n in (0, 1)]),
    [f"{H}.0.ln_1.bias: unknown dtype 'X'", f"{H}.1.ln_1.bias: unknown dtype 'X'"],
  ),
  "an index that names absent files": (
    shards(lambda d, places: places.update({"a": "gone.safetensors", "b": "../../x.safetensors"})),
    ["names gone.safetensors, which is absent", "names ../../x.safetensors, which is absent"],
  ),
  "a lost shard": (
    shards(lambda d, _: (d / SECOND).unlink()),
    [f"names {SECOND}, which is absent"],
  ),
  "a truncated shard": (
    shards(lambda d, _: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-5])),
    [f"{SECOND} is damaged: truncated: "],
  ),
  "both shards damaged": (
    shards(lambda d, _: [p.write_bytes(b"") for p in d.glob("*.safetensors")]),
    ["model-00001-of-00002.safetensors is truncated", f"{SECOND} is truncated"],
  ),
  "a tensor in another shard": (
    shards(lambda d, places: places.update({"lm_head.weight": SECOND})),
    [f"{SECOND} lacks lm_head.weight", "holds lm_head.weight, but"],
  ),
  "a tensor that the index forgets": (
    shards(lambda d, places: places.pop("lm_head.weight")),
    ["holds lm_head.weight, but model.safetensors.index.json does not name it"],
  ),
  "an index without places": (
    lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
    ["model.safetensors.index.json has no weight_map"],
  ),
  "half an index": (
    lambda d: (d / "model.safetensors.index.json").write_text('{"weight'),
    ["model.safetensors.index.json is no JSON"],
  ),
  "faults of every kind": (
    lambda d: [config(k_att=9)(d), bytes_of(lambda b: b[:-7])(d)],
    ["has 2 problems", "k_att=9 exceeds n_att_experts=6", "damaged: truncated"],
  ),
}


def test_there_are_forty_faults():
  assert len(FAULTS) >= 40


def refuse(directory: pathlib.Path) -> str:
  """Import and return the refusal; check that it is one sentence and that nothing is left."""
  before = sorted(path.name for path in directory.parent.iterdir())
  with pytest.raises(ValueError, match=r"has (a|\d+) problem") as caught:
    import_checkpoint(directory, directory.parent / "new/w")
  assert "\n" not in str(caught.value)
  assert sorted(path.name for path in directory.parent.iterdir()) == before
  return str(caught.value)


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named_and_leaves_nothing(name, tmp_path):
  directory = models.copy_golden("multihead", tmp_path / "in")
  fault, phrases = FAULTS[name]
  fault(directory)
  message = refuse(directory)
  assert message.startswith(f"{directory} has ")
  for phrase in phrases:
    assert phrase in message


def test_without_a_fault_there_is_no_refusal(tmp_path):
  directory = models.copy_golden("multihead", tmp_path / "in")
  shards()(directory)
  import_checkpoint(directory, tmp_path / "w")


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(data=st.data())
def test_any_cut_of_a_file_is_refused(data, tmp_path_factory):
  directory = models.copy_golden("linear_gate", tmp_path_factory.mktemp("cut") / "in")
  path = directory / "model.safetensors"
  os.truncate(path, data.draw(st.integers(0, path.stat().st_size - 1)))
  assert "model.safetensors" in refuse(directory)
  shutil.rmtree(directory)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(data=st.data())
def test_any_damage_to_a_header_is_refused_or_harmless(data, tmp_path_factory):
  path = tmp_path_factory.mktemp("header") / "model.safetensors"
  content = bytearray((models.GOLDEN / "linear_gate/model.safetensors").read_bytes())
  length = int.from_bytes(content[:8], "little")
  for position in data.draw(st.lists(st.integers(0, 7 + length), min_size=1, max_size=4)):
    content[position] = data.draw(st.integers(0, 255))
  path.write_bytes(content)
  try:
    reader = own.Reader(path)
  except ValueError as error:
    assert str(error).startswith(f"{path} is ")
    assert "\n" not in str(error)
    return
  for name, entry in reader.entries.items():  # A name, or spaces, were changed.
    assert reader.read(name).nbytes == entry.nbytes
  reader.close()


JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers(-5, 100)
  | st.floats(allow_nan=False)
  | st.text(max_size=3),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
  ),
  max_leaves=5,
)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
  values=st.dictionaries(
    st.sampled_from(
      [
        "n_layer",
        "n_embd",
        "n_head",
        "k_att",
        "k_mlp",
        "gate_type",
        "vocab_size",
        "n_att_experts",
        "layer_norm_epsilon",
        "sample_topk",
        "resid_pdrop",
        "model_type",
        "tie_word_embeddings",
      ]
    ),
    JSON,
    min_size=1,
  )
)
def test_any_config_is_refused_or_fits(values, tmp_path_factory):
  from mfjax.hf.directory import open_directory

  directory = models.copy_golden("linear_gate", tmp_path_factory.mktemp("config") / "in")
  content = json.loads((directory / "config.json").read_text()) | values
  (directory / "config.json").write_text(json.dumps(content))
  try:
    opened = open_directory(directory)
  except ValueError as error:
    assert "config.json" in str(error) or "is missing" in str(error)
    assert "\n" not in str(error)
  else:
    assert opened.config.num_layers == 2
    opened.close()


# Pickles.


def _pickled(write: Callable[[pathlib.Path], None], tmp_path: pathlib.Path) -> str:
  directory = models.copy_golden("multihead", tmp_path / "in")
  (directory / "model.safetensors").unlink()
  write(directory / "pytorch_model.bin")
  return refuse(directory)


class Malicious:
  """Runs a command when it is unpickled."""

  def __reduce__(self):
    return os.system, ("touch executed",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  monkeypatch.chdir(tmp_path)
  message = _pickled(lambda path: torch.save({"a": Malicious()}, path), tmp_path)
  assert "pytorch_model.bin cannot be read: it holds more than tensors" in message
  assert not (tmp_path / "executed").exists()


def test_other_pickles_are_refused(tmp_path):
  torch = pytest.importorskip("torch")
  cases = {
    "holds more than tensors: 'step', 'name'": {"step": 3, "name": "x", "w": torch.ones(2)},
    "holds a list, not a dict of tensors": [torch.ones(2)],
    "that mfjax does not read: c, s": {
      "c": torch.ones(2, dtype=torch.complex64),
      "s": torch.ones(2).to_sparse(),
    },
  }
  for number, (phrase, content) in enumerate(cases.items()):
    folder = tmp_path / str(number)
    folder.mkdir()
    assert phrase in _pickled(lambda path, content=content: torch.save(content, path), folder)


def test_a_truncated_pickle_is_refused(tmp_path):
  torch = pytest.importorskip("torch")

  def write(path):
    torch.save({"w": torch.ones(5000)}, path)
    os.truncate(path, 9000)

  assert "pytorch_model.bin cannot be read: " in _pickled(write, tmp_path)


# The output.


@pytest.fixture
def workdir(tmp_path):
  models.make_workdir(tmp_path / "w", models.IDENTITY)
  return tmp_path / "w"


@pytest.mark.parametrize("made", ["file", "directory", "link"])
def test_an_output_that_exists_is_left_alone(workdir, tmp_path, made):
  out = tmp_path / "out"
  if made == "file":
    out.write_text("mine")
  elif made == "directory":
    out.mkdir()
    (out / "mine").write_text("mine")
  else:
    out.symlink_to(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="out is there already: give another directory"):
    export(workdir, out, num_tokens=0)
  with pytest.raises(ValueError, match="out is there already: give another directory"):
    import_checkpoint(models.GOLDEN / "multihead", out)
  assert out.is_symlink() if made == "link" else out.exists()


def test_an_empty_directory_is_no_output_yet(workdir, tmp_path):
  (tmp_path / "out").mkdir()
  export(workdir, tmp_path / "out", num_tokens=0)
  assert (tmp_path / "out/config.json").exists()


def _fail_after(monkeypatch, target: str, name: str, error: BaseException, calls: int) -> None:
  """Let a function raise `error` from its `calls`-th call on."""
  module: Any = __import__("importlib").import_module(target)
  function, count = getattr(module, name), 0

  def fail(*args: Any, **kwargs: Any) -> Any:
    nonlocal count
    count += 1
    if count >= calls:
      raise error
    return function(*args, **kwargs)

  monkeypatch.setattr(module, name, fail)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("calls", [1, 2, 9])
def test_a_disk_that_fills_during_an_export(workdir, tmp_path, monkeypatch, calls):
  _fail_after(monkeypatch, "os", "pwrite", FULL, calls)
  with pytest.raises(ValueError, match="the disk filled while .*out was written"):
    export(workdir, tmp_path / "out", num_tokens=0)
  assert [path.name for path in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize("calls", [1, 20])
def test_a_disk_that_fills_during_an_import(tmp_path, monkeypatch, calls):
  _fail_after(monkeypatch, "mfjax.stored_arrays", "_write_block", FULL, calls)
  with pytest.raises(ValueError, match="w could not be written: No space left on device"):
    import_checkpoint(models.GOLDEN / "multihead", tmp_path / "deep/er/w")
  assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_noticed_first(workdir, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
  with pytest.raises(ValueError, match=r"out takes about [\d,]+ bytes and 1,000 are free"):
    export(workdir, tmp_path / "out", num_tokens=0)
  with pytest.raises(ValueError, match=r"new takes about [\d,]+ bytes and 1,000 are free"):
    import_checkpoint(models.GOLDEN / "multihead", tmp_path / "new")
  assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_a_damaged_source_ends_an_import_midway(tmp_path, monkeypatch):
  _fail_after(monkeypatch, "mfjax.hf.safetensors", "read_exactly", ValueError("x ended"), 30)
  with pytest.raises(ValueError, match="x ended"):
    import_checkpoint(models.GOLDEN / "multihead", tmp_path / "w")
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), RuntimeError("a bug")])
def test_an_interruption_leaves_nothing(error, workdir, tmp_path, monkeypatch):
  _fail_after(monkeypatch, "mfjax.hf.layout", "buffer", error, 2)
  with pytest.raises(type(error)):
    export(workdir, tmp_path / "out", num_tokens=0)
  assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_an_interrupted_import_ends_soon_and_leaves_nothing(tmp_path, monkeypatch):
  written, wait = [], Checkpointer.wait
  block = stored_arrays._write_block
  begun = threading.Event()

  def slowly(*args):
    time.sleep(0.05)
    block(*args)
    written.append(args)
    begun.set()

  def interrupt(self):
    if self._pending is None:
      return wait(self)
    begun.wait()
    monkeypatch.setattr(Checkpointer, "wait", wait)
    raise KeyboardInterrupt

  monkeypatch.setattr(stored_arrays, "_write_block", slowly)
  monkeypatch.setattr(Checkpointer, "wait", interrupt)
  with pytest.raises((KeyboardInterrupt, CheckpointSaveError)):
    import_checkpoint(models.GOLDEN / "multihead", tmp_path / "w")
  assert len(written) < 20  # Of some 60 blocks.
  assert list(tmp_path.iterdir()) == []


def test_the_output_appears_whole(tmp_path):
  with staged(tmp_path / "out", 0) as pending:
    (pending / "a").write_text("a")
    assert not (tmp_path / "out").exists()
    assert re.fullmatch(r"\.out\..*\.partial", pending.name)
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  assert (tmp_path / "out/a").read_text() == "a"
