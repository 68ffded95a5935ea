# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
r"""Small calls of every template of the CUDA kernels, for compute-sanitizer; needs nvcc and a GPU.

    for tool in memcheck initcheck synccheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 python tests/sanitizer.py LIBRARY
    done
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitizer.py RACECHECK

LIBRARY is the kernels alone, without XLA:

    nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -shared -Xcompiler -fPIC \
        -o LIBRARY xla_ffi/cuda/sm90/{decode/launch,layer/launch,append}.cu

RACECHECK is the same with -DMLA_JAX_RACECHECK: racecheck does not follow `bar.arrive`, nor
barriers that some warps pass more often than others (xla_ffi/cuda/sm90/ptx.cuh).
"""

import ctypes
import dataclasses
import itertools
import os
import sys
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax.numpy as jnp
import numpy as np
import reference
import shapes
import test_layer
from reference import Problem, assert_close, assert_rounded, assert_same_bits, attend, problem

from mla_jax.layer import weights
from mla_jax.rope import rope_tables

MARGIN = 1 << 20  # bytes
COUNTERS = 264  # MLA_SM90_COUNTERS of xla_ffi/mla.h


def _fields(pointers: str, sizes: str, **others: Any) -> list[tuple[str, Any]]:
    return [
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, ctypes.c_int32) for name in sizes.split()),
        *others.items(),
    ]


class Params(ctypes.Structure):
    """MlaDecodeParams of xla_ffi/mla.h."""

    _fields_ = _fields(
        "q q_pe k_cache block_table cache_seqlens out lse workspace counters",
        "b s_q h_q h_kv d_k d_v num_pages page_size max_pages_per_seq",
        softmax_scale=ctypes.c_float,
        causal=ctypes.c_int32,
        dtype=ctypes.c_int32,
        batch_invariant=ctypes.c_int32,
    )


class AppendParams(ctypes.Structure):
    """MlaAppendParams of xla_ffi/mla.h."""

    _fields_ = _fields(
        "pages latents scale cos sin block_table seqlens num_new place",
        "b t c r num_rows num_slots num_layers num_pages page_size max_pages_per_seq",
        epsilon=ctypes.c_float,
        interleaved=ctypes.c_int32,
        dtype=ctypes.c_int32,
        scale_dtype=ctypes.c_int32,
    )


class LayerParams(ctypes.Structure):
    """MlaLayerParams of xla_ffi/mla.h."""

    _fields_ = _fields(
        "x norm w_q w_kv kv_norm w_uk w_uv w_o cos sin block_table seqlen num_new pages y "
        "workspace",
        "d h n r c v layer num_layers num_pages page_size max_pages",
        norm_epsilon=ctypes.c_float,
        kv_norm_epsilon=ctypes.c_float,
        softmax_scale=ctypes.c_float,
        interleaved=ctypes.c_int32,
        dtype=ctypes.c_int32,
    )


class Device:
    """Memory of the first GPU, by the driver; what is copied to it counts as initialised."""

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        error = getattr(self.driver, name)(*arguments)
        if error:
            sys.exit(f"{name}: CUDA error {error}")

    def allocate(self, num_bytes: int) -> ctypes.c_void_p:
        pointer = ctypes.c_void_p()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(num_bytes))
        return pointer

    def put(self, array: np.ndarray) -> ctypes.c_void_p:
        array = np.ascontiguousarray(array)
        pointer = self.allocate(array.nbytes)
        source = ctypes.c_void_p(array.ctypes.data)
        self.call("cuMemcpyHtoD_v2", pointer, source, ctypes.c_size_t(array.nbytes))
        return pointer

    def get(self, pointer: ctypes.c_void_p, like: np.ndarray) -> np.ndarray:
        target = ctypes.c_void_p(like.ctypes.data)
        self.call("cuMemcpyDtoH_v2", target, pointer, ctypes.c_size_t(like.nbytes))
        return like

    def put_guarded(self, like: np.ndarray) -> ctypes.c_void_p:
        """Memory for a result, `MARGIN` from where it begins: a write beside it shows."""
        return self.put(np.full(like.nbytes + 2 * MARGIN, 0xA5, np.uint8))

    def get_guarded(self, pointer: ctypes.c_void_p, like: np.ndarray) -> np.ndarray:
        whole = self.get(pointer, np.empty(like.nbytes + 2 * MARGIN, np.uint8))
        before, inside, after = np.split(whole, [MARGIN, -MARGIN])
        assert np.all(np.append(before, after) == 0xA5), "written outside a result"
        return inside.view(like.dtype).reshape(like.shape)


def run(
    device: Device,
    library: ctypes.CDLL,
    p: Problem,
    causal: bool,
    invariant: bool,
    in_parts: bool = False,
) -> tuple[Any, Any]:
    """Calls the kernel with every buffer an allocation of its own."""
    b, s_q, h_q, d_k = p.q.shape
    num_pages, page_size, h_kv, _ = p.k_cache.shape
    q, q_pe = p.q, None
    if h_kv > 1:  # as the kernel wants it: rows that read the same keys at one stride
        q = q.reshape(b, s_q, h_kv, h_q // h_kv, d_k).swapaxes(2, 3)
    if in_parts:
        q, q_pe = q[:, 0, :, :512].swapaxes(0, 1), device.put(q[:, 0, :, 512:])
    out, lse = np.empty((b, s_q, h_q, 512), p.q.dtype), np.empty((b, h_q, s_q), np.float32)
    arrays = [device.put(x) for x in (q, p.k_cache, p.block_table, p.cache_seqlens)]
    sizes = (b, s_q, h_q, h_kv, d_k, 512, num_pages, page_size, p.block_table.shape[1])
    dtype = 1 if p.q.dtype == np.float16 else 0
    params = Params(
        arrays[0], q_pe, *arrays[1:], *[None] * 4, *sizes, d_k**-0.5, causal, dtype, invariant
    )
    workspace = library.mla_sm90_decode_workspace_bytes(ctypes.byref(params), 132)
    results = [device.put_guarded(x) for x in (out, lse)]
    rest = [device.allocate(n) for n in (workspace, 4 * COUNTERS)]
    params.out, params.lse = (x.value + MARGIN for x in results)
    params.workspace, params.counters = rest
    if error := library.mla_sm90_decode(ctypes.byref(params), None):
        sys.exit(f"launch: CUDA error {error}")
    out, lse = map(device.get_guarded, results, (out, lse))
    for pointer in (*arrays, *results, *rest, *([q_pe] if in_parts else [])):
        device.call("cuMemFree_v2", pointer)
    return out, lse


def append(
    device: Device,
    library: ctypes.CDLL,
    dtype: Any,
    scale_dtype: Any,
    interleaved: bool,
    integers: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Appends 3 tokens of each sequence; returns the pages and what float64 makes of them.

    Args:
        device: to run on.
        library: the kernels.
        dtype: of latents and pages.
        scale_dtype: of the norm's weights.
        interleaved: the order of the rotated channels.
        integers: block table, lengths, numbers of new tokens, and the layer with two zeros.
    """
    b, t, c, r, num_layers, num_pages, page_size = len(integers[1]), 3, 512, 64, 2, 9, 16
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((b, t, c + r)).astype(dtype)
    scale = rng.standard_normal(c).astype(scale_dtype)
    angle = rng.uniform(-3, 3, (b, t, r // 2))
    operands = (latents, scale, np.cos(angle).astype("f4"), np.sin(angle).astype("f4"))
    pages = np.ones((num_layers * num_pages, page_size, 1, c + r), dtype)
    *tokens, (layer, *_) = integers
    want = reference.append(pages, operands, *tokens, layer, num_pages, interleaved=interleaved)
    arrays = [device.put(x) for x in (pages, *operands, *integers)]
    sizes = (b, t, c, r, *pages.shape[:2], num_layers, num_pages, page_size, tokens[0].shape[1])
    code = {"bfloat16": 0, "float16": 1, "float32": 2}
    kinds = (code[pages.dtype.name], code[scale.dtype.name])
    params = AppendParams(*arrays, *sizes, 1e-6, interleaved, *kinds)
    if error := library.mla_sm90_append(ctypes.byref(params), None):
        sys.exit(f"append: CUDA error {error}")
    got = device.get(arrays[0], np.empty_like(pages))
    for pointer in arrays:
        device.call("cuMemFree_v2", pointer)
    return got, want


def check_append(device: Device, library: ctypes.CDLL) -> int:
    """Holds the append to float64, also where lengths and tables are anything."""
    rng = np.random.default_rng(0)
    table = rng.permutation(9)[:8].reshape(4, 2).astype(np.int32)
    right = [table, np.array([3, 18, 32, 7]), np.array([3, 3, 1, 0]), np.array([1, 0, 0])]
    anything = [rng.integers(-(2**31), 2**31, x.shape) for x in right[:3]]
    count = 0
    for integers in (right, [*anything, right[3]]):
        for dtype in (jnp.bfloat16, jnp.float16):
            for scale_dtype in (dtype, np.float32):
                for interleaved in (False, True):
                    values = [np.asarray(x, np.int32) for x in integers]
                    got, want = append(device, library, dtype, scale_dtype, interleaved, values)
                    assert_rounded(got, want)
                    count += 1
    return count


def run_layer(
    device: Device, library: ctypes.CDLL, layer: test_layer.Layer, x: Any, cache: Any, norm: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Calls the kernels of a layer, the second of the cache's; returns y and the pages."""
    attention = layer.attention
    *matrices, own = weights(attention, layer.norm if norm else None, None)
    angles = rope_tables(attention.rope, cache.positions(1), attention.qk_rope_head_dim)
    integers = (cache.block_table, cache.seqlens, cache.num_new)
    arrays = [device.put(np.asarray(a)) for a in (x, *matrices, *angles, *integers, cache.pages)]
    own = device.put(np.asarray(own)) if norm else None
    d, h = x.shape[-1], attention.num_heads
    y = np.empty(x.shape, x.dtype)
    result = device.put_guarded(y)
    library.mla_sm90_layer_workspace_bytes.restype = ctypes.c_size_t
    workspace = device.allocate(library.mla_sm90_layer_workspace_bytes(h))
    sizes = (1, cache.num_layers, cache.num_pages, cache.pages.shape[1], cache.block_table.shape[1])
    params = LayerParams(
        *(arrays[0], own, *arrays[1:], result.value + MARGIN, workspace),
        *(d, h, 128, 64, 512, 128, *sizes, test_layer.EPSILON, test_layer.KV_EPSILON),
        *(attention.softmax_scale, attention.rope.interleaved, x.dtype == np.float16),
    )
    if error := library.mla_sm90_layer(ctypes.byref(params), None):
        sys.exit(f"layer: CUDA error {error}")
    y = device.get_guarded(result, y)
    pages = device.get(arrays[-1], np.empty(cache.pages.shape, cache.dtype))
    for pointer in (*arrays, result, workspace, *([own] if norm else [])):
        device.call("cuMemFree_v2", pointer)
    return y, pages


def check_layer(device: Device, library: ctypes.CDLL) -> int:
    """Holds layers of one token to float64, also where lengths and tables are anything."""
    cases = [
        (16, 2048, 4100, 64, "bfloat16", True, True),
        (16, 512, 9000, 128, "float16", False, False),
        (3, 512, 40, 16, "float16", True, True),
        (33, 2560, 300, 32, "bfloat16", False, True),
        (128, 512, 700, 64, "bfloat16", True, False),
    ]
    for case in cases:
        layer, x, cache, norm = test_layer.layer_of(case)
        got = run_layer(device, library, layer, x, cache, norm)
        test_layer.assert_is_the_definition(got, layer, x, cache, 1, norm)
    rng = np.random.default_rng(0)
    for _ in range(4):
        table, *counts = (rng.integers(-(2**31), 2**31, n) for n in (cache.block_table.size, 1, 1))
        integers = [jnp.asarray(v, jnp.int32) for v in (table[None], *counts)]
        names = ("block_table", "seqlens", "num_new")
        wild = dataclasses.replace(cache, **dict(zip(names, integers, strict=True)))
        run_layer(device, library, layer, x, wild, norm)
    return len(cases)


def main() -> None:
    """Holds each case to the oracle, so that what is checked is also right."""
    library = ctypes.CDLL(sys.argv[1])
    library.mla_sm90_decode_workspace_bytes.restype = ctypes.c_size_t
    device = Device()
    cases: list[tuple[list[int], dict[str, Any]]] = []
    for dtype in (jnp.bfloat16, jnp.float16):
        for d_k in (576, 512):
            cases.append(([200, 0, 700], {"h_q": 16, "d_k": d_k, "dtype": dtype}))
            wide = {"h_q": 128, "s_q": 2, "width": 1000}  # room for many blocks
            cases.append(([130, 900], {**wide, "d_k": d_k, "dtype": dtype}))
    cases.append(([130, 900], {"h_q": 128, "s_q": 2}))
    cases += [([600], {"h_q": h_q, "width": 1000}) for h_q in (40, 128)]  # low tiles
    for page_size in (16, 32, 128):
        cases += [([3, 300], {"h_q": h_q, "page_size": page_size}) for h_q in (3, 40)]
    cases += [([64, 200], {"h_q": 16, "h_kv": 2, "s_q": 2}), ([64] * 140, {"h_q": 16})]
    cases += [([9000], {"h_q": 16}), ([2000] * 5, {"h_q": 128}), ([70] * 40, {"h_q": 16})]
    cases.append(([600] * 20, {"h_q": 128}))  # combined in wide units
    cases.append(([20_000], {"h_q": 3}))
    lengths, s_q, h_q = shapes.IN_STEP[1]
    cases.append((lengths, {"h_q": h_q, "s_q": s_q}))
    for lengths, options in cases:
        p = problem(lengths, **options, poison=0)
        causal = "s_q" in options
        for invariant in (False, True):
            got = run(device, library, p, causal, invariant)
            assert_close(got, attend(p, causal=causal))
            if not causal and p.k_cache.shape[2:] == (1, 576):
                assert_same_bits(run(device, library, p, causal, invariant, in_parts=True), got)
    garbage = np.random.default_rng(0).integers(-(2**31), 2**31, (7, 34)).astype(np.int32)
    for h_q, invariant in itertools.product((16, 40), (False, True)):
        p = problem([300] * 7, h_q=h_q, width=33)
        p = Problem(p.q, p.k_cache, garbage[:, :33].copy(), garbage[:, 33].copy())
        run(device, library, p, False, invariant)
    appends = check_append(device, library)
    layers = check_layer(device, library)
    print(f"{len(cases)} cases, {appends} appends and {layers} layers agree with the oracle")


if __name__ == "__main__":
    main()
