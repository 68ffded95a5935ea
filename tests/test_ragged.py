# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Ragged queries against the oracle, on a grid as FlashInfer's, and the packed cache's adapters."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from reference import assert_close, attend, problem

import mla_jax

KV = [0, 17, 33, 64, 97, 114, 514, 1024]
QO = list(range(1, 18, 2))


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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("tile", [1, 4, 16])
def test_grid(op, implementation, page_size, tile, causal):
    """All 72 pairs of lengths at once; more queries than tokens, no tokens, no queries."""
    pairs = [(kv, qo) for kv in KV for qo in QO] + [(5, 0), (0, 0)]
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    lengths, q_lens = (list(x) for x in zip(*pairs, strict=True))
    p = problem(lengths, d_k=64, d_v=48, h_q=2, page_size=page_size, dtype="float32")
    total = sum(q_lens)
    rng = np.random.default_rng(1)
    p = replace(p, q=rng.standard_normal((total, 1, 2, 64)).astype(np.float32))
    op(p.q[:74], *p.arrays()[1:], 48)  # skips where the implementation cannot run
    cu = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    q = np.concatenate([p.q[:, 0], np.full((7, 2, 64), np.nan, np.float32)])  # what follows
    run = functools.partial(
        mla_jax.ragged_mla_with_kvcache,
        head_dim_v=48,
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
