# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The op: every implementation against the float64 oracle, and the choice among them."""

import functools
import itertools
import logging
import os
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    UNUSED,
    Problem,
    assert_as_flashmla,
    assert_close,
    assert_same_bits,
    attend,
    problem,
)

import mla_jax
from mla_jax import decode, xla

INT32 = np.iinfo(np.int32)

# --- FlashMLA's grid ------------------------------------------------------------------------------


class Case(NamedTuple):
    """One case of the grid of FlashMLA's tests/test_flash_mla_dense_decoding.py."""

    b: int
    s_q: int
    s_k: int
    h_q: int
    h_kv: int
    varlen: bool
    causal: bool
    zeros: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("varlen", "causal", "zeros") if getattr(self, name)]
        sizes = f"b{self.b}-s_q{self.s_q}-s_k{self.s_k}-h{self.h_q}-kv{self.h_kv}"
        return "-".join([sizes, *flags])

    @property
    def cost(self) -> float:
        """CPU time, roughly: 1 to compile, the rest for products and data."""
        tokens = self.b * ((1 + self.varlen) * self.s_k + 128)
        return 1 + tokens * (self.s_q * self.h_q + 64 * self.h_kv) // 4e6


_HEADS = [
    (h_q, h_kv) for h_q in (1, 3, 9, 63, 64, 126, 128) for h_kv in (1, 2, 3, 8) if h_q % h_kv == 0
]
# `causal` varies fastest: it reads the data of the case before.
GRID = [
    Case(b, s_q, s_k, *heads, varlen, causal)
    for b in (1, 2, 6, 64)
    for s_q in (1, 2, 4)
    for s_k in (20, 140, 4096)
    for heads in _HEADS
    for varlen in (False, True)
    for causal in (False, True)
]
ZEROS = [
    Case(128, 2, 4096, *heads, True, causal, zeros=True)
    for heads in _HEADS
    for causal in (False, True)
]


def thin(cases: list[Case]) -> list[Case]:
    """Keeps cheap cases until every pair of values of two axes that occurs is kept once."""
    pairs = {case: frozenset(itertools.combinations(enumerate(case), 2)) for case in cases}
    missing = set().union(*pairs.values())
    kept = []
    while missing:
        gain = {case: len(pairs[case] & missing) / case.cost for case in cases}
        kept.append(max(cases, key=lambda c: (gain[c], c.varlen, c.causal)))
        missing -= pairs[kept[-1]]
    return sorted(kept)


if os.environ.get("MLA_JAX_FULL_GRID") == "1":
    CASES = GRID + ZEROS
else:
    CASES = thin(GRID) + [c._replace(s_k=20) for c in ZEROS if (c.h_q, c.h_kv) == (9, 3)]


@functools.lru_cache(maxsize=2)
def inputs(case: Case, flashmla: bool) -> Problem:
    """Draws the inputs of a case; `causal` must be False, both values share them.

    Both values of `varlen` have the same shapes, so that they share an executable.
    """
    rng = np.random.default_rng(case[:5])
    drawn = np.maximum(rng.normal(case.s_k, case.s_k / 2, case.b), case.s_q).astype(int)
    if case.zeros:
        drawn[rng.random(case.b) < 0.5] = 0
    fixed = np.full(case.b, case.s_k)
    pages = [-(-lengths // 64) for lengths in (drawn, fixed)]
    return problem(
        (drawn if case.varlen else fixed).tolist(),
        seed=case[:6],
        s_q=case.s_q,
        h_q=case.h_q,
        h_kv=case.h_kv,
        width=max(p.max() for p in pages) + 1,
        num_pages=max(p.sum() for p in pages) + 3,
        flashmla=flashmla,
    )


@functools.lru_cache(maxsize=1)
def expected(case: Case, flashmla: bool) -> tuple[np.ndarray, np.ndarray]:
    return attend(inputs(case._replace(causal=False), flashmla), causal=case.causal)


@pytest.mark.parametrize("data", ["flashmla", "normal"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_flashmla_grid(op, case, data):
    flashmla = data == "flashmla"
    p = inputs(case._replace(causal=False), flashmla)
    got = op(*p.arrays(), p.head_dim_v, causal=case.causal)
    compare = assert_as_flashmla if flashmla else assert_close
    compare(got, expected(case, flashmla))


def test_the_grid_is_whole_and_its_part_meets_every_value():
    assert len(GRID) == 2304
    assert len(ZEROS) == 32
    part = thin(GRID)
    for axes in [(0,), (1,), (2,), (3, 4), (5, 6), (0, 3), (0, 1), (0, 2), (2, 3), (1, 6)]:
        every, met = ({tuple(case[a] for a in axes) for case in cases} for cases in (GRID, part))
        assert met == every, axes


# --- Shapes, dtypes and edges ---------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "page_size", "d_k", "d_v", "heads"),
    [
        ("bfloat16", 16, 576, 512, (16, 1)),
        ("bfloat16", 32, 512, 512, (8, 2)),
        ("bfloat16", 128, 576, 512, (5, 1)),
        ("float16", 64, 576, 512, (6, 3)),
        ("float16", 16, 512, 512, (128, 1)),
        ("float32", 64, 576, 512, (8, 1)),
        ("float32", 1, 40, 24, (6, 2)),
        ("bfloat16", 8, 320, 256, (3, 1)),
        ("float32", 1024, 40, 40, (4, 4)),
    ],
    ids=str,
)
def test_lengths_at_every_border(op, dtype, page_size, d_k, d_v, heads, causal):
    # Short sequences: among thousands of tokens one too many or too few would not show.
    s_q = 3
    borders = {k * page_size + d for k in (1, 2) for d in (-1, 0, 1)} | {64, 512, 513}
    lengths = sorted({0, 1, s_q - 1, s_q, s_q + 1} | {n for n in borders if n < 600})
    p = problem(
        lengths,
        s_q=s_q,
        h_q=heads[0],
        h_kv=heads[1],
        d_k=d_k,
        d_v=d_v,
        page_size=page_size,
        dtype=dtype,
    )
    got = op(*p.arrays(), d_v, causal=causal)
    assert got[0].dtype == dtype
    assert got[1].dtype == jnp.float32
    assert_close(got, attend(p, causal=causal))


@pytest.mark.parametrize("scale", [0.02, np.float32(0.3)])
def test_softmax_scale(op, scale):
    # Long enough for maxima that grow: by little and, at the larger scale, by much.
    p = problem([700, 3], s_q=2)
    got = op(*p.arrays(), 512, softmax_scale=scale)
    assert_close(got, attend(p, softmax_scale=float(scale)))


def test_more_rows_than_low_tiles_cover(op):
    # 2176 rows: 136 tiles of 16, 68 of 32. Few blocks are for low tiles, as low as a GPU has room.
    p = problem([50], s_q=17, h_q=128)
    assert_close(op(*p.arrays(), 512, causal=True), attend(p, causal=True))


@pytest.mark.parametrize(("h_q", "b"), [(33, 40), (64, 33), (128, 20), (128, 30)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_few_pieces_of_many_rows(op, h_q, b, dtype):
    # Two to four pieces a sequence where there are 132 multiprocessors, of 33 rows and more.
    lengths = np.random.default_rng(b).integers(520, 640, b).tolist()
    p = problem(lengths, h_q=h_q, dtype=dtype)
    assert_close(op(*p.arrays(), 512), attend(p))


def test_head_groups(op):
    # Each KV head holds a constant of its own, so the output names the head that was read.
    p = problem([5], h_q=6, h_kv=3)
    k_cache = np.where(np.isnan(p.k_cache), np.nan, np.arange(1, 4)[:, None]).astype(p.q.dtype)
    out, _ = op(p.q, k_cache, p.block_table, p.cache_seqlens, 512)
    np.testing.assert_array_equal(np.asarray(out)[0, 0, :, 0], [1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [16, 64])
def test_any_table_and_any_length(op, page_size, causal):
    # Every value that int32 has may stand in a table or be a length. Ids in the pool are read, all
    # others are pages of zeros; a length counts within [0, capacity].
    b, width, num_pages = 16, 9, 7
    rng = np.random.default_rng(page_size)
    p = problem([num_pages * page_size], s_q=2, page_size=page_size, num_pages=num_pages)
    wild = rng.integers(INT32.min, INT32.max, (b, width), np.int32, endpoint=True)
    near = rng.integers(-2, num_pages + 2, (b, width), np.int32)
    table = np.where(rng.random((b, width)) < 0.3, wild, near)
    table[:4, 0] = [INT32.min, INT32.max, -1, num_pages]
    capacity = width * page_size
    lengths = rng.integers(INT32.min, INT32.max, b, np.int32)
    lengths[:10] = [1, 1, page_size, 1, INT32.min, INT32.max, -1, 0, capacity, capacity + 1]
    q = rng.standard_normal((b, *p.q.shape[1:])).astype(p.q.dtype)
    hostile = Problem(q, p.k_cache, table, lengths)
    got = op(*hostile.arrays(), 512, causal=causal)
    assert_close(got, attend(hostile, causal=causal))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_empty_batch(op, batch_invariant):
    p = problem([5, 6]).rows(slice(0))
    out, lse = op(*p.arrays(), 512, batch_invariant=batch_invariant)
    assert (out.shape, lse.shape) == ((0, 1, 4, 512), (0, 4, 1))


def test_halves_merge_by_lse(op):
    # Split-KV and context parallelism rest on it: lse is the natural logarithm, +inf nothing.
    p = problem([640, 70, 65], s_q=2, width=12, dtype="float16")
    lengths = p.cache_seqlens
    first = np.minimum(lengths, 64)
    halves = [
        op(p.q, p.k_cache, p.block_table[:, :-1], first, 512),
        op(p.q, p.k_cache, p.block_table[:, 1:], lengths - first, 512),
    ]
    out, lse = (np.stack([np.asarray(h[i], np.float64) for h in halves]) for i in (0, 1))
    merged = np.log(np.exp(lse).sum(axis=0))
    weights = np.exp(lse - merged)
    assert_close(
        (
            (weights.transpose(0, 1, 3, 2)[..., None] * out).sum(axis=0).astype(np.float16),
            merged,
        ),
        attend(p),
    )


# --- Bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_same_bits_again(op, batch_invariant):
    arrays = problem([600, 64, 0, 129], s_q=2).arrays()
    first = op(*arrays, 512, batch_invariant=batch_invariant)
    for _ in range(3):
        assert_same_bits(op(*arrays, 512, batch_invariant=batch_invariant), first)


@pytest.mark.parametrize(("s_q", "h_q"), [(1, 8), (2, 5)])
def test_batch_invariant(op, s_q, h_q):
    shape = {"s_q": s_q, "h_q": h_q, "width": 20, "num_pages": 60}
    p = problem([1000, 65, 200, 0, 1], **shape)
    run = functools.partial(op, head_dim_v=512, causal=True, batch_invariant=True)
    whole = run(*p.arrays())
    assert_close(whole, attend(p, causal=True))

    for i in range(5):  # alone
        assert_same_bits(run(*p.rows(slice(i, i + 1)).arrays()), [x[i : i + 1] for x in whole])

    order = np.array([3, 0, 4, 2, 1])  # in other slots
    assert_same_bits(run(*p.rows(order).arrays()), [x[order] for x in whole])

    twice = np.concatenate([order, order])  # in a larger batch
    assert_same_bits(run(*p.rows(twice).arrays()), [x[twice] for x in whole])

    moved = np.random.default_rng(1).permutation(60).astype(np.int32)  # page i is now moved[i]
    table = np.where(p.block_table == UNUSED, UNUSED, moved[np.minimum(p.block_table, 59)])
    k_cache = np.empty_like(p.k_cache)
    k_cache[moved] = p.k_cache
    assert_same_bits(run(p.q, k_cache, table, p.cache_seqlens), whole)

    short = p.rows(slice(1, 2))  # in a table that is as wide as it must be, or much wider
    for width in (2, 75):
        table = np.full((1, width), UNUSED, np.int32)
        table[:, :2] = short.block_table[:, :2]
        got = run(short.q, short.k_cache, table, short.cache_seqlens)
        assert_same_bits(got, [x[1:2] for x in whole])


def test_nan_in_a_used_slot_shows(op):
    """Only what must not be read is silenced: a NaN that counts makes its queries NaN."""
    p = problem([70, 70], s_q=1, h_q=3)
    k_cache = p.k_cache.copy()
    k_cache[p.block_table[1, 1], 2, 0, 5] = np.nan
    out, lse = op(p.q, k_cache, p.block_table, p.cache_seqlens, 512)
    assert np.isfinite(np.asarray(out[0], np.float32)).all()
    assert np.isfinite(lse[0]).all()
    assert np.isnan(np.asarray(out[1], np.float32)).all()
    assert np.isnan(lse[1]).all()


def test_batch_invariant_xla_multiplies_one_sequence_at_a_time():
    # A CPU's products give the same bits in any batch; a GPU's library chooses by the batch's size.
    arrays = problem([3] * 7).arrays()
    options = {"head_dim_v": 512, "softmax_scale": 0.04, "causal": False}
    for batch_invariant, batched in [(False, True), (True, False)]:
        lowered = xla.decode.lower(*arrays, **options, batch_invariant=batch_invariant)
        products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
        assert products
        assert all(("tensor<7x" in line) == batched for line in products)


# --- Under transformations ------------------------------------------------------------------------


def test_jit_compiles_once(op):
    # Lengths and tables are data: no value of them compiles anything anew.
    p = problem([130, 0, 64], s_q=2, width=4, poison=0)
    jitted = jax.jit(lambda *arrays: op(*arrays, 512, causal=True))
    for lengths in ([130, 0, 64], [1, 0, 0], [-5, 2**31 - 1, 7]):
        table = p.block_table if lengths[0] > 0 else np.zeros_like(p.block_table)
        call = Problem(p.q, p.k_cache, table, np.asarray(lengths, np.int32))
        assert_close(jitted(*call.arrays()), attend(call, causal=True))
    assert jitted._cache_size() == 1


def test_eager_calls_compile_once(op, caplog):
    # 7 heads: no other test may have compiled these shapes before.
    shape = {"h_q": 7, "width": 3, "num_pages": 6}
    first, second = (problem(n, **shape).arrays() for n in ([130, 1], [64, 65]))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.block_until_ready(op(*first, 512))
        assert "Finished XLA compilation" in caplog.text
        caplog.clear()
        jax.block_until_ready(op(*second, 512))
    assert "compilation" not in caplog.text


GROWING = np.array([[63, 0], [64, 1], [65, 2], [66, 2]], np.int32)  # over a page's border


def test_scan(op):
    p = problem([66, 2])
    q, k_cache, table, _ = p.arrays()

    @jax.jit
    def decode_all(lengths):
        step = lambda carry, n: (carry, op(q, k_cache, table, n, 512))  # noqa: E731
        return jax.lax.scan(step, None, lengths)[1]

    out, lse = decode_all(GROWING)
    for t, lengths in enumerate(GROWING):
        call = Problem(p.q, p.k_cache, p.block_table, lengths)
        assert_close((out[t], lse[t]), attend(call))


def test_while_loop(op):
    p = problem([66, 2])
    q, k_cache, table, _ = p.arrays()

    @jax.jit
    def decode_until(lengths, stop):
        def step(state):
            lengths, total = state
            out, _ = op(q, k_cache, table, lengths, 512)
            return lengths + 1, total + out.astype(jnp.float32)

        start = (lengths, jnp.zeros((2, 1, 4, 512)))
        return jax.lax.while_loop(lambda state: state[0][0] < stop, step, start)[1]

    total = decode_until(jnp.asarray([63, -1], jnp.int32), 67)
    calls = [
        attend(Problem(p.q, p.k_cache, p.block_table, np.asarray([n, n - 64], np.int32)))[0]
        for n in range(63, 67)
    ]
    np.testing.assert_allclose(total, sum(calls), rtol=2 / 128, atol=2e-2)


@pytest.mark.parametrize(
    "mapped", [m for m in itertools.product([True, False], repeat=4) if any(m)], ids=str
)
def test_vmap(op, mapped):
    # No NaN: where tables are mapped and pools are not, the second table reads the first pool.
    problems = [problem([n, 3], seed=n, width=2, num_pages=5, poison=0) for n in (65, 5)]
    fields = ("q", "k_cache", "block_table", "cache_seqlens")
    stacked = [np.stack([getattr(p, name) for p in problems]) for name in fields]
    arrays = [x if m else x[0] for x, m in zip(stacked, mapped, strict=True)]
    axes = tuple(0 if m else None for m in mapped)
    out, lse = jax.vmap(lambda *a: op(*a, 512), in_axes=axes)(*arrays)
    for i in range(2):
        one = [x[i] if m else x for x, m in zip(arrays, mapped, strict=True)]
        assert_close((out[i], lse[i]), attend(Problem(*one)))


# --- Work follows the lengths ---------------------------------------------------------------------


def test_xla_takes_as_many_steps_as_the_longest_length_needs(monkeypatch):
    steps = []
    attend_pages = xla.attend_pages

    def counted(q, k_cache, block_table, visible, expand, **options):
        def counting(latents):
            jax.debug.callback(lambda _: steps.append(1), latents[0, 0, 0, 0])
            return expand(latents)

        return attend_pages(q, k_cache, block_table, visible, counting, **options)

    monkeypatch.setattr(xla, "attend_pages", counted)
    options = {"softmax_scale": 0.04, "causal": False, "batch_invariant": False}
    # The function inside the jit: the jitted one may be compiled already, without the counter.
    run = jax.jit(functools.partial(xla.decode.__wrapped__, head_dim_v=512, **options))
    p = problem([600, 70, 0], width=1000)
    for longest, expected_steps in [(600, 2), (512, 1), (1, 1), (0, 0)]:
        steps.clear()
        lengths = np.minimum(p.cache_seqlens, longest)
        run(*Problem(p.q, p.k_cache, p.block_table, lengths).arrays())
        jax.effects_barrier()
        assert len(steps) == expected_steps, longest


def test_xla_gathers_no_whole_table():
    width = 4096
    q, k_cache, table, lengths = problem([5, 6], width=width).arrays()
    run = jax.jit(
        functools.partial(decode.flash_mla_with_kvcache, implementation="xla"), static_argnums=4
    )
    text = run.lower(q, k_cache, table, lengths, 512).compile().as_text()
    shapes = re.findall(r"\b(?:bf16|f32|f16)\[([\d,]+)\]", text)
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)
    chunk = 2 * 512 * 576  # sequences, tokens, channels
    assert largest <= 2 * chunk  # of a whole table's width it would be 512 chunks


# --- Choice of the implementation -----------------------------------------------------------------


@pytest.fixture
def implementations(monkeypatch):
    """Two implementations that cannot run, and one whose result is 7 everywhere."""

    def sevens(q, *rest, head_dim_v, **options):
        return jnp.full((*q.shape[:3], head_dim_v), 7, q.dtype), jnp.full(q.shape[2::-1], 7.0)

    def fake(reason=None):
        return SimpleNamespace(unsupported_reason=lambda **inputs: reason, decode=sevens)

    table = {"fast": fake("wants a GPU"), "new": fake("is not built"), "plain": fake()}
    monkeypatch.setattr(decode, "_IMPLEMENTATIONS", table)


def test_choice(implementations):
    arrays = (*problem([3]).arrays(), 512)
    run = functools.partial(mla_jax.flash_mla_with_kvcache, *arrays)
    for implementation in (None, "plain", ("new", "plain", "fast")):
        assert (run(implementation=implementation)[0] == 7).all()
    with pytest.raises(NotImplementedError, match=r"^fast: wants a GPU$"):
        run(implementation="fast")
    with pytest.raises(NotImplementedError, match=r"^new: is not built$"):
        run(implementation=["new"])
    with pytest.raises(ExceptionGroup, match="no implementation can run these inputs") as group:
        run(implementation=("new", "fast"))
    assert [str(e) for e in group.value.exceptions] == ["new: is not built", "fast: wants a GPU"]
    assert all(isinstance(e, NotImplementedError) for e in group.value.exceptions)


def test_explain(implementations):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in problem([3]).arrays()]
    found = mla_jax.explain(*shapes, 512)
    assert found == mla_jax.Explanation("plain", {"fast": "wants a GPU", "new": "is not built"})
    assert str(found) == "runs: plain\nnot fast: wants a GPU\nnot new: is not built"
    found = mla_jax.explain(*shapes, 512, implementation="new")
    assert str(found) == "runs: none\nnot new: is not built"


@pytest.mark.parametrize("name", ["flash", (), ("plain", "flash")])
@pytest.mark.parametrize("function", [mla_jax.flash_mla_with_kvcache, mla_jax.explain])
def test_unknown_implementation(implementations, function, name):
    message = rf"implementation: got {re.escape(repr(name))}, expected None, one of \['fast', 'new'"
    with pytest.raises(ValueError, match=message):
        function(*problem([3]).arrays(), 512, implementation=name)


# --- Refusals -------------------------------------------------------------------------------------


def shaped(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.zeros(shape, dtype)


def ints(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


# What differs from a right call, and what the error says.
REFUSALS = [
    ({"q": shaped(2, 4, 576)}, r"q: got bfloat16\[2, 4, 576\], expected 4 axes"),
    ({"q": shaped(2, 1, 4, 576, dtype=jnp.int32)}, "q: got dtype int32, expected bfloat16"),
    ({"q": shaped(2, 0, 4, 576)}, r"q: got bfloat16\[2, 0, 4, 576\], expected at least one query"),
    ({"q": shaped(2, 1, 0, 576)}, "expected at least one query, head and channel"),
    ({"q": shaped(2, 1, 4, 576, dtype=jnp.float32)}, "k_cache: got dtype bfloat16, expected q's"),
    ({"q": shaped(2, 1, 4, 512)}, "k_cache: got d_k 576, expected q's d_k 512"),
    ({"q": shaped(3, 1, 4, 576)}, r"block_table: got int32\[2, 3\], expected int32\[b=3"),
    ({"k_cache": shaped(5, 64, 576)}, r"k_cache: got bfloat16\[5, 64, 576\], expected 4 axes"),
    ({"k_cache": shaped(0, 64, 1, 576)}, "k_cache: .* expected at least one page, slot, head"),
    ({"k_cache": shaped(5, 0, 1, 576)}, "k_cache: .* expected at least one page, slot, head"),
    ({"k_cache": shaped(5, 64, 3, 576)}, "q: got 4 heads, expected a multiple of k_cache's 3"),
    ({"block_table": ints(6)}, r"block_table: got int32\[6\], expected int32\[b=2"),
    ({"block_table": ints(3, 3)}, r"block_table: got int32\[3, 3\], expected int32\[b=2"),
    ({"block_table": shaped(2, 3)}, r"block_table: got bfloat16\[2, 3\], expected int32"),
    ({"block_table": ints(2, 0)}, r"block_table: got int32\[2, 0\], expected at least one column"),
    ({"cache_seqlens": ints(3)}, r"cache_seqlens: got int32\[3\], expected int32\[b=2\]"),
    ({"cache_seqlens": ints(2, 1)}, r"cache_seqlens: got int32\[2, 1\], expected int32\[b=2\]"),
    ({"cache_seqlens": shaped(2)}, r"cache_seqlens: got bfloat16\[2\], expected int32"),
    ({"head_dim_v": 577}, r"head_dim_v: got 577, expected an int in \[1, d_k=576\]"),
    ({"head_dim_v": 0}, "head_dim_v: got 0, expected an int"),
    ({"head_dim_v": 512.0}, "head_dim_v: got 512.0, expected an int"),
    ({"softmax_scale": 0.0}, "softmax_scale: got 0.0, expected a positive finite number"),
    ({"softmax_scale": float("nan")}, "softmax_scale: got nan, expected a positive finite"),
    ({"softmax_scale": float("inf")}, "softmax_scale: got inf, expected a positive finite"),
    ({"num_splits": ints(3)}, "got one without the other, expected both results of get_mla_meta"),
    ({"tile_scheduler_metadata": ints(4, 8)}, "got one without the other"),
    (
        {"tile_scheduler_metadata": ints(4, 7), "num_splits": ints(3)},
        r"tile_scheduler_metadata: got int32\[4, 7\], expected int32\[num_parts, 8\]",
    ),
    (
        {"tile_scheduler_metadata": shaped(4, 8), "num_splits": ints(3)},
        r"tile_scheduler_metadata: got bfloat16\[4, 8\], expected int32",
    ),
    (
        {"tile_scheduler_metadata": ints(4, 8), "num_splits": ints(2)},
        r"num_splits: got int32\[2\], expected int32\[b \+ 1 = 3\]",
    ),
]


@pytest.mark.parametrize("function", [mla_jax.flash_mla_with_kvcache, mla_jax.explain])
@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_refusals(function, change, message):
    right = {
        "q": shaped(2, 1, 4, 576),
        "k_cache": shaped(5, 64, 1, 576),
        "block_table": ints(2, 3),
        "cache_seqlens": ints(2),
        "head_dim_v": 512,
    }
    with pytest.raises(ValueError, match=message):
        function(**(right | change))


def test_traced_scale_is_refused():
    arrays = problem([3]).arrays()
    run = jax.jit(lambda scale: mla_jax.flash_mla_with_kvcache(*arrays, 512, softmax_scale=scale))
    with pytest.raises(ValueError, match="softmax_scale: got a traced value, expected a Python"):
        run(0.1)


def test_schedule_is_taken(op):
    p = problem([600, 3], s_q=2)
    q, k_cache, table, lengths = p.arrays()

    @jax.jit
    def step(lengths):
        schedule = mla_jax.get_mla_metadata(lengths, 2 * 4, 1)
        return op(
            q,
            k_cache,
            table,
            lengths,
            512,
            tile_scheduler_metadata=schedule[0],
            num_splits=schedule[1],
        )

    assert_close(step(lengths), attend(p))
