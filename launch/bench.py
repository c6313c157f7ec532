"""Measure one part of the system and print it beside its ceiling and a peer.

  mfjax bench data [--data=DIR] [--sequence_length=2048]
  mfjax bench experts [--tokens=4096] [--d_model=512] [--d_ff=1024] [--num_experts=32] [--top_k=2]
  mfjax bench kernels [--only=grouped_matmul,gather,experts,stick_breaking,wide] [--shapes=...]
  mfjax bench kernels --target=v6e
  mfjax bench model --config=molm_350m_4b [--rows=16,64 --microbatches=1,4 --forward_rows=32]
  mfjax bench conversion --config=molm_350m_4b [--only=float32,bfloat16] [--scratch=DIR]

`data`: the input pipeline alone, tokens per second out of ArrayRecord files. Without --data it
reads synthetic documents of log-normal lengths. `experts`: a routed feed-forward layer on one
device, beside a dense layer of the same active FLOPs, under three routings. `kernels`: each kernel
on this device, compared with the oracle, then timed beside other ways to do the same work, in
turns; with --target no TPU is needed: cycles of their compiled loops, beside JAX's own kernels.
`model`: forward pass and train step of a config on one device, random weights and tokens, with what
each part takes; --config.FIELD changes the config. `conversion`: export and import of a random
checkpoint of a config, beside the disk's copy speed for the same bytes, with peak memory.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from launch import flags as shared
from mfjax.schema import unknown_name

_DATA = flags.DEFINE_string("data", None, "Prepared data to read. Default: synthetic documents.")
_SEQUENCE_LENGTH = flags.DEFINE_integer(
  "sequence_length",
  None,
  "Predictions per row. Default: 2048, and the config's own for `model`.",
  lower_bound=1,
)
_SECONDS = flags.DEFINE_float("seconds", 5.0, "How long each line of `data` is measured.")

_TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens of the expert layer.", lower_bound=4)
_D_MODEL = flags.DEFINE_integer("d_model", 512, "Width of the model.", lower_bound=1)
_D_FF = flags.DEFINE_integer("d_ff", 1024, "Width of an expert.", lower_bound=1)
_NUM_EXPERTS = flags.DEFINE_integer("num_experts", 32, "Number of experts.", lower_bound=2)
_TOP_K = flags.DEFINE_integer("top_k", 2, "Experts chosen per token.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Turns of which the median counts.", lower_bound=1)

_ONLY = flags.DEFINE_list(
  "only", [], "Sections of `kernels`, or dtypes of `conversion`'s checkpoint. Default: all."
)
_SHAPES = flags.DEFINE_list(
  "shapes",
  [],
  "Sizes of the one section that --only names, such as 65536x1024x2048x32 (rows, inputs, outputs, "
  "groups) for grouped_matmul. Default: the released models' sizes; on a CPU small ones.",
)
_TARGET = flags.DEFINE_string("target", None, "TPU to compile the kernels for: v5e, v5p, v6e, ...")
_ROWS = flags.DEFINE_list("rows", ["16"], "Rows of each train step that is measured.")
_MICROBATCHES = flags.DEFINE_list(
  "microbatches", ["1"], "Microbatches of each train step: one number, or as many as --rows."
)
_FORWARD_ROWS = flags.DEFINE_list("forward_rows", ["32"], "Rows of each forward pass; empty: none.")
_SCRATCH = flags.DEFINE_string(
  "scratch", ".", "Directory on the disk that `conversion` uses; what it makes there is removed."
)
_JSON = flags.DEFINE_string("json", None, "File for the figures as JSON; -: print them instead.")


def main(argv: Sequence[str]) -> None:
  """Run the benchmark that the first argument names."""
  if len(argv) != 2:
    raise ValueError(f"name one benchmark: {', '.join(_BENCHMARKS)}")
  if argv[1] not in _BENCHMARKS:
    raise ValueError(unknown_name(argv[1], _BENCHMARKS, "benchmark"))
  _BENCHMARKS[argv[1]]()


def bench_data() -> None:
  """Print tokens per second of the input pipeline, of its parts and of Grain's own packing."""
  from mfjax.bench import data

  rates = data.measure(_DATA.value, _SEQUENCE_LENGTH.value or 2048, _SECONDS.value)
  lines = [f"{'':36}  {'million tokens/s':>16}  {'fill':>6}"]
  for rate in rates:
    filled = "" if rate.fill is None else f"{rate.fill:6.3f}"
    lines.append(f"{rate.name:36}  {rate.tokens_per_second / 1e6:16.2f}  {filled}")
  print("\n".join(line.rstrip() for line in lines))


def bench_experts() -> None:
  """Print time and computed rows of a routed layer relative to a dense one."""
  import jax  # The data benchmark runs without it.

  from mfjax.bench import experts

  if _TOP_K.value >= _NUM_EXPERTS.value:
    raise ValueError(f"top_k={_TOP_K.value} must be below num_experts={_NUM_EXPERTS.value}")
  shape = experts.ExpertShape(
    tokens=_TOKENS.value,
    d_model=_D_MODEL.value,
    d_ff=_D_FF.value,
    num_experts=_NUM_EXPERTS.value,
    top_k=_TOP_K.value,
  )
  device = jax.devices()[0]
  print(f"{shape} on {device.device_kind}, jax {jax.__version__}")
  print(f"{'routing':12}  {'rows/active':>11}  {'forward ms':>26}  {'forward + backward ms':>26}")
  for row in experts.measure(shape, device, _REPEATS.value):
    forward = _against(row.forward, row.dense_forward)
    training = _against(row.training, row.dense_training)
    print(f"{row.routing:12}  {row.rows_ratio:11.3f}  {forward:>26}  {training:>26}")


def _against(routed: float, dense: float) -> str:
  return f"{routed * 1e3:.2f} / dense {dense * 1e3:.2f} = {routed / dense:.2f}"


def bench_kernels() -> None:
  """Print time, TFLOP/s, share of the ceiling and alternatives of each kernel."""
  if _TARGET.value is not None:
    _bench_target(_TARGET.value)
    return
  import jax

  from mfjax.bench import kernels

  sections = _sections(kernels.SHAPES)
  if _SHAPES.value and len(sections) > 1:
    raise ValueError("--shapes needs --only with one section, whose sizes they are")
  device = jax.devices()[0]
  shapes = {s: kernels.shapes_of(s, _SHAPES.value, device.platform) for s in sections}
  ceiling = kernels.ceiling(device, _REPEATS.value)
  report: dict[str, Any] = _about(jax, device) | {"ceiling_flops": ceiling, "rows": []}
  _show(f"{_title(report)}; a plain matmul reaches {ceiling / 1e12:.4g} TFLOP/s (the ceiling)")
  _show("A figure behind a name says how many times as fast as that the kernel is.")
  _show(f"{'':38} {'':44} {'ms':>9} {'TFLOP/s':>8} {'ceiling':>7}")
  missing: dict[str, None] = {}
  try:
    for section in sections:
      for row in kernels.measure(section, shapes[section], device, _REPEATS.value):
        report["rows"].append(dataclasses.asdict(row))
        rate = (row.moved_bytes or row.flops) / row.seconds
        beside = "  ".join(f"{name} {t / row.seconds:.2f}" for name, t in row.beside.items())
        share = "TB/s" if row.moved_bytes else f"{rate / ceiling:.1%}"
        _show(
          f"{row.operation:38} {row.shape:44} {row.seconds * 1e3:9.3f} {rate / 1e12:8.4g} "
          f"{share:>7}  {beside}"
        )
        missing |= {f"{name}: {why}": None for name, why in row.missing.items()}
  finally:  # What was measured before an error is not lost.
    _write(report)
  for line in missing:
    _show(f"not measured, {line}")


def _bench_target(target: str) -> None:
  """Print the cycles and unit use of the kernels' loop bodies for a TPU that need not be here."""
  from mfjax.bench import static_cycles

  if _SHAPES.value:
    raise ValueError("--shapes is for kernels that run: with --target they are fixed")
  sections = _sections(static_cycles.SECTIONS)
  schedules = static_cycles.measure(target, sections, os.environ)
  _show(f"scheduled cycles of loop bodies on {target}, waits for memory left out")
  program = ""
  for schedule in schedules:
    if schedule.program != program:
      program = schedule.program
      _show(f"{program}{': ' + schedule.error if schedule.error else ''}")
    for body in schedule.bodies:
      used = sorted(body.shares.items(), key=lambda item: -item[1])
      shares = ", ".join(f"{unit} {share:.0%}" for unit, share in used if share >= 0.05)
      _show(f"  {schedule.kernel:40} {body.cycles:7} cycles: {shares}")
  _write({"target": target, "schedules": [dataclasses.asdict(s) for s in schedules]})


def _sections(known: Iterable[str]) -> list[str]:
  """Return what --only names, by default everything."""
  known = list(known)
  for section in _ONLY.value:
    if section not in known:
      raise ValueError(unknown_name(section, known, "section"))
  return list(_ONLY.value) or known


def bench_model() -> None:
  """Print time, tokens per second, utilisation, memory and parts of a model's passes."""
  import jax

  from mfjax import metrics
  from mfjax.bench import kernels, model

  config = shared.run_config()
  if _SEQUENCE_LENGTH.value is not None:
    data = dataclasses.replace(config.data, sequence_length=_SEQUENCE_LENGTH.value)
    config = dataclasses.replace(config, data=data)
  forwards = _integers("forward_rows", _FORWARD_ROWS.value)
  settings = [model.Setting(rows=rows) for rows in forwards]
  settings += [model.Setting(rows=rows, microbatches=count) for rows, count in _steps()]
  device = jax.devices()[0]
  config, mesh = model.single_device(config, device)
  peak = metrics.device_peak([device], config.model.compute_dtype)
  ceiling = kernels.ceiling(device, _REPEATS.value)
  report: dict[str, Any] = _about(jax, device) | {
    "config": config.to_dict(),
    "peak_flops": peak.flops_per_second,
    "peak_source": peak.source,
    "ceiling_flops": ceiling,
    "rows": [],
  }
  _show(f"{_title(report)}; a plain matmul reaches {ceiling / 1e12:.4g} TFLOP/s (the ceiling)")
  _show(f"100 % of MFU is {peak.flops_per_second / 1e12:.4g} TFLOP/s ({peak.source})")
  kinds = config.kernels
  _show(f"kernels: {kinds.grouped_matmul.value}, {kinds.stick_breaking.value}")
  try:
    for found in model.measure(config, mesh, settings, _REPEATS.value):
      if isinstance(found, model.Breakdown):
        report["rows"][-1]["parts"] = [dataclasses.asdict(part) for part in found.parts]
        _show_parts(found.parts, report["rows"][-1]["seconds"])
        continue
      flops_per_second = found.flops / found.seconds
      figures = dataclasses.asdict(found) | {
        "tokens_per_second": found.tokens_per_second,
        "mfu": flops_per_second / peak.flops_per_second,
        "share_of_ceiling": flops_per_second / ceiling,
      }
      report["rows"].append(figures)
      _show_timing(found, figures)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise ValueError(
      f"{device.device_kind} has too little memory for this: fewer --rows or --forward_rows, more "
      "--microbatches, or --config.train.remat=full need less"
    ) from error
  finally:  # What was measured before an error is not lost.
    _write(report)


def bench_conversion() -> None:
  """Print speed, share of the disk's copy speed and peak memory of exports and imports."""
  from launch import _conversion
  from mfjax.bench import conversion

  config, sections = shared.run_config(), _sections(conversion.SECTIONS)
  report: dict[str, Any] = {"config": config.to_dict(), "rows": []}
  _show(f"{'':28} {'read, written GB':>16} {'seconds':>8} {'copies':>12} {'share':>6}  peak memory")
  command = (sys.executable, "-m", "launch.main")
  try:
    for section in sections:
      with (
        _conversion.converting(),
        tempfile.TemporaryDirectory(prefix="bench-conversion-", dir=_SCRATCH.value) as folder,
      ):
        for row in conversion.measure(config, section, pathlib.Path(folder), command, _say):
          shares = {"copy_seconds": row.copy_seconds, "share_of_copy": row.share_of_copy}
          report["rows"].append(dataclasses.asdict(row) | shares)
          copies = ", ".join(f"{seconds:.1f}" for seconds in row.copies_seconds)
          _show(
            f"{row.job:28} {row.bytes_read / 1e9:8.2f} {row.bytes_written / 1e9:7.2f} "
            f"{row.seconds:8.1f} {copies:>12} {row.share_of_copy:6.0%}  "
            f"{row.peak_bytes / 1e9:.2f} GB, {row.peak_bytes / row.largest_tensor:.2f} of the "
            f"largest stacked tensor; load {row.load_average:.1f}"
          )
  finally:
    _write(report)


def _say(text: str) -> None:
  print(f"... {text}", file=sys.stderr, flush=True)


def _steps() -> list[tuple[int, int]]:
  """Return (rows, microbatches) of each train step."""
  rows, counts = _integers("rows", _ROWS.value), _integers("microbatches", _MICROBATCHES.value)
  counts = counts * len(rows) if len(counts) == 1 else counts
  if len(counts) != len(rows):
    raise ValueError(f"--microbatches has {len(counts)} numbers for {len(rows)} of --rows")
  return list(zip(rows, counts, strict=True))


def _show_timing(timing: Any, figures: dict[str, Any]) -> None:
  setting = timing.setting
  count = f" in {setting.microbatches} microbatches" if setting.microbatches > 1 else ""
  what = "train step" if setting.microbatches else "forward, no lm_head"
  _show(
    f"{what}, {setting.rows} x {timing.sequence_length}{count}: {timing.seconds * 1e3:.1f} ms, "
    f"{figures['tokens_per_second']:,.0f} tokens/s, MFU {figures['mfu']:.1%}, "
    f"{figures['share_of_ceiling']:.1%} of the ceiling; memory {timing.compiled_bytes / 2**30:.1f} "
    f"GiB compiled, {timing.peak_bytes / 2**30:.1f} GiB peak so far; fullest expert "
    f"{timing.imbalance:.2f} times the mean, no token dropped"
  )


def _show_parts(parts: Iterable[Any], seconds: float) -> None:
  heads = ("forward", "again", "backward", "all, ms", "kernels", "share")
  _show(f"  {'':26} {' '.join(f'{head:>9}' for head in heads)}")
  for part in parts:
    times = (part.forward, part.recomputed, part.backward, part.seconds, part.kernels)
    columns = " ".join(f"{time * 1e3:9.2f}" for time in times)
    _show(f"  {part.name:26} {columns} {part.seconds / seconds:9.1%}")


def _integers(name: str, texts: Sequence[str]) -> list[int]:
  for text in texts:
    if not text.isdecimal() or int(text) == 0:
      raise ValueError(f"--{name}={','.join(texts)}: give positive numbers, such as 16,64")
  return [int(text) for text in texts]


def _about(jax: Any, device: Any) -> dict[str, Any]:
  return {"device": device.device_kind, "jax": jax.__version__}


def _title(report: dict[str, Any]) -> str:
  return f"{report['device']}, jax {report['jax']}"


def _show(line: str) -> None:
  if _JSON.value != "-":
    print(line.rstrip(), flush=True)  # A line as soon as it is there: the next may take minutes.


def _write(report: dict[str, Any]) -> None:
  """Write the figures where --json says."""
  if _JSON.value == "-":
    print(json.dumps(report))
  elif _JSON.value is not None:
    with open(_JSON.value, "w", encoding="utf-8") as file:
      json.dump(report, file, indent=1)
      file.write("\n")


_BENCHMARKS = {
  "data": bench_data,
  "experts": bench_experts,
  "kernels": bench_kernels,
  "model": bench_model,
  "conversion": bench_conversion,
}
