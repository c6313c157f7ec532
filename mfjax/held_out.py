"""Held-out text: loss by domain, its table, and a sampled continuation."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mfjax import generate
from mfjax.config import RunConfig
from mfjax.data.index import VALIDATION, DataIndex
from mfjax.data.pipeline import evaluation_batches, evaluation_bytes
from mfjax.data.tokenizer import Tokenizer
from mfjax.metrics import bits_per_byte, byte_entropy
from mfjax.sharding import device_batch, process_rows

PROMPT_TOKENS = 64
TEMPERATURE = 0.8

EvalStep = Callable[[Any, Any], Mapping[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class DomainLoss:
  """Loss on `tokens` predictions of `bytes` raw bytes; `byte_entropy` is order-0, of all text."""

  nats_per_token: float
  bits_per_byte: float
  byte_entropy: float
  tokens: int
  bytes: int


def evaluate_domains(
  eval_step: EvalStep,
  params: Any,
  index: DataIndex,
  mesh: Mesh,
  *,
  rows: int,
  sequence_length: int,
  max_tokens: int,
  stopped: Callable[[], bool] = lambda: False,
) -> dict[str, DomainLoss] | None:
  """Return each domain's held-out loss, or None if `stopped` came true on the way.

  Batches have `rows` rows over all processes; `max_tokens` bounds the predictions per domain, to
  whole documents (0: all). A domain without held-out text is left out.
  """
  losses = {}
  for domain in index.domain_names:
    split = index.split(domain, VALIDATION)
    if not split.documents:
      continue
    batches = evaluation_batches(
      index,
      domain,
      rows=rows,
      sequence_length=sequence_length,
      max_tokens=max_tokens,
      own_rows=process_rows(mesh, rows),
    )
    nats, tokens = 0.0, 0
    wanted = ({k: rows for k, rows in batch.items() if k != "domain_ids"} for batch in batches)
    for sums in _one_late(eval_step(params, device_batch(mesh, batch)) for batch in wanted):
      if stopped():
        return None
      nats += float(sums["nats"])
      tokens += int(sums["tokens"])
    num_bytes = evaluation_bytes(index, domain, max_tokens=max_tokens)
    losses[domain] = DomainLoss(
      nats_per_token=nats / tokens,
      bits_per_byte=bits_per_byte(nats, num_bytes),
      byte_entropy=byte_entropy(split.byte_histogram),
      tokens=tokens,
      bytes=num_bytes,
    )
  return losses


def _one_late(results: Iterable[Mapping[str, jax.Array]]) -> Iterator[Mapping[str, np.ndarray]]:
  """Fetch each result after the next was dispatched."""
  previous = None
  for result in results:
    if previous is not None:
      yield jax.device_get(previous)
    previous = result
  if previous is not None:
    yield jax.device_get(previous)


def table(losses: Mapping[str, DomainLoss]) -> str:
  """Return a table of held-out losses, a line per domain, the bytes' entropy beside them."""
  width = max(len("held-out"), *map(len, losses))
  lines = [f"{'held-out':{width}}  {'tokens':>13}  nats/token  bits/byte  byte entropy (bits)"]
  for domain, loss in losses.items():
    lines.append(
      f"{domain:{width}}  {loss.tokens:13,}  {loss.nats_per_token:10.4f}  "
      f"{loss.bits_per_byte:9.4f}  {loss.byte_entropy:19.4f}"
    )
  return "\n".join(lines)


def continuation(
  params: Any, config: RunConfig, mesh: Mesh, index: DataIndex, tokenizer: Tokenizer
) -> tuple[str, str]:
  """Return the beginning of a held-out document and `evaluate.sample_tokens` sampled after it.

  The document is one of the first domain that has any held out; the continuation ends early where
  the model ends the document.
  """
  domain = next(name for name in index.domain_names if index.split(name, VALIDATION).documents)
  batches = evaluation_batches(
    index, domain, rows=1, sequence_length=config.data.sequence_length, max_tokens=1
  )
  first = next(batches)
  document = first["tokens"][0][first["segment_ids"][0] == 1]
  length = min(PROMPT_TOKENS, len(document) // 2)  # Leave something to continue.
  prompt = document[: length + 1]  # Begins with end-of-text.
  tokens = generate.sample(
    params,
    config,
    mesh,
    prompt,
    config.evaluate.sample_tokens,
    temperature=TEMPERATURE,
    seed=config.train.seed,
  )
  ends = np.flatnonzero(tokens == index.end_of_text)
  tokens = tokens[: ends[0]] if ends.size else tokens
  return tokenizer.decode(prompt[1:]), tokenizer.decode(tokens)
