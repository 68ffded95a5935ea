# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The schedule inside the CUDA kernel, compiled for the host: one warp as 32 contexts (tests/warp).

Each CTA finds its part by itself, and waits for what it believes the others to have: all must find
the same.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import shapes
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK = 64
HEIGHTS = (64, 32, 16)
MOST_PARTS = 132
SOURCES = Path(__file__).parent / "warp"
COMPILER = os.environ.get("CXX") or shutil.which("c++")

PART = np.dtype(
    [
        *((name, "i4") for name in "height begin_seq begin_block end_seq end_block".split()),
        *(("begin_tokens", "i4"), ("one_sequence", "?")),
        *((name, "i4") for name in "size begin_seq_at end_seq_at end_seq_last_at".split()),
        *(("line_end", "i4"), ("helper", "i4")),
    ],
    align=True,
)
PIECES = np.dtype([(name, "i4") for name in "begin_first end_first end_last helpers".split()])


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("schedule") / "schedule.so"
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{SOURCES}"]
    subprocess.run([COMPILER, *options, "-o", path, SOURCES / "schedule.cc"], check=True)
    return ctypes.CDLL(str(path))


def ints(values) -> ctypes.Array:
    return (ctypes.c_int32 * len(values))(*values)


def blocks_of(lengths, max_tokens):
    """Tokens and blocks that count; a sequence without tokens has a block, to be written."""
    tokens = np.clip(lengths, 0, max_tokens)
    return tokens.tolist(), np.maximum(-(-tokens // BLOCK), 1).tolist()


def find(library, lengths, rows, h_kv, sms, max_tokens, error):
    """Returns the parts that the CTAs of one group find, and what each knows of the others."""
    wanted = [-(-rows // height) * h_kv for height in HEIGHTS]
    ctas = max(min(sms, MOST_PARTS), wanted[0])
    groups, counts = np.zeros(3, np.int32), np.zeros(3, np.int32)
    tiles, found = (ctypes.c_int64 * 3)(*wanted), []
    for backwards in (False, True):
        parts, pieces = np.zeros(ctas, PART), np.zeros(ctas, PIECES)
        begins = np.zeros((ctas, 3), np.int32)
        arrays = (parts, pieces, groups, counts, begins)
        out = (ctypes.c_void_p(x.ctypes.data) for x in arrays)
        arguments = (ints(lengths), len(lengths), max_tokens, tiles, ctas, error, backwards)
        library.find_parts(*arguments, *out)
        found.append(parts)
    assert (found[0] == found[1]).all()  # no two lanes write the same
    (height,) = set(parts["height"].tolist())
    num, count = counts[height], groups[height]
    assert count == wanted[height]  # all rows have a tile
    total = sum(blocks_of(lengths, max_tokens)[1])
    # Blocks of a part and of combining it: about the least that a height can have.
    lower = [i for i in (1, 2) if wanted[i - 1] < wanted[i] <= ctas]
    costs = {i: -(-total // (ctas // wanted[i])) + (4 >> i) for i in (0, *lower)}
    assert costs[height] <= min(costs.values()) + 2
    # What is prefetched ahead is what the part begins with.
    foreseen = begins[:, 0] >= 0
    known = parts[foreseen]
    assert (known["begin_seq"] <= known["end_seq"]).all()
    assert (begins[foreseen, 0] == known["begin_seq"]).all()
    assert (begins[foreseen, 1] == known["begin_block"]).all()
    assert (begins[foreseen, 2] == height).all()
    if foreseen.any():
        assert (foreseen == (parts["begin_seq"] <= parts["end_seq"])).all()
    # CTAs that go through the same blocks agree; those that are left over have nothing.
    used, left = parts[: num * count].reshape(num, count), parts[num * count :]
    assert (used == used[:, :1]).all()
    assert (left["end_seq"] < left["begin_seq"]).all()
    assert (left["helper"] < 0).all()
    return used[:, 0], pieces[: num * count : count], foreseen.any()


def check(library, lengths, *, rows=16, h_kv=1, sms=132, max_tokens=1 << 20, error=0):
    """Asserts what the CTAs rely on; returns the blocks of each part."""
    parts, pieces, _ = find(library, lengths, rows, h_kv, sms, max_tokens, error)
    tokens, blocks = blocks_of(lengths, max_tokens)

    done, holders, works = [0] * len(lengths), [[] for _ in lengths], []
    for k, part in enumerate(parts):
        items = range(part["begin_seq"], part["end_seq"] + 1)
        assert not part["one_sequence"] or len(items) <= 1
        assert not items or part["begin_tokens"] == tokens[part["begin_seq"]]
        work = 0
        for seq in items:
            begin = part["begin_block"] if seq == part["begin_seq"] else 0
            end = part["end_block"] if seq == part["end_seq"] else blocks[seq]
            assert begin == done[seq] < end <= blocks[seq]  # each block once, in order
            done[seq], work = end, work + end - begin
            holders[seq].append(k)
        assert work <= part["size"]
        works.append(work)
    assert done == blocks
    size = max(parts["size"])
    if parts["one_sequence"].all() and size > 1 and max(blocks) <= 64 * (size - 1):
        needed = sum(-(-n // (size - 1)) for n in blocks)
        assert needed > len(parts)  # a smaller one would not do

    # Who combines a split sequence: those for whom it is the last, and parts without work.
    shares, helpers = [[] for _ in lengths], [set() for _ in lengths]
    for k, (part, known) in enumerate(zip(parts, pieces, strict=True)):
        items = range(part["begin_seq"], part["end_seq"] + 1)
        for seq in {*items[:1], *items[-1:]}:
            if len(holders[seq]) == 1:
                continue
            last = seq == part["end_seq"]
            first = known["end_first"] if last else known["begin_first"]
            count = (known["end_last"] if last else k) - first + 1
            assert (first, count) == (holders[seq][0], len(holders[seq]))
            assert holders[seq] == list(range(first, first + count))
            if last:
                helpers[seq].add(count + known["helpers"] if part["one_sequence"] else count - 1)
                shares[seq].append(k - first)
        if part["helper"] >= 0:
            assert not items
            seq = part["end_seq"]
            count = known["end_last"] - known["end_first"] + 1
            assert (known["end_first"], count) == (holders[seq][0], len(holders[seq]))
            if count > 1:
                helpers[seq].add(count + known["helpers"])
                shares[seq].append(count + part["helper"])
    for seq, holding in enumerate(holders):
        if len(holding) > 1:
            (number,) = helpers[seq]
            wanted = {share for share in shares[seq] if share < number}
            assert wanted == set(range(number))
            assert len(shares[seq]) == len(set(shares[seq]))
    return works


COMMON = {
    "rows": st.sampled_from([1, 16, 64, 100, 128, 256, 1024, 2176, 5000]),
    "h_kv": st.integers(1, 3),
    "sms": st.sampled_from([1, 2, 7, 78, 114, 132]),
    "error": st.integers(-1, 1),
}
LENGTH = st.one_of(
    st.integers(0, 300), st.integers(0, 70000), st.sampled_from([0, 64, 1024, 4096, 65536])
)


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(LENGTH, min_size=1, max_size=40), **COMMON)
def test_any_lengths(library, lengths, **options):
    check(library, lengths, **options)


@settings(max_examples=200, deadline=None)
@given(length=LENGTH, b=st.integers(1, 160), **COMMON)
def test_equal_lengths(library, length, b, **options):
    check(library, [length] * b, **options)


@settings(max_examples=300, deadline=None)
@given(
    kinds=st.lists(LENGTH, min_size=1, max_size=4),
    other=LENGTH,
    b=st.one_of(st.sampled_from([32, 33, 128, 129]), st.integers(33, 66), st.integers(67, 140)),
    seed=st.integers(0, 2**32 - 1),
    **COMMON,
)
def test_several_sequences_to_a_lane(library, kinds, other, b, seed, **options):
    """One is unlike the others. With 66 or fewer there are parts that help."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice(kinds, b)
    lengths[rng.integers(b)] = other
    check(library, lengths.tolist(), **options)


@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("b", [1, 4, 16, 128])
@pytest.mark.parametrize("s_k", [1024, 8192, 65536])
def test_the_shapes_of_the_benchmark(library, b, s_k, h_q):
    """The longest part is little longer than if all were equal."""
    works = check(library, [s_k] * b, rows=h_q)
    equal = -(-b * s_k // BLOCK // len(works))
    assert max(works) <= max(1.15 * equal, equal + 4)


@pytest.mark.parametrize("rows", [16, 64, 128])
@pytest.mark.parametrize("b", [2, 4, 16, 64, 128])
def test_equal_lengths_are_foreseen(library, b, rows):
    """Also where they differ within a block; not where one has a block more."""
    lengths = np.random.default_rng(0).integers(4033, 4097, b)
    assert find(library, lengths.tolist(), rows, 1, 132, 1 << 20, 0)[2]
    lengths[b // 2] += BLOCK
    assert not find(library, lengths.tolist(), rows, 1, 132, 1 << 20, 0)[2]


@pytest.mark.parametrize(("lengths", "s_q", "h_q"), shapes.IN_STEP)
def test_parts_are_long_where_tiles_are_to_keep_in_step(library, lengths, s_q, h_q):
    parts, _, _ = find(library, lengths, s_q * h_q, 1, 132, 1 << 20, 0)
    assert len(parts) == 2
    assert (parts["size"] > library.long_part()).all()


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 300),
    h_kv=st.integers(1, 3),
    sms=st.integers(1, 132),
    b=st.integers(1, 40),
    room=st.integers(1, 1000),
)
def test_tables_with_little_room_have_the_lowest_tiles(library, rows, h_kv, sms, b, room):
    groups = [-(-rows // height) * h_kv for height in HEIGHTS]
    ctas = max(sms, groups[0])
    found = library.prefer_lowest((ctypes.c_int64 * 3)(*groups), ctas, b, ctypes.c_int64(room))
    there = groups[1] < groups[2] <= ctas
    parts = ctas // groups[2]
    assert found == (parts if there and room <= 5 * parts else 0)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(17, 140),
    sms=st.integers(16, 132),
    b=st.integers(1, 40),
    blocks=st.integers(1, 40),
    alike=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_parts_of_tables_with_little_room(library, rows, sms, b, blocks, alike, seed):
    """Whatever the table has room for, parts are right, and what is foreseen is so."""
    max_tokens = blocks * BLOCK
    lengths = np.random.default_rng(seed).integers(0, max_tokens + 1, b)
    if alike:
        lengths[:] = lengths[0]
    check(library, lengths.tolist(), rows=rows, sms=sms, max_tokens=max_tokens)


@pytest.mark.parametrize(("max_tokens", "height", "num"), [(1024, 16, 16), (1 << 20, 32, 33)])
def test_blocks_of_low_tiles_are_foreseen(library, max_tokens, height, num):
    """Of the lowest ones, since the table has room for few blocks, and of middle ones."""
    parts, _, foreseen = find(library, [1000] * 4, 128, 1, 132, max_tokens, 0)
    assert foreseen
    assert (len(parts), {HEIGHTS[i] for i in parts["height"]}) == (num, {height})


def test_more_sequences_than_lanes_hold(library):
    rng = np.random.default_rng(0)
    check(library, rng.integers(0, 3000, 1000).tolist())
    check(library, [5] * 5000)


def test_lengths_that_are_none(library):
    int32 = np.iinfo(np.int32)
    lengths = np.random.default_rng(0).integers(int32.min, int32.max, 50).tolist()
    check(library, [*lengths, -1, int32.min, int32.max], max_tokens=4096)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(LENGTH, min_size=1, max_size=40), **COMMON)
def test_pieces_of_batch_invariant_calls(library, lengths, rows, h_kv, sms, error):
    """Each is computed once, by the part in which it begins, and is the sequence's own."""
    parts, _, _ = find(library, lengths, min(rows, 16), h_kv, sms, 1 << 20, error)
    _, blocks = blocks_of(lengths, 1 << 20)
    found = [[] for _ in lengths]
    for part in parts:
        for seq in range(part["begin_seq"], part["end_seq"] + 1):
            begin = int(part["begin_block"]) if seq == part["begin_seq"] else 0
            end = part["end_block"] if seq == part["end_seq"] else blocks[seq]
            size = library.fixed_piece_blocks(blocks[seq])
            found[seq] += range(library.fixed_piece_begin(begin, size, error), end, size)
    for n, begins in zip(blocks, found, strict=True):
        size = library.fixed_piece_blocks(n)
        assert begins == list(range(0, n, size))
        assert size >= min(n, 8)


def test_pieces_fit_the_workspace(library):
    """Also those of a sequence that is shorter than its table allows."""
    most = 0
    for blocks in range(1, 3000):
        size = library.fixed_piece_blocks(blocks)
        most = max(most, -(-blocks // size))
        assert most <= library.most_fixed_pieces(blocks) <= 32
        assert size <= max(16, -(-blocks // 32))
