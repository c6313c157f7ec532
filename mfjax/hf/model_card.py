"""The README.md of an export: what the model is, how it was trained, and what was checked."""

import json
from collections.abc import Mapping
from typing import Any

from mfjax import metrics
from mfjax.hf.source import Checkpoint
from mfjax.hf.verify import Verdict
from mfjax.writers import METRICS_FILE, read_records

_TEXT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- moduleformer
- mixture-of-experts
- mfjax
---

# {name}

A [ModuleFormer](https://arxiv.org/abs/2306.04640): a decoder-only language model whose attention
heads and feed-forward networks are mixtures of experts, with stick-breaking attention and no
positional encoding. Trained with mfjax {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer(["Once upon a time"], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=32)))
```

## Model

{model}

## Training

{training}

## Conversion

The weights are stored in {dtype}. After writing, they were read back and compared with the
checkpoint; `parity.json` has the figures.

```
{verdict}
```
"""


def text(source: Checkpoint, dtype: str, verdict: Verdict, name: str) -> str:
  """Return the card of a step's export."""
  total = sum(metrics.total_parameters(source.config).values())
  active = sum(metrics.active_parameters(source.config).values())
  config = source.run_config.to_dict()
  model = {"parameters": f"{total:,}", "active per token": f"{active:,}"} | config["model"]
  return _TEXT.format(
    name=name,
    version=source.run["versions"]["mfjax"],
    model=_table(model),
    training=_training(source, config),
    dtype=dtype,
    verdict="\n".join(verdict.lines()),
  )


def _training(source: Checkpoint, config: Mapping[str, Any]) -> str:
  step = source.opened.step
  if step == 0:
    return "These weights were not trained by mfjax: they are as they were imported or drawn."
  facts: dict[str, Any] = {"steps": f"{step:,}"}
  path = source.path / METRICS_FILE
  records = [r for r in read_records(path) if r["step"] <= step] if path.exists() else []
  trained = [record for record in records if "loss" in record]
  if trained:
    facts["tokens"] = f"{sum(record['tokens'] for record in trained):,}"
    facts["training cross-entropy at the end"] = f"{trained[-1]['cross_entropy']:.4f} nats/token"
  for record in [record for record in records if "evaluation" in record][-1:]:
    for domain, values in record["evaluation"].items():
      facts[f"held-out {domain}, step {record['step']:,}"] = (
        f"{values['nats_per_token']:.4f} nats/token, {values['bits_per_byte']:.4f} bits/byte"
      )
  sections = {name: config[name] for name in ("data", "loss", "optimizer", "train")}
  settings = json.dumps(sections, indent=1)
  return f"{_table(facts)}\n\n```json\n{settings}\n```"


def _table(facts: Mapping[str, Any]) -> str:
  return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items())])
