"""Held-out losses and continuations over a small prepared corpus."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfjax import held_out, sharding
from mfjax.config import DataConfig, EvalConfig, MeshConfig, RunConfig, TrainConfig
from mfjax.data.index import VALIDATION
from mfjax.data.prepare import PrepareOptions, prepare
from mfjax.data.tokenizer import load_tokenizer
from mfjax.metrics import byte_entropy

NATS = 1.25  # The fake model's loss on every prediction.


@pytest.fixture(scope="module")
def index(tmp_path_factory):
  directory = tmp_path_factory.mktemp("corpus")
  inputs = []
  for domain, word in (("code", "def f(x): "), ("prose", "once upon a time ")):
    (directory / domain).mkdir()
    for number in range(40):
      (directory / domain / f"{number}.txt").write_text(word * (1 + number % 7))
    inputs.append((domain, str(directory / domain)))
  options = {"out": str(directory / "data"), "validation_fraction": 0.3}
  return prepare(PrepareOptions(inputs=tuple(inputs), **options))


@pytest.fixture
def mesh():
  return sharding.make_mesh(MeshConfig(), jax.devices())


def eval_step(params, batch):
  tokens = jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)
  return {"nats": NATS * tokens, "tokens": tokens}


def evaluate(index, mesh, **options):
  options = {"rows": 8, "sequence_length": 32, "max_tokens": 0} | options
  return held_out.evaluate_domains(eval_step, None, index, mesh, **options)


def test_loss_per_token_and_per_byte_count_end_of_text(index, mesh):
  losses = evaluate(index, mesh)
  assert list(losses) == ["code", "prose"]
  for domain, loss in losses.items():
    split = index.split(domain, VALIDATION)
    assert loss.tokens == split.tokens + split.documents
    assert loss.bytes == split.bytes
    assert loss.nats_per_token == pytest.approx(NATS)
    assert loss.bits_per_byte == pytest.approx(NATS * loss.tokens / np.log(2) / split.bytes)
    assert loss.byte_entropy == byte_entropy(split.byte_histogram)


def test_bounded_evaluation_divides_by_its_own_bytes(index, mesh):
  loss = evaluate(index, mesh, max_tokens=100)["prose"]
  assert loss.tokens <= 100
  assert loss.bytes < index.split("prose", VALIDATION).bytes
  documents = loss.tokens - loss.bytes  # Bytes are tokens here; each document adds end-of-text.
  assert documents >= 1
  assert loss.bits_per_byte == pytest.approx(NATS * loss.tokens / np.log(2) / loss.bytes)


def test_a_stop_request_ends_an_evaluation(index, mesh):
  assert evaluate(index, mesh, stopped=lambda: True) is None


def test_table_has_the_byte_entropy_beside_the_loss():
  text = held_out.table({"code": held_out.DomainLoss(1.5, 2.25, 4.5, 1234, 1000)})
  header, line = text.splitlines()
  assert "nats/token  bits/byte  byte entropy" in header
  assert line.split() == ["code", "1,234", "1.5000", "2.2500", "4.5000"]


def test_continuation_starts_from_a_held_out_document_and_ends_with_it(index, mesh, monkeypatch):
  prompts = []

  def sample(params, config, mesh, prompt, num_tokens, *, temperature, seed):
    prompts.append(prompt)
    return np.array([*b"and so on", index.end_of_text, *b"junk"][:num_tokens])

  monkeypatch.setattr(held_out, "generate", types.SimpleNamespace(sample=sample))
  config = RunConfig(
    data=DataConfig(sequence_length=256),
    evaluate=EvalConfig(sample_tokens=100),
    train=TrainConfig(seed=1),
  )
  prompt, text = held_out.continuation(None, config, mesh, index, load_tokenizer(index.path))
  assert text == "and so on"
  assert ("def f(x): " * 7).startswith(prompt)
  assert prompts[0].tolist() == [index.end_of_text, *prompt.encode()]
