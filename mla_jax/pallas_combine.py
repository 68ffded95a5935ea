# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The Mosaic-GPU kernel of implementation "pallas" that combines the splits of a sequence.

A warpgroup holds one row of the output at a time, or a share of its splits, and scales each partial
result by the exponential of its log sum (FlashDecoding). Where nothing is split it ends at once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.pallas_config import Config
from mla_jax.pallas_schedule import Schedule

Ref = Any

# Up to so many sequences and KV heads may have many splits each.
_FEW_SEQUENCES = 8
_RESIDENT_WARPGROUPS = 528  # what runs at once: their registers let four on a multiprocessor
_COMBINE_WARPGROUPS = 1056  # of the whole grid, at least: eight for each of 132 multiprocessors


def combine(
    out: jax.Array,
    lse: jax.Array,
    partial_out: jax.Array,
    partial_lse: jax.Array,
    schedule: Schedule,
    h_kv: int,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    """Combines the results of the splits of each sequence that has several, in place.

    Args:
        out: as `decode` returns it, here and below.
        lse: likewise.
        partial_out: likewise.
        partial_lse: likewise.
        schedule: that `decode` ran over.
        h_kv: KV heads.
        config: that of `decode`.

    Returns:
        out and lse, those of split sequences filled in; lse is +inf where nothing was seen.
    """
    b, parts = out.shape[0] // h_kv, schedule.parts
    if parts == 1:  # no sequence can be split
        return out, lse
    # A split sequence is found by itself, or by the part that holds its last split: the fewer.
    groups = min(b, parts)
    # Few sequences may have many splits, which several warpgroups share, as far as all run at once.
    warpgroups = 4 if groups * h_kv <= _FEW_SEQUENCES else 1
    while warpgroups > 1 and groups * h_kv * config.rows * warpgroups > _RESIDENT_WARPGROUPS:
        warpgroups //= 2
    rows = config.rows
    while rows % 2 == 0 and groups * h_kv * config.rows // rows * warpgroups < _COMBINE_WARPGROUPS:
        rows //= 2
    shared = plgpu.SMEM((warpgroups, config.d_v), jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_combine_body, config=config, h_kv=h_kv, rows=rows, by_seq=b <= parts),
        out_type=(),
        scratch_types={
            "outs": shared,
            "tops": shared,
            "sums": shared,
            "ready": plgpu.Barrier(num_arrivals=warpgroups),
        },
        grid=(groups, h_kv, config.rows // rows),
        grid_names=("group", "kv_head", "rows"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="mla_combine",
        interpret=config.interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    inputs = (partial_out, partial_lse, schedule.cuts, schedule.num_splits)
    results = pl.run_state(lambda refs: kernel(*inputs, *refs))((out, lse))
    # Where results are put into a larger array, as by a scan, XLA makes a call write there at once,
    # and forgets that it works in place (seen with jax 0.11.2): what is not split would be lost.
    return lax.optimization_barrier(results)


def _combine_body(
    partial_out: Ref,
    partial_lse: Ref,
    cuts: Ref,
    num_splits: Ref,
    out: Ref,
    lse: Ref,
    *,
    config: Config,
    h_kv: int,
    rows: int,
    by_seq: bool,
    outs: Ref,
    tops: Ref,
    sums: Ref,
    ready: Ref,
) -> None:
    group = lax.axis_index("group")
    kv_head = lax.axis_index("kv_head")
    first_row = lax.axis_index("rows") * rows
    warpgroup = lax.axis_index("warpgroup")
    warpgroups = tops.shape[0]
    slots = partial_out.shape[0] // h_kv
    layout = plgpu.Layout.WG_STRIDED((config.d_v,), config.d_v // 128)
    b = out.shape[0] // h_kv
    seq = group if by_seq else jnp.clip(cuts[0, group], 0, b - 1)
    first = num_splits[seq]
    count = num_splits[seq + 1] - first
    mine = count > 1
    if not by_seq:
        mine = jnp.logical_and(mine, cuts[2, group] == count - 1)

    def splat(x: Any) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(jnp.float32(x), (config.d_v,), ()), layout)

    def load(ref: Ref) -> jax.Array:
        return plgpu.load(ref, layout=layout)  # type: ignore[call-arg]

    def add(pieces: list[tuple[jax.Array, jax.Array, jax.Array]], state: Any) -> Any:
        """Adds `(log sum, sum, sum of values)`, each relative to its log sum, to such a state."""
        top, total, acc = state
        new = top
        for x, _, _ in pieces:
            new = jnp.maximum(new, x)
        safe = jnp.where(new == -jnp.inf, 0.0, new)
        factor = jnp.exp(top - safe)
        total, acc = total * factor, acc * factor
        for x, weight, value in pieces:
            factor = jnp.exp(x - safe)
            total, acc = total + factor * weight, acc + factor * value
        return new, total, acc

    def splits(row: jax.Array) -> Any:
        """Combines every `warpgroups`-th split of a row: eight loads at once, then single ones."""

        def step(unroll: int, begin: jax.Array, i: jax.Array, state: Any) -> Any:
            pieces = []
            for k in range(unroll):
                split = (begin + i * unroll + k) * warpgroups + warpgroup
                # A wrong schedule gives wrong results, but reads what is there.
                slot = jnp.clip(first + split, 0, slots - 1) * h_kv + kv_head
                log_sum = splat(partial_lse[slot, row])
                pieces.append((log_sum, splat(1.0), load(partial_out.at[slot, row])))
            return add(pieces, state)

        n = lax.div(count - warpgroup + (warpgroups - 1), jnp.int32(warpgroups))
        state = (splat(-jnp.inf), splat(0.0), splat(0.0))
        done = jnp.int32(0)
        for unroll in (8, 2, 1):
            times = lax.div(n - done, jnp.int32(unroll))
            state = lax.fori_loop(0, times, functools.partial(step, unroll, done), state)
            done += times * unroll
        return state

    @pl.when(mine)
    def combine_rows() -> None:
        @pl.loop(0, rows)
        def combine_row(r: jax.Array) -> None:
            row = first_row + r

            def store(state: Any) -> None:
                top, total, acc = state
                seen = total != 0  # NaN was seen
                total = jnp.where(seen, total, 1.0)
                target = seq * h_kv + kv_head
                out[target, row] = (acc / total).astype(out.dtype)
                lse[target, row] = jnp.where(seen, top + jnp.log(total), jnp.inf).max()

            state = splits(row)
            if warpgroups == 1:
                store(state)
                return
            tops[warpgroup], sums[warpgroup], outs[warpgroup] = state
            plgpu.barrier_arrive(ready)
            plgpu.barrier_wait(ready)

            @pl.when(warpgroup == 0)
            def merge() -> None:
                every = [
                    (load(tops.at[w]), load(sums.at[w]), load(outs.at[w]))
                    for w in range(warpgroups)
                ]
                store(add(every[1:], every[0]))

            plgpu.barrier_arrive(ready)
            plgpu.barrier_wait(ready)
