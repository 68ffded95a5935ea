# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Ragged queries: prefill and decode of many sequences in one call, queries packed end to end."""

import jax
import jax.numpy as jnp

from mla_jax.decode import Implementation, flash_mla_with_kvcache


def ragged_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    cu_q_lens: jax.Array,
    head_dim_v: int,
    softmax_scale: float | None = None,
    causal: bool = True,
    *,
    queries_per_tile: int = 8,
    batch_invariant: bool = False,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs `flash_mla_with_kvcache` for sequences with different numbers of queries.

    Queries are cut into tiles of one sequence each, padded on the left, and every tile is a
    sequence to the op. There are `total / queries_per_tile + n` tiles whatever the lengths, so no
    value of them compiles anything anew. A tile reads its sequence's tokens once: larger tiles suit
    prefill, 1 suits decode.

    Args:
        q: `[total, h_q, d_k]`: the queries of sequence 0, then those of sequence 1, and so on.
            What follows the last sequence's queries may hold anything.
        k_cache: as for `flash_mla_with_kvcache`.
        block_table: `[n, max_pages_per_seq]` int32, as there.
        cache_seqlens: `[n]` int32, tokens in the cache, those of the queries included.
        cu_q_lens: `[n + 1]` int32: queries `cu_q_lens[i]` to `cu_q_lens[i + 1]` are sequence i's.
            Rises from 0; sequences may have no query.
        head_dim_v: as there.
        softmax_scale: as there.
        causal: a sequence's last query sees all its tokens, each one before it one fewer.
        queries_per_tile: queries that share a pass over the tokens.
        batch_invariant: as there.
        implementation: as there.

    Returns:
        out `[total, h_q, head_dim_v]` and lse `[total, h_q]` float32; 0 and +inf for queries that
        see nothing and past the last query.

    Raises:
        ValueError: an argument is wrong; NotImplementedError and ExceptionGroup as for the op.
    """
    q, block_table, cache_seqlens, cu_q_lens = map(
        jnp.asarray, (q, block_table, cache_seqlens, cu_q_lens)
    )
    if q.ndim != 3:
        raise ValueError(f"q: got {q.dtype}{list(q.shape)}, expected 3 axes [total, h_q, d_k]")
    if cu_q_lens.dtype != jnp.int32 or cu_q_lens.shape != (block_table.shape[0] + 1,):
        raise ValueError(
            f"cu_q_lens: got {cu_q_lens.dtype}{list(cu_q_lens.shape)}, "
            f"expected int32[n + 1 = {block_table.shape[0] + 1}]"
        )
    if not isinstance(queries_per_tile, int) or queries_per_tile < 1:
        raise ValueError(f"queries_per_tile: got {queries_per_tile!r}, expected a positive int")
    total, n, width = q.shape[0], block_table.shape[0], queries_per_tile
    if n == 0 or total == 0:
        out = jnp.zeros((*q.shape[:2], head_dim_v), q.dtype)
        return out, jnp.full(q.shape[:2], jnp.inf, jnp.float32)

    q_lens = jnp.maximum(jnp.diff(cu_q_lens), 0)
    tile_end = jnp.cumsum((q_lens + width - 1) // width)
    tile = jnp.arange(-(-total // width) + n)
    seq = jnp.searchsorted(tile_end, tile, side="right")
    is_tile = seq < n
    seq = jnp.minimum(seq, n - 1)
    first = (tile - (tile_end - (q_lens + width - 1) // width)[seq]) * width
    count = jnp.where(is_tile, jnp.minimum(q_lens[seq] - first, width), 0)
    # The last `count` columns of a tile are queries.
    column = (first + count - width)[:, None] + jnp.arange(width)
    is_query = (column >= first[:, None]) & (count > 0)[:, None]
    query = jnp.where(is_query, cu_q_lens[seq][:, None] + column, total)

    unseen = q_lens[seq] - first - count if causal else 0  # tokens that follow the tile's last
    out, lse = flash_mla_with_kvcache(
        q.at[query].get(mode="fill", fill_value=0),
        k_cache,
        block_table[seq],
        jnp.where(count > 0, cache_seqlens[seq] - unseen, 0),
        head_dim_v,
        softmax_scale=softmax_scale,
        causal=causal,
        batch_invariant=batch_invariant,
        implementation=implementation,
    )
    packed = jnp.zeros((total, *out.shape[2:]), out.dtype)
    packed_lse = jnp.full(q.shape[:2], jnp.inf, jnp.float32)
    return (
        packed.at[query].set(out, mode="drop"),
        packed_lse.at[query].set(lse.swapaxes(1, 2), mode="drop"),
    )
