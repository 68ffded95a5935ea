# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The split-KV schedule: which part of the machine works on which blocks of which sequence."""

import jax
import jax.numpy as jnp

BLOCK = 64  # tokens that a kernel takes at a time
TILE = 64  # query rows that a kernel takes at a time
# What starting a sequence (loading q, writing the result) costs, in blocks of 64 tokens.
_OVERHEAD = 5
_DEFAULT_SMS = 132  # H100 SXM, where the device does not say
METADATA_WIDTH = 8


def num_parts(num_q_tokens_per_head_k: int, num_heads_k: int, num_sms: int | None = None) -> int:
    """Counts the parts a schedule has: one a multiprocessor, shared among tiles and KV heads."""
    if num_sms is None:
        num_sms = getattr(jax.devices()[0], "core_count", None) or _DEFAULT_SMS
    tiles = -(-num_q_tokens_per_head_k // TILE) * num_heads_k
    return max(num_sms // tiles, 1)


def get_mla_metadata(
    cache_seqlens: jax.Array,
    num_q_tokens_per_head_k: int,
    num_heads_k: int,
    *,
    num_sms: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Schedules split-KV decode for these lengths; once a step serves every layer.

    All sequences, each with its blocks of 64 tokens after a fixed cost, are laid on one line, and
    the line is cut into equal parts, so that all multiprocessors end together. The result is an
    ordinary pair of arrays: under `jit` it follows the lengths, and no compilation depends on them.

    Args:
        cache_seqlens: `[b]` int32, the length of each sequence, its new tokens included. Values
            below 0 count as 0.
        num_q_tokens_per_head_k: query rows that share a KV head, `s_q * h_q // h_kv`.
        num_heads_k: the number of KV heads, `h_kv`.
        num_sms: multiprocessors to schedule for; by default those of the default device.

    Returns:
        tile_scheduler_metadata `[num_parts, 8]` int32: for each part (first sequence, first block,
        last sequence, end block, index of the first piece among its sequence's splits, 0, 0, 0).
        A part begins at its first block of its first sequence, takes the sequences between whole,
        and stops before `end block` of its last sequence.
        num_splits `[b + 1]` int32: cumulative number of splits; sequence i has
        `num_splits[i + 1] - num_splits[i]`, at least one even when its length is 0.

    Raises:
        ValueError: an argument has the wrong shape, dtype or range.
    """
    cache_seqlens = jnp.asarray(cache_seqlens)
    if cache_seqlens.ndim != 1 or cache_seqlens.dtype != jnp.int32:
        raise ValueError(
            f"cache_seqlens: got {cache_seqlens.dtype}{list(cache_seqlens.shape)}, "
            "expected int32[b]"
        )
    for name, value in (
        ("num_q_tokens_per_head_k", num_q_tokens_per_head_k),
        ("num_heads_k", num_heads_k),
        ("num_sms", 1 if num_sms is None else num_sms),
    ):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a positive int")
    b = cache_seqlens.shape[0]
    parts = num_parts(num_q_tokens_per_head_k, num_heads_k, num_sms)

    blocks = -(-jnp.maximum(cache_seqlens, 0) // BLOCK)  # rounds up without overflow
    end = jnp.cumsum(_OVERHEAD + blocks, dtype=jnp.int32)
    total = end[-1] if b else jnp.int32(0)
    cuts = jnp.arange(parts + 1, dtype=jnp.int32) * ((total + parts - 1) // parts)
    # A cut falls into sequence `seq` before its block `block`; a cut inside the fixed cost moves to
    # the sequence's start. Cuts at or past the end of the line are (b, 0).
    seq = jnp.searchsorted(end, cuts, side="right").astype(jnp.int32)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), end])[seq]
    block = jnp.where(cuts < total, jnp.maximum(cuts - start - _OVERHEAD, 0), 0)

    # Cuts are distinct, so each one past a sequence's first block divides it once more.
    divides = (block > 0).astype(jnp.int32)
    extra = jnp.zeros(b, jnp.int32).at[seq].add(divides, mode="drop")
    num_splits = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(1 + extra, dtype=jnp.int32)])
    dividing = jnp.cumsum(divides, dtype=jnp.int32)
    before_seq = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(extra, dtype=jnp.int32)])[seq]
    first_split = jnp.where(block > 0, dividing - before_seq, 0)

    zero = jnp.zeros(parts, jnp.int32)
    columns = (seq[:-1], block[:-1], seq[1:], block[1:], first_split[:-1], zero, zero, zero)
    return jnp.stack(columns, axis=1), num_splits
