"""Processes that are about to compute different things are named before they begin."""

import concurrent.futures
import pathlib
import types

import pytest

from mfjax.cluster import agreement
from mfjax.cluster.processes import Process
from mfjax.config import DataConfig, OptimizerConfig, RunConfig
from tests.cluster.fake_store import FakeStore

INDEX = types.SimpleNamespace(path=pathlib.Path("data"), tokenizer="bytes", digest="d")


def outcomes(facts):
  """Return what each process is told, '' if all is well."""
  store = FakeStore()

  def one(rank):
    try:
      agreement.check(store, Process(rank, len(facts), f"host{rank}"), facts[rank], 10)
    except ValueError as error:
      return str(error)
    return ""

  with concurrent.futures.ThreadPoolExecutor(len(facts)) as threads:
    return list(threads.map(one, range(len(facts))))


def facts(config=RunConfig(), index=INDEX):  # noqa: B008  # Frozen.
  return agreement.facts(config, index)


def test_equal_processes_agree_wherever_their_data_lies():
  elsewhere = RunConfig(data=DataConfig(path="/elsewhere"))
  assert outcomes([facts(), facts(elsewhere), facts()]) == [""] * 3


def test_another_config_is_named_with_rank_host_field_and_values():
  other = RunConfig(optimizer=OptimizerConfig(learning_rate=1e-3))
  told = outcomes([facts(), facts(), facts(other), facts()])
  assert len(set(told)) == 1
  assert told[0] == (
    "the processes do not agree: [2/host2]: another config than the others "
    "(optimizer.learning_rate 0.001 != 0.0003): "
    "start all of them with the same command, code and data"
  )


def test_most_processes_are_right_even_if_process_0_is_not():
  told = outcomes([facts(index=_replaced(digest="old")), facts(), facts()])
  assert "[0/host0]: another data than the others (digest 'old' != 'd')" in told[2]


def test_without_a_majority_process_0_is_right():
  told = outcomes([facts(), facts(index=_replaced(digest="old"))])
  assert "[1/host1]: another data" in told[0]


def test_other_code_and_other_tokenizer_are_named(tmp_path, monkeypatch):
  for name in ("a", "b"):
    (tmp_path / name).write_text(name)
  usual = [facts(index=_replaced(path=tmp_path, tokenizer="a"))] * 2
  other = facts(index=_replaced(path=tmp_path, tokenizer="b"))
  monkeypatch.setattr(agreement, "source_digest", lambda: "changed")
  newer = facts(index=_replaced(path=tmp_path, tokenizer="a"))
  told = outcomes([*usual, other, newer])
  assert "[3/host3]: another code than the others (source 'changed' !=" in told[0]
  assert "[2/host2]: another tokenizer than the others" in told[0]


def test_many_different_ranks_are_counted():
  told = outcomes([facts()] * 12 + [facts(index=_replaced(digest="old"))] * 11)
  assert "[19/host19] and 3 more: another data" in told[0]


def test_a_process_that_does_not_come_is_named():
  with pytest.raises(TimeoutError, match="no word from rank 1"):
    agreement.check(FakeStore(), Process(0, 2), facts(), 0.05)


def _replaced(**changes):
  return types.SimpleNamespace(**(vars(INDEX) | changes))
