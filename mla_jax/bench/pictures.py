# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The pictures of a run, where matplotlib is installed."""

import importlib.util
from pathlib import Path
from typing import Any

import jax

from mla_jax.bench import generation, op, runs, step
from mla_jax.bench.report import ratios


def draw_op(report: op.Report, folder: Path) -> str | None:
    """Draws roofline.png and, where there is a ratio, speedup.png; says why where it cannot."""
    if (missing := _missing()) is not None:
        return missing
    figure, axes = _figure(5)
    ceilings = report.ceilings
    ridge = ceilings.product / ceilings.read
    intensities = [row.flops / row.bytes for row in report.rows]
    left, right = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    roof = [min(x * ceilings.read, ceilings.product) / 1e12 for x in (left, ridge, right)]
    axes.loglog([left, ridge, right], roof, color="black", label="ceilings of this run")
    for name in report.names:
        points = [
            (row.flops / row.bytes, row.flops / r.us / 1e6)
            for row in report.rows
            if (r := row.results.get(name)) is not None and r.us is not None and r.correct
        ]
        if points:
            axes.loglog(*zip(*points, strict=True), "o", label=name, alpha=0.7)
    axes.set(xlabel="operations per byte", ylabel="TFLOP/s", title=jax.devices()[0].device_kind)
    axes.legend()
    _save(figure, folder / "roofline.png")

    columns = ratios(report)
    if not columns:
        return "no speedup.png: it needs a peer, or --compare"
    figure, axes = _figure(1.5 + 0.12 * len(report.rows) * len(columns))
    height = 0.8 / len(columns)
    for i, (name, values) in enumerate(columns.items()):
        places = [y + i * height for y in range(len(report.rows))]
        axes.barh(places, [value or 0 for value in values], height, align="edge", label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([y + 0.4 for y in range(len(report.rows))], [str(r.shape) for r in report.rows])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set(xlabel="times as fast", ylabel="b,s_q,s_k,h_q")
    figure.legend(loc="outside upper center", ncols=len(columns))  # no place is free of bars
    _save(figure, folder / "speedup.png")
    return None


def draw_generation(report: runs.Report[generation.Row], folder: Path) -> str | None:
    """Draws generate.png, tokens a second by batch; says why where it cannot."""
    if (missing := _missing()) is not None:
        return missing
    figure, axes = _figure(4)
    batches = [row.b for row in report.rows]
    limits = [1e3 * row.b / row.floor_ms for row in report.rows]
    axes.loglog(batches, limits, "--", color="black", label="limit of the memory's speed")
    for name in _names(report):
        points = [
            (row.b, r.tokens_per_second)
            for row in report.rows
            if (r := row.results.get(name)) is not None and r.tokens_per_second is not None
        ]
        if points:
            axes.loglog(*zip(*points, strict=True), "o-", label=name)
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.minorticks_off()
    context = ", ".join(sorted({str(row.context) for row in report.rows}))
    axes.set(xlabel="sequences", ylabel="tokens a second", title=_title(report, context))
    _legend(axes)
    _save(figure, folder / "generate.png")
    return None


def draw_steps(report: runs.Report[step.Row], folder: Path) -> str | None:
    """Draws step.png, the time of a step beside its floor; says why where it cannot."""
    if (missing := _missing()) is not None:
        return missing
    names = _names(report)
    if not names:
        return "no picture: nothing was measured"
    figure, axes = _figure(1.5 + 0.3 * len(report.rows) * len(names))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        found = [row.results.get(name) for row in report.rows]
        bars = [
            (y + i * height, r.us / 1e3, r.us / r.ratio / 1e3)
            for y, r in enumerate(found)
            if r is not None and r.us is not None and r.ratio is not None
        ]
        if bars:
            places, times, floors = zip(*bars, strict=True)
            axes.barh(places, times, height, align="edge", label=name)
            ends = [place + height for place in places]
            label = "products and op alone" if i == 0 else None
            axes.vlines(floors, places, ends, color="black", label=label)
    labels = [f"{row.b}, {row.context}" for row in report.rows]
    axes.set_yticks([y + 0.4 for y in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set(xlabel="ms a step", ylabel="sequences, context", title=_title(report))
    _legend(axes)
    _save(figure, folder / "step.png")
    return None


def _missing() -> str | None:
    if importlib.util.find_spec("matplotlib") is None:
        return "no pictures: they need matplotlib (pip install 'mla-jax[bench]')"
    return None


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    return figure, figure.subplots()


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:  # noise may have covered all times
        axes.legend()


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _names(report: runs.Report[Any]) -> list[str]:
    return list(dict.fromkeys(name for row in report.rows for name in row.results))


def _title(report: runs.Report[Any], context: str | None = None) -> str:
    title = f"{report.model}, {report.layers} layers, {jax.devices()[0].device_kind}"
    return title if context is None else f"{title}, context {context}"
