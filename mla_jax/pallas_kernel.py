# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The Mosaic-GPU decode kernel of implementation "pallas", for Hopper.

A CTA holds 64 packed query rows and walks through blocks of 64 tokens: scores = Q K^T, weights =
softmax, output += weights V, where V is the first columns of K. Four warpgroups:

  weights 0, 1   each has one of the two block buffers: loads a block into it, makes its scores and
                 weights; even blocks belong to 0, odd ones to 1
  output 0, 1    each accumulates half of the columns of the output over all blocks

So no order couples the two buffers but that of the running maxima and sums, which pass from one
weights warpgroup to the other through shared memory, block by block:

  weights g:  wait free | load | scores | maximum (after that of g - 1) | weights | sum | ready
  output:     wait ready of g | rescale | product with weights g | free

A running maximum stays behind the scores by some slack, so that the output is rarely rescaled.

Blocks are counted over all items of a CTA (`g`): a buffer may hold a block of the next sequence
while the output of this one is still being written.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.pallas_config import Config
from mla_jax.pallas_schedule import Schedule
from mla_jax.schedule import BLOCK, TILE

Ref = Any

# By how much scores, as logarithms to base 2, may exceed the running maximum before it follows.
# Weights are at most 2^8 then, which float16 holds; digits are none the fewer.
_SLACK = 8.0


def _tiled(columns: int, dtype: Any) -> tuple[Any, ...]:
    """The layout of shared memory that the tensor cores read."""
    swizzle = min(128, columns * jnp.dtype(dtype).itemsize)
    return (  # mypy takes both classes for abstract
        plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)),  # type: ignore[abstract]
        plgpu.SwizzleTransform(swizzle),  # type: ignore[abstract]
    )


def _matrix(*shape: int, dtype: Any) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=_tiled(shape[-1], dtype))


@dataclass(frozen=True)
class _Item:
    """Blocks `[begin, end)` of a sequence; `n` counts them, a masked one if there are none."""

    seq: jax.Array
    length: jax.Array
    begin: jax.Array
    n: jax.Array
    slot: jax.Array  # where its result goes among the splits
    whole: jax.Array  # whether it is the only split of its sequence


def decode(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    seqlens: jax.Array,
    schedule: Schedule,
    config: Config,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Runs the decode kernel over a schedule.

    Args:
        q: `[b * h_kv, rows, d_k]`, rows padded to `config.rows`.
        k_cache: `[num_pages, page_size, h_kv * d_k]`.
        block_table: `[b, max_pages_per_seq]` int32.
        seqlens: `[b]` int32, clamped to the table's capacity.
        schedule: the division of the blocks among CTAs.
        config: the kernel's.

    Returns:
        out `[b * h_kv, rows, d_v]` in q's dtype and lse `[b * h_kv, lse_rows]`, of sequences that
        are not split; partial outputs `[num_slots * h_kv, rows, d_v]` float32, normalised, and
        their lse `[num_slots * h_kv, lse_rows]`, -inf where nothing was seen, of those that are.
    """
    b = seqlens.shape[0]
    h_kv = k_cache.shape[2] // config.d_k
    parts = schedule.parts
    groups = config.tiles * h_kv  # CTAs that share a part of the schedule
    half, rope, dtype = config.half, config.rope, q.dtype
    slots = b + parts if parts > 1 else 1  # one part splits nothing
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out_type = (
        jax.ShapeDtypeStruct((b * h_kv, config.rows, config.d_v), dtype),
        f32((b * h_kv, config.lse_rows)),
        f32((slots * h_kv, config.rows, config.d_v)),
        f32((slots * h_kv, config.lse_rows)),
    )
    vector = plgpu.SMEM((2, TILE), jnp.float32)
    narrow = (2, BLOCK, rope)
    values = (
        _matrix(2, 2, BLOCK, half, dtype=dtype),
        _matrix(2, 2, TILE, config.piece, dtype=jnp.float32),
    )
    scratch = {
        "q_smem": _matrix(2, TILE, half, dtype=dtype),
        "q_rope": _matrix(1, TILE, rope, dtype=dtype) if rope else None,
        # Block buffers: values, by half, which the output of an item leaves through, too. The
        # interpreter takes accesses to different parts of a union for a race.
        "kv": values if config.interpret else plgpu.RefUnion(*values),
        "k_rope": _matrix(*narrow, dtype=dtype) if rope else None,
        # Weights take the place of the block's RoPE columns, if these are as wide.
        "p_smem": None if rope == BLOCK else _matrix(2, TILE, BLOCK, dtype=dtype),
        "maxima": vector,
        "factors": vector,
        "sums": vector,
        "lse_smem": plgpu.SMEM((TILE,), jnp.float32),
        "q_full": plgpu.Barrier(num_arrivals=3 if rope else 2),
        "q_free": plgpu.Barrier(num_arrivals=2),
        "k_full": plgpu.Barrier(num_barriers=4, num_arrivals=max(1, BLOCK // config.page_size)),
        "rope_full": plgpu.Barrier(num_barriers=2, num_arrivals=max(1, BLOCK // config.page_size)),
        "k_free": plgpu.Barrier(num_barriers=4),
        "max_ready": plgpu.Barrier(num_barriers=2),
        "sum_ready": plgpu.Barrier(num_barriers=2),
        "p_ready": plgpu.Barrier(num_barriers=2),
        "scored": plgpu.Barrier(num_barriers=2),
        "item_ready": plgpu.Barrier(num_barriers=2),
        "drained": plgpu.Barrier(num_barriers=2),
    }
    scratch = {name: value for name, value in scratch.items() if value is not None}
    kernel = plgpu.kernel(
        functools.partial(_decode_body, config=config, h_kv=h_kv, groups=groups),
        out_type=out_type,
        scratch_types=scratch,
        grid=(parts * groups,),
        grid_names=("cta",),
        num_threads=4,
        thread_name="warpgroup",
        kernel_name="mla_decode",
        interpret=config.interpret,
        # Our own barriers suffice: `scored` and `drained` where the warps of a warpgroup must meet.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, unsafe_no_auto_barriers=True
        ),
    )
    return kernel(q, k_cache, block_table, seqlens, schedule.cuts, schedule.num_splits)


def _row_vector(ref: Ref) -> jax.Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))  # type: ignore[call-arg]


def _any_rescales(factor: jax.Array) -> jax.Array:
    """Says whether a factor of this warp's rows is not 1: warps may get different answers."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA.reduce(1),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=None),  # type: ignore[arg-type]
    )
    def vote(_: Any, factors: Any) -> Any:
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        one = arith.constant(f32, ir.FloatAttr.get(f32, 1.0))  # type: ignore[arg-type,call-arg]
        changes = [
            arith.cmpf(arith.CmpFPredicate.UNE, vector.extract(x, [], [0]), one)
            for x in factors.registers.flat
        ]
        voted = llvm.inline_asm(
            i32,
            [arith.extui(i32, functools.reduce(arith.ori, changes))],
            "{ .reg .pred p, q; setp.ne.s32 p, $1, 0; "
            "vote.sync.any.pred q, p, 0xffffffff; selp.s32 $0, 1, 0, q; }",
            "=r,r",
            has_side_effects=True,
        )
        return mgpu.FragmentedArray.splat(voted, (), is_signed=True)  # type: ignore[arg-type]

    return vote(factor) != 0


def _columns(x: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(x, like.shape, [0])


def _decode_body(
    q: Ref,
    k_cache: Ref,
    block_table: Ref,
    seqlens: Ref,
    cuts: Ref,
    num_splits: Ref,
    out: Ref,
    lse: Ref,
    partial_out: Ref,
    partial_lse: Ref,
    *,
    config: Config,
    h_kv: int,
    groups: int,
    q_smem: Ref,
    kv: Ref,
    maxima: Ref,
    factors: Ref,
    sums: Ref,
    lse_smem: Ref,
    q_full: Ref,
    q_free: Ref,
    k_full: Ref,
    rope_full: Ref,
    k_free: Ref,
    max_ready: Ref,
    sum_ready: Ref,
    p_ready: Ref,
    scored: Ref,
    item_ready: Ref,
    drained: Ref,
    q_rope: Ref = None,
    k_rope: Ref = None,
    p_smem: Ref = None,
) -> None:
    k_smem, stage = kv
    p_smem = k_rope if p_smem is None else p_smem
    cta = lax.axis_index("cta")
    warpgroup = lax.axis_index("warpgroup")
    part = lax.div(cta, jnp.int32(groups))
    group = lax.rem(cta, jnp.int32(groups))
    kv_head = lax.div(group, jnp.int32(config.tiles))
    first_row = lax.rem(group, jnp.int32(config.tiles)) * TILE
    b = seqlens.shape[0]
    half, rope, tile_rows = config.half, config.rope, config.tile_rows
    scale_log2 = config.scale * math.log2(math.e)

    def for_each_item(body: Any) -> jax.Array:
        """Calls `body(g, item)` for the items of this part; returns the number of their blocks."""
        begin_seq, end_seq = jnp.maximum(cuts[0, part], 0), cuts[0, part + 1]
        begin_block, end_block = cuts[1, part], cuts[1, part + 1]
        first = cuts[2, part]
        last_seq = jnp.minimum(jnp.where(end_block > 0, end_seq, end_seq - 1), b - 1)

        def step(seq: jax.Array, g: jax.Array) -> jax.Array:
            length = jnp.clip(seqlens[seq], 0, block_table.shape[1] * config.page_size)
            blocks = lax.div(length + (BLOCK - 1), jnp.int32(BLOCK))
            begin = jnp.clip(jnp.where(seq == begin_seq, begin_block, 0), 0, blocks)
            end = jnp.where(seq == end_seq, jnp.minimum(end_block, blocks), blocks)
            split = jnp.where(seq == begin_seq, first, 0)
            first_split = num_splits[seq]
            n = jnp.maximum(end - begin, 1)
            whole = num_splits[seq + 1] - first_split == 1
            slot = jnp.clip(first_split + split, 0, partial_lse.shape[0] // h_kv - 1)
            body(g, _Item(seq, length, begin, n, slot, whole))
            return g + n

        return lax.fori_loop(begin_seq, last_seq + 1, step, jnp.int32(0))

    # ---- Queries, blocks, scores, weights ----

    def load_queries(item: _Item) -> None:
        rows = pl.ds(first_row, tile_rows)
        source = q.at[item.seq * h_kv + kv_head, rows]
        here = pl.ds(0, tile_rows)
        for i in range(2):
            plgpu.copy_gmem_to_smem(source.at[:, pl.ds(i * half, half)], q_smem.at[i, here], q_full)
        if rope:
            plgpu.copy_gmem_to_smem(source.at[:, pl.ds(2 * half, rope)], q_rope.at[0, here], q_full)

    def pages_of(item: _Item, block: jax.Array) -> list[tuple[jax.Array, Any]]:
        """The page and the tokens within it of each copy of a block; past the pool are zeros."""
        size = min(config.page_size, BLOCK)
        found = []
        for i in range(BLOCK // size):
            token = block * BLOCK + i * size
            used = token < item.length
            entry = lax.div(jnp.where(used, token, 0), jnp.int32(config.page_size))
            page = block_table[item.seq, entry]
            page = jnp.where(used & (page >= 0), page, k_cache.shape[0])
            found.append((page, pl.ds(lax.rem(token, jnp.int32(config.page_size)), size)))
        return found

    def load_block(pages: Any, first_column: Any, columns: int, target: Ref, full: Ref) -> None:
        size = min(config.page_size, BLOCK)
        column = kv_head * config.d_k + first_column
        for i, (page, tokens) in enumerate(pages):
            plgpu.copy_gmem_to_smem(
                k_cache.at[page, tokens, pl.ds(column, columns)],
                target.at[pl.ds(i * size, size)],
                full,
            )

    def make_weights(slot: jax.Array) -> None:
        other = 1 - slot

        @pl.when(slot == 1)
        def stand_in_for_the_block_before_the_first() -> None:
            plgpu.barrier_arrive(max_ready.at[1])
            plgpu.barrier_arrive(sum_ready.at[1])

        plgpu.barrier_arrive(q_free)

        def item_body(g: jax.Array, item: _Item) -> None:
            first = lax.rem(slot + g, jnp.int32(2))

            @pl.when(slot == 0)
            def load_queries_when_free() -> None:
                plgpu.barrier_wait(q_free)
                load_queries(item)

            limit = item.length
            if config.causal:
                row = first_row + plgpu.broadcasted_iota(
                    jnp.int32, (TILE,), 0, layout=plgpu.Layout.WGMMA.reduce(1)
                )
                query = lax.div(row, jnp.int32(config.heads_per_kv))
                limit = jnp.minimum(item.length - config.s_q + 1 + query, item.length)

            def block_body(i: jax.Array, _: None) -> None:
                j = first + 2 * i
                block = item.begin + j
                # Indices the compiler cannot see through: it would hoist the addresses of all
                # operands and barriers out of the loop and spill them.
                zero = lax.optimization_barrier(jnp.int32(0))
                here = slot + zero
                there = 1 - here
                pages = pages_of(item, block)
                for h in range(2):
                    plgpu.barrier_wait(k_free.at[2 * here + h])
                    load_block(pages, h * half, half, k_smem.at[here, h], k_full.at[2 * here + h])
                if rope:
                    load_block(pages, 2 * half, rope, k_rope.at[here], rope_full.at[here])

                @pl.when(i == 0)
                def wait_for_queries() -> None:
                    plgpu.barrier_wait(q_full)

                def scores_of(acc: Ref) -> jax.Array:
                    for h in range(2):
                        plgpu.barrier_wait(k_full.at[2 * here + h])
                        plgpu.wgmma(acc, q_smem.at[h + zero], k_smem.at[here, h].transpose((1, 0)))
                    if rope:
                        plgpu.barrier_wait(rope_full.at[here])
                        plgpu.wgmma(acc, q_rope.at[zero], k_rope.at[here].transpose((1, 0)))
                    return acc[...]

                scores = pl.run_scoped(scores_of, plgpu.ACC((TILE, BLOCK), jnp.float32))
                plgpu.barrier_arrive(scored.at[here])

                @pl.when(j + 2 >= item.n)
                def free_queries() -> None:
                    plgpu.barrier_arrive(q_free)

                past = item.length - block * BLOCK  # the block's first token past the end
                if config.causal:
                    seen = limit - block * BLOCK
                else:
                    seen = jnp.broadcast_to(past, (TILE,))

                def mask(scores: jax.Array) -> jax.Array:
                    token = plgpu.broadcasted_iota(
                        jnp.int32, (TILE, BLOCK), 1, layout=plgpu.Layout.WGMMA
                    )
                    return jnp.where(token < _columns(seen, token), scores, -jnp.inf)

                hidden = config.s_q - 1 if config.causal else 0
                scores = lax.cond(past < BLOCK + hidden, mask, lambda x: x, scores)
                top = scores.max(axis=1) * scale_log2

                plgpu.barrier_wait(max_ready.at[there])
                before = _row_vector(maxima.at[there])
                before = jnp.where(jnp.broadcast_to(j == 0, before.shape), -jnp.inf, before)
                top = jnp.where(top - before > _SLACK, top, before)
                maxima[here] = top
                plgpu.barrier_arrive(max_ready.at[here])

                # Where nothing was seen yet: -inf - -inf would be NaN.
                top = jnp.where(top == -jnp.inf, 0.0, top)
                factor = jnp.exp2(before - top)
                factors[here] = factor
                weights = jnp.exp2(scores * scale_log2 - _columns(top, scores))
                # All warps must be done with the RoPE columns that the weights replace.
                plgpu.barrier_wait(scored.at[here])
                p_smem[here] = weights.astype(q.dtype)

                @pl.when(past < BLOCK)
                def clear() -> None:
                    clear_past_end(here, past)

                plgpu.commit_smem()
                plgpu.barrier_arrive(p_ready.at[here])

                total = weights.sum(axis=1)
                plgpu.barrier_wait(sum_ready.at[there])
                before = _row_vector(sums.at[there])
                before = jnp.where(jnp.broadcast_to(j == 0, before.shape), 0.0, before)
                sums[here] = before * factor + total
                plgpu.barrier_arrive(sum_ready.at[here])

                @pl.when(j == item.n - 1)
                def end_item() -> None:
                    plgpu.barrier_arrive(item_ready.at[here])

            mine = lax.div(item.n - first + 1, jnp.int32(2))
            lax.fori_loop(0, mine, block_body, None)

            @pl.when(mine == 0)
            def pass_queries() -> None:
                plgpu.barrier_wait(q_full)
                plgpu.barrier_arrive(q_free)

        total = for_each_item(item_body)
        # No barrier may be left with a completion that nobody saw.
        for h in range(2):
            plgpu.barrier_wait(k_free.at[2 * slot + h])

        @pl.when(slot == lax.rem(total, jnp.int32(2)))
        def see_the_last_block() -> None:
            plgpu.barrier_wait(max_ready.at[other])
            plgpu.barrier_wait(sum_ready.at[other])

        @pl.when(slot == 0)
        def see_free_queries() -> None:
            plgpu.barrier_wait(q_free)

    def clear_past_end(slot: jax.Array, valid: jax.Array) -> None:
        """Zeroes the values past the sequence's end: their weights are 0, but 0 * NaN is NaN."""
        for h in range(2):
            for c in range(0, half, 64):
                values = k_smem.at[slot, h, :, pl.ds(c, 64)]
                row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, 64), 0, layout=plgpu.Layout.WGMMA)
                old = plgpu.load(values, layout=plgpu.Layout.WGMMA)  # type: ignore[call-arg]
                values[...] = jnp.where(row < valid, old, jnp.zeros_like(old))

    # ---- Output ----

    def accumulate_output(h: jax.Array) -> None:
        for slot in range(2):
            plgpu.barrier_arrive(k_free.at[2 * slot + h])

        accumulators = [plgpu.ACC((TILE, config.piece), jnp.float32)] * 2

        def item_body(g: jax.Array, item: _Item) -> None:
            def product(c: int, slot: jax.Array, acc: Ref) -> None:
                columns = pl.ds(c * config.piece, config.piece)
                plgpu.wgmma(acc, p_smem.at[slot], k_smem.at[slot, h, :, columns])

            def block_body(acc: tuple[Ref, ...], j: jax.Array, values: Any) -> Any:
                slot = lax.rem(g + j, jnp.int32(2))
                here = slot + lax.optimization_barrier(jnp.int32(0))
                plgpu.barrier_wait(p_ready.at[here])
                factor = _row_vector(factors.at[here])
                if config.interpret is None:
                    values_so_far = [plgpu.wgmma_accumulator_load(x, wait_n=None) for x in acc]
                    scaled = lax.cond(
                        _any_rescales(factor),
                        lambda values: [x * _columns(factor, x) for x in values],
                        lambda values: values,
                        values_so_far,
                    )
                    for ref, value in zip(acc, scaled, strict=True):
                        ref[...] = value
                    for c, ref in enumerate(acc):
                        product(c, here, ref)
                    plgpu.wgmma_wait(0)
                else:  # the interpreter cannot store to an accumulator

                    def fresh(c: int, ref: Ref) -> jax.Array:
                        product(c, here, ref)
                        return ref[...]

                    values = [
                        value * _columns(factor, value)
                        + pl.run_scoped(functools.partial(fresh, c), accumulators[c])
                        for c, value in enumerate(values)
                    ]

                @pl.when(j + 1 < item.n)
                def free_block() -> None:
                    plgpu.barrier_arrive(k_free.at[2 * here + h])

                return values

            def scope(*acc: Ref) -> None:
                if config.interpret is None:
                    lax.fori_loop(0, item.n, functools.partial(block_body, acc), None)
                    values = [plgpu.wgmma_accumulator_load(ref, wait_n=0) for ref in acc]
                else:
                    zeros = [jnp.zeros((TILE, config.piece), jnp.float32)] * 2
                    values = lax.fori_loop(0, item.n, functools.partial(block_body, acc), zeros)
                finish(g, item, h, values)

            if config.interpret is None:
                pl.run_scoped(scope, *accumulators)
            else:
                scope()

        for_each_item(item_body)

    def finish(g: jax.Array, item: _Item, h: jax.Array, values: list[jax.Array]) -> None:
        """Writes the output of an item through the half buffer of its last block."""
        slot = lax.rem(g + item.n - 1, jnp.int32(2))
        plgpu.barrier_wait(item_ready.at[slot])
        # All warps must be done with the values that the output replaces.
        plgpu.barrier_arrive(drained.at[h])
        plgpu.barrier_wait(drained.at[h])
        total = _row_vector(sums.at[slot])
        seen = total != 0  # NaN was seen
        total = jnp.where(seen, total, 1.0)
        log_sum = jnp.where(seen, _row_vector(maxima.at[slot]) * math.log(2) + jnp.log(total), 0.0)
        inverse = jnp.where(seen, 1.0 / total, 0.0)
        values = [value * _columns(inverse, value) for value in values]
        here = pl.ds(0, tile_rows)
        rows = pl.ds(first_row, tile_rows)

        def store_lse(target: Ref, nothing: float) -> None:
            @pl.when(h == 0)
            def store() -> None:
                lse_smem[...] = jnp.where(seen, log_sum, nothing)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(lse_smem.at[here], target.at[rows])

        @pl.when(item.whole)
        def store_result() -> None:
            target = item.seq * h_kv + kv_head
            store_lse(lse.at[target], jnp.inf)
            for c, value in enumerate(values):
                columns = pl.ds(c * config.piece, config.piece)
                k_smem[slot, h, :, columns] = value.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                k_smem.at[slot, h, here], out.at[target, rows, pl.ds(h * half, half)]
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(jnp.logical_not(item.whole))
        def store_partial() -> None:
            target = item.slot * h_kv + kv_head
            store_lse(partial_lse.at[target], -jnp.inf)
            for c, value in enumerate(values):
                column = h * half + c * config.piece
                stage[slot, h] = value
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    stage.at[slot, h, here],
                    partial_out.at[target, rows, pl.ds(column, config.piece)],
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        plgpu.barrier_arrive(k_free.at[2 * slot + h])

    @pl.when(warpgroup < 2)
    def weights() -> None:
        plgpu.set_max_registers(config.weights_registers, action="decrease")
        make_weights(warpgroup)

    @pl.when(warpgroup >= 2)
    def output() -> None:
        plgpu.set_max_registers(config.output_registers, action="increase")
        accumulate_output(warpgroup - 2)
