# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Ragged queries against the oracle, on a grid as FlashInfer's, and the packed cache's adapters."""

import functools
import itertools
import os
from dataclasses import replace

import jax
import numpy as np
import pytest
from meshes import on_gpu
from reference import assert_close, attend, problem

import mla_jax
from mla_jax import adapters

KV = [0, 17, 33, 64, 97, 114, 514, 1024]
QO = list(range(1, 18, 2))
# Queries per tile, page size, causal; all pairs of lengths are in each.
if on_gpu() or os.environ.get("MLA_JAX_FULL_GRID") == "1":
    GRID = list(itertools.product([1, 4, 16], [16, 64], [True, False]))
else:
    GRID = [(1, 64, True), (4, 16, False), (16, 16, True)]


def expected(p, q_lens, causal):
    """The oracle of each sequence alone; `p.q` is `[total, 1, h, d]`."""
    outs, lses, first = [], [], 0
    for i, n in enumerate(q_lens):
        q = p.q[first : first + n, 0][None]
        one = replace(p.rows(slice(i, i + 1)), q=q)
        out, lse = attend(one, causal=causal)
        outs.append(out[0])
        lses.append(lse[0].T)
        first += n
    return np.concatenate(outs), np.concatenate(lses)


@pytest.mark.parametrize(("tile", "page_size", "causal"), GRID)
def test_grid(op, implementation, page_size, tile, causal):
    """All 72 pairs of lengths at once; more queries than tokens, no tokens, no queries."""
    kernel = on_gpu() and implementation != "xla"  # which takes DeepSeek's widths alone
    d_k, d_v, dtype = (576, 512, "bfloat16") if kernel else (64, 48, "float32")
    pairs = [(kv, qo) for kv in KV for qo in QO] + [(5, 0), (0, 0)]
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    lengths, q_lens = (list(x) for x in zip(*pairs, strict=True))
    p = problem(lengths, d_k=d_k, d_v=d_v, h_q=2, page_size=page_size, dtype=dtype)
    total = sum(q_lens)
    rng = np.random.default_rng(1)
    p = replace(p, q=rng.standard_normal((total, 1, 2, d_k)).astype(p.q.dtype))
    op(p.q[:74], *p.arrays()[1:], d_v)  # skips where the implementation cannot run
    cu = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    q = np.concatenate([p.q[:, 0], np.full((7, 2, d_k), np.nan, p.q.dtype)])  # what follows
    run = functools.partial(
        mla_jax.ragged_mla_with_kvcache,
        head_dim_v=d_v,
        causal=causal,
        queries_per_tile=tile,
        implementation=implementation,
    )
    out, lse = jax.jit(run)(q, *p.arrays()[1:], cu)
    assert not out[total:].any()
    assert np.isposinf(lse[total:]).all()
    want, want_lse = expected(p, q_lens, causal)
    got = out[None, :total], lse[:total].T[None]
    assert_close(got, (want[None], want_lse.T[None]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": np.zeros((4, 1, 2, 64), np.float32)},
            r"q: got float32\[4, 1, 2, 64\], expected 3",
        ),
        (
            {"cu_q_lens": np.zeros(2, np.int32)},
            r"cu_q_lens: got int32\[2\], expected int32\[n",
        ),
        ({"queries_per_tile": 0}, "queries_per_tile: got 0, expected a positive int"),
    ],
    ids=str,
)
def test_refusals(change, message):
    p = problem([3, 4], d_k=64, d_v=48, h_q=2, dtype="float32")
    names = ("k_cache", "block_table", "cache_seqlens")
    right = dict(zip(names, p.arrays()[1:], strict=True))
    right |= {"q": p.q[:, 0], "cu_q_lens": np.array([0, 1, 2], np.int32), "head_dim_v": 48}
    with pytest.raises(ValueError, match=message):
        mla_jax.ragged_mla_with_kvcache(**(right | change))


def test_an_implementation_that_cannot_says_why():
    p = problem([3, 4], d_k=64, d_v=48, h_q=2, dtype="float32")
    arguments = (p.q[:, 0], *p.arrays()[1:], np.array([0, 1, 2], np.int32), 48)
    name = "ffi" if on_gpu() else "pallas"
    with pytest.raises(NotImplementedError, match=f"{name}: (q: got dtype float32|not on cpu)"):
        mla_jax.ragged_mla_with_kvcache(*arguments, implementation=name)


# --- Adapters -------------------------------------------------------------------------------------


def packed(seed=0):
    """A mixed step: decode, prefill with a prefix, prefill from nothing, and an unused slot."""
    rng = np.random.default_rng(seed)
    c, r, heads, page_size, packing = 40, 16, 3, 8, 2
    lengths, q_lens = np.array([20, 30, 5, 99]), np.array([1, 7, 5, 0])
    cu = np.concatenate([[0], np.cumsum(q_lens)])
    cu[-1] = 77  # past the sequences in use
    table = rng.permutation(24)[:20].reshape(4, 5)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    total = 16  # three more than there are queries
    keys = [draw(n, c + r) for n in lengths[:3]]
    cache = np.full((24, page_size, 256), np.nan, np.float32)
    new = np.full((total, c + r), np.nan, np.float32)
    for i, rows in enumerate(keys):
        old = len(rows) - q_lens[i]
        new[cu[i] : cu[i] + q_lens[i]] = rows[old:]
        for t, row in enumerate(rows[:old]):
            padded = np.zeros(256, np.float32)
            padded[:c], padded[128 : 128 + r] = row[:c], row[c:]
            cache[table[i, t // page_size], t % page_size] = padded
    q = draw(total, heads, c + r)
    ints = [np.asarray(x, np.int32) for x in (lengths, table.reshape(-1), cu, [1, 1, 3])]
    arrays = (q[..., :c], q[..., c:], new[:, :c], new[:, c:])
    return q, keys, q_lens, (*arrays, cache.reshape(24, page_size // packing, packing, 256), *ints)


# As callers of these libraries write it; tokamax's op has the names of tpu-inference's function.
TOKAMAX = {"s_dtype": "float32", "return_residuals": False, "mask_value": -1e30}
TOKAMAX |= {"q_scale": 2.0, "k_scale": 0.25, "v_scale": 3.0, "sm_scale": 0.4}
CALLS = {
    "tpu-inference": ("mla_ragged_paged_attention", {"sm_scale": 0.2, "transpose_kv_cache": False}),
    "tokamax": ("mla_ragged_paged_attention", TOKAMAX),
    "ejkernel": ("multi_latent_ragged_page_attention", {"softmax_scale": 0.2, "cfg": None}),
    "ejkernel v2": ("multi_latent_ragged_page_attention_v2", {"softmax_scale": 0.2}),
}


@pytest.mark.parametrize("library", CALLS)
def test_adapters(library):
    name, options = CALLS[library]
    q, keys, q_lens, arguments = packed()
    call = functools.partial(getattr(adapters, name), num_kv_pages_per_block=2, **options)
    out, cache = jax.jit(call)(*arguments)
    out = out / options.get("v_scale", 1.0)
    assert cache.shape == arguments[4].shape
    first = 0
    for rows, n in zip(keys, q_lens[:3], strict=True):
        for j in range(n):
            seen = rows[: len(rows) - n + j + 1].astype(np.float64)
            scores = 0.2 * q[first + j].astype(np.float64) @ seen.T
            weights = np.exp(scores - scores.max(1, keepdims=True))
            want = weights @ seen[:, :40] / weights.sum(1, keepdims=True)
            np.testing.assert_allclose(out[first + j], want, rtol=1e-4, atol=1e-5)
        first += n
    assert not out[first:].any()
    # The tokens are where a next step finds them, and nothing else has changed.
    before, table = arguments[4].reshape(24, 8, 256), arguments[6].reshape(4, 5)
    after = np.asarray(cache).reshape(24, 8, 256)
    for i, rows in enumerate(keys):
        for t, row in enumerate(rows):
            got = after[table[i, t // 8], t % 8]
            np.testing.assert_array_equal(np.concatenate([got[:40], got[128:144]]), row)
    changed = (after != before) & ~(np.isnan(after) & np.isnan(before))
    assert changed.any(-1).sum() == q_lens.sum()


def test_adapters_refuse():
    *_, arguments = packed()
    for name, value in [("sliding_window", 4), ("transpose_kv_cache", True), ("soft_cap", 0.0)]:
        with pytest.raises(NotImplementedError, match=f"{name}: got {value}, expected None or"):
            adapters.mla_ragged_paged_attention(*arguments, **{name: value})
    with pytest.raises(NotImplementedError, match=r"sparse_mask: got array\(.*expected None or"):
        adapters.mla_ragged_paged_attention(*arguments, sparse_mask=np.ones(2, bool))
    with pytest.raises(NotImplementedError, match="logits_soft_cap: got 30.0, expected None"):
        adapters.multi_latent_ragged_page_attention(*arguments, logits_soft_cap=30.0)
    wrong = (*arguments[:4], arguments[4][..., :200], *arguments[5:])
    with pytest.raises(
        ValueError, match=r"cache_kv: got \[24, 4, 2, 200\], expected 4 axes, the la"
    ):
        adapters.mla_ragged_paged_attention(*wrong)
    with pytest.raises(ValueError, match="page_indices and cu_q_lens: got"):
        adapters.mla_ragged_paged_attention(*arguments[:6], arguments[6][:-1], *arguments[7:])
    with pytest.raises(ValueError, match="new_kv_c and new_k_pe: got"):
        adapters.mla_ragged_paged_attention(*arguments[:2], arguments[2][:-1], *arguments[3:])
