# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Decode for very many steps, with sequences admitted, forked and released inside `jit`.

`PYTHONPATH=. python tests/soak.py --steps 100000` checks the cache's books between chunks of steps
and prints time and memory over the run: both must stay what they were.
"""

import argparse
import dataclasses
import functools
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax import PagedKVCache, flash_mla_with_kvcache
from mla_jax.bench import models
from mla_jax.config import DeepseekConfig

SLOTS, PAGE_SIZE, WIDTH = 8, 16, 6  # at most 96 tokens a sequence
PAGES = SLOTS * WIDTH // 3  # of what all could want: some are refused now and then
CONFIG = DeepseekConfig(
    model_type="deepseek_v2",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    q_lora_rank=None,
    n_routed_experts=8,
    n_shared_experts=1,
    moe_intermediate_size=64,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A server's: `target` is the length at which a sequence is released; the rest are counts."""

    cache: PagedKVCache
    tokens: jax.Array
    target: jax.Array
    key: jax.Array
    released: jax.Array
    refused: jax.Array
    forked: jax.Array


def start(dtype: jnp.dtype) -> State:
    """Makes a server with empty slots, whose pages hold NaN before they are written."""
    cache = PagedKVCache.create(
        num_layers=CONFIG.num_hidden_layers,
        num_pages=PAGES,
        max_seqs=SLOTS,
        max_pages_per_seq=WIDTH,
        page_size=PAGE_SIZE,
        dtype=dtype,
    )
    return State(
        cache=dataclasses.replace(cache, pages=cache.pages * jnp.nan),
        tokens=jnp.zeros((SLOTS, 1), jnp.int32),
        target=jnp.arange(1, SLOTS + 1, dtype=jnp.int32) * 8,
        key=jax.random.key(0),
        released=jnp.zeros((), jnp.int32),
        refused=jnp.zeros((), jnp.int32),
        forked=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "implementation"), donate_argnames="state")
def run(graphdef, params, state, steps, *, implementation=None):
    """Serves for `steps` steps."""
    model = nnx.merge(graphdef, params)
    absorbed = model.absorb()

    def step(_, s):
        key, *keys = jax.random.split(s.key, 5)
        ends = s.cache.seqlens >= s.target
        cache = s.cache.release(ends)
        # One of the slots that became empty may go on where another sequence is.
        slot = jnp.where(ends.any() & jax.random.bernoulli(keys[0]), jnp.argmax(ends), SLOTS)
        source = jax.random.randint(keys[1], (), 0, SLOTS)
        forks = (slot < SLOTS) & ~ends[source]
        cache = cache.fork(source, jnp.where(forks, slot, SLOTS))
        most = WIDTH * PAGE_SIZE
        target = jnp.where(ends, jax.random.randint(keys[2], (SLOTS,), 1, most), s.target)
        target = jnp.maximum(target, jnp.minimum(cache.seqlens + 1, most))
        fresh = jax.random.randint(keys[3], (SLOTS, 1), 0, CONFIG.vocab_size)
        tokens = jnp.where(ends[:, None], fresh, s.tokens)
        cache, granted = cache.reserve(jnp.ones(SLOTS, jnp.int32))
        # Refused, it makes room for the others.
        target = jnp.where(granted, target, 0)
        logits, cache = model.step(tokens, cache, absorbed=absorbed, implementation=implementation)
        drawn = jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None]
        return State(
            cache=cache,
            tokens=jnp.where(granted[:, None], drawn, tokens),
            target=target,
            key=key,
            released=s.released + ends.sum(dtype=jnp.int32),
            refused=s.refused + (~granted).sum(dtype=jnp.int32),
            forked=s.forked + forks,
        )

    return jax.lax.fori_loop(0, steps, step, state)


def check(state: State) -> None:
    """Raises AssertionError where the cache's books do not agree, or a latent is not finite."""
    cache = state.cache
    table, lengths = np.asarray(cache.block_table), np.asarray(cache.seqlens)
    used = np.arange(WIDTH) < -(-lengths // PAGE_SIZE)[:, None]
    assert (table[used] >= 0).all()
    assert (table[used] < PAGES).all()
    assert (table[~used] == -1).all()
    counts = np.bincount(table[used], minlength=PAGES)
    np.testing.assert_array_equal(cache.refcounts, counts)
    for slot in range(SLOTS):  # no page twice in one sequence
        assert len(set(table[slot][used[slot]])) == used[slot].sum()
    pages = np.asarray(cache.pages, np.float32)
    for slot in range(SLOTS):
        for layer in range(cache.num_layers):
            latents = pages[layer * PAGES + table[slot][used[slot]]].reshape(-1, cache.d_k)
            assert np.isfinite(latents[: lengths[slot]]).all(), (slot, layer)


def agree(state: State, implementation: str | None) -> float:
    """Returns how far the op is from plain XLA on the cache as it is, relative to the norm."""
    cache = state.cache
    q = jax.random.normal(jax.random.key(1), (SLOTS, 1, CONFIG.num_attention_heads, cache.d_k))
    arrays = (q.astype(cache.dtype), cache.pages, cache.layer_table(1), cache.seqlens)
    out, expected = (
        np.asarray(flash_mla_with_kvcache(*arrays, 512, implementation=name)[0], np.float64)
        for name in (implementation, "xla")
    )
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def bytes_in_use() -> int:
    """Returns the device's memory in use, or where it does not count, the process's."""
    stats = jax.devices()[0].memory_stats()
    if stats is not None:
        return stats["bytes_in_use"]
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Runs the soak and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--chunk", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--implementation")
    args = parser.parse_args()
    # Wider types are faster on CPUs.
    dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    graphdef, params = nnx.split(models.language_model(CONFIG, dtype))
    state, times, memory = start(dtype), [], []
    end = time.monotonic() + args.seconds
    while len(times) < args.steps // args.chunk and time.monotonic() < end:
        begin = time.perf_counter()
        state = run(graphdef, params, state, args.chunk, implementation=args.implementation)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - begin) / args.chunk * 1e6)
        check(state)
        memory.append(bytes_in_use())
    counts = (int(x) for x in (state.released, state.forked, state.refused))
    print("steps {}, released {}, forked {}, refused {}".format(len(times) * args.chunk, *counts))
    tenths = np.array_split(np.array(times[1:]), min(10, len(times) - 1))  # the first compiles
    print("us a step, medians of tenths:", *(f"{np.median(tenth):.1f}" for tenth in tenths))
    tenths = np.array_split(np.array(memory[1:]), min(10, len(times) - 1))
    print("MB in use, medians of tenths:", *(f"{np.median(tenth) / 1e6:.2f}" for tenth in tenths))
    print(f"difference from plain XLA at the end: {agree(state, args.implementation):.1e}")


if __name__ == "__main__":
    main()
