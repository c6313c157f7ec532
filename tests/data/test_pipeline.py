import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
from grain.sources import ArrayRecordDataSource

from mfjax.config import DataConfig, DataEnd, RowFormat
from mfjax.data.index import TRAIN, VALIDATION
from mfjax.data.pipeline import TrainStream, evaluation_batches, evaluation_bytes
from mfjax.data.plan import Cursor, Planner, Position

LENGTH = 64
PACK = DataConfig(sequence_length=LENGTH, batch_rows=8, window_tokens=40 * LENGTH)
CONCATENATE = dataclasses.replace(PACK, row_format=RowFormat.CONCATENATE)
FORMATS = pytest.mark.parametrize("config", [PACK, CONCATENATE], ids=["pack", "concatenate"])
EVEN = (("code", 0.5), ("prose", 0.5))


def take(index, config, count=None, **kwargs):
  """Return the first `count` (batch, state) pairs of a stream, or all."""
  stream = TrainStream(index, config, **({"seed": 3} | kwargs))
  found = list(itertools.islice(stream, count))
  stream.close()
  return found


def block(process, processes):
  """Return the rows of a batch of 8 on one of several processes, each with a contiguous block."""
  return range(process * 8 // processes, (process + 1) * 8 // processes)


def assert_same(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], key)


def stored(index, domain, split=TRAIN):
  files = [f"{index.path / shard.file}" for shard in index.split(domain, split).shards]
  return [tuple(np.frombuffer(r, index.dtype).tolist()) for r in ArrayRecordDataSource(files)]


def segments(batches):
  """Yield (domain, inputs, targets) of every segment of every row."""
  for batch in batches:
    for row in range(len(batch["tokens"])):
      ids = batch["segment_ids"][row]
      for segment in range(1, ids.max() + 1):
        own = ids == segment
        (domain,) = set(batch["domain_ids"][row][own].tolist())
        yield domain, batch["tokens"][row][own].tolist(), batch["targets"][row][own].tolist()


def predictions(batches):
  """Return how often each (domain, input, target) pair is predicted."""
  return collections.Counter(
    (domain, *pair)
    for domain, inputs, targets in segments(batches)
    for pair in zip(inputs, targets, strict=True)
  )


def expected_predictions(index, domain, split=TRAIN):
  number, end = index.domain_names.index(domain), index.end_of_text
  return collections.Counter(
    (number, *pair)
    for document in stored(index, domain, split)
    for pair in itertools.pairwise((end, *document, end))
  )


def test_batch_form(two_domains):
  (batch, _), *_ = take(two_domains, PACK, 1)
  for name in ("tokens", "targets", "segment_ids", "domain_ids"):
    assert batch[name].shape == (8, LENGTH)
    assert batch[name].dtype == np.int32
  padding = batch["segment_ids"] == 0
  assert padding.any()
  for name in ("tokens", "targets", "domain_ids"):
    assert not batch[name][padding].any()


@FORMATS
def test_every_prediction_of_an_epoch_is_made_once(two_domains, config):
  config = dataclasses.replace(config, on_end=DataEnd.STOP, batch_rows=1)
  batches = [batch for batch, _ in take(two_domains, config)]
  expected = expected_predictions(two_domains, "code") + expected_predictions(two_domains, "prose")
  assert predictions(batches) == expected


def test_packed_documents_are_whole_shifted_and_begin_at_end_of_text(two_domains):
  config = dataclasses.replace(PACK, on_end=DataEnd.STOP, batch_rows=1)
  end, found = two_domains.end_of_text, collections.Counter()
  batches = [batch for batch, _ in take(two_domains, config)]
  pieces = collections.Counter(
    (domain, tuple(inputs), tuple(targets)) for domain, inputs, targets in segments(batches)
  )
  for number, domain in enumerate(two_domains.domain_names):
    for document in stored(two_domains, domain):
      inputs, targets = (end, *document), (*document, end)
      for start in range(0, len(inputs), LENGTH):
        cut = slice(start, start + LENGTH)
        found[number, inputs[cut], targets[cut]] += 1
  assert pieces == found


def test_concatenated_rows_are_full_single_segments(two_domains):
  for batch, _ in take(two_domains, CONCATENATE, 20):
    assert np.all(batch["segment_ids"] == 1)
    assert np.all(batch["tokens"][:, 1:] == batch["targets"][:, :-1])
    assert np.all(batch["domain_ids"] == batch["domain_ids"][:, :1])


@FORMATS
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_global_batches_do_not_depend_on_the_number_of_processes(two_domains, config, processes):
  config = dataclasses.replace(config, mixture=EVEN)
  alone = take(two_domains, config, 30)
  shards = [take(two_domains, config, 30, own_rows=block(i, processes)) for i in range(processes)]
  together = [
    {name: np.concatenate([batch[name] for batch, _ in parts]) for name in alone[0][0]}
    for parts in zip(*shards, strict=True)
  ]
  assert_same(together, [batch for batch, _ in alone])
  for shard in shards:
    assert [state for _, state in shard] == [state for _, state in alone]


def test_own_rows_need_not_be_neighbours(two_domains):
  """A pod's mesh may give a process rows that are far apart."""
  alone = take(two_domains, PACK, 10)
  for own in ([0, 1, 6, 7], [2, 3, 4, 5]):
    some = take(two_domains, PACK, 10, own_rows=own)
    assert_same([b for b, _ in some], [{k: x[own] for k, x in b.items()} for b, _ in alone])


def test_order_does_not_depend_on_prefetch_or_batch_rows(two_domains):
  other = dataclasses.replace(PACK, prefetch_batches=7, batch_rows=4)
  for name in ("tokens", "segment_ids"):
    rows = np.concatenate([batch[name] for batch, _ in take(two_domains, PACK, 10)])
    same = np.concatenate([batch[name] for batch, _ in take(two_domains, other, 20)])
    np.testing.assert_array_equal(rows, same)


def test_seeds_and_epochs_differ(two_domains):
  first = np.concatenate([batch["tokens"] for batch, _ in take(two_domains, PACK, 5)])
  again = np.concatenate([batch["tokens"] for batch, _ in take(two_domains, PACK, 5)])
  other = np.concatenate([batch["tokens"] for batch, _ in take(two_domains, PACK, 5, seed=4)])
  assert np.array_equal(first, again)
  assert np.mean(first == other) < 0.5


def test_epochs_and_windows_have_their_own_order(two_domains):
  config = dataclasses.replace(PACK, mixture=(("prose", 1.0),), window_tokens=20 * LENGTH)
  planner = Planner(two_domains, config, seed=3)

  def first_window(epoch, window):
    layout, _ = planner.next_window(Position(window, 0, (Cursor(epoch=epoch),)))
    return layout

  documents = [set(first_window(epoch, 0).pieces.document.tolist()) for epoch in range(3)]
  assert documents[0] != documents[1] != documents[2] != documents[0]
  one, other = first_window(0, 0), first_window(0, 7)
  assert set(one.pieces.document.tolist()) == set(other.pieces.document.tolist())
  assert one.pieces.document.tolist() != other.pieces.document.tolist()


@FORMATS
@pytest.mark.parametrize("on_end", DataEnd)
def test_resuming_anywhere_equals_the_undisturbed_stream(two_domains, config, on_end):
  config = dataclasses.replace(config, on_end=on_end, mixture=EVEN)
  whole = take(two_domains, config, None if on_end is DataEnd.STOP else 60)
  for after in (0, 1, 4, 7, 11, len(whole) - 1):
    state = json.loads(json.dumps(whole[after][1]))
    left = None if on_end is DataEnd.STOP else len(whole) - 1 - after
    resumed = take(two_domains, config, left, state=state)
    assert_same([b for b, _ in resumed], [b for b, _ in whole[after + 1 :]])
    assert [s for _, s in resumed] == [s for _, s in whole[after + 1 :]]


def test_resuming_on_other_process_counts(two_domains):
  whole = take(two_domains, PACK, 20)
  for processes in (1, 2, 8):
    parts = [
      take(
        two_domains,
        PACK,
        10,
        state=whole[9][1],
        own_rows=block(i, processes),
      )
      for i in range(processes)
    ]
    for number in range(10):
      tokens = np.concatenate([part[number][0]["tokens"] for part in parts])
      np.testing.assert_array_equal(tokens, whole[10 + number][0]["tokens"])


def test_state_is_a_few_integers(two_domains):
  state = take(two_domains, PACK, 9)[-1][1]
  assert len(json.dumps(state)) < 800


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"sequence_length": 32}, "sequence_length=64, this run has 32"),
    ({"mixture": EVEN}, "mixture="),
    ({"window_tokens": 50 * LENGTH}, "window_tokens="),
    ({"seed": 4}, "seed=3, this run has 4"),
  ],
)
def test_a_state_of_another_stream_is_refused(two_domains, change, named):
  state = take(two_domains, PACK, 1)[0][1]
  seed = change.pop("seed", 3)
  with pytest.raises(ValueError, match=named):
    TrainStream(two_domains, dataclasses.replace(PACK, **change), seed=seed, state=state)


def test_a_state_of_other_data_is_refused(two_domains):
  state = take(two_domains, PACK, 1)[0][1]
  other = dataclasses.replace(two_domains, digest="0" * 64)
  with pytest.raises(ValueError, match="saved with data="):
    TrainStream(other, PACK, seed=3, state=state)
  with pytest.raises(ValueError, match="no data state"):
    TrainStream(two_domains, PACK, seed=3, state={"row": 1})


@FORMATS
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_mixture_shares_hold(two_domains, config, share):
  config = dataclasses.replace(config, mixture=(("code", share), ("prose", 1 - share)))
  counts = np.zeros(2)
  for batch, _ in take(two_domains, config, 400):
    counts += np.bincount(batch["domain_ids"][batch["segment_ids"] > 0], minlength=2)
  assert abs(counts[0] / counts.sum() - share) < 0.01


def test_stop_ends_everywhere_at_the_same_batch(two_domains):
  config = dataclasses.replace(PACK, on_end=DataEnd.STOP)
  lengths = {len(take(two_domains, config, own_rows=block(i, 4))) for i in range(4)}
  assert len(lengths) == 1
  assert lengths.pop() > 10
  stream = TrainStream(two_domains, config, seed=0)
  batches = list(stream)
  assert batches
  assert next(stream, None) is None
  stream.close()


def test_stop_ends_a_mixture_with_its_first_domain(two_domains):
  config = dataclasses.replace(PACK, on_end=DataEnd.STOP, batch_rows=1, mixture=EVEN)
  found = predictions(batch for batch, _ in take(two_domains, config))
  totals = [two_domains.domains[d][TRAIN] for d in ("code", "prose")]
  totals = [split.tokens + split.documents for split in totals]
  seen = [sum(n for (domain, *_), n in found.items() if domain == d) for d in range(2)]
  assert totals[1] < totals[0]
  assert seen[1] == totals[1]
  assert seen[0] == pytest.approx(seen[1], rel=0.02, abs=2 * LENGTH)


def test_repeat_goes_on_after_an_epoch(two_domains):
  split = two_domains.split("prose", TRAIN)
  config = dataclasses.replace(CONCATENATE, mixture=(("prose", 1.0),), batch_rows=1)
  rows = 3 * (split.tokens + split.documents) // LENGTH
  found = predictions(batch for batch, _ in take(two_domains, config, rows))
  once = expected_predictions(two_domains, "prose")
  assert sum((found - once - once - once).values()) <= LENGTH * 40  # The last window runs ahead.
  assert sum((once + once - found).values()) == 0


def test_impossible_streams_are_refused(two_domains):
  config = dataclasses.replace(PACK, mixture=(("pose", 1.0),))
  with pytest.raises(ValueError, match="unknown domain 'pose': did you mean 'prose'"):
    TrainStream(two_domains, config, seed=0)
  with pytest.raises(ValueError, match="own rows 2 to 8 lie outside batch_rows=8"):
    TrainStream(two_domains, PACK, seed=0, own_rows=[2, 8])


def test_a_closed_stream_says_so(two_domains):
  stream = TrainStream(two_domains, PACK, seed=0)
  stream.close()
  with pytest.raises(ValueError, match="closed"):
    next(stream)


def evaluate(index, processes=1, **kwargs):
  parts = [
    list(
      evaluation_batches(
        index,
        "code",
        rows=8,
        sequence_length=LENGTH,
        own_rows=block(i, processes),
        **kwargs,
      )
    )
    for i in range(processes)
  ]
  return [
    {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    for batches in zip(*parts, strict=True)
  ]


def test_evaluation_takes_every_held_out_prediction_once(two_domains):
  batches = evaluate(two_domains)
  assert predictions(batches) == expected_predictions(two_domains, "code", VALIDATION)
  assert {batch["tokens"].shape for batch in batches} == {(8, LENGTH)}
  assert_same(batches, evaluate(two_domains, processes=4))
  split = two_domains.split("code", VALIDATION)
  assert evaluation_bytes(two_domains, "code") == split.bytes


def test_bounded_evaluation_takes_whole_documents_and_their_bytes(two_domains):
  total = two_domains.split("code", VALIDATION).tokens
  batches = evaluate(two_domains, max_tokens=total // 2)
  end = two_domains.end_of_text
  counts = predictions(batches)
  tokens = sum(counts.values())
  documents = sum(n for (_, _, target), n in counts.items() if target == end)
  assert 0 < tokens <= total // 2
  assert evaluation_bytes(two_domains, "code", max_tokens=total // 2) == tokens - documents
  assert evaluate(two_domains, max_tokens=1)


def test_evaluating_an_unknown_domain_is_refused(two_domains):
  with pytest.raises(ValueError, match="did you mean 'code'"):
    next(evaluation_batches(two_domains, "cod", rows=8, sequence_length=LENGTH))
