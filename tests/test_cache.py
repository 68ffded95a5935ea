# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""PagedKVCache against a plain Python model, and what XLA makes of it."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import IN_PLACE, pool_sized
from jax import lax

from mla_jax.cache import PagedKVCache, PagePoolFullError

D_K = 3


class _Slot:
    """One sequence of the model: its tokens, and pages told apart by identity."""

    def __init__(self, tokens=(), pages=(), num_new=0):
        self.tokens = list(tokens)  # [num_layers, d_k] each, or None where nothing was written
        self.pages = list(pages)
        self.num_new = num_new

    def copy(self, num_new=0):
        return _Slot(self.tokens, self.pages, num_new)


class _Model:
    """What the cache should do, slot by slot, with Python lists."""

    def __init__(self, num_pages, page_size, max_seqs, max_pages_per_seq):
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_pages_per_seq = max_pages_per_seq
        self.slots = [_Slot() for _ in range(max_seqs)]

    def copy(self):
        other = _Model(self.num_pages, self.page_size, 0, self.max_pages_per_seq)
        other.slots = [slot.copy(slot.num_new) for slot in self.slots]
        return other

    def holders(self, page):
        return sum(page in slot.pages for slot in self.slots)

    def num_free(self):
        return self.num_pages - len({page for slot in self.slots for page in slot.pages})

    def reserve(self, num_tokens):
        granted = []
        for slot, n in zip(self.slots, num_tokens, strict=True):
            slot.num_new = 0
            num_pages = math.ceil((len(slot.tokens) + n) / self.page_size)
            partial = n > 0 and len(slot.tokens) % self.page_size > 0
            copy = partial and self.holders(slot.pages[-1]) > 1
            fits = (
                n >= 0
                and num_pages <= self.max_pages_per_seq
                and num_pages - len(slot.pages) + copy <= self.num_free()
            )
            granted.append(fits)
            if fits:
                if copy:
                    slot.pages[-1] = object()
                slot.pages += [object() for _ in range(num_pages - len(slot.pages))]
                slot.tokens += [None] * n
                slot.num_new = n
        return granted

    def append(self, latents):  # [num_layers, max_seqs, t, d_k]
        for i, slot in enumerate(self.slots):
            for k in range(1, min(slot.num_new, latents.shape[2]) + 1):
                slot.tokens[-k] = latents[:, i, -k]

    def truncate(self, seqlens):
        for slot, n in zip(self.slots, seqlens, strict=True):
            slot.tokens = slot.tokens[: max(n, 0)]
            slot.pages = slot.pages[: math.ceil(len(slot.tokens) / self.page_size)]
            slot.num_new = 0

    def release(self, mask):
        self.slots = [_Slot() if gone else s for s, gone in zip(self.slots, mask, strict=True)]

    def fork(self, src, dst):
        before = list(self.slots)
        for s, d in zip(src, dst, strict=True):
            if 0 <= d < len(before) and s != d:
                self.slots[d] = before[s].copy() if 0 <= s < len(before) else _Slot()

    def reorder(self, src):
        self.fork(src, range(len(src)))


def check(cache, model):
    """Compares everything observable, and the accounts of the pool."""
    pages, table, seqlens, num_new, refcounts = (
        np.asarray(x)
        for x in (cache.pages, cache.block_table, cache.seqlens, cache.num_new, cache.refcounts)
    )
    num_pages, page_size, num_layers = cache.num_pages, cache.page_size, cache.num_layers
    assert seqlens.tolist() == [len(slot.tokens) for slot in model.slots]
    assert num_new.tolist() == [slot.num_new for slot in model.slots]

    # Each page of the model is one id, each id one page: shared where forked, and nowhere else.
    pairs = set()
    for row, slot in zip(table, model.slots, strict=True):
        held = len(slot.pages)
        assert held == math.ceil(len(slot.tokens) / page_size)
        assert (row[:held] >= 0).all()
        assert (row[:held] < num_pages).all()
        assert (row[held:] == -1).all()
        pairs.update(zip(slot.pages, row[:held].tolist(), strict=True))
    assert len(pairs) == len({page for page, _ in pairs}) == len({i for _, i in pairs})

    named = table[table >= 0]
    assert refcounts.tolist() == np.bincount(named, minlength=num_pages).tolist()
    assert np.sum(refcounts == 0) + len(np.unique(named)) == num_pages
    assert np.sum(refcounts == 0) == model.num_free()

    for row, slot in zip(table, model.slots, strict=True):
        written = [p for p, token in enumerate(slot.tokens) if token is not None]
        if written:
            position = np.array(written)
            rows = np.arange(num_layers)[:, None] * num_pages + row[position // page_size]
            want = np.stack([slot.tokens[p] for p in written], axis=1)
            assert np.array_equal(pages[rows, position % page_size, 0], want)


def poisoned(dtype=jnp.float32, **sizes):
    """An empty cache whose memory holds NaN."""
    cache = PagedKVCache.create(d_k=D_K, dtype=dtype, **sizes)
    return dataclasses.replace(cache, pages=jnp.full_like(cache.pages, jnp.nan))


def append_all(cache, latents):
    for layer in range(cache.num_layers):
        cache = cache.append(layer, latents[layer])
    return cache


OPS = {
    name: jax.jit(function, donate_argnums=0)
    for name, function in {
        "reserve": PagedKVCache.reserve,
        "append": append_all,
        "truncate": PagedKVCache.truncate,
        "release": PagedKVCache.release,
        "fork": PagedKVCache.fork,
        "reorder": PagedKVCache.reorder,
    }.items()
}


class _Walk:
    """Applies random operations to a cache and to its model alike."""

    def __init__(self, page_size, num_pages, max_pages_per_seq, num_layers, eager):
        self.rng = np.random.default_rng(0)
        self.cache = poisoned(
            num_layers=num_layers,
            num_pages=num_pages,
            max_seqs=6,
            max_pages_per_seq=max_pages_per_seq,
            page_size=page_size,
        )
        self.model = _Model(num_pages, page_size, 6, max_pages_per_seq)
        self.eager = eager
        self.unwritten = False
        self.seen = dict.fromkeys(("refused", "refused but later granted", "copied", "full"), 0)

    def slots(self, low, high, n=None):
        return self.rng.integers(low, high, n or len(self.model.slots)).astype(np.int32)

    def step(self):
        eager = self.rng.random() < self.eager
        if self.unwritten and self.rng.random() < 0.95:
            self.append(eager)
        else:
            name = self.rng.choice(
                ["reserve", "fork", "release", "truncate", "reorder"], p=[0.6, 0.16, 0.1, 0.1, 0.04]
            )
            getattr(self, name)(eager)
        check(self.cache, self.model)

    def apply(self, name, eager, *args):
        op = getattr(PagedKVCache, name) if eager else OPS[name]
        self.cache = op(self.cache, *args)

    def reserve(self, eager):
        most = self.rng.choice([1, 3, 8])  # a decode step; speculation; a chunk of a prompt
        num_tokens = self.slots(0, most + 1)
        if most > 1:
            num_tokens *= self.rng.random(num_tokens.shape) < 0.5
        if not eager and self.rng.random() < 0.1:
            num_tokens[self.slots(0, num_tokens.size, 1)] = self.rng.choice([-1, 2**31 - 1, 40])
        after = self.model.copy()
        granted = after.reserve(num_tokens.tolist())
        self.seen["refused"] += not all(granted)
        self.seen["refused but later granted"] += any(
            g and n > 0 and not all(granted[:i])
            for i, (g, n) in enumerate(zip(granted, num_tokens, strict=True))
        )
        self.seen["copied"] += any(
            old.pages and new.pages[: len(old.pages)] != old.pages
            for old, new in zip(self.model.slots, after.slots, strict=True)
        )
        self.seen["full"] += after.num_free() == 0
        if eager and not all(granted):
            with pytest.raises(PagePoolFullError):
                self.cache.reserve(num_tokens)
            return
        if eager:
            self.cache, got = self.cache.reserve(num_tokens)
        else:
            self.cache, got = OPS["reserve"](self.cache, num_tokens)
        assert np.asarray(got).tolist() == granted
        self.model = after
        self.unwritten = True

    def append(self, eager):
        longest = max(slot.num_new for slot in self.model.slots)
        t = self.rng.choice([t for t in (1, 3, 8) if t >= longest] or [40])
        if not eager and self.rng.random() < 0.05:
            t = 1  # fewer columns than granted tokens: the newest are written
        shape = (self.cache.num_layers, len(self.model.slots), t, D_K)
        latents = self.rng.standard_normal(shape, np.float32)
        for i, slot in enumerate(self.model.slots):
            latents[:, i, : max(t - slot.num_new, 0)] = np.nan  # padding
        self.cache = (append_all if eager else OPS["append"])(self.cache, latents)
        self.model.append(latents)
        self.unwritten = False

    def truncate(self, eager):
        seqlens = self.slots(0 if eager else -2, 40)
        self.apply("truncate", eager, seqlens)
        self.model.truncate(seqlens.tolist())

    def release(self, eager):
        mask = self.rng.random(len(self.model.slots)) < self.rng.choice([0.2, 0.5, 1.0])
        self.apply("release", eager, mask)
        self.model.release(mask.tolist())

    def fork(self, eager):
        max_seqs = len(self.model.slots)
        empty = [i for i, slot in enumerate(self.model.slots) if not slot.tokens]
        if eager or (empty and self.rng.random() < 0.8):  # else a slot with tokens, or none at all
            dst = self.rng.permutation(empty)[:2]
            if not len(dst):
                return
            src = self.slots(0, max_seqs, len(dst))
        else:
            dst = self.rng.permutation(np.arange(-1, max_seqs + 1))[:2]
            src = self.slots(-1, max_seqs + 1, len(dst))
        if len(dst) == 1:
            self.apply("fork", eager, src[0], dst[0])
        else:
            self.apply("fork", eager, src, dst.astype(np.int32))
        self.model.fork(src.tolist(), dst.tolist())

    def reorder(self, eager):
        src = self.slots(0, len(self.model.slots)) if eager else self.slots(-1, 7)
        self.apply("reorder", eager, src)
        self.model.reorder(src.tolist())


# page_size, num_pages, max_pages_per_seq, num_layers, share of operations outside jit
WALKS = [
    (1, 20, 12, 2, 0),
    (2, 12, 8, 2, 0.05),
    (2, 60, 20, 1, 0),
    (4, 8, 6, 3, 0),
    (16, 8, 4, 2, 0),
]


@pytest.mark.parametrize("sizes", WALKS, ids=lambda s: f"page_size{s[0]}-num_pages{s[1]}")
def test_random_operations_agree_with_a_plain_model(sizes):
    """20,000 operations in all; the whole state is compared after each."""
    walk = _Walk(*sizes)
    for _ in range(20_000 // len(WALKS)):
        walk.step()
    # The walk went where mistakes hide.
    assert walk.seen["full"] > 3
    assert walk.seen["refused"] > 100
    assert walk.seen["refused but later granted"] > 50
    assert walk.seen["copied"] > 50 or walk.model.page_size == 1


def small(num_pages=8, page_size=4, **sizes):
    sizes = {"num_layers": 2, "max_seqs": 4, "max_pages_per_seq": 4} | sizes
    return poisoned(num_pages=num_pages, page_size=page_size, **sizes)


def test_new_tokens_are_the_last_columns_of_their_slot():
    cache, granted = small().reserve([2, 0, 3, 1])
    assert granted.tolist() == [True] * 4
    np.testing.assert_array_equal(cache.positions(3)[0], [-1, 0, 1])
    np.testing.assert_array_equal(cache.positions(3)[2], [0, 1, 2])
    latents = jnp.arange(4 * 3 * D_K, dtype=jnp.float32).reshape(4, 3, D_K)
    cache = cache.append(1, latents)
    page = cache.pages[cache.layer_table(1)[0, 0], :, 0]
    np.testing.assert_array_equal(page[:2], latents[0, 1:])
    assert np.isnan(page[2:]).all()  # neither past the length
    assert np.isnan(cache.pages[cache.layer_table(0)[:, 0]]).all()  # nor in another layer
    assert np.sum(~np.isnan(cache.pages)) == 6 * D_K


def test_the_last_of_several_sharers_keeps_the_partial_page():
    cache, _ = small().reserve([5, 0, 0, 0])
    cache = cache.fork([0, 0], [1, 2])
    assert cache.refcounts.tolist() == [3, 3, 0, 0, 0, 0, 0, 0]
    cache, _ = cache.reserve([1, 1, 1, 0])
    assert cache.refcounts.tolist() == [3, 1, 1, 1, 0, 0, 0, 0]
    assert cache.block_table[2, 1] == 1
    # One sharer that does not write: every writer copies.
    cache = cache.fork([2], [3])
    cache, _ = cache.reserve([0, 0, 1, 0])
    assert cache.block_table[3, 1] == 1
    assert cache.block_table[2, 1] == 4


def test_a_full_page_that_is_shared_is_not_copied():
    cache, _ = small().reserve([4, 0, 0, 0])
    cache, _ = cache.fork(0, 1).reserve([1, 1, 0, 0])
    assert cache.block_table[:2, 0].tolist() == [0, 0]
    assert cache.num_free_pages == 5


def test_a_refused_slot_leaves_nothing_behind_and_does_not_stop_later_ones():
    reserve = jax.jit(PagedKVCache.reserve)
    cache, granted = reserve(small(num_pages=3), np.array([8, 9, 17, 4]))
    # Slot 1 asks for 3 pages where 1 is left, slot 2 for 5 where its row has 4.
    assert granted.tolist() == [True, False, False, True]
    assert cache.seqlens.tolist() == cache.num_new.tolist() == [8, 0, 0, 4]
    assert cache.num_free_pages == 0
    assert (cache.block_table[1:3] == -1).all()
    again, granted = reserve(cache, np.array([1, 1, 0, 0]))
    assert granted.tolist() == [False, False, True, True]
    np.testing.assert_array_equal(again.block_table, cache.block_table)


def test_copy_on_write_counts_against_the_pool():
    cache, _ = small(num_pages=2).reserve([5, 0, 0, 0])
    cache, granted = jax.jit(PagedKVCache.reserve)(cache.fork(0, 1), np.array([1, 1, 0, 0]))
    assert granted.tolist() == [False, False, True, True]  # neither holds the page alone
    cache, granted = cache.truncate([5, 4, 0, 0]).reserve([1, 0, 0, 0])
    assert granted.all()
    assert cache.seqlens.tolist() == [6, 4, 0, 0]


def test_inside_jit_wild_values_write_nothing():
    cache, _ = small().reserve([1, 1, 1, 1])
    append = jax.jit(PagedKVCache.append)
    latents = np.ones((4, 1, D_K), np.float32)
    for layer in (-1, 2, 2**31 - 1, -(2**31)):
        assert np.isnan(append(cache, layer, latents).pages).all()
    wild = np.array([-1, -(2**31), 2**31 - 1, 2**31 - 2], np.int32)
    after, granted = jax.jit(PagedKVCache.reserve)(cache, wild)
    assert not granted.any()
    assert after.seqlens.tolist() == [1, 1, 1, 1]
    np.testing.assert_array_equal(after.block_table, cache.block_table)
    after = jax.jit(PagedKVCache.reorder)(cache, wild)
    assert after.num_free_pages == cache.num_pages


def test_integers_stay_int32_under_x64():
    def all_methods(cache, latents):
        cache, _ = cache.reserve(np.array([5, 0, 2, 0]))
        cache = cache.fork(0, 1).append(0, latents)
        cache, _ = cache.reserve(np.array([1, 1, 1, 1]))
        cache = cache.truncate([1, 1, 1, 1]).reorder([1, 0, 2, 2]).release(np.zeros(4, bool))
        return cache, cache.positions(2), cache.layer_table(1), cache.num_free_pages

    with jax.enable_x64(True):
        cache, *others = jax.jit(all_methods)(small(), jnp.ones((4, 5, D_K), jnp.float32))
    assert cache.dtype == jnp.float32
    for x in (cache.block_table, cache.seqlens, cache.num_new, cache.refcounts, *others):
        assert x.dtype == jnp.int32


def test_capacity_of_deepseek_v3():
    per_token = PagedKVCache.bytes_per_token(num_layers=61)
    assert per_token == 61 * (512 + 64) * 2 == 70_272
    fit = PagedKVCache.tokens_that_fit
    assert fit(64 * per_token, num_layers=61) == 64
    assert fit(64 * per_token - 1, num_layers=61) == 0
    assert fit(2**30, num_layers=61) == 64 * (2**30 // (64 * per_token))
    assert fit(100, num_layers=1, page_size=2, d_k=4, dtype=jnp.float32) == 6
    cache = PagedKVCache.create(
        num_layers=3, num_pages=5, max_seqs=1, max_pages_per_seq=1, page_size=2, d_k=4
    )
    assert cache.dtype == jnp.bfloat16
    assert cache.pages.nbytes == 10 * PagedKVCache.bytes_per_token(num_layers=3, d_k=4)


# What XLA makes of it.


def decode_step(cache, num_tokens, latents):
    cache, granted = cache.reserve(num_tokens)
    for layer in range(cache.num_layers):
        cache = cache.append(layer, latents)
    return cache, granted


def scan_over_layers(cache, num_tokens, latents):
    cache, granted = cache.reserve(num_tokens)
    layers = jnp.arange(cache.num_layers)
    cache, _ = lax.scan(lambda c, layer: (c.append(layer, latents), None), cache, layers)
    return cache, granted


def loop(cache, num_tokens, latents, step):
    """Decodes 30 steps; full slots are released, and the next slot forked into their place."""

    def body(state):
        n, cache = state
        cache, granted = step(cache, num_tokens, latents)
        cache = cache.release(~granted)
        dst = jnp.argmin(granted)
        cache = cache.fork((dst + 1) % cache.max_seqs, jnp.where(granted[dst], -1, dst))
        return n + 1, cache

    return lax.while_loop(lambda state: state[0] < 30, body, (0, cache))[1]


def loop_of_steps(cache, num_tokens, latents):
    return loop(cache, num_tokens, latents, decode_step)


def loop_of_scans(cache, num_tokens, latents):
    return loop(cache, num_tokens, latents, scan_over_layers)


def between_steps(cache, num_tokens, latents):
    cache = cache.release(num_tokens > 5).fork(num_tokens[:2], num_tokens[2:])
    return cache.truncate(num_tokens).reorder(num_tokens)


@pytest.mark.parametrize(
    ("program", "t"),
    [
        (decode_step, 1),
        (decode_step, 7),
        (scan_over_layers, 1),
        (loop_of_steps, 1),
        (loop_of_scans, 7),
        (between_steps, 1),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_program_updates_the_pool_in_place(program, t, dtype):
    if dtype == "bfloat16" and jax.default_backend() == "cpu" and jax.__version_info__ < (0, 12):
        pytest.skip(
            "XLA's CPU backend emulates bfloat16 scatters by a float32 copy before jax 0.12"
        )
    sizes = {"num_layers": 3, "num_pages": 64, "max_seqs": 4, "max_pages_per_seq": 8}
    cache = poisoned(**sizes, page_size=16, dtype=dtype)
    num_tokens, latents = jnp.ones(4, jnp.int32), jnp.ones((4, t, D_K), dtype)
    compiled = jax.jit(program, donate_argnums=0).lower(cache, num_tokens, latents).compile()
    text = compiled.as_text()
    assert "input_output_alias={" in text
    assert pool_sized(text, cache.pages.size) <= IN_PLACE
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.pages.nbytes
    assert memory.temp_size_in_bytes < cache.pages.nbytes

    pointer = cache.pages.unsafe_buffer_pointer()
    result = jax.tree.leaves(compiled(cache, num_tokens, latents))[0]
    assert cache.pages.is_deleted()
    assert result.unsafe_buffer_pointer() == pointer


def test_the_search_for_copies_finds_one():
    x = jnp.zeros((192, 16, 1, D_K))
    compiled = jax.jit(lambda x: (x, x.at[0].set(1))).lower(x).compile()
    assert "copy" in pool_sized(compiled.as_text(), x.size)


@pytest.mark.parametrize("program", [decode_step, loop_of_scans])
def test_other_values_trace_nothing(program):
    step = jax.jit(program)
    rng = np.random.default_rng(0)
    cache = small(num_pages=10)
    for num_tokens in ([1, 1, 1, 1], [0, 3, 0, 1], [9, 9, 9, 9], [0, 0, 0, 0], [-1, 2, 3, 1]):
        latents = rng.standard_normal((4, 3, D_K), np.float32)
        step(cache, np.array(num_tokens, np.int32), latents)
        cache, _ = jax.jit(PagedKVCache.reserve)(cache, np.array([1, 0, 2, 0]))
        cache = cache.reorder(rng.permutation(4))
    assert step._cache_size() == 1


@pytest.mark.parametrize("step", [decode_step, scan_over_layers])
def test_a_while_loop_agrees_with_the_plain_model(step):
    cache = small(num_pages=7, page_size=3, num_layers=3)
    model = _Model(7, 3, 4, 4)
    num_tokens = np.array([1, 2, 1, 0], np.int32)
    latents = np.random.default_rng(1).standard_normal((4, 2, D_K), np.float32)
    cache = jax.jit(lambda *args: loop(*args, step))(cache, num_tokens, latents)
    for _ in range(30):
        granted = model.reserve(num_tokens.tolist())
        model.append(np.broadcast_to(latents, (3, *latents.shape)))
        model.release([not g for g in granted])
        if not all(granted):
            dst = granted.index(False)
            model.fork([(dst + 1) % 4], [dst])
    check(cache, model)


# Refusals.

SIZES = {"num_layers": 2, "num_pages": 8, "max_seqs": 4, "max_pages_per_seq": 4}
LATENTS = np.zeros((4, 2, D_K), np.float32)


def create(**sizes):
    return lambda _: PagedKVCache.create(**(SIZES | sizes))


def projected(cache, c, dtype="float32", angles=None):
    tables = jnp.ones((4, 2, max(0, D_K - c) // 2 if angles is None else angles))
    cache = dataclasses.replace(cache, num_new=0 * cache.num_new)
    return cache.append_projected(0, LATENTS, jnp.ones(c, dtype), tables, tables)


REFUSALS = {
    "num_layers: got 0, expected an int of at least 1": create(num_layers=0),
    "num_pages: got -1, expected an int of at least 1": create(num_pages=-1),
    "max_seqs: got 2.0, expected an int of at least 1": create(max_seqs=2.0),
    "max_pages_per_seq: got None, expected an int": create(max_pages_per_seq=None),
    "page_size: got 0, expected an int of at least 1": create(page_size=0),
    "d_k: got True, expected an int of at least 1": create(d_k=True),
    "dtype: got int8, expected a floating type": create(dtype=jnp.int8),
    "num_layers * num_pages: got 2147483648, expected at most 2147483647 (int32)": create(
        num_pages=2**30
    ),
    "max_pages_per_seq * page_size: got 4294967296, expected at most": create(page_size=2**30),
    "max_seqs * max_pages_per_seq: got 4294967296, expected at most": create(max_seqs=2**30),
    "num_tokens: got shape (3,), expected (4,)": lambda c: c.reserve([1, 1, 1]),
    "num_tokens: got dtype float64, expected integers": lambda c: c.reserve([1.0, 1, 1, 1]),
    "num_tokens: got [-2], expected 0 <= num_tokens < 2147483648": lambda c: c.reserve(
        [1, -2, 1, 1]
    ),
    "num_tokens: got dtype bool, expected integers": lambda c: jax.jit(PagedKVCache.reserve)(
        c, np.ones(4, bool)
    ),
    "latents: got shape (4, 2, 2), expected (max_seqs, t, d_k) = (4, t, 3)": lambda c: c.append(
        0, LATENTS[..., :2]
    ),
    "latents: got shape (3, 2, 3), expected (max_seqs, t, d_k)": lambda c: c.append(0, LATENTS[:3]),
    "latents: got shape (4, 3), expected (max_seqs, t, d_k)": lambda c: c.append(0, LATENTS[:, 0]),
    "latents: got dtype bfloat16, expected float32": lambda c: c.append(
        0, jnp.asarray(LATENTS, jnp.bfloat16)
    ),
    "latents: got t = 2 columns, expected at least 3, the tokens": lambda c: c.append(0, LATENTS),
    "scale: got shape (2,), expected (c,) with d_k - c = 3 - c even": lambda c: projected(c, 2),
    "scale: got shape (5,), expected (c,) with d_k - c": lambda c: projected(c, 5),
    "scale: got int32 of shape (1,), expected floating": lambda c: projected(c, 1, "int32"),
    "cos: got float32 of shape (4, 2, 0), expected float32 of shape (4, 2, 1)": lambda c: projected(
        c, 1, angles=0
    ),
    "latents: got dtype int32, expected a floating type": lambda c: c.append_projected(
        0, jnp.zeros((4, 3, 3), jnp.int32), *3 * [jnp.ones(3)]
    ),
    "layer: got [2], expected 0 <= layer < 2": lambda c: c.append(2, LATENTS),
    "layer: got [-1], expected 0 <= layer < 2": lambda c: c.layer_table(-1),
    "layer: got dtype float64, expected integers": lambda c: c.layer_table(0.5),
    "layer: got shape (1,), expected ()": lambda c: c.append([0], LATENTS),
    "t: got 0, expected an int of at least 1": lambda c: c.positions(0),
    "mask: got int32 of shape (4,), expected bool of shape (4,)": lambda c: c.release([1, 0, 0, 0]),
    "mask: got bool of shape (), expected bool of shape (4,)": lambda c: c.release(True),
    "seqlens: got shape (), expected (4,)": lambda c: c.truncate(3),
    "seqlens: got [-1], expected 0 <= seqlens <": lambda c: c.truncate([0, 0, 0, -1]),
    "src: got shape (1, 1), expected a slot or one dimension": lambda c: c.fork([[0]], [[1]]),
    "src: got [7], expected 0 <= src < 4": lambda c: c.fork([0, 7], [1, 2]),
    "dst: got shape (2,), expected ()": lambda c: c.fork(0, [1, 2]),
    "dst: got [4], expected 0 <= dst < 4": lambda c: c.fork(0, 4),
    "dst: got slots [3] twice, expected each once": lambda c: c.fork([0, 0], [3, 3]),
    "dst: got slots [1] with tokens, expected empty slots": lambda c: c.fork([0, 0], [1, 3]),
    "src: got [4], expected 0 <= src < 4": lambda c: c.reorder([0, 1, 2, 4]),
    "src: got shape (2,), expected (4,)": lambda c: c.reorder([0, 1]),
    "num_bytes: got 0, expected an int": lambda _: PagedKVCache.tokens_that_fit(0, num_layers=1),
    "d_k: got -1, expected an int": lambda _: PagedKVCache.bytes_per_token(num_layers=1, d_k=-1),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_bad_input_is_refused(text):
    cache, _ = small().reserve([3, 1, 0, 0])
    with pytest.raises(ValueError, match=re.escape(text)):
        REFUSALS[text](cache)


def test_outside_jit_a_full_pool_is_an_exception():
    cache, _ = small(num_pages=3).reserve([5, 0, 0, 0])
    with pytest.raises(
        PagePoolFullError, match=re.escape("need 3 pages, 1 of 3 are free; slots [1, 3] do not fit")
    ):
        cache.reserve([7, 1, 0, 1])
    with pytest.raises(
        PagePoolFullError,
        match=re.escape("slot 1 would hold 17 tokens, 5 pages of 4; its row of the table has 4"),
    ):
        cache.reserve([0, 17, 0, 0])
    check_free, _ = cache.reserve([3, 0, 4, 0])  # the refused calls took nothing
    assert check_free.num_free_pages == 0
