# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run leaves: a table in the terminal and results.json."""

import datetime
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import mla_jax
from mla_jax.bench import generation, runs, step
from mla_jax.bench.op import Report, Result, Row
from mla_jax.bench.peers import peer_versions
from mla_jax.bench.profile import Profile


def ratios(report: Report) -> dict[str, list[float | None]]:
    """Returns the ratio columns, one value a row, by heading: how many times as fast.

    Each of ours against the better of the peers, and the pair of `--compare`.
    """
    columns: dict[str, list[float | None]] = {}
    for name in report.ours:
        peers = [(row, row.better_peer()) for row in report.rows]
        values = [None if p is None else row.speedup(name, p) for row, p in peers]
        if any(value is not None for value in values):
            columns[f"{name} over better peer"] = values
    if report.compare is not None:
        first, second = report.compare
        values = [row.speedup(first, second) for row in report.rows]
        columns[f"{first} over {second}"] = values
    return columns


def geometric_mean(values: list[float | None]) -> float | None:
    """Returns the geometric mean of the values that are there, or None."""
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def to_json(report: Report) -> dict[str, Any]:
    """Returns the run as JSON holds it; an error that is not finite is null."""
    rows = []
    for row in report.rows:
        entry = asdict(row)
        entry["shape"]["causal"] = row.shape.causal
        for result in entry["results"].values():
            result["error"] = result["error"] if math.isfinite(result["error"]) else None
        entry["better_peer"] = row.better_peer()
        rows.append(entry)
    columns = ratios(report)
    return _header("op", report) | {
        "versions": {"mla-jax": mla_jax.__version__, "jax": jax.__version__} | peer_versions(),
        "rows": rows,
        "ratios": columns,
        "geometric_means": {name: geometric_mean(values) for name, values in columns.items()},
    }


def _header(command: str, report: Report | runs.Report[Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "versions": {"mla-jax": mla_jax.__version__, "jax": jax.__version__},
        "dtype": report.dtype,
        "rounds": report.rounds,
        "ceilings": {
            "read_bytes_per_second": report.ceilings.read,
            "product_flops_per_second": report.ceilings.product,
        },
    }


def steps_to_json(command: str, report: runs.Report[Any]) -> dict[str, Any]:
    """Returns a run of `generate` or `step` as JSON holds it."""
    names = ("model", "layers", "weight_bytes", "steps", "compile_seconds")
    fields = {name: getattr(report, name) for name in names}
    return _header(command, report) | fields | {"rows": [asdict(row) for row in report.rows]}


def print_generation(report: runs.Report[generation.Row], console: Console) -> None:
    """Prints the table of `generate`."""
    _print_steps_header(report, console)
    console.print("each cell: ms a step, floor over it, tokens/s", markup=False)
    names = list(dict.fromkeys(name for row in report.rows for name in row.results))
    table = Table(box=SIMPLE)
    for heading in ("b", "context", "floor ms", "cache GB", "peak GB", *names):
        table.add_column(heading, justify="right")
    for row in report.rows:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.1f}"
        cells = [str(row.b), str(row.context), f"{row.floor_ms:.3f}"]
        cells += [f"{row.cache_bytes / 1e9:.2f}", peak]
        for name in names:
            found = row.results.get(name)
            if found is None or found.ms is None or found.tokens_per_second is None:
                cells.append("-" if found is None else "noise")
                continue
            share = row.floor_ms / found.ms
            cells.append(f"{found.ms:.3f} {share:.2f} {found.tokens_per_second:.0f}")
        table.add_row(*cells)
    console.print(table)
    _print_reasons(report, console)


def print_steps(report: runs.Report[step.Row], console: Console) -> None:
    """Prints the table of `step`."""
    _print_steps_header(report, console)
    console.print(
        "each cell: us a step, the op's own of one layer, step over projections + layers * op",
        markup=False,
    )
    names = list(dict.fromkeys(name for row in report.rows for name in row.results))
    table = Table(box=SIMPLE)
    for heading in ("b", "context", "pools", "projections us", *names):
        table.add_column(heading, justify="right")
    for row in report.rows:
        cells = [str(row.b), str(row.context), f"{row.pools} of {report.layers}"]
        cells += [f"{row.projections_us:.0f}"]
        for name in names:
            found = row.results.get(name)
            if found is None or found.ratio is None:
                cells.append("-" if found is None else "noise")
                continue
            cells.append(f"{found.us:.0f} {found.op_us:.1f} {found.ratio:.2f}")
        table.add_row(*cells)
    console.print(table)
    if any(row.pools < report.layers for row in report.rows):
        console.print("layers share pools: memory is short of one for each", markup=False)
    _print_reasons(report, console)


def print_profile(name: str, profile: Profile, console: Console) -> None:
    """Prints what took longest on the device."""
    share = f"{profile.in_command_buffers:.1%} of it in command buffers"
    console.print(f"{name}: {profile.us:.0f} us on the device, {share}", markup=False)
    for kernel, count, us in profile.kernels[:25]:
        console.print(f"{us:10.1f} us {us / profile.us:6.1%} {count:6d} x  {kernel}", markup=False)


def _print_steps_header(report: runs.Report[Any], console: Console) -> None:
    ceilings = report.ceilings
    console.print(
        f"{jax.devices()[0].device_kind}, {report.model}, {report.layers} layers of "
        f"{report.weight_bytes / 1e9:.2f} GB, {report.dtype}, random weights and latents, median "
        f"of {report.rounds} rounds; ceilings of this run: read {ceilings.read / 1e9:.0f} GB/s, "
        f"product {ceilings.product / 1e12:.2f} TFLOP/s; "
        f"compiled in {report.compile_seconds:.0f} s",
        markup=False,
    )


def _print_reasons(report: runs.Report[Any], console: Console) -> None:
    for row in report.rows:
        for name, why in row.reasons.items():
            console.print(f"not {name} at b {row.b}: {why}", markup=False)


def print_report(report: Report, console: Console) -> None:
    """Prints the table, what was not measured and why, and the geometric means."""
    ceilings, columns = report.ceilings, ratios(report)
    console.print(
        f"{jax.devices()[0].device_kind}, {report.dtype}, median of {report.rounds} rounds; "
        f"ceilings of this run: read {ceilings.read / 1e9:.0f} GB/s, "
        f"product {ceilings.product / 1e12:.2f} TFLOP/s",
        markup=False,
    )
    console.print("each cell: us, floor over it, relative error against float64", markup=False)
    ran = [name for name in report.names if any(name in row.results for row in report.rows)]
    table = Table(box=SIMPLE)
    for heading in ("b", "s_q", "s_k", "h_q", "floor us", *ran, *columns):
        table.add_column(heading, justify="right")
    for i, row in enumerate(report.rows):
        shape = row.shape
        cells = [str(shape.b), f"{shape.s_q}{'c' if shape.causal else ''}"]
        cells += [f"{shape.s_k}{' varlen' if shape.varlen else ''}", str(shape.h_q)]
        cells += [f"{row.floor_us:.1f}"]
        cells += [_cell(row.results.get(name)) for name in ran]
        cells += ["-" if v[i] is None else f"{v[i]:.2f}" for v in columns.values()]
        table.add_row(*cells)
    console.print(table)
    for name, values in columns.items():
        mean = geometric_mean(values)
        if mean is not None:
            console.print(f"{name}: geometric mean {mean:.3f}", markup=False)
    if any((r.of_floor or 0) > 1 for row in report.rows for r in row.results.values()):
        console.print("above 1 of the floor: the ceilings, in plain JAX, came out too low")
    for line in _reasons(report.rows):
        console.print(line, markup=False)


def _cell(result: Result | None) -> str:
    if result is None:
        return "-"
    time = "noise" if result.us is None else f"{result.us:.1f} {result.of_floor:.2f}"
    return f"{time} {result.error:.1e}" + ("" if result.correct else " [red]WRONG[/red]")


def _reasons(rows: list[Row]) -> list[str]:
    """Says once why a variant is absent, with the shapes where it is not absent everywhere."""
    shapes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, why in row.reasons.items():
            shapes.setdefault((name, why), []).append(str(row.shape))
    return [
        f"not {name}{'' if len(where) == len(rows) else ' at ' + ' '.join(where)}: {why}"
        for (name, why), where in shapes.items()
    ]


def write(report: Report, folder: Path) -> None:
    """Writes results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(report), indent=1, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
