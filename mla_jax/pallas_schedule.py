# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The schedules of implementation "pallas": which CTAs work on which blocks of which sequence.

All blocks are laid on one line, sequence after sequence, and the line is cut into parts. The
balanced schedule is a kernel of its own: as XLA operations it is a dozen launches.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.schedule import BLOCK

Ref = Any

# What starting a sequence (loading q, writing the result) costs, in blocks.
_OVERHEAD = 3
# Blocks of a split that does not depend on the batch.
_INVARIANT_BLOCKS = 32
_CHUNK = 64  # sequences or cuts that are the rows of one matrix


class Schedule(NamedTuple):
    """A division of all sequences' blocks into parts.

    Attributes:
        cuts: `[3, parts + 1 or more]` int32: part p works from cut p up to cut p + 1. Cut p is
            before block `cuts[1, p]` of sequence `cuts[0, p]`, which then begins the split
            `cuts[2, p]` of that sequence; `(b, 0, 0)` past the last sequence.
        num_splits: `[b + 1 or more]` int32, the number of splits of all sequences before each.
        parts: how many there are.
    """

    cuts: jax.Array
    num_splits: jax.Array
    parts: int


def given_schedule(metadata: jax.Array, num_splits: jax.Array) -> Schedule:
    """Takes over a schedule in the format of `get_mla_metadata`."""
    cuts = jnp.concatenate([metadata[:, jnp.array([0, 1, 4])], metadata[-1:, 2:5]])
    return Schedule(cuts.T, num_splits, metadata.shape[0])


def invariant_schedule(seqlens: jax.Array, capacity: int) -> Schedule:
    """Cuts each sequence into splits of one size: the same whatever else is in the batch.

    Args:
        seqlens: `[b]` int32.
        capacity: tokens that a sequence may have; lengths are clamped to it.

    Returns:
        A schedule in which a part is one split, those that are not needed empty.
    """
    b = seqlens.shape[0]
    blocks = _blocks(seqlens, capacity)[:, None]
    most = max(1, -(-capacity // (BLOCK * _INVARIANT_BLOCKS)))
    split = jnp.arange(most, dtype=jnp.int32)
    begin = split * _INVARIANT_BLOCKS
    used = begin < blocks
    index = jnp.arange(b, dtype=jnp.int32)[:, None]
    # A part that is not needed begins and ends where the sequence ends.
    rows = jnp.where(used, index, index + 1), jnp.where(used, begin, 0), jnp.where(used, split, 0)
    end = jnp.array([[b], [0], [0]], jnp.int32)
    cuts = jnp.concatenate([jnp.stack(rows).reshape(3, b * most), end], axis=1)
    num_splits = jnp.cumsum(used.sum(axis=1, dtype=jnp.int32))
    return Schedule(cuts, jnp.concatenate([jnp.zeros(1, jnp.int32), num_splits]), b * most)


def balanced_schedule(
    seqlens: jax.Array, capacity: int, parts: int, interpret: Any = None
) -> Schedule:
    """Schedules the blocks of all sequences so that all parts of the machine end together.

    Either each sequence on the line is preceded by a gap that stands for the cost of starting it,
    and the cuts' distance is rounded up if sequences of one length then end at a cut; or, if that
    leaves few parts idle, each is padded to whole parts, so that no part works on two.

    Args:
        seqlens: `[b]` int32, b is not 0.
        capacity: tokens that a sequence may have; lengths are clamped to it.
        parts: the number of parts.
        interpret: Pallas' parameters of interpretation, or None to compile.
    """
    b = seqlens.shape[0]
    chunks, tiles = _ceil(b, _CHUNK), _ceil(parts + 1, _CHUNK)
    vector = plgpu.SMEM((_CHUNK,), jnp.int32)
    kernel = plgpu.kernel(
        functools.partial(_schedule_body, capacity=capacity, parts=parts),
        out_type=(
            jax.ShapeDtypeStruct((3, tiles * _CHUNK), jnp.int32),
            jax.ShapeDtypeStruct((chunks * _CHUNK + 1,), jnp.int32),
        ),
        scratch_types={
            "lengths": plgpu.SMEM((chunks, _CHUNK), jnp.int32),
            "costs": vector,
            "ends": vector,
            "counts": vector,
            "full": plgpu.Barrier(num_arrivals=chunks),
        },
        grid=(tiles,),
        grid_names=("tile",),
        kernel_name="mla_schedule",
        interpret=interpret,
    )
    cuts, num_splits = kernel(seqlens)
    return Schedule(cuts, num_splits, parts)


def _schedule_body(
    seqlens: Ref,
    cuts: Ref,
    num_splits: Ref,
    *,
    capacity: int,
    parts: int,
    lengths: Ref,
    costs: Ref,
    ends: Ref,
    counts: Ref,
    full: Ref,
) -> None:
    """Finds 64 cuts, and in one CTA the splits.

    What is one number for all is held as a vector of 64 equal ones: the sum along a row of a matrix
    stays within a warp.
    """
    tile = lax.axis_index("tile")
    b, chunks = seqlens.shape[0], lengths.shape[0]
    matrix = plgpu.Layout.WGMMA
    rows, columns = matrix.reduce(1), matrix.reduce(0)
    shape = (_CHUNK, _CHUNK)

    def load(ref: Ref, layout: Any) -> jax.Array:
        return plgpu.load(ref, layout=layout)  # type: ignore[call-arg]

    def blocks_of(chunk: jax.Array, layout: Any) -> jax.Array:
        """Blocks of the sequences of a chunk, 0 past the last sequence."""
        index = plgpu.broadcasted_iota(jnp.int32, (_CHUNK,), 0, layout=layout) + chunk * _CHUNK
        return jnp.where(index < b, _blocks(load(lengths.at[chunk], layout), capacity), 0)

    def along_rows(x: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(x, shape, [1])

    @pl.loop(0, chunks)
    def load_lengths(chunk: jax.Array) -> None:
        here = pl.ds(chunk * _CHUNK, _CHUNK)
        plgpu.copy_gmem_to_smem(seqlens.at[here], lengths.at[chunk], full)  # past the end: zeros

    plgpu.barrier_wait(full)
    zeros = plgpu.layout_cast(jnp.zeros((_CHUNK,), jnp.int32), rows)

    def measure(chunk: jax.Array, state: Any) -> Any:
        total, longest = state
        blocks = along_rows(blocks_of(chunk, columns))
        return total + blocks.sum(axis=1), jnp.maximum(longest, blocks.max(axis=1))

    total, longest = lax.fori_loop(0, chunks, measure, (zeros, zeros))
    size = _ceil(total + b * _OVERHEAD, parts)
    whole = _ceil(size, longest + _OVERHEAD) * (longest + _OVERHEAD)
    size = jnp.where(whole - size <= 2 + lax.div(size, 32), whole, size)
    gap = zeros + _OVERHEAD
    if b <= parts:
        padded = _ceil(longest, parts // b)
        pad = padded <= size + 2 + lax.div(size, 16)
        size, gap = jnp.where(pad, padded, size), jnp.where(pad, 0, gap)

    part = plgpu.broadcasted_iota(jnp.int32, (_CHUNK,), 0, layout=rows) + tile * _CHUNK
    cut = part * size
    earlier = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=matrix) <= (
        plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=matrix)
    )

    def up_to(x: jax.Array) -> jax.Array:
        return jnp.where(earlier, along_rows(x), 0).sum(axis=1)

    def place(chunk: jax.Array, state: Any) -> Any:
        """Places the sequences of a chunk on the line."""
        before, splits, seq, start = state
        blocks = blocks_of(chunk, rows)
        costs[...] = jnp.where(
            blocks == 0, 0, jnp.where(gap == 0, _ceil(blocks, size) * size, blocks + gap)
        )
        cost = load(costs, columns)
        end = before + up_to(cost)
        ends[...] = end
        # A sequence's splits: the cuts before its end, less those up to its first block, and one.
        counts[...] = jnp.where(
            blocks == 0, 0, _ceil(end, size) - lax.div(end - load(costs, rows) + gap, size)
        )
        count = load(counts, columns)

        @pl.when(tile == 0)
        def store_splits() -> None:
            num_splits[pl.ds(chunk * _CHUNK + 1, _CHUNK)] = splits + up_to(count)

        passed = along_rows(load(ends, columns)) <= lax.broadcast_in_dim(cut, shape, [0])
        return (
            before + along_rows(cost).sum(axis=1),
            splits + along_rows(count).sum(axis=1),
            seq + jnp.where(passed, 1, 0).sum(axis=1),
            start + jnp.where(passed, along_rows(cost), 0).sum(axis=1),
        )

    _, _, seq, start = lax.fori_loop(0, chunks, place, (zeros, zeros, zeros, zeros))
    # A cut inside the gap moves to the sequence's start.
    block = jnp.where(seq < b, jnp.maximum(cut - start - gap, 0), 0)
    here = pl.ds(tile * _CHUNK, _CHUNK)
    cuts[0, here] = jnp.minimum(seq, b)
    cuts[1, here] = block
    cuts[2, here] = jnp.where(block > 0, part - lax.div(start + gap, size), 0)

    @pl.when(tile == 0)
    def store_first() -> None:
        num_splits[0] = jnp.int32(0)


def _blocks(seqlens: jax.Array, capacity: int) -> jax.Array:
    """Blocks of sequences, one at least."""
    return jnp.maximum(_ceil(jnp.clip(seqlens, 0, capacity), BLOCK), 1)


def _ceil(x: Any, y: Any) -> Any:
    if isinstance(x, int) and isinstance(y, int):
        return -(-x // y)
    return lax.div(x + (y - 1), y)
