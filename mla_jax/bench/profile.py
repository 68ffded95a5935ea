# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Where the time of a program goes on a GPU, by kernel, from a trace of `jax.profiler`."""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# Of the host's calls that start work: a command buffer is one, however many kernels it holds.
_LAUNCHES = ("cuGraphLaunch", "cuLaunchKernelEx", "cuLaunchKernel")


def trace(function: Callable[[], Any], folder: Path) -> dict[str, Any]:
    """Runs a function once under the profiler.

    Args:
        function: warm already, or the trace holds its compilation.
        folder: where the trace goes, for TensorBoard and Perfetto.

    Returns:
        `kernels`: (name without its number, times launched, microseconds in all), longest first;
        `host`: how often the host started a command buffer or a kernel, by name of the call.
    """
    with jax.profiler.trace(str(folder)):
        function()
    path = max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(path) as file:
        return summary(json.load(file)["traceEvents"])


def summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums a trace's events up, as `trace` returns them."""
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    host: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("ph") != "X":
            continue
        thread = threads.get((event["pid"], event["tid"]), "")
        if "/device:" in processes.get(event["pid"], "") and thread.startswith("Stream"):
            entry = kernels[re.sub(r"(_|\.)\d+\b", "", event["name"])]
            entry[0] += 1
            entry[1] += event["dur"]
        elif event["name"] in _LAUNCHES:
            host[event["name"]] += 1
    rows = [(name, int(count), us) for name, (count, us) in kernels.items()]
    return {"kernels": sorted(rows, key=lambda row: -row[2]), "host": dict(host)}
