# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Meshes of the test machine's devices, and the collectives of compiled programs."""

import math
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def mesh(kind: AxisType = AxisType.Auto, **sizes: int) -> Mesh:
    """Returns a mesh with axes of these names and sizes, or skips where devices are too few."""
    number = math.prod(sizes.values())
    if jax.device_count() < number:
        pytest.skip(f"needs {number} devices, has {jax.device_count()}")
    devices = np.array(jax.devices()[:number]).reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=(kind,) * len(sizes))


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def suited(implementation: str) -> dict[str, Any]:
    """Returns a dtype and a page size that an implementation takes here, pages cut in two as well.

    Kernels of GPUs take no float32, which compares best, and no short pages, which cross most.
    """
    if on_gpu():
        return {"dtype": "float32" if implementation == "xla" else "bfloat16", "page_size": 64}
    return {"dtype": "float32", "page_size": 16}


def put(x: Any, mesh: Mesh, *spec: Any) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def collectives(text: str) -> dict[str, list[int]]:
    """Lists, for each kind of collective in compiled HLO, the elements of each one's results."""
    found: dict[str, list[int]] = {}
    for shapes, kind, start in re.findall(rf"= (.+?) ({_KINDS})(-start)?\(", text):
        # What starts a collective may list the operands before the results.
        if start and shapes.startswith("(("):
            shapes = shapes[shapes.index(")") :]
        sizes = re.findall(r"\w+\[([\d,]*)\]", shapes)
        if start and kind != "all-reduce" and not shapes.startswith(")"):
            sizes = sizes[len(sizes) // 2 :]
        elements = sum(math.prod(int(n) for n in size.split(",") if n) for size in sizes)
        found.setdefault(kind, []).append(elements)
    return found


def kinds(text: str) -> Counter[str]:
    """Counts the collectives of each kind."""
    return Counter({kind: len(sizes) for kind, sizes in collectives(text).items()})
