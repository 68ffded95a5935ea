# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The peers that may be installed, all for PyTorch: FlashMLA, FlashAttention-3, FlashInfer.

They take the very arrays of our implementations, through DLPack, and are timed by replay of a CUDA
graph between two events, in the runs that ours are timed in. What a peer plans before its calls is
not timed. JAX itself has no op to measure: its paged attention wants keys and values of one width,
its attention has no pages.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mla_jax.bench.cases import D_K, D_V, PAGE_SIZE, SCALE, Data, Shape
from mla_jax.bench.timing import TimedCalls

# name: (module, what pip installs)
_PACKAGES = {
    "flashmla": ("flash_mla", "sgl-flash-mla"),
    "fa3": ("fa3_fwd_interface", "fa3-fwd"),
    "flashinfer": ("flashinfer", "flashinfer-python"),
}
PEERS = tuple(_PACKAGES)


def unsupported_reason(name: str, dtype: str) -> str | None:
    """Says why a peer cannot be measured here, or None."""
    module, package = _PACKAGES[name]
    for needed, install in ((module, package), ("torch", "torch")):
        if importlib.util.find_spec(needed) is None:
            return f"not installed (pip install {install})"
    if jax.default_backend() != "gpu":
        return "it runs on NVIDIA GPUs alone"
    if dtype not in ("bfloat16", "float16"):
        return f"got dtype {dtype}, it takes bfloat16 and float16"
    return None


def peer_versions() -> dict[str, str]:
    """Returns the versions of the peers that are installed, and of torch."""
    found = {}
    for package in ("torch", *(package for _, package in _PACKAGES.values())):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def capture(call: Callable[[int], Any], calls: int) -> tuple[Any, list[Any]]:
    """Makes a CUDA graph of `call(0)`, .., `call(calls - 1)`.

    Returns:
        The graph, and the results of its calls; both, and what `call` closes over, must be kept
        for as long as the graph is replayed.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever a first call sets up stays out of the graph
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # A thread of XLA's asks its streams for their state every now and then. By default CUDA forbids
    # that to all threads while one captures, and XLA takes the refusal for the streams' end.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = [call(i) for i in range(calls)]
    return graph, results


class PeerVariant(TimedCalls):
    """A peer as a CUDA graph of `calls` calls, each with its own inputs, replayed `repeats` times.

    Args:
        name: one of `PEERS`, for which `unsupported_reason` is None.
        shape: of each call.
        data: inputs of at least `calls` calls.
        calls: of the graph.
        repeats: replays of a measurement.

    Attributes:
        calls: of a measurement, `calls * repeats`.
    """

    def __init__(self, name: str, shape: Shape, data: Data, calls: int, repeats: int = 1) -> None:
        import torch

        self.calls, self._repeats = calls * repeats, repeats
        self._torch = torch
        arrays = (data.queries[:calls], data.pools, data.tables[:calls], data.lengths)
        tensors = Data(*jax.tree.map(torch.from_dlpack, jax.block_until_ready(arrays)))
        # The graph reads what the call closes over (a schedule, caches laid out anew): kept.
        self._call = _CALLS[name](shape, tensors)
        self._graph, self._results = capture(self._call, calls)

    def first_result(self) -> np.ndarray:
        """Replays the graph and returns the result of its first call."""
        self._graph.replay()
        self._torch.cuda.synchronize()
        return self._results[0].float().cpu().numpy()

    def run(self, times: int) -> float:
        """Replays all so many times; returns the seconds between two events around them."""
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times * self._repeats):
            self._graph.replay()
        end.record()
        self._torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3


def _flashmla(shape: Shape, data: Any) -> Callable[[int], Any]:
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    schedule = get_mla_metadata()[0]  # filled by the first call; it depends on the lengths alone
    # Without use_legacy the package takes kernels of newer GPUs.
    options = {"causal": shape.causal, "use_legacy": True, "is_fp8_kvcache": False}

    def call(i: int) -> Any:
        return flash_mla_with_kvcache(*data.call(i), D_V, schedule, **options)[0]

    return call


def _fa3(shape: Shape, data: Any) -> Callable[[int], Any]:
    from fa3_fwd_interface import flash_attn_with_kvcache

    # It reads no pages here: each sequence laid out in one piece, by its pool's first table.
    caches = [
        pool[table.clamp(min=0).long()].view(shape.b, -1, 1, D_K)
        for pool, table in zip(data.pools, data.tables, strict=False)
    ]
    options = {"softmax_scale": SCALE, "causal": shape.causal}
    if shape.varlen:
        options["cache_seqlens"] = data.lengths
    else:
        caches = [cache[:, : shape.s_k] for cache in caches]

    def call(i: int) -> Any:
        q, cache = data.queries[i], caches[i % len(caches)]
        latents, rotary = cache[..., :D_V], cache[..., D_V:]
        return flash_attn_with_kvcache(q[..., D_V:], rotary, latents, qv=q[..., :D_V], **options)

    return call


def _flashinfer(shape: Shape, data: Any) -> Callable[[int], Any]:
    import torch
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    lengths = data.lengths.cpu()
    starts = torch.nn.functional.pad((-(-lengths // PAGE_SIZE)).cumsum(0), (1, 0)).int()
    queries = torch.arange(shape.b + 1, dtype=torch.int32) * shape.s_q
    dtype = data.queries[0].dtype
    workspace = torch.empty(2**27, dtype=torch.int8, device="cuda")  # of one call at a time
    wrappers = []
    for table in data.tables:
        wrapper = BatchMLAPagedAttentionWrapper(workspace)
        wrapper.plan(
            queries.cuda(),
            starts.cuda(),
            table[table >= 0],
            data.lengths,
            shape.h_q,
            D_V,
            D_K - D_V,
            PAGE_SIZE,
            shape.causal,
            SCALE,
            dtype,
            dtype,
        )
        wrappers.append(wrapper)

    def call(i: int) -> Any:
        q, pool, _, _ = data.call(i)
        q, pool = q.view(-1, shape.h_q, D_K), pool[:, :, 0]
        parts = (q[..., :D_V], q[..., D_V:], pool[..., :D_V], pool[..., D_V:])
        return wrappers[i].run(*parts).view(shape.b, shape.s_q, shape.h_q, D_V)

    return call


_CALLS: dict[str, Callable[[Shape, Any], Callable[[int], Any]]] = {
    "flashmla": _flashmla,
    "fa3": _fa3,
    "flashinfer": _flashinfer,
}
