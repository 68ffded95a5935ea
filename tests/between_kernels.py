# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a call takes between a model's other kernels, which push its code and data out of L2.

    PYTHONPATH=. python tests/between_kernels.py LIBRARY [OTHER ...]

A library is the kernels alone (tests/sanitizer.py says how to build one). Needs a Hopper GPU and
torch; FlashMLA is measured beside it where sgl-flash-mla is installed, its schedule not timed.

Before each call come a product with 134 MB of weights and five small kernels. A CUDA graph of 16
such pairs is timed, and one of 16 without the call; the difference counts, in microseconds a call.
"""

import ctypes
import importlib.util
import random
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from sanitizer import Params

from mla_jax.bench import cases, peers

CALLS, ROUNDS = 16, 10
SHAPES = (  # b, s_k, h_q
    *((1, s_k, 16) for s_k in (1024, 4096, 16384)),
    *((1, s_k, 128) for s_k in (4096, 16384)),
    *((b, 4096, h_q) for b in (4, 16) for h_q in (16, 128)),
    (128, 4096, 16),
)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


class Others:
    """The kernels between two calls."""

    def __init__(self) -> None:
        self.wide, self.narrow, self.x = normal(8192, 8192), normal(2048, 2048), normal(8, 8192)

    def __call__(self) -> torch.Tensor:
        y = torch.nn.functional.layer_norm(self.x @ self.wide, (8192,))[:, :2048]
        return (y.sin().softmax(-1) @ self.narrow).cumsum(-1).sum()


def draw(shape: cases.Shape) -> cases.Data:
    """Inputs of all calls, torch's; pools of up to 1.5 GB, none in a cache when its turn comes."""
    pages = shape.b * shape.s_k // cases.PAGE_SIZE
    count = min(CALLS, max(2, 1_500_000_000 // shape.cache_bytes(2)))
    order = (torch.randperm(pages, device="cuda").int() for _ in range(CALLS))
    return cases.Data(
        [normal(shape.b, shape.s_q, shape.h_q, cases.D_K) for _ in range(CALLS)],
        [normal(pages, cases.PAGE_SIZE, 1, cases.D_K) for _ in range(count)],
        [x.view(shape.b, -1) for x in order],
        torch.full((shape.b,), shape.s_k, device="cuda", dtype=torch.int32),
    )


def of_library(library: ctypes.CDLL, shape: cases.Shape, data: Any) -> Callable[[int], Any]:
    b, s_q, h_q = shape.b, shape.s_q, shape.h_q
    sizes = (
        b,
        s_q,
        h_q,
        1,
        cases.D_K,
        cases.D_V,
        *data.pools[0].shape[:2],
        data.tables[0].shape[1],
    )
    options = (cases.SCALE, 0, 0, 0)
    params = Params(*[None] * 9, *sizes, *options)
    needed = library.mla_sm90_decode_workspace_bytes(ctypes.byref(params), 132)
    out = torch.empty(b, s_q, h_q, cases.D_V, device="cuda", dtype=torch.bfloat16)
    lse = torch.empty(b, h_q, s_q, device="cuda")
    workspace = torch.empty(needed, device="cuda", dtype=torch.uint8)
    counters = torch.empty(264, device="cuda", dtype=torch.int32)
    results = (out, lse, workspace, counters)

    def call(i: int) -> Any:
        q, *rest = data.call(i)
        pointers = (q.data_ptr(), None, *(x.data_ptr() for x in (*rest, *results)))
        params = Params(*pointers, *sizes, *options)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if error := library.mla_sm90_decode(ctypes.byref(params), stream):
            sys.exit(f"launch: CUDA error {error}")
        return results

    return call


def graph(once: Callable[[int], Any]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """Returns a graph of all calls, and what must outlive it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once(0)  # whatever a first call sets up stays out of the graph
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    found = torch.cuda.CUDAGraph()
    with torch.cuda.graph(found):
        kept = [once(i) for i in range(CALLS)]
    return found, [kept, once]


def measure(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Microseconds of a pair, the median of some rounds, all in turn in each."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(ROUNDS + 2):
        for name in random.Random(number).sample(list(graphs), len(graphs)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graphs[name].replay()
            start.record()
            graphs[name].replay()
            end.record()
            torch.cuda.synchronize()
            if number > 1:
                times[name].append(1e3 * start.elapsed_time(end) / CALLS)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    libraries = {path: ctypes.CDLL(path) for path in sys.argv[1:]}
    for library in libraries.values():
        library.mla_sm90_decode_workspace_bytes.restype = ctypes.c_size_t
    others = Others()
    for b, s_k, h_q in SHAPES:
        shape = cases.Shape(b, 1, s_k, h_q)
        data = draw(shape)
        calls = {path: of_library(library, shape, data) for path, library in libraries.items()}
        if importlib.util.find_spec("flash_mla") is not None:
            calls["flashmla"] = peers._CALLS["flashmla"](shape, data)
        made = {"": graph(lambda _: others())}
        for name, call in calls.items():
            made[name] = graph(lambda i, call=call: (others(), call(i)))
        took = measure({name: found for name, (found, _) in made.items()})
        shown = "  ".join(f"{name} {took[name] - took['']:.1f}" for name in calls)
        print(f"({shape})  others {took['']:.1f}  {shown}", flush=True)


if __name__ == "__main__":
    main()
