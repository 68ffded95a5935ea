# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Libraries of the kernels beside each other: whether they give the same bits, and their times.

    PYTHONPATH=. python tests/kernel_times.py LIBRARY [OTHER ...] [--peers] [--shapes SHAPE ...]

A library is the kernels alone (tests/sanitizer.py says how to build one). Needs a Hopper GPU and
torch; with --peers also sgl-flash-mla and fa3-fwd.

First all get the same drawn calls, with garbage in what they write; how many give other bits than
the first library is printed. Then each shape, b,s_q,s_k,h_q, is timed: CUDA graphs of some calls,
in random order with pauses between, which leave the clock high. Printed are medians in
microseconds a call, the first library's time over each, and the largest relative error of some
sequences against float64.
"""

import argparse
import ctypes
import math
import random
import statistics
import time
from typing import Any

import numpy as np
import torch
from kernel_calls import Call, draw, load, microseconds, normal, of_library

from mla_jax.bench import cases, peers


def drawn_call(rng: random.Random) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Arguments of a call: any batch, heads, widths, pages and lengths that kernels differ by."""
    b = rng.choice((1, 1, 2, 3, 4, 16, 40, 128, 140))
    s_q, h_q = rng.choice((1, 1, 1, 2, 4)), rng.choice((1, 3, 16, 32, 64, 100, 128))
    d_k, page_size = rng.choice((576, 576, 576, 512)), rng.choice((16, 32, 64, 64, 64, 128))
    longest = min(rng.choice((64, 300, 1000, 5000, 20000)), 600_000 // b)
    dtype = rng.choice((torch.bfloat16, torch.bfloat16, torch.float16))
    alike = rng.random() < 0.4
    lengths = [longest if alike else rng.randint(0, longest) for _ in range(b)]
    width = -(-longest // page_size)
    pages = min(b * width, 4000)
    arrays = (
        normal(b, s_q, h_q, d_k, dtype=dtype),
        normal(pages, page_size, 1, d_k, dtype=dtype),
        torch.randint(pages, (b, width), device="cuda", dtype=torch.int32),
        torch.tensor(lengths, device="cuda", dtype=torch.int32),
    )
    scale = rng.choice((d_k**-0.5, d_k**-0.5, 1.0, 8.0))
    return arrays, {"scale": scale, "causal": s_q > 1, "batch_invariant": rng.random() < 0.2}


def count_other_bits(libraries: list[ctypes.CDLL], calls: int) -> list[int]:
    """Counts, for each library, the calls whose results are not the bits of the first one's."""
    rng = random.Random(0)
    torch.manual_seed(0)
    counts = [0] * len(libraries)
    for _ in range(calls):
        arrays, options = drawn_call(rng)
        expected = None
        for i, library in enumerate(libraries):
            q, cache, table, _ = arrays
            call = Call(library, q, cache, table.shape[1], **options)
            for garbage in (call.out, call.lse):
                garbage.fill_(math.nan)
            call.workspace.random_()
            call.counters.random_(-(2**31), 2**31 - 1)
            call(*arrays)
            torch.cuda.synchronize()
            bits = (call.out.view(torch.int16), call.lse.view(torch.int32))
            expected = expected or bits
            counts[i] += not all(map(torch.equal, bits, expected))
    return counts


def to_host(x: torch.Tensor) -> np.ndarray:
    return (x.float() if x.is_floating_point() else x).cpu().numpy()


def float64(shape: cases.Shape, data: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns some sequences and what the first call gives for them, in float64."""
    rows = cases.some_sequences(shape.lengths())
    q, pool, table, lengths = data.call(0)
    pages = to_host(pool[table[rows].long()]).reshape(-1, *pool.shape[1:])  # theirs alone
    own = np.arange(len(pages)).reshape(len(rows), -1)
    order = np.arange(len(rows))
    return rows, cases.reference(to_host(q[rows]), pages, own, to_host(lengths[rows]), order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("libraries", nargs="+")
    parser.add_argument("--peers", action="store_true", help="measure both peers as well")
    parser.add_argument("--shapes", nargs="+", type=cases.parse_shape, default=cases.GPU_SHAPES)
    parser.add_argument("--bits", type=int, default=400, help="drawn calls")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.06, help="seconds before each graph")
    options = parser.parse_args()
    libraries = {path: load(path) for path in options.libraries}
    first, *others = libraries
    counts = count_other_bits(list(libraries.values()), options.bits)
    for name, count in zip(others, counts[1:], strict=True):
        print(f"{name}: {count} of {options.bits} calls give other bits than {first}", flush=True)

    ratios: dict[str, list[float]] = {}
    for shape in options.shapes:
        calls = max(4, cases.num_pools(shape, 2))
        data = draw(shape, calls)
        variants = {path: of_library(x, shape, data) for path, x in libraries.items()}
        if options.peers:
            variants |= {name: peers._CALLS[name](shape, data) for name in ("flashmla", "fa3")}
        rows, expected = float64(shape, data)
        errors = {
            name: cases.relative_error(to_host(call(0)[rows]), expected)
            for name, call in variants.items()
        }
        graphs = {name: peers.capture(call, calls) for name, call in variants.items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for number in range(options.rounds + 1):
            for name in random.sample(list(graphs), len(graphs)):
                time.sleep(options.pause)
                took = microseconds(graphs[name][0], calls)
                if number > 0:
                    times[name].append(took)
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, us in medians.items():
            ratios.setdefault(name, []).append(medians[first] / us)
        shown = (
            f"{n} {us:.1f} ({ratios[n][-1]:.3f}, {errors[n]:.1e})" for n, us in medians.items()
        )
        print(f"({shape})  {'  '.join(shown)}", flush=True)
        del graphs, variants, data
        torch.cuda.empty_cache()
    means = (f"{n} {statistics.geometric_mean(values):.4f}" for n, values in ratios.items())
    print("geometric means  " + "  ".join(means))


if __name__ == "__main__":
    main()
