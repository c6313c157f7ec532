"""Compile a run's steps for a machine you do not have: does it fit, and how fast can it be?

  mfjax compile --config=molm_350m_4b --target=v5p:4x4x4 [--num_slices=2] [--config.FIELD=VALUE]
  mfjax compile --config=molm_350m_4b --target=v5e:4x4 --search

Compiles the very train step and evaluation step, kernels included, for that machine's mesh, on
this computer and without an accelerator (`pip install 'mfjax[tpu]'`, for GPUs `'mfjax[cuda]'`).
Prints bytes per device by kind, what to change if they do not fit, the collectives, and bounds of
the step's time. --search ranks meshes, microbatches and remat by estimate and compiles the best.
Exit code 0: it fits; 3: it does not; 2: the command line, the config or the target cannot be used.
"""

import json
import os
import pathlib
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

from absl import flags

from launch import flags as shared
from mfjax import targets
from mfjax.config import RunConfig

_TARGET = flags.DEFINE_string(
  "target", None, "The machine, such as v5e:4x4, v5p:4x4x8, v6e:16x16, tpu7x:2x2x2 or h200:8."
)
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices of the target, joined by DCN.")
_EVALUATION = flags.DEFINE_bool("evaluation", True, "Compile the evaluation step as well.")
_ROUTING = flags.DEFINE_string(
  "routing", None, "Measured load of experts: a run's metrics.jsonl, or JSON of counts per layer."
)
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, microbatches and remat.")
_SEARCH_COMPILES = flags.DEFINE_integer(
  "search_compiles", 3, "Layouts that --search compiles, the best first.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", None, "File to write the report to as well.")

DOES_NOT_FIT = 3
_GIB = 2**30
_SHOWN_REMEDIES = 4

# libtpu must not ask for a TPU of this machine, and says so at length if it cannot tell its name.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "JAX_PLATFORMS": "cpu",
}


def main(argv: Sequence[str]) -> int:
  """Compile as the flags say, print the report and return the exit code."""
  if len(argv) > 1:
    raise ValueError(f"unexpected argument {argv[1]!r}: all of compile's settings are flags")
  if not _TARGET.value:
    raise ValueError(f"--target is missing; {targets.known()}")
  target = targets.parse(_TARGET.value, _NUM_SLICES.value)
  config = shared.run_config()

  import jax

  from mfjax import fit, routing

  histogram = routing.read(_ROUTING.value, config.model) if _ROUTING.value else None
  prepare(os.environ)
  jax.config.update("jax_platforms", "cpu")
  machine = fit.Machine.of(target)
  if _SEARCH.value:
    return _search(config, machine, histogram)
  report = fit.check(config, machine, evaluation=_EVALUATION.value, histogram=histogram)
  _print_report(report)
  _write(report.to_dict())
  return 0 if report.fits else DOES_NOT_FIT


def prepare(environment: MutableMapping[str, str]) -> None:
  """Keep compilers away from accelerators of this machine; before JAX first makes a device."""
  environment.update(_ENVIRONMENT)


def _search(config: RunConfig, machine: Any, histogram: Any) -> int:
  from mfjax import fit

  ranked = fit.rank(config, machine)
  tried = fit.shortlist(ranked, machine, _SEARCH_COMPILES.value)
  print(
    f"{len(ranked)} layouts of {machine.target} whose sizes divide, "
    f"{sum(c.memory_bytes <= machine.limit_bytes for c in ranked)} fit by estimate; "
    f"the best {len(tried)} are compiled"
  )
  reports = []
  for candidate in tried:
    print(f"\n{candidate.flags}", flush=True)
    report = fit.check(candidate.config, machine, evaluation=_EVALUATION.value, histogram=histogram)
    reports.append((candidate, report))
    print(f"  {_verdict(report)}; {_bounds_line(report)}", flush=True)
  reports.sort(key=lambda pair: (not pair[1].fits, pair[1].at_least or float("inf")))
  print("\nbest first, as compiled")
  rows = [("fits", "peak GiB", "step at least", "MFU at most", "by estimate", "flags")]
  for candidate, report in reports:
    bounds = report.bounds
    rows.append(
      (
        "yes" if report.fits else "no",
        f"{report.peak_bytes / _GIB:.2f}",
        f"{bounds.at_least:.3f} s" if bounds else "-",
        f"{bounds.mfu_at_most:.0%}" if bounds else "-",
        f"{candidate.memory_bytes / _GIB:.2f} GiB, {candidate.seconds:.3f} s",
        candidate.flags,
      )
    )
  _print_table(rows, "<>>>><")
  _write({"layouts": [report.to_dict() | {"flags": c.flags} for c, report in reports]})
  return 0 if any(report.fits for _, report in reports) else DOES_NOT_FIT


def _print_report(report: Any) -> None:
  mesh = " x ".join(f"{axis}={size}" for axis, size in report.axis_sizes.items())
  kernels = report.config.kernels
  print(f"{report.machine.target}: {report.num_devices} devices, mesh {mesh}")
  print(
    f"kernels: grouped_matmul={kernels.grouped_matmul.value}, "
    f"stick_breaking={kernels.stick_breaking.value}"
  )
  for program in report.programs:
    print(
      f"\n{program.name}: lowered in {program.lower_seconds:.0f} s, compiled in "
      f"{program.compile_seconds:.0f} s ({program.compile_cpu_seconds:.0f} s of processors), "
      f"{program.num_kernels} Pallas kernels; bytes per device at its peak"
    )
    rows = [(kind.kind, f"{kind.bytes / _GIB:.3f} GiB") for kind in program.memory]
    share = program.peak_bytes / report.machine.facts.memory_bytes
    whole = report.machine.facts.memory_bytes / _GIB
    rows.append(("all", f"{program.peak_bytes / _GIB:.3f} GiB, {share:.0%} of {whole:.1f} GiB"))
    _print_table(rows, "<<")
  print(f"\n{_verdict(report)}")
  for line in report.notes:
    print(f"  {line}")
  if not report.fits:
    for change, saved in report.remedies[:_SHOWN_REMEDIES]:
      print(f"  {change} saves about {saved / _GIB:.2f} GiB")
  if report.bounds is not None:
    _print_collectives(report)
    _print_bounds(report)


def _verdict(report: Any) -> str:
  limit = report.limit_bytes
  if report.fits:
    return f"fits: {(limit - report.peak_bytes) / _GIB:.2f} GiB of {limit / _GIB:.2f} GiB are left"
  short = (report.peak_bytes - limit) / _GIB
  return (
    f"does not fit: {short:.2f} GiB short, {report.peak_bytes / _GIB:.2f} GiB of the "
    f"{limit / _GIB:.2f} GiB that a program can have"
  )


def _print_collectives(report: Any) -> None:
  print("\ncollectives of the train step; bytes that one device sends per step")
  rows = [("kind", "link", "group", "times", "operands", "sent")]
  for line in report.collective_rows():
    link = f"{line['link']}, per round" if line["per_round"] else line["link"]
    rows.append(
      (
        line["kind"],
        link,
        str(line["group_size"]),
        f"{line['times']:,}",
        _megabytes(line["operand_bytes"]),
        _megabytes(line["sent_bytes"]),
      )
    )
  for link, total in report.sent_by_link().items():
    rows.append(("all", link, "", "", "", _megabytes(total)))
  _print_table(rows, "<<>>>>")
  if any(one.dynamic for one in report.programs[0].collectives):
    print("  per round: what each further round of an exchange sends, when routing is skewed")


def _megabytes(size: float) -> str:
  return f"{size / 1e6:,.1f} MB" if size >= 5e4 else f"{size / 1e3:,.1f} kB"


def _print_bounds(report: Any) -> None:
  print("\nbounds of a train step")
  rows = [
    (
      *("routing", "compute", "memory", "ICI", "DCN", "optimizer"),
      *("bound by", "step at least", "nothing overlapped", "MFU at most"),
    )
  ]
  named = [("balanced", report.bounds), ("measured", report.measured_bounds)]
  for name, bounds in named:
    if bounds is not None:
      times = (bounds.compute, bounds.memory, bounds.ici, bounds.dcn, bounds.optimizer)
      rows.append(
        (
          name,
          *("unknown" if time is None else f"{time * 1e3:.1f} ms" for time in times),
          bounds.bound,
          f"{bounds.at_least * 1e3:.1f} ms",
          f"{bounds.without_overlap * 1e3:.1f} ms",
          f"{bounds.mfu_at_most:.1%}",
        )
      )
  _print_table(rows, "<>>>>><>>>")
  print("  assumed:")
  for line in report.assumptions:
    print(f"  - {line}")


def _bounds_line(report: Any) -> str:
  if report.bounds is None:
    return "no bounds"
  return f"a step takes at least {report.bounds.at_least:.3f} s, bound by {report.bounds.bound}"


def _print_table(rows: Sequence[tuple[str, ...]], sides: str) -> None:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    cells: Iterable[str] = (
      f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
    )
    print(f"  {'  '.join(cells)}".rstrip())


def _write(report: dict[str, Any]) -> None:
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
