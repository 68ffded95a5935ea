# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Where the time of a program goes on a GPU, by kernel, from a trace of `jax.profiler`."""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

# Its name without the number that XLA gives it, times launched, microseconds in all.
Kernel = tuple[str, int, float]


@dataclass(frozen=True)
class Profile:
    """Where the time went.

    Attributes:
        us: microseconds on the device in all.
        in_command_buffers: the share of them in CUDA graphs.
        kernels: what ran on the device, longest first.
    """

    us: float
    in_command_buffers: float
    kernels: list[Kernel]


def trace(function: Callable[[], Any], folder: Path) -> Profile:
    """Runs a function once under the profiler.

    Args:
        function: warm already, or the trace holds its compilation.
        folder: where the trace goes, for TensorBoard and Perfetto.

    Returns:
        What ran on the device. Of a loop that is a command buffer as a whole, it is one iteration.
    """
    with jax.profiler.trace(str(folder)):
        function()
    path = max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(path) as file:
        return summary(json.load(file)["traceEvents"])


def summary(events: list[dict[str, Any]]) -> Profile:
    """Sums a trace's events up, as `trace` returns them."""
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    in_graphs = 0.0
    for event in events:
        if event.get("ph") != "X":
            continue
        thread = threads.get((event["pid"], event["tid"]), "")
        if "/device:" in processes.get(event["pid"], "") and thread.startswith("Stream"):
            entry = kernels[re.sub(r"(_|\.)\d+\b", "", event["name"])]
            entry[0] += 1
            entry[1] += event["dur"]
            # The nodes inside a loop of a graph name no graph.
            in_graphs += event["dur"] if "cuda_graph_node_id" in event.get("args", {}) else 0
    rows = [(name, int(count), us) for name, (count, us) in kernels.items()]
    total = sum(us for *_, us in rows)
    rows.sort(key=lambda row: -row[2])
    return Profile(total, in_graphs / total if total else 0.0, rows)
