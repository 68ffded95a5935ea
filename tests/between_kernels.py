# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a call takes between a model's other kernels, which push its code and data out of L2.

    PYTHONPATH=. python tests/between_kernels.py LIBRARY [OTHER ...]

A library is the kernels alone (tests/sanitizer.py says how to build one). Needs a Hopper GPU and
torch; FlashMLA is measured beside it where sgl-flash-mla is installed, its schedule not timed.

Before each call come a product with 134 MB of weights and five small kernels. A CUDA graph of 16
such pairs is timed, and one of 16 without the call; the difference counts, in microseconds a call.
"""

import importlib.util
import random
import statistics
import sys

import torch
from kernel_calls import draw, load, microseconds, normal, of_library

from mla_jax.bench import cases, peers

CALLS, ROUNDS = 16, 10
SHAPES = (  # b, s_k, h_q
    *((1, s_k, 16) for s_k in (1024, 4096, 16384)),
    *((1, s_k, 128) for s_k in (4096, 16384)),
    *((b, 4096, h_q) for b in (4, 16) for h_q in (16, 128)),
    (128, 4096, 16),
)


class Others:
    """The kernels between two calls."""

    def __init__(self) -> None:
        self.wide, self.narrow, self.x = normal(8192, 8192), normal(2048, 2048), normal(8, 8192)

    def __call__(self) -> torch.Tensor:
        y = torch.nn.functional.layer_norm(self.x @ self.wide, (8192,))[:, :2048]
        return (y.sin().softmax(-1) @ self.narrow).cumsum(-1).sum()


def measure(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Microseconds of a pair, the median of some rounds, all in turn in each."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(ROUNDS + 2):
        for name in random.Random(number).sample(list(graphs), len(graphs)):
            took = microseconds(graphs[name], CALLS)
            if number > 1:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    libraries = {path: load(path) for path in sys.argv[1:]}
    others = Others()
    for b, s_k, h_q in SHAPES:
        shape = cases.Shape(b, 1, s_k, h_q)
        data = draw(shape, CALLS)
        calls = {path: of_library(library, shape, data) for path, library in libraries.items()}
        if importlib.util.find_spec("flash_mla") is not None:
            calls["flashmla"] = peers._CALLS["flashmla"](shape, data)
        made = {"": peers.capture(lambda _: others(), CALLS)}
        for name, call in calls.items():
            made[name] = peers.capture(lambda i, call=call: (others(), call(i)), CALLS)
        took = measure({name: found for name, (found, _) in made.items()})
        shown = "  ".join(f"{name} {took[name] - took['']:.1f}" for name in calls)
        print(f"({shape})  others {took['']:.1f}  {shown}", flush=True)


if __name__ == "__main__":
    main()
