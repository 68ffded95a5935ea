# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Runs implementation "pallas" in Pallas' interpreter, with race detection, on small problems.

Run: python tests/pallas_interpreter.py CASE [CASE ...], or --mistake NAME, or --schedules

A process of its own: the interpreter holds threads of XLA's pool while barriers are waited for (it
hangs if there are too few), and a kernel that fails leaves it unusable. Prints what went wrong and
exits with 1 if a case differs from the oracle or an access is a race.

What it cannot see: waits for products (`wgmma_wait`), layouts, registers, accesses of single warps.
"""

import os

if __name__ == "__main__":
    os.environ["NPROC"] = "32"  # threads of XLA's pool
    os.environ["JAX_PLATFORMS"] = "cpu"

import functools
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from reference import assert_close, attend, problem

import mla_jax
from mla_jax import get_mla_metadata, pallas, pallas_combine, pallas_schedule


class Case(NamedTuple):
    """Arguments of `problem`, of `decode`, and what to change of the problem."""

    lengths: Sequence[int]
    problem: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})
    bad_pages: Sequence[tuple[int, int, int]] = ()  # sequence, entry, id
    nan: tuple[int, int] | None = None  # sequence, used token


CASES = {
    # One part: blocks of several sequences, an empty one between, a full last block; no RoPE.
    "whole": Case(
        [70, 0, 128], {"d_k": 512, "page_size": 128, "dtype": jnp.float16}, {"num_sms": 1}
    ),
    # Cut into parts of few blocks; several warpgroups combine a row; a NaN that counts.
    "split": Case([200, 10, 130], {"h_q": 3}, {"num_sms": 6}, nan=(2, 100)),
    # Two tiles of rows; queries that see nothing; page ids outside the pool.
    "causal": Case([100, 2, 1], {"s_q": 2, "h_q": 35}, {"causal": True}, [(0, 1, -1), (1, 0, 99)]),
    # A schedule from outside; scores so large that the running maxima must follow them.
    "heads": Case(
        [70, 150], {"h_q": 6, "h_kv": 2, "page_size": 16}, {"given": True, "softmax_scale": 0.3}
    ),
    # Splits of one size; one warpgroup combines a row.
    "invariant": Case(
        [200, 40], {"d_k": 320, "d_v": 256, "page_size": 8}, {"batch_invariant": True, "few": 0}
    ),
}

# Mistakes in pallas_kernel.py: texts that stand there once, and what they become.
_FREE = """
                @pl.when(j + 1 < item.n)
                def free_block() -> None:
                    plgpu.barrier_arrive(k_free.at[2 * here + h])
"""
_FREE_QUERIES = """
                @pl.when(j + 2 >= item.n)
                def free_queries() -> None:
                    plgpu.barrier_arrive(q_free)
"""
_FACTOR = "                factor = _row_vector(factors.at[here])\n"
_SCORES = "                scores = pl.run_scoped("
MISTAKES: dict[str, dict[str, str]] = {
    "a block is not waited for": {"plgpu.barrier_wait(k_full.at[2 * here + h])": "pass"},
    "queries are not waited for": {
        "def wait_for_queries() -> None:\n                    plgpu.barrier_wait(q_full)": (
            "def wait_for_queries() -> None:\n                    pass"
        )
    },
    "weights are not waited for": {"plgpu.barrier_wait(p_ready.at[here])": "pass"},
    "maxima are not waited for": {
        "plgpu.barrier_wait(max_ready.at[there])\n                before": "before"
    },
    "a buffer is loaded before it is free": {
        "plgpu.barrier_wait(k_free.at[2 * here + h])\n                    load": "load"
    },
    "a buffer is freed before the product": {_FREE: "", _FACTOR: _FREE + _FACTOR},
    "queries are freed before the scores": {_FREE_QUERIES: "", _SCORES: _FREE_QUERIES + _SCORES},
    "weights are not committed": {
        "plgpu.commit_smem()\n                plgpu.barrier_arrive(p_ready": (
            "plgpu.barrier_arrive(p_ready"
        )
    },
    "the output is not committed": {
        "plgpu.commit_smem()\n            plgpu.copy_smem_to_gmem(\n                k_smem": (
            "plgpu.copy_smem_to_gmem(\n                k_smem"
        )
    },
}


def track_products() -> None:
    """Makes the interpreter check the reads of `wgmma` for races, which it leaves out.

    A product is taken to be over when it has been issued: its operands are read through the
    asynchronous proxy, as TMA reads shared memory, so what was not committed is a race.
    """
    issue = gpu_callbacks.wgmma

    @gpu_callbacks.fail_on_exception
    @functools.wraps(issue)
    def wgmma(*, thread: Any, source_info: Any = None, **operands: Any) -> Any:
        memory = gpu_callbacks._get_shared_memory()
        clock = memory.incr_clock(thread)
        clock.inc(memory.get_next_tma_thread_id())
        for name in ("a", "b"):
            key = operands[f"{name}_allocation_key_as_array"]
            transforms = gpu_callbacks._remove_noop_transforms(operands[f"{name}_transforms"])
            key = gpu_callbacks.HostAllocationKey.from_array(key)
            access = memory.access(key, jax.tree.map(int, transforms))
            gpu_callbacks.get_races().check_read(
                thread, clock.async_smem_clock.copy(), key, access, source_info=source_info
            )
        with memory.lock:
            memory.clocks[thread].update(clock)
        return issue(thread=thread, source_info=source_info, **operands)

    gpu_callbacks.wgmma = wgmma


def refuse_vectors_past_the_end() -> None:
    """Makes the interpreter fail where a vector is stored past the end of its row.

    It drops what is outside, as the hardware does for tiles; but Mosaic-GPU stores a contiguous
    window as plain bytes, which go on in the next row.
    """
    clip = gpu_callbacks._clip_store_to_shape

    def check(access: Any, value: np.ndarray, shape: tuple[int, ...]) -> Any:
        clipped = clip(access, value, shape)
        is_vector = max(value.shape) == value.size
        if is_vector and (clipped is None or clipped[1].shape != value.shape):
            raise ValueError(f"a vector {value.shape} is stored past the end of {shape}")
        return clipped

    gpu_callbacks._clip_store_to_shape = check


def run(case: Case) -> None:
    """Runs a case and compares it with the oracle."""
    p = problem(case.lengths, **case.problem)
    defaults = {"causal": False, "batch_invariant": False, "num_sms": 2}
    defaults["softmax_scale"] = p.q.shape[-1] ** -0.5
    options = defaults | dict(case.options)
    for sequence, entry, page in case.bad_pages:
        p.block_table[sequence, entry] = page
    if case.nan is not None:
        sequence, token = case.nan
        page, slot = divmod(token, p.k_cache.shape[1])
        p.k_cache[p.block_table[sequence, page], slot] = np.nan
    schedule: tuple[Any, ...] = ()
    pallas_combine._FEW_SEQUENCES = options.pop("few", 8)
    if options.pop("given", False):
        heads = p.q.shape[2] // p.k_cache.shape[2]
        schedule = get_mla_metadata(
            jnp.asarray(p.cache_seqlens), p.q.shape[1] * heads, p.k_cache.shape[2], num_sms=4
        )
    got = pallas.decode(
        *p.arrays(),
        *schedule,
        head_dim_v=p.head_dim_v,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
        **options,
    )
    got = jax.tree.map(np.asarray, got)
    if case.nan is not None:
        assert all(np.isnan(x[sequence].astype(np.float32)).all() for x in got)
        keep = np.arange(len(case.lengths)) != sequence
        got, p = tuple(x[keep] for x in got), p.rows(keep)
    expected = attend(p, softmax_scale=options["softmax_scale"], causal=options["causal"])
    assert_close(got, expected)
    assert not gpu_callbacks.get_races().races_found


# --- Schedules ------------------------------------------------------------------------------------


def walk(schedule: pallas_schedule.Schedule, seqlens: Any) -> list[list[tuple[int, int]]]:
    """Follows a schedule as the decode kernel does; returns each sequence's blocks by split."""
    cuts, num_splits = (np.asarray(x) for x in schedule[:2])
    b = len(seqlens)
    found: list[dict[int, tuple[int, int]]] = [{} for _ in range(b)]
    for part in range(schedule.parts):
        (begin_seq, begin, first), (end_seq, end, _) = cuts[:, part], cuts[:, part + 1]
        for seq in range(begin_seq, min(end_seq if end > 0 else end_seq - 1, b - 1) + 1):
            blocks = max(-(-int(seqlens[seq]) // 64), 1)
            index = first if seq == begin_seq else 0
            assert index not in found[seq]
            found[seq][index] = (
                int(begin) if seq == begin_seq else 0,
                min(int(end), blocks) if seq == end_seq else blocks,
            )
    assert num_splits[0] == 0
    for pieces, count in zip(found, np.diff(num_splits[: b + 1]), strict=True):
        assert sorted(pieces) == list(range(count))
    return [[pieces[i] for i in sorted(pieces)] for pieces in found]


def assert_whole(pieces: list[list[tuple[int, int]]], seqlens: Any) -> None:
    """Asserts that the splits of each sequence are all of its blocks, in order."""
    for splits, length in zip(pieces, seqlens, strict=True):
        edges = [0, *(past for _, past in splits)]
        assert [first for first, _ in splits] == edges[:-1]
        assert all(first < past for first, past in splits)
        assert edges[-1] == max(-(-int(length) // 64), 1)


def run_schedules() -> None:
    """Asserts that balanced schedules take every block once and divide the work evenly."""
    rng = np.random.default_rng(0)
    capacity = 2**18
    for parts, lengths, most in [
        (1, [0, 100, 65], None),
        (7, rng.integers(0, 200, 64), None),
        (132, rng.integers(0, 20000, 150), None),
        (7, [-5, 2**30, 64], None),  # clamped
        (132, [65536], 8),
        (132, [4096] * 128, 64),  # whole sequences
        (66, [8192] * 16, 32),  # four parts each
        (132, [64 * (i + 1) for i in range(100)], 47),  # 5050 / 132 is 39
    ]:
        seqlens = np.asarray(lengths, np.int32)
        options = (capacity, parts, plgpu.InterpretGPUParams(detect_races=True))
        schedule = pallas_schedule.balanced_schedule(jnp.asarray(seqlens), *options)
        seqlens = np.clip(seqlens, 0, capacity)
        assert_whole(walk(schedule, seqlens), seqlens)
        cuts, num_splits = (np.asarray(x) for x in schedule[:2])
        assert num_splits[len(seqlens)] < len(seqlens) + parts  # there is room for the results
        line = np.concatenate([[0], np.cumsum(np.maximum(-(-seqlens // 64), 1))])
        work = np.diff(line[cuts[0, : parts + 1]] + cuts[1, : parts + 1])
        assert most is None or work.max() <= most, work.max()
    assert not gpu_callbacks.get_races().races_found


# --- Mistakes -------------------------------------------------------------------------------------


def make_mistake(changes: dict[str, str]) -> None:
    """Puts a changed copy of pallas_kernel in the place of the module."""
    spec = importlib.util.find_spec("mla_jax.pallas_kernel")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    for old, new in changes.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    mla_jax.pallas_kernel = module
    exec(compile(source, "mistake", "exec"), module.__dict__)


if __name__ == "__main__":
    pallas_schedule._INVARIANT_BLOCKS = 2
    track_products()
    refuse_vectors_past_the_end()
    if sys.argv[1] == "--schedules":
        run_schedules()
        sys.exit()
    if sys.argv[1] == "--mistake":
        make_mistake(MISTAKES[sys.argv[2]])
        run(Case([200, 130], options={"num_sms": 1}))
        sys.exit()
    for name in sys.argv[1:]:
        run(CASES[name])
        print(name, "ok", flush=True)
