# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The gradient of the op against a float64 formula that differences of the oracle confirm."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import Problem, attend, problem

import mla_jax

# Small widths: gradients touch every channel, and the oracle goes query by query.
problem = functools.partial(problem, d_k=24, d_v=16, dtype="float32")


def cotangents(p: Problem, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    b, s_q, h_q, _ = p.q.shape
    rng = np.random.default_rng(seed)
    shapes = (b, s_q, h_q, p.head_dim_v), (b, h_q, s_q)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def expected_gradients(p, d_out, d_lse, *, softmax_scale=None, causal=False):
    """Differentiates the op in float64, query by query and head by head.

    Returns the gradients by q and k_cache of `sum(out * d_out) + sum(lse * d_lse)`.
    """
    b, s_q, h_q, d_k = p.q.shape
    num_pages, page_size, h_kv, _ = p.k_cache.shape
    scale = d_k**-0.5 if softmax_scale is None else softmax_scale
    dq, dk_cache = np.zeros(p.q.shape), np.zeros(p.k_cache.shape)
    for i in range(b):
        length = min(max(int(p.cache_seqlens[i]), 0), p.block_table.shape[1] * page_size)
        for j in range(s_q):
            seen = length - s_q + j + 1 if causal else length
            if seen <= 0:
                continue
            places = [(p.block_table[i, t // page_size], t % page_size) for t in range(seen)]
            for h in range(h_q):
                kv = h // (h_q // h_kv)
                keys = np.array(
                    [
                        p.k_cache[page, slot, kv] if 0 <= page < num_pages else np.zeros(d_k)
                        for page, slot in places
                    ],
                    np.float64,
                )
                query = p.q[i, j, h].astype(np.float64)
                values = keys[:, : p.head_dim_v]
                weights = np.exp(scale * keys @ query - (scale * keys @ query).max())
                weights /= weights.sum()
                by_weight = values @ d_out[i, j, h].astype(np.float64)
                by_score = weights * (by_weight - weights @ by_weight + d_lse[i, h, j])
                dq[i, j, h] = scale * by_score @ keys
                by_key = scale * by_score[:, None] * query
                by_key[:, : p.head_dim_v] += weights[:, None] * d_out[i, j, h]
                for (page, slot), row in zip(places, by_key, strict=True):
                    if 0 <= page < num_pages:
                        dk_cache[page, slot, kv] += row
    return dq, dk_cache


def gradients(op, p, d_out, d_lse, **options):
    arrays = p.arrays()
    results, pullback = jax.vjp(
        lambda q, k_cache: op(q, k_cache, *arrays[2:], p.head_dim_v, **options), *arrays[:2]
    )
    return pullback((jnp.asarray(d_out, results[0].dtype), jnp.asarray(d_lse)))


def assert_near(got, expected, bound=3e-6):
    for name, x, y in zip(("q", "k_cache"), got, expected, strict=True):
        x = np.asarray(x, np.float64)
        assert np.isfinite(x).all(), name
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
        assert error < bound, f"{name}: off by {error:.1e} of its norm"
        np.testing.assert_array_equal(x[y == 0], 0, err_msg=name)  # what is not read gets zeros


@pytest.mark.parametrize("causal", [False, True])
def test_the_formula_equals_central_differences(causal):
    p = problem([5, 1, 0], s_q=2, h_q=2, d_k=6, d_v=4, page_size=4, poison=0)
    p = replace(p, q=p.q.astype(np.float64), k_cache=p.k_cache.astype(np.float64))
    d_out, d_lse = cotangents(p)

    def objective(p):
        out, lse = attend(p, causal=causal)
        return (out * d_out).sum() + (np.where(np.isinf(lse), 0, lse) * d_lse).sum()

    for name, expected in zip(
        ("q", "k_cache"), expected_gradients(p, d_out, d_lse, causal=causal), strict=True
    ):
        x, step = getattr(p, name), 1e-5
        for index in np.ndindex(x.shape):
            moved = []
            for sign in (1, -1):
                y = x.copy()
                y[index] += sign * step
                moved.append(objective(replace(p, **{name: y})))
            difference = (moved[0] - moved[1]) / (2 * step)
            assert abs(difference - expected[index]) < 1e-8, (name, index)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("s_q", "heads", "page_size"), [(1, (4, 1), 16), (3, (6, 3), 4), (2, (3, 1), 64)], ids=str
)
def test_gradients(op, s_q, heads, page_size, causal):
    """Lengths on both sides of pages and chunks; all that is not read is NaN."""
    h_q, h_kv = heads
    lengths = [0, 1, 2, page_size - 1, page_size + 1, 70, 515]
    p = problem(lengths, s_q=s_q, h_q=h_q, h_kv=h_kv, page_size=page_size)
    d_out, d_lse = cotangents(p)
    options = {"causal": causal, "softmax_scale": 0.3}
    got = gradients(op, p, d_out, d_lse, **options)
    assert [(x.dtype, x.shape) for x in got] == [
        ("float32", p.q.shape),
        ("float32", p.k_cache.shape),
    ]
    assert_near(got, expected_gradients(p, d_out, d_lse, **options))


@pytest.mark.parametrize("result", [0, 1], ids=["out", "lse"])
def test_gradient_of_one_result(op, result):
    p = problem([9, 4], s_q=2)
    pair = cotangents(p)
    only = tuple(x if i == result else np.zeros_like(x) for i, x in enumerate(pair))
    arrays = p.arrays()
    value = lambda q, k: (op(q, k, *arrays[2:], 16)[result] * pair[result]).sum()  # noqa: E731
    assert_near(jax.grad(value, (0, 1))(*arrays[:2]), expected_gradients(p, *only))


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_half_precision(op, dtype, bound):
    p = problem([70, 33, 0], s_q=2, d_k=576, d_v=512, dtype=dtype)
    d_out, d_lse = cotangents(p)
    d_out = d_out.astype(dtype).astype(np.float32)
    got = gradients(op, p, d_out, d_lse, causal=True)
    assert [x.dtype for x in got] == [dtype, dtype]
    assert_near(got, expected_gradients(p, d_out, d_lse, causal=True), bound)


def test_shared_pages_add_up(op):
    """Three sequences with a common prefix, one page twice in one table."""
    p = problem([20, 20, 20], page_size=8, poison=0)
    table = p.block_table.copy()
    table[1:, :2] = table[0, :2]
    table[2, 2] = table[2, 0]
    p = replace(p, block_table=table)
    assert_near(gradients(op, p, *cotangents(p)), expected_gradients(p, *cotangents(p)))


def test_page_ids_outside_the_pool_get_nothing(op):
    p = problem([30], page_size=8)
    table = np.array([[p.block_table[0, 0], -1, p.k_cache.shape[0], p.block_table[0, 3], 0]])
    p = replace(p, block_table=table.astype(np.int32))
    assert_near(gradients(op, p, *cotangents(p)), expected_gradients(p, *cotangents(p)))


def test_lengths_outside_the_table(op):
    p = problem([16, 16], page_size=8, width=2)
    p = replace(p, cache_seqlens=np.array([2**31 - 1, -5], np.int32))
    assert_near(gradients(op, p, *cotangents(p)), expected_gradients(p, *cotangents(p)))


def test_nan_cotangents_stay_with_what_was_seen(op):
    """A loss may well make NaN of the lse +inf of a query that saw nothing."""
    p = problem([9, 0, 3], page_size=8)
    d_out, d_lse = cotangents(p)
    expected = expected_gradients(p, d_out, d_lse)
    d_out[1], d_lse[1] = np.nan, np.nan
    assert_near(gradients(op, p, d_out, d_lse), expected)
    # A true NaN stays in its own sequence.
    d_out[2, 0, 0, 0] = np.nan
    dq, dk_cache = gradients(op, p, d_out, d_lse)
    assert np.isnan(dq[2]).any()
    assert np.isfinite(dq[:2]).all()
    own = np.zeros(p.k_cache.shape[:2], bool)
    own[p.block_table[2, 0], :3] = True
    assert np.isfinite(np.asarray(dk_cache)[~own]).all()


def test_under_jit_checkpoint_and_vmap(op):
    p = problem([9, 4], s_q=2)
    arrays, (d_out, d_lse) = p.arrays(), cotangents(p)

    def loss(q, k_cache, checkpointed):
        run = lambda q, k: op(q, k, *arrays[2:], 16, causal=True)  # noqa: E731
        out, lse = (jax.checkpoint(run) if checkpointed else run)(q, k_cache)
        return (out * d_out).sum() + (lse * d_lse)[np.isfinite(lse_expected)].sum()

    lse_expected = attend(p, causal=True)[1]
    expected = expected_gradients(p, d_out, d_lse, causal=True)
    for checkpointed in (False, True):
        got = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(*arrays[:2], checkpointed)
        assert_near(got, expected)
    # One pool for two sets of queries, and a pool each.
    two = jnp.stack([arrays[0], 2 * arrays[0]])
    for axis in (None, 0):
        pool = arrays[1] if axis is None else jnp.stack([arrays[1]] * 2)
        got = jax.vmap(jax.grad(loss, (0, 1)), (0, axis, None))(two, pool, False)
        for i in range(2):
            q = np.asarray(two[i])
            one = expected_gradients(replace(p, q=q), d_out, d_lse, causal=True)
            assert_near([x[i] for x in got], one)


def test_of_a_vmap(op):
    """The other order: one gradient through a mapped op, whose pool collects from both."""
    p = problem([9, 4])
    arrays, (d_out, _) = p.arrays(), cotangents(p)
    mapped = jax.vmap(lambda q, k: op(q, k, *arrays[2:], 16)[0], (0, None))
    two = np.stack([p.q, 2 * p.q])
    dq, dk_cache = jax.grad(lambda q, k: (mapped(q, k) * d_out).sum(), (0, 1))(two, arrays[1])
    no_lse = np.zeros((2, 4, 1))
    ones = [expected_gradients(replace(p, q=q), d_out, no_lse) for q in two]
    assert_near((dq, dk_cache), (np.stack([x for x, _ in ones]), sum(x for _, x in ones)))


def test_memory_is_not_that_of_the_scores(op):
    """Compiled for 64 times as many tokens, it holds no array that grew but those of the table."""
    p = problem([5], s_q=2, h_q=64, page_size=64, width=4096, num_pages=8)
    arrays = p.arrays()
    grad = jax.grad(lambda q, k: op(q, k, *arrays[2:], 16)[0].sum(), (0, 1))
    text = jax.jit(grad).lower(*arrays[:2]).compile().as_text()
    shapes = re.findall(r"\b(?:f32)\[([\d,]+)\]", text)
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)
    assert largest <= 2 * 64 * 512  # the scores of a chunk; of all tokens it would be 512 times


def test_forward_mode_is_refused(op):
    q, *rest = problem([3]).arrays()
    run = lambda q: op(q, *rest, 16)[0]  # noqa: E731
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(run, (q,), (q,))


def test_module_decode_trains(op, implementation):
    """Gradients reach parameters through the absorbed path as through the naive one."""
    shape = {"h_q": 2, "d_k": 16, "d_v": 12, "page_size": 4, "dtype": "float32"}
    op(*problem([5, 5], **shape).arrays(), 12)  # skips where the implementation cannot run
    module = mla_jax.MultiHeadLatentAttention(
        16, 2, q_lora_rank=None, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=8, rngs=nnx.Rngs(0),
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    cache = mla_jax.PagedKVCache.create(
        num_layers=1, num_pages=4, max_seqs=2, max_pages_per_seq=2, page_size=4, d_k=16,
        dtype=jnp.float32,
    )  # fmt: skip
    cache, _ = cache.reserve(np.array([5, 5]))

    @nnx.jit
    @nnx.grad
    def naive(module):
        return (module(x) ** 2).sum()

    @nnx.jit
    @nnx.grad
    def absorbed(module):
        return (module.decode(x, cache, 0, implementation=implementation)[0] ** 2).sum()

    for a, b in zip(*(jax.tree.leaves(g(module)) for g in (naive, absorbed)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
