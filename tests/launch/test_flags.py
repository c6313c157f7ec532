"""Config files and typed overrides, and the sentences that answer malformed ones."""

import dataclasses
import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from launch import flags
from mfjax.config import Gate, RunConfig
from mfjax.schema import flatten

LEAVES = sorted(flatten(RunConfig().to_dict()))
CONFIGS = sorted(file.stem for file in pathlib.Path(configs.__file__).parent.glob("[!_]*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_are_short_runs_with_their_command(name):
  path = flags.find_config(name)
  source = path.read_text()
  assert len(source.splitlines()) <= 80
  assert f"mfjax train --config={name} --workdir=runs/{name}" in source
  assert flags.load_config(name) == flags.load_config(f"configs/{name}.py")


def test_config_resolves_to_the_current_directory_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  installed = pathlib.Path(configs.__file__).parent / "quickstart.py"
  assert flags.find_config("quickstart") == installed
  assert flags.find_config("configs/quickstart.py") == installed
  own = tmp_path / "configs" / "quickstart.py"
  own.parent.mkdir()
  own.write_text("")
  assert flags.find_config("quickstart").resolve() == own
  with pytest.raises(ValueError, match="there is no such file"):
    flags.find_config("elsewhere/quickstart.py")


def test_overrides_are_typed_and_validated_together():
  config = flags.override(
    RunConfig(),
    [
      "model.d_ff=1_000",
      "model.gate=gmm",
      "model.num_heads=3",  # Needs the next one: 1024 is not divisible by 3.
      "model.d_attention=96",
      "optimizer.learning_rate=1e-3",
      "optimizer.weight_decay=0",
      "train.tensorboard=False",
      "data.path=a=b",
      "data.mixture=code=0.7,prose=0.3",
      "train.seed=1",
      "train.seed=2",
    ],
  )
  assert (config.model.d_ff, config.model.gate, config.model.head_dim) == (1000, Gate.GMM, 32)
  assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (1e-3, 0.0)
  assert (config.train.tensorboard, config.train.seed, config.data.path) == (False, 2, "a=b")
  assert config.data.mixture == (("code", 0.7), ("prose", 0.3))
  assert flags.override(config, ["data.mixture="]).data.mixture == ()
  assert flags.override(config, []) == config


BAD_OVERRIDES = {
  "model.dff=1": "unknown field 'config.model.dff': did you mean 'config.model.d_ff'?",
  "modle.d_ff=1": "did you mean 'config.model.d_ff'?",
  "d_ff=1": "did you mean 'config.model.d_ff'?",
  "train.batch_rows=1": "did you mean 'config.data.batch_rows'?",
  "model=1": "config.model is a group of fields",
  "=1": "unknown field 'config.'",
  "model.d_ff": "config.model.d_ff has no value: write --config.model.d_ff=VALUE",
  "model.d_ff=abc": "config.model.d_ff='abc': give an integer",
  "model.d_ff=": "config.model.d_ff='': give an integer",
  "model.d_ff=1.5": "give an integer",
  "model.d_ff=1e3": "give an integer",
  "model.d_ff=true": "give an integer",
  "model.d_ff=-1": "d_ff=-1 must be positive",
  "model.gate=gmmm": "unknown choice 'gmmm': did you mean 'gmm'?",
  "model.gate=MLP": "unknown choice 'MLP': known: gmm, linear, mlp",
  "model.gate=": "known: gmm, linear, mlp",
  "model.ff_top_k=33": "choose ff_top_k of at most 32",
  "model.sample_top_k=3": "sample_top_k=3 exceeds attention_top_k=2",
  "model.num_heads=3": "num_heads=2 works",
  "model.router_dropout=1": "router_dropout=1.0 must be at least 0 and below 1",
  "model.layer_norm_eps=nan": "layer_norm_eps=nan must be a finite number",
  "mesh.data=0": "data=0 must be a positive number of devices",
  "mesh.fsdp=-1": "only one mesh axis may be -1",
  "data.mixture=code": "config.data.mixture='code': give domains and shares",
  "data.mixture=code=x": "give domains and shares, such as code=0.7,prose=0.3",
  "data.mixture=code=0.5,": "give domains and shares",
  "data.mixture=code=-1": "must be positive",
  "data.mixture=code=1,code=2": "names domain 'code' twice",
  "optimizer.learning_rate=fast": "config.optimizer.learning_rate='fast': give a number",
  "optimizer.learning_rate=inf": "must be a finite number",
  "optimizer.beta2=1": "beta2=1.0 must be at least 0 and below 1",
  "optimizer.warmup_steps=96000": "choose at most 95367",
  "train.microbatches=5": "data.batch_rows=1540 works",
  "train.tensorboard=maybe": "config.train.tensorboard='maybe': give true or false",
  "train.steps=0": "steps=0 must be positive",
}

BAD_FILES = {
  "def get_config(:": "line 1: not valid Python",
  "def get_config():\n return 1\n\tpass": "line 3: not valid Python",
  "": "it has no get_config() function",
  "get_config = 3": "it has no get_config() function",
  "def get_config(): return {'model': {}}": "get_config() returned a dict",
  "def get_config(): pass": "get_config() returned a NoneType",
  "def get_config(size): pass": "missing 1 required positional argument",
  "import absent_module": "line 1: ModuleNotFoundError: No module named 'absent_module'",
  "def get_config():\n  return 1 / 0": "line 2: ZeroDivisionError",
  "from mfjax.config import *\n\nModelConfig(dff=1)": "line 3: TypeError",
  "from mfjax.config import *\nModelConfig(d_ff='1')": "d_ff='1' has type str: give a int",
  "from mfjax.config import *\nModelConfig(d_ff=0)": "line 2: d_ff=0 must be positive",
  "from mfjax.config import *\nModelConfig(gate='gmmm')": "did you mean 'gmm'?",
  "from mfjax.config import *\nDataConfig(mixture=3)": "give (domain, share) pairs",
  "\0": "null byte",
  "raise ValueError('two\\nlines')": "line 1: two lines",
}


def _sentence(outcome) -> str:
  """Return the error of a command line that a user got wrong."""
  assert (outcome.code, outcome.out) == (2, "")
  lines = outcome.err.splitlines()
  assert len(lines) == 1, outcome.err
  assert lines[0].startswith("mfjax probe: error: ")
  assert "Traceback" not in lines[0]
  return lines[0]


@pytest.mark.parametrize(("assignment", "text"), BAD_OVERRIDES.items())
def test_malformed_override_is_one_sentence(mfjax, tmp_path, assignment, text):
  outcome = mfjax("probe", "--config=molm_350m_4b", "--workdir=run", f"--config.{assignment}")
  assert text in _sentence(outcome)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("source", "text"), BAD_FILES.items())
def test_malformed_file_is_one_sentence(mfjax, tmp_path, source, text):
  (tmp_path / "mine.py").write_text(source)
  sentence = _sentence(mfjax("probe", "--config=mine.py", "--workdir=run"))
  assert text in sentence
  assert "mine.py" in sentence
  assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
  ("args", "text"),
  [
    ((), "--config is missing"),
    (("--config=",), "--config is missing"),
    (("--config=quikstart",), "unknown config 'quikstart': did you mean 'quickstart'?"),
    (("--config=configs/molm_350m.py",), "did you mean 'molm_350m_4b'?"),
    (("--config=a/b.py",), "--config=a/b.py: there is no such file"),
    (("--config=.",), "unknown config"),
    (("--config=quickstart", "--config.model.d_ff=1", "--config.model.d_f=1"), "config.model.d_f'"),
    (("--config",), "config"),
    (("--confg=quickstart",), "did you mean '--config'?"),
  ],
)
def test_malformed_command_line_is_one_sentence(mfjax, args, text):
  assert text in _sentence(mfjax("probe", *args))


def test_not_utf8_file_is_one_sentence(mfjax, tmp_path):
  (tmp_path / "mine.py").write_bytes(b"x = '\xff'")
  assert "mine.py" in _sentence(mfjax("probe", "--config=mine.py"))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(LEAVES), st.text(max_size=8) | st.integers().map(str) | st.floats().map(str))
def test_any_text_is_a_valid_config_or_a_sentence_with_the_field(leaf, text):
  try:
    config = flags.override(RunConfig(), [f"{leaf}={text}"])
  except ValueError as error:
    assert leaf.rpartition(".")[2] in str(error)
  else:
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert dataclasses.replace(config) == config


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_characters="="), max_size=20))
def test_any_unknown_name_is_a_sentence_with_the_name(name):
  if name not in LEAVES:
    with pytest.raises(ValueError, match="field"):
      flags.override(RunConfig(), [f"{name}=1"])
