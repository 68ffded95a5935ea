# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Merging attention states: parts of sequences against the oracle on the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Problem, assert_close, assert_same_bits, attend, problem

import mla_jax


def split(p: Problem, pages: list[int]) -> list[Problem]:
    """Cuts each sequence after so many pages of its table; parts may be empty."""
    page_size, parts, first = p.k_cache.shape[1], [], 0
    for end in [*pages, p.block_table.shape[1]]:
        tokens = np.clip(p.cache_seqlens - first * page_size, 0, (end - first) * page_size)
        table = p.block_table[:, first:end] if end > first else p.block_table[:, :1]
        parts.append(Problem(p.q, p.k_cache, table, tokens.astype(np.int32), p.head_dim_v))
        first = end
    return parts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_sequences(op, dtype):
    """An empty part, sequences that end in the first part, and one with no token at all."""
    p = problem([200, 64, 65, 3, 0], s_q=2, page_size=32, dtype=dtype)
    parts = [op(*x.arrays(), 512) for x in split(p, [2, 2, 5])]
    outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
    got = mla_jax.merge_attention_states(outs, lses)
    assert got[0].dtype == dtype
    assert_close(got, attend(p))
    # In any order, and in steps: merged states are states.
    pairs = [mla_jax.merge_attention_states(outs[i::2], lses[i::2]) for i in (1, 0)]
    stacked = [jnp.stack(x) for x in zip(*pairs, strict=True)]
    assert_close(jax.jit(mla_jax.merge_attention_states)(*stacked), attend(p))


def states(n, seed=0):
    rng = np.random.default_rng(seed)
    outs = rng.standard_normal((n, 2, 3, 4, 5)).astype(np.float32)
    return outs, rng.standard_normal((n, 2, 4, 3)).astype(np.float32)


def test_neutral_element():
    """Whatever a part that saw nothing holds, the others keep their bits."""
    outs, lses = states(1)
    for nothing in (np.inf, -np.inf):
        more = np.concatenate([np.full_like(outs, np.nan), outs, np.full_like(outs, np.inf)])
        more_lses = np.concatenate([np.full_like(lses, nothing), lses, np.full_like(lses, nothing)])
        assert_same_bits(mla_jax.merge_attention_states(more, more_lses), (outs[0], lses[0]))
        out, lse = mla_jax.merge_attention_states(more[[0, 2]], more_lses[[0, 2]])
        assert not out.any()
        assert np.isposinf(lse).all()


def test_large_and_far_apart_lse():
    outs, lses = states(3)
    lses += np.array([3000, -3000, 3001], np.float32)[:, None, None, None]
    weights = np.exp(lses.astype(np.float64) - 3000)
    weights[1] = 0
    by_out = weights.swapaxes(-1, -2)[..., None]
    out, lse = mla_jax.merge_attention_states(outs, lses)
    np.testing.assert_allclose(out, (by_out * outs).sum(0) / by_out.sum(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(lse, 3000 + np.log(weights.sum(0)), rtol=1e-6)


def test_nan_shows():
    outs, lses = states(2)
    lses[0, 1, 2, 1] = np.nan
    out, lse = mla_jax.merge_attention_states(outs, lses)
    assert np.isnan(lse[1, 2, 1])
    assert np.isnan(out[1, 1, 2]).all()
    assert np.isnan(lse).sum() == 1


def test_gradient():
    """Of one sequence cut in two, through op and merge, as of the whole."""
    p = problem([9, 3], page_size=4, d_k=24, d_v=16, dtype="float32")
    arrays = p.arrays()

    def whole(q, k):
        return mla_jax.flash_mla_with_kvcache(q, k, *arrays[2:], 16)

    def merged(q, k):
        parts = [
            mla_jax.flash_mla_with_kvcache(q, k, x.block_table, x.cache_seqlens, 16)
            for x in split(p, [1])
        ]
        return mla_jax.merge_attention_states(*(jnp.stack(x) for x in zip(*parts, strict=True)))

    gradients = []
    for run in (whole, merged):
        loss = lambda q, k, run=run: sum((jnp.sin(x)).sum() for x in run(q, k))  # noqa: E731
        gradients.append(jax.jit(jax.grad(loss, (0, 1)))(*arrays[:2]))
    for x, y in zip(*gradients, strict=True):
        assert np.abs(y).max() > 0.1
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outs": np.ones((2, 3, 4, 5), np.float32)}, r"outs: got float32\[2, 3, 4, 5\], expected"),
        ({"outs": np.ones((0, 2, 3, 4, 5), np.float32)}, r"expected floating \[n >= 1"),
        ({"outs": np.ones((2, 2, 3, 4, 5), np.int32)}, r"outs: got int32"),
        ({"lses": np.ones((2, 2, 3, 4), np.float32)}, r"lses: got float32\[2, 2, 3, 4\], expected"),
        ({"lses": np.ones((2, 2, 4, 3), np.int32)}, r"lses: got int32.* expected float32\[2, 2, 4"),
    ],
    ids=str,
)
def test_refusals(change, message):
    outs, lses = states(2)
    with pytest.raises(ValueError, match=message):
        mla_jax.merge_attention_states(**({"outs": outs, "lses": lses} | change))
