# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The split-KV schedule: every block once, parts of equal cost, one executable for all lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mla_jax
from mla_jax.schedule import num_parts

BLOCK = 64
OVERHEAD = 5  # what a sequence's start costs a part, in blocks


schedule = jax.jit(mla_jax.get_mla_metadata, static_argnums=(1, 2), static_argnames="num_sms")


def pieces_of(metadata: np.ndarray, lengths: list[int]) -> list[list[tuple[int, int, int, int]]]:
    """Follows a schedule as a kernel does; pieces (sequence, first block, end block, split)."""
    parts = []
    for seq, block, last, end, split, *_ in metadata.tolist():
        pieces = []
        while (seq, block) < (last, end):
            stop = end if seq == last else -(-max(lengths[seq], 0) // BLOCK)
            pieces.append((seq, block, stop, split))
            seq, block, split = seq + 1, 0, 0
        parts.append(pieces)
    return parts


def check(lengths: list[int], rows: int, heads: int, sms: int) -> None:
    """Asserts all that a kernel relies on."""
    result = schedule(jnp.asarray(lengths, jnp.int32), rows, heads, num_sms=sms)
    metadata, num_splits = map(np.asarray, result)
    b, parts = len(lengths), max(sms // (-(-rows // 64) * heads), 1)
    assert metadata.shape == (parts, 8)
    assert num_splits.shape == (b + 1,)
    assert metadata.dtype == num_splits.dtype == np.int32
    assert not metadata[:, 5:].any()
    # One part ends where the next begins.
    np.testing.assert_array_equal(metadata[1:, :2], metadata[:-1, 2:4])

    blocks = [-(-max(n, 0) // BLOCK) for n in lengths]
    work = pieces_of(metadata, lengths)
    done = [[] for _ in range(b)]
    for pieces in work:
        for seq, first, end, split in pieces:
            done[seq].append((first, end, split))
    assert num_splits[0] == 0
    for seq, taken in enumerate(done):
        # Pieces join, from block 0 to the last, and are numbered in that order.
        firsts, ends, splits = zip(*taken, strict=True)
        assert (firsts[0], *ends) == (*firsts, blocks[seq])
        assert splits == tuple(range(len(taken)))
        assert num_splits[seq + 1] - num_splits[seq] == len(taken)
        if blocks[seq]:
            assert all(first < end for first, end, _ in taken)
        else:
            assert taken == [(0, 0, 0)]

    ideal = -(-sum(OVERHEAD + n for n in blocks) // parts)
    for pieces in work:
        cost = sum(OVERHEAD + end - first for _, first, end, _ in pieces)
        assert cost <= ideal + OVERHEAD + 1


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    lengths=st.lists(
        st.one_of(st.integers(0, 10_000), st.integers(0, 130), st.just(0), st.integers(-5, 0)),
        min_size=7,
        max_size=7,
    ),
    sms=st.sampled_from([1, 2, 13, 132]),
)
def test_every_block_once_and_in_order(lengths, sms):
    check(lengths, 128, 1, sms)


@pytest.mark.parametrize(
    ("lengths", "rows", "heads", "sms"),
    [
        ([4096], 16, 1, 132),  # one sequence, a few blocks a part
        ([64], 16, 1, 132),  # more parts than blocks
        ([1], 1, 1, 1),
        ([0], 1, 1, 132),
        ([0] * 40, 1, 1, 13),
        ([0, 0, 70_000, 0], 1, 1, 132),
        ([64, 65, 63, 128] * 32, 64, 1, 132),
        ([1024] * 128, 128, 1, 132),
        ([1024] * 128, 65, 3, 132),
        ([100, 5], 1000, 8, 132),  # more tiles than multiprocessors
        ([2**31 - 1], 1, 1, 132),
        ([-(2**31), 5], 1, 1, 132),
    ],
    ids=lambda value: f"{len(value)}x{value[0]}" if isinstance(value, list) else None,
)
def test_particular_lengths(lengths, rows, heads, sms):
    check(lengths, rows, heads, sms)


def test_parts_end_together():
    # 128 equal sequences of 64 blocks over 132 parts: as near to equal as blocks allow.
    metadata, _ = mla_jax.get_mla_metadata(jnp.full(128, 4096, jnp.int32), 64, 1, num_sms=132)
    work = pieces_of(np.asarray(metadata), [4096] * 128)
    blocks = [sum(end - first for _, first, end, _ in pieces) for pieces in work]
    assert sum(blocks) == 128 * 64
    assert max(blocks) - min(blocks[:-1]) <= OVERHEAD + 1


def test_as_many_equal_sequences_as_parts_are_not_split():
    _, num_splits = mla_jax.get_mla_metadata(jnp.full(132, 640, jnp.int32), 64, 1, num_sms=132)
    np.testing.assert_array_equal(num_splits, np.arange(133))


def test_empty_batch():
    metadata, num_splits = mla_jax.get_mla_metadata(jnp.zeros(0, jnp.int32), 1, 1, num_sms=4)
    np.testing.assert_array_equal(metadata, np.zeros((4, 8)))
    np.testing.assert_array_equal(num_splits, [0])


def test_jit_compiles_once_and_changes_nothing():
    one = jax.jit(lambda n: mla_jax.get_mla_metadata(n, 128, 1, num_sms=132))
    for lengths in ([5, 0, 9000], [0, 0, 0], [-7, 2**31 - 1, 64]):
        lengths = jnp.asarray(lengths, jnp.int32)
        eager = mla_jax.get_mla_metadata(lengths, 128, 1, num_sms=132)
        for got, expected in zip(one(lengths), eager, strict=True):
            np.testing.assert_array_equal(got, expected)
    assert one._cache_size() == 1


def test_scan_over_growing_lengths():
    lengths = jnp.asarray([[63, 0], [64, 1], [65, 2]], jnp.int32)
    step = lambda carry, n: (carry, mla_jax.get_mla_metadata(n, 1, 1, num_sms=3))  # noqa: E731
    _, stacked = jax.lax.scan(step, None, lengths)
    for i, n in enumerate(lengths):
        for got, expected in zip(stacked, schedule(n, 1, 1, num_sms=3), strict=True):
            np.testing.assert_array_equal(got[i], expected)


def test_parts_are_shared_among_tiles_and_heads():
    assert num_parts(64, 1, 132) == 132
    assert num_parts(65, 1, 132) == 66
    assert num_parts(128, 2, 132) == 33
    assert num_parts(6400, 1, 132) == 1
    assert num_parts(64, 1) >= 1  # the multiprocessors of the default device


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_seqlens": jnp.zeros((2, 1), jnp.int32)}, r"cache_seqlens: got int32\[2, 1\]"),
        ({"cache_seqlens": jnp.zeros(2)}, r"cache_seqlens: got float32\[2\], expected int32\[b\]"),
        ({"num_q_tokens_per_head_k": 0}, "num_q_tokens_per_head_k: got 0, expected a positive int"),
        ({"num_q_tokens_per_head_k": 1.5}, r"num_q_tokens_per_head_k: got 1\.5, expected"),
        ({"num_heads_k": -1}, "num_heads_k: got -1, expected a positive int"),
        ({"num_sms": 0}, "num_sms: got 0, expected a positive int"),
    ],
)
def test_refusals(change, message):
    right = {
        "cache_seqlens": jnp.zeros(2, jnp.int32),
        "num_q_tokens_per_head_k": 16,
        "num_heads_k": 1,
        "num_sms": 132,
    }
    with pytest.raises(ValueError, match=message):
        mla_jax.get_mla_metadata(**(right | change))
