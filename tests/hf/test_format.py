"""The published format: names and shapes, config.json, safetensors, tokenizer files."""

import contextlib
import json
import types

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.numpy
import tensorstore
import tokenizers

from mfjax.config import DType, Gate, ModelConfig
from mfjax.data.tokenizer import ByteTokenizer
from mfjax.hf import directory, layout, published_config, tokenizer_files
from mfjax.hf import safetensors as own
from mfjax.hf.source import Checkpoint, row_blocks
from mfjax.stored_arrays import CHUNK_BYTES, StoredArray, chunk_shape
from tests.hf import models

RELEASED = {"350M-4B": (24, 2, 4_142_526_464), "700M-8B": (48, 2, 8_182_046_720)}


@pytest.mark.parametrize("name", models.GOLDEN_CASES)
def test_names_and_shapes_are_those_of_the_published_class(name):
  with contextlib.closing(own.Reader(models.GOLDEN / name / "model.safetensors")) as reader:
    found = reader.entries
  with contextlib.closing(directory.open_directory(models.GOLDEN / name)) as opened:
    config = opened.config
  expected = {tensor.name: tensor.shape for tensor in layout.tensors(config).values()}
  published = json.loads((models.GOLDEN / name / "config.json").read_text())
  side = published_config.context_length(published)
  expected |= dict.fromkeys(layout.buffer_names(config.num_layers), (side, side))
  assert {name: entry.shape for name, entry in found.items()} == expected


@pytest.mark.parametrize("name", models.GOLDEN_CASES)
def test_buffers_are_those_of_the_published_class(name):
  file = safetensors.numpy.load_file(models.GOLDEN / name / "model.safetensors")
  buffers = {name: value for name, value in file.items() if layout.is_buffer(name)}
  assert buffers
  for name, value in buffers.items():
    np.testing.assert_array_equal(layout.buffer(name, len(value), np.dtype(np.float32)), value)
    assert layout.buffer(name, len(value), np.dtype(np.float32)).dtype == value.dtype


@pytest.mark.parametrize("size", RELEASED)
def test_released_sizes(size):
  layers, top_k, parameters = RELEASED[size]
  config, problems = published_config.from_published({"n_layer": layers, "k_att": top_k})
  assert not problems
  assert sum(tensor.size for tensor in layout.tensors(config).values()) == parameters


def test_missing_keys_take_the_published_defaults_and_extras_are_ignored():
  extras = {"local_size": 1, "moe_type": "moe", "pre_norm": True, "universal": 0, "world_size": 8}
  config, problems = published_config.from_published(extras | {"att_func": "stickbreaking"})
  assert not problems
  assert config == ModelConfig(num_layers=48)


CONFIGS = st.builds(
  ModelConfig,
  vocab_size=st.integers(1, 300),
  d_model=st.sampled_from([8, 16]),
  num_layers=st.integers(1, 3),
  num_heads=st.sampled_from([1, 2]),
  d_attention=st.sampled_from([8, 16]),
  d_ff=st.integers(1, 9),
  num_attention_experts=st.integers(2, 5),
  num_ff_experts=st.integers(2, 5),
  gate=st.sampled_from(Gate),
  residual_dropout=st.sampled_from([0.0, 0.25]),
  layer_norm_eps=st.sampled_from([1e-5, 1e-6]),
)


@hypothesis.given(config=CONFIGS)
def test_config_round_trip(config):
  published = json.loads(json.dumps(published_config.to_published(config, dtype="bfloat16")))
  assert published_config.from_published(published, DType.BFLOAT16) == (config, [])


@pytest.mark.parametrize(
  ("key", "value", "says"),
  [
    ("k_att", 17, "k_att=17 exceeds n_att_experts=16"),
    ("n_head", 3, "n_head=3: n_head=2 works"),
    ("gate_type", "top", "gate_type='top'"),
    ("activation_function", "relu", "activation_function='relu' is not 'gelu_new'"),
    ("tie_word_embeddings", True, "tie_word_embeddings=True is not False"),
    ("n_layer", "24", "n_layer='24' has type str"),
    ("n_embd", 0, "n_embd=0 must be positive"),
    ("model_type", "llama", "model_type='llama'"),
    ("sample_topk", 3, "sample_topk=3 exceeds k_att=2"),
  ],
)
def test_what_a_config_cannot_say(key, value, says):
  config, problems = published_config.from_published({key: value})
  assert config is None
  assert says in "; ".join(problems)


DTYPES = st.sampled_from([np.float32, np.float16, np.int8, models.BFLOAT16])
ARRAYS = DTYPES.flatmap(
  lambda dtype: hypothesis.extra.numpy.array_shapes(max_dims=3, min_side=0, max_side=5).map(
    lambda shape: np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
  )
)


@hypothesis.given(arrays=st.dictionaries(st.text(min_size=1, max_size=8), ARRAYS, max_size=5))
def test_files_are_those_of_the_safetensors_library(arrays, tmp_path_factory):
  arrays.pop("__metadata__", None)
  path = tmp_path_factory.mktemp("files") / "a.safetensors"
  writer = own.Writer(path, {name: (array.dtype, array.shape) for name, array in arrays.items()})
  for name, array in arrays.items():
    for row in reversed(range(len(array))):  # In any order.
      writer.write(name, row, array[row : row + 1])
  writer.close()
  theirs = safetensors.numpy.load_file(path)
  assert theirs.keys() == arrays.keys()
  library = path.with_name("b.safetensors")
  safetensors.numpy.save_file(arrays, library)
  for reader in (own.Reader(path), own.Reader(library)):
    for name, array in arrays.items():
      assert theirs[name].dtype == array.dtype
      assert theirs[name].tobytes() == array.tobytes()
      assert reader.read(name).tobytes() == array.tobytes()
      assert reader.read(name, 1, 2).tobytes() == array[1:2].tobytes()
    reader.close()


def test_several_banks_are_one_tensor():
  one = models.IDENTITY
  params = models.draw_params(one)
  leaves = {}
  for keys in {keys for tensor in layout.tensors(one).values() for keys in tensor.parts}:
    node = params
    for key in keys:
      node = node[key]
    if "bank_0" in keys:  # 3 of the experts in the first bank, the rest in the other.
      other = tuple("bank_10" if key == "bank_0" else key for key in keys)
      leaves[keys], leaves[other] = node[:, :3], node[:, 3:]
    else:
      leaves[keys] = node
  names = layout.banks(leaves)
  assert names == ("bank_0", "bank_10")
  arrays = {keys: StoredArray(tensorstore.array(value)) for keys, value in leaves.items()}
  source = object.__new__(Checkpoint)  # Without the files of one.
  source.config, source.tensors = one, layout.tensors(one, names)
  source.opened = types.SimpleNamespace(arrays=arrays)
  whole = layout.tensors(one)
  for name, tensor in source.tensors.items():
    leaf = params
    for key in whole[name].parts[0]:
      leaf = leaf[key]
    leaf = leaf if tensor.layer is None else leaf[tensor.layer]
    leaf = (leaf.T if tensor.transposed else leaf)[: tensor.shape[0]]
    for start, stop in row_blocks(tensor, 2):
      np.testing.assert_array_equal(source.read(name, start, stop), leaf[start:stop])


@hypothesis.given(
  shape=hypothesis.extra.numpy.array_shapes(min_dims=1, max_dims=4, max_side=4096),
  stacked=st.booleans(),
)
def test_chunks_are_small_and_span_no_two_layers(shape, stacked):
  chunk = chunk_shape(shape, shape, 4, stacked=stacked)
  assert np.prod(chunk) * 4 <= CHUNK_BYTES
  assert all(size % part == 0 for size, part in zip(shape, chunk, strict=True))
  if stacked:
    assert chunk[0] == 1


@hypothesis.given(text=st.text())
def test_byte_tokenizer_file(text):
  ours, theirs = ByteTokenizer(), tokenizer_files.byte_tokenizer()
  theirs = tokenizers.Tokenizer.from_str(theirs.to_str())
  (ids,) = ours.encode_batch([text])
  assert theirs.encode(text).ids == ids.tolist()
  assert theirs.decode(ids.tolist()) == text
  assert theirs.token_to_id("<|endoftext|>") == ours.end_of_text
  assert theirs.get_vocab_size() == ours.vocab_size
