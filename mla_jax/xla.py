# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Implementation "xla": the definition of the op, in plain JAX, for any device.

Letters: `b` sequences, `s` queries per sequence, `h` heads, `r` query rows that share their keys,
`n` tokens of a chunk, `d` width of a key, `v` width of a value.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

# Tokens gathered per step of the loop. Large enough for full matrix products, small enough that the
# gathered chunk (b x 512 x 576 bf16: 75 MB at b = 128) stays far below the cache it is read from.
_CHUNK = 512

Expand = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def unsupported_reason(**_: object) -> str | None:
    """Says why these inputs cannot run here: never, this form takes all valid ones."""
    return None


@partial(
    jax.jit,
    static_argnames=("head_dim_v", "softmax_scale", "causal", "batch_invariant", "platform"),
)
def decode(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    batch_invariant: bool,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends each query to the cached tokens of its sequence.

    The arguments are those of `mla_jax.flash_mla_with_kvcache`, already checked; `platform` makes
    no difference.

    Returns:
        out `[b, s_q, h_q, head_dim_v]` in q's dtype and lse `[b, h_q, s_q]` float32.
    """
    _, s_q, h_q, _ = q.shape
    h_kv = k_cache.shape[2]
    group = h_q // h_kv
    rows = to_rows(q, h_kv)
    visible = visible_tokens(cache_seqlens, s_q, causal, capacity(k_cache, block_table))
    visible = jnp.repeat(visible, group, axis=1)

    def attend(rows: jax.Array, table: jax.Array, visible: jax.Array):
        return attend_pages(
            rows,
            k_cache,
            table,
            visible,
            lambda latents: (latents, latents[..., :head_dim_v]),
            scale=softmax_scale,
        )

    if batch_invariant:
        # One sequence at a time, in chunks of one size whatever the width of the table: the same
        # arithmetic whatever the batch.
        missing = -block_table.shape[1] % max(1, _CHUNK // k_cache.shape[1])
        block_table = jnp.pad(block_table, ((0, 0), (0, missing)))
        out, lse = jax.lax.map(
            lambda x: jax.tree.map(lambda a: a[0], attend(*(a[None] for a in x))),
            (rows, block_table, visible),
        )
    else:
        out, lse = attend(rows, block_table, visible)

    return from_rows(out, s_q).astype(q.dtype), lse_from_rows(lse, s_q)


def result_shapes(q: jax.Array, head_dim_v: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns what the op gives for q: out `[b, s_q, h_q, head_dim_v]`, lse `[b, h_q, s_q]`."""
    b, s_q, h_q, _ = q.shape
    return (
        jax.ShapeDtypeStruct((b, s_q, h_q, head_dim_v), q.dtype),
        jax.ShapeDtypeStruct((b, h_q, s_q), jnp.float32),
    )


def to_rows(q: jax.Array, h_kv: int) -> jax.Array:
    """Groups `[b, s_q, h_q, d]` by KV head into `[b, h_kv, s_q * group, d]`.

    All queries that read the same keys are rows of one matrix: head g of a group is row (j, g).
    """
    b, s_q, h_q, d = q.shape
    group = h_q // h_kv
    rows = q.reshape(b, s_q, h_kv, group, d).transpose(0, 2, 1, 3, 4)
    return rows.reshape(b, h_kv, s_q * group, d)


def from_rows(rows: jax.Array, s_q: int) -> jax.Array:
    """Undoes `to_rows`."""
    b, h_kv, r, d = rows.shape
    group = r // s_q
    rows = rows.reshape(b, h_kv, s_q, group, d).transpose(0, 2, 1, 3, 4)
    return rows.reshape(b, s_q, h_kv * group, d)


def lse_from_rows(lse: jax.Array, s_q: int) -> jax.Array:
    """Brings `[b, h_kv, s_q * group]` into the order of the op's lse, `[b, h_q, s_q]`."""
    b, h_kv, r = lse.shape
    group = r // s_q
    return lse.reshape(b, h_kv, s_q, group).swapaxes(2, 3).reshape(b, h_kv * group, s_q)


def capacity(k_cache: jax.Array, block_table: jax.Array) -> int:
    """Counts the tokens a row of `block_table` can name."""
    return block_table.shape[1] * k_cache.shape[1]


def visible_tokens(seqlens: jax.Array, s_q: int, causal: bool, capacity: int) -> jax.Array:
    """Counts the tokens each query sees, `[b, s_q]`; causal query j: `seqlens - s_q + j + 1`."""
    seqlens = jnp.clip(seqlens, 0, capacity)[:, None]
    if not causal:
        return jnp.broadcast_to(seqlens, (seqlens.shape[0], s_q))
    return jnp.maximum(seqlens - s_q + jnp.arange(1, s_q + 1), 0)


class Chunks:
    """The tokens that a batch sees, a fixed number of whole pages at a time.

    Attributes:
        count: int32 scalar, how many chunks the longest sequence needs, whatever the width of the
            table.
    """

    def __init__(self, k_cache: jax.Array, block_table: jax.Array, visible: jax.Array):
        """Cuts pages `[num_pages, page_size, h, d]` by tables; `visible` as for `attend_pages`."""
        num_pages, page_size = k_cache.shape[:2]
        self._pages = min(max(1, _CHUNK // page_size), block_table.shape[1])
        self._tokens = self._pages * page_size
        table = jnp.pad(block_table, ((0, 0), (0, -block_table.shape[1] % self._pages)))
        # Negative ids would count from the end of the pool; past the end they read as zeros.
        self._table = jnp.where(table < 0, num_pages, table)
        self._k_cache = k_cache
        self._seqlens = visible.max(axis=1, initial=0)
        self.count = (self._seqlens.max(initial=0) + self._tokens - 1) // self._tokens

    def load(self, i: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Reads chunk `i` of every sequence.

        Returns:
            ids `[b, pages]` int32 of its pages, at least 0, in no pool where past its end; the
            number of each token in its sequence, `[n]`; the tokens `[b, n, h, d]`, 0 past the
            length.
        """
        ids = jax.lax.dynamic_slice_in_dim(self._table, i * self._pages, self._pages, axis=1)
        cached = self._k_cache.at[ids].get(mode="fill", fill_value=0)
        cached = cached.reshape(ids.shape[0], self._tokens, *cached.shape[3:])
        token = i * self._tokens + jnp.arange(self._tokens)
        # A weight of 0 does not silence a NaN: what lies past the length is cleared itself.
        return ids, token, jnp.where(self.holds(token)[:, :, None, None], cached, 0)

    def holds(self, token: jax.Array) -> jax.Array:
        """Says which tokens `[n]` lie within each sequence, `[b, n]`."""
        return token < self._seqlens[:, None]


def attend_pages(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    visible: jax.Array,
    expand: Expand,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Computes `softmax(scale * q k^T) v` over paged tokens by an online softmax.

    One pass over the tokens in chunks of whole pages; as many chunks as the longest sequence needs,
    whatever the width of the table (Milakov and Gimelshein 2018, arXiv:1805.02867; FlashAttention,
    arXiv:2205.14135). Scores, sums and outputs are float32; the weights are rounded to v's dtype
    for the second product, as the tensor cores take them.

    Args:
        q: `[b, h, r, d]` rows of queries.
        k_cache: `[num_pages, page_size, h_cache, d_cache]`.
        block_table: `[b, max_pages_per_seq]` int32. A page id outside the pool reads as zeros.
        visible: `[b, r]` int32, the number of tokens each row sees. What the cache holds past the
            largest of a sequence is never used, NaN included.
        expand: maps cached tokens `[b, n, h_cache, d_cache]` to keys `[b, n, h, d]` and values
            `[b, n, h, v]`.
        scale: factor of the scores.

    Returns:
        out `[b, h, r, v]` float32 and lse `[b, h, r]` float32, natural logarithm. A row that sees
        nothing gives 0 and +inf.
    """
    b, h, r, _ = q.shape
    chunks = Chunks(k_cache, block_table, visible)

    def step(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
        m, total, acc = state
        _, token, cached = chunks.load(i)
        k, v = expand(cached)

        scores = scale * jnp.einsum("bhrd,bnhd->bhrn", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(token < visible[:, None, :, None], scores, -jnp.inf)
        m_new = jnp.maximum(m, scores.max(axis=-1))
        m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)  # nothing seen yet: -inf - -inf is NaN
        p = jnp.exp(scores - m_safe[..., None])
        alpha = jnp.exp(m - m_safe)
        total = alpha * total + p.sum(axis=-1)
        pv = jnp.einsum("bhrn,bnhv->bhrv", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return m_new, total, alpha[..., None] * acc + pv

    d_v = jax.eval_shape(lambda: expand(chunks.load(0)[2]))[1].shape[-1]
    start = (
        jnp.full_like(q, -jnp.inf, jnp.float32, (b, h, r)),
        jnp.zeros_like(q, jnp.float32, (b, h, r)),
        jnp.zeros_like(q, jnp.float32, (b, h, r, d_v)),
    )
    m, total, acc = jax.lax.fori_loop(0, chunks.count, step, start)
    seen = total != 0
    total = jnp.where(seen, total, 1.0)
    out = acc / total[..., None]
    return out, jnp.where(seen, m + jnp.log(total), jnp.inf)
