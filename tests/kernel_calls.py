# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Calls of the CUDA kernels alone, by ctypes, on torch's arrays; for the scripts that time them."""

import ctypes
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from sanitizer import COUNTERS, Params

from mla_jax.bench import cases


def load(path: str) -> ctypes.CDLL:
    """Loads the kernels alone; tests/sanitizer.py says how to build them."""
    library = ctypes.CDLL(path)
    library.mla_sm90_decode_workspace_bytes.restype = ctypes.c_size_t
    return library


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def draw(shape: cases.Shape, calls: int) -> cases.Data:
    """Inputs of some calls, torch's, each with a pool of its own where all take up to 1.5 GB."""
    pages = shape.b * shape.s_k // cases.PAGE_SIZE
    count = min(calls, max(1, 1_500_000_000 // shape.cache_bytes(2)))
    order = (torch.randperm(pages, device="cuda").int() for _ in range(calls))
    return cases.Data(
        [normal(shape.b, shape.s_q, shape.h_q, cases.D_K) for _ in range(calls)],
        [normal(pages, cases.PAGE_SIZE, 1, cases.D_K) for _ in range(count)],
        [x.view(shape.b, -1) for x in order],
        torch.full((shape.b,), shape.s_k, device="cuda", dtype=torch.int32),
    )


@dataclasses.dataclass
class Call:
    """Decodes of one shape by one library, all with the same results and workspace."""

    library: ctypes.CDLL
    q: torch.Tensor
    cache: torch.Tensor
    width: int  # of the table
    scale: float
    causal: bool
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        b, s_q, h_q, d_k = self.q.shape
        pages, page_size, h_kv, _ = self.cache.shape
        self._sizes = (b, s_q, h_q, h_kv, d_k, cases.D_V, pages, page_size, self.width)
        needed = self.library.mla_sm90_decode_workspace_bytes(
            ctypes.byref(self._params(*[None] * 9)),
            torch.cuda.get_device_properties(0).multi_processor_count,
        )
        self.out = torch.empty(b, s_q, h_q, cases.D_V, device="cuda", dtype=self.q.dtype)
        self.lse = torch.empty(b, h_q, s_q, device="cuda")
        self.workspace = torch.empty(needed, device="cuda", dtype=torch.uint8)
        self.counters = torch.empty(COUNTERS, device="cuda", dtype=torch.int32)

    def _params(self, *pointers: int | None) -> Params:
        float16 = self.q.dtype == torch.float16
        options = (self.scale, self.causal, float16, self.batch_invariant)
        return Params(*pointers, *self._sizes, *options)

    def __call__(self, q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """Takes q, cache, table and lengths."""
        arrays = (*others, self.out, self.lse, self.workspace, self.counters)
        params = self._params(q.data_ptr(), None, *(x.data_ptr() for x in arrays))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if error := self.library.mla_sm90_decode(ctypes.byref(params), stream):
            sys.exit(f"launch: CUDA error {error}")
        return self.out


def of_library(library: ctypes.CDLL, shape: cases.Shape, data: Any) -> Callable[[int], Any]:
    q, cache, table, _ = data.call(0)
    call = Call(library, q, cache, table.shape[1], cases.SCALE, shape.causal)
    return lambda i: call(*data.call(i))


def microseconds(found: torch.cuda.CUDAGraph, calls: int) -> float:
    """Replays a graph twice; returns what a call of the second run took."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found.replay()
    start.record()
    found.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / calls
