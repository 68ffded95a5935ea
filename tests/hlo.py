# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What compiled programs do with the pool."""

import math
import re

# Operations that hand a buffer on or write into it; `copy`, `convert`, `select`... make another.
IN_PLACE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional",
    "fusion", "scatter", "dynamic-update-slice",
}  # fmt: skip


def pool_sized(text: str, size: int) -> set[str]:
    """Names the HLO operations with a result of at least `size` elements."""
    found = set()
    for shape, name in re.findall(r" = \(?\w+\[([\d,]+)\].*? ([a-z][\w-]*)\(", text):
        if math.prod(map(int, shape.split(","))) >= size:
            found.add(name)
    return found
