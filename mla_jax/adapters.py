# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The signatures of other JAX libraries' ragged MLA attention, on this library's op.

| library | its function | here |
| --- | --- | --- |
| tpu-inference 0.32 | `kernels.mla.{v1,v2}.kernel.mla_ragged_paged_attention` | the same name |
| tokamax (2026-08) | the op `MultiHeadLatentAttention` | `mla_ragged_paged_attention` |
| ejkernel 0.0.80 | `multi_latent_ragged_page_attention` and its `_v2` | the same names |

They append the new tokens to a packed cache and attend to it. In that cache a token's latent and
its rotary key are each padded to a multiple of 128 channels, 512 + 128 for DeepSeek, which is not
the width that the CUDA kernel takes: on a GPU these run in plain XLA. For the kernel keep a
`PagedKVCache` of 576 channels and call `ragged_mla_with_kvcache`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.decode import Implementation
from mla_jax.ragged import ragged_mla_with_kvcache

_ALIGNMENT = 128
# Options of the other libraries that this one does not have.
_CHANGE_THE_RESULT = (
    "sliding_window",
    "soft_cap",
    "sparse_mask",
    "transpose_kv_cache",
    "return_residuals",
)


def mla_ragged_paged_attention(
    ql_nope: jax.Array,
    q_pe: jax.Array,
    new_kv_c: jax.Array,
    new_k_pe: jax.Array,
    cache_kv: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    sm_scale: float = 1.0,
    implementation: Implementation = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Appends and attends with the signature of tpu-inference's function and of tokamax's op.

    Args:
        ql_nope: `[total, h, c]`, queries in the latent space, packed sequence after sequence.
        q_pe: `[total, h, r]`, their rotary part.
        new_kv_c: `[total, c]`, latents of the same tokens.
        new_k_pe: `[total, r]`, their rotary keys.
        cache_kv: `[num_pages, page_size / packing, packing, align(c) + align(r)]`, align rounding
            up to 128; whoever donates it has it written in place.
        kv_lens: `[max_num_seqs]` int32, tokens of each sequence, the new ones included.
        page_indices: `[max_num_seqs * pages_per_seq]` int32.
        cu_q_lens: `[max_num_seqs + 1]` int32.
        distribution: `[3]` int32; the last is the number of sequences, the others are not needed.
        sm_scale: factor of the scores.
        implementation: as for `flash_mla_with_kvcache`.
        **options: `q_scale`, `k_scale` and `v_scale`, numbers by which scores and values are
            multiplied, or None. What would change the result otherwise (`sliding_window`,
            `soft_cap`, `transpose_kv_cache`, ...) must be None or False. Anything else, such as
            block sizes and limits of the other library's kernels, is ignored.

    Returns:
        `[total, h, c]`, 0 past the last sequence's queries, and the cache.

    Raises:
        ValueError: shapes do not match.
        NotImplementedError: an option is asked for that the op does not have.
    """
    for name in _CHANGE_THE_RESULT:
        value = options.get(name)
        if value is not None and value is not False:  # it may be an array
            raise NotImplementedError(f"{name}: got {value!r}, expected None or False")
    q_scale, k_scale, v_scale = (
        1.0 if options.get(name) is None else options[name]
        for name in ("q_scale", "k_scale", "v_scale")
    )
    total, _, c = ql_nope.shape
    r, width = q_pe.shape[-1], _aligned(ql_nope.shape[-1]) + _aligned(q_pe.shape[-1])
    if cache_kv.ndim != 4 or cache_kv.shape[-1] != width:
        raise ValueError(
            f"cache_kv: got {list(cache_kv.shape)}, expected 4 axes, the last of {width} channels"
        )
    if new_kv_c.shape != (total, c) or new_k_pe.shape != (total, r):
        raise ValueError(
            f"new_kv_c and new_k_pe: got {list(new_kv_c.shape)} and {list(new_k_pe.shape)}, "
            f"expected {[total, c]} and {[total, r]}"
        )
    n = kv_lens.shape[0]
    if page_indices.ndim != 1 or page_indices.shape[0] % n or cu_q_lens.shape != (n + 1,):
        raise ValueError(
            f"page_indices and cu_q_lens: got {list(page_indices.shape)} and "
            f"{list(cu_q_lens.shape)}, expected [{n} * pages_per_seq] and [{n + 1}]"
        )
    num_pages, rows, packing, _ = cache_kv.shape
    page_size = rows * packing
    pages = cache_kv.reshape(num_pages, page_size, 1, width)
    table = page_indices.reshape(n, -1)

    # Sequences past the number in use have no queries.
    ends = jnp.where(jnp.arange(1, n + 1) <= distribution[2], cu_q_lens[1:], 0)
    cu_q_lens = jnp.concatenate([cu_q_lens[:1], jax.lax.cummax(ends)])
    token = jnp.arange(total)
    seq = jnp.searchsorted(cu_q_lens[1:], token, side="right")
    is_new = seq < n
    seq = jnp.minimum(seq, n - 1)
    position = kv_lens[seq] - cu_q_lens[seq + 1] + token
    is_new &= (position >= 0) & (position < table.shape[1] * page_size)
    page = table[seq, jnp.where(is_new, position // page_size, 0)]
    is_new &= (page >= 0) & (page < num_pages)
    page = jnp.where(is_new, page, num_pages + token)  # outside, each its own: dropped
    new = jnp.concatenate([_pad(new_kv_c), _pad(new_k_pe)], axis=-1).astype(pages.dtype)
    pages = pages.at[page, position % page_size, 0].set(new, mode="drop", unique_indices=True)

    q = jnp.concatenate([_pad(ql_nope), _pad(q_pe)], axis=-1).astype(pages.dtype)
    out, _ = ragged_mla_with_kvcache(
        q,
        pages,
        table,
        kv_lens,
        cu_q_lens,
        c,
        softmax_scale=sm_scale * q_scale * k_scale,
        implementation=implementation,
    )
    return (out * v_scale).astype(ql_nope.dtype), pages.reshape(cache_kv.shape)


def multi_latent_ragged_page_attention(
    queries_nope: jax.Array,
    queries_pe: jax.Array,
    keys_values: jax.Array,
    keys_pe: jax.Array,
    kv_cache: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    query_start_loc: jax.Array,
    distribution: jax.Array,
    *,
    softmax_scale: float | None = None,
    implementation: Implementation = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Appends and attends with the signature of ejkernel's function of this name.

    The arguments are, in this order, those of `mla_ragged_paged_attention`; `softmax_scale` None is
    `(c + r) ** -0.5`, and `logits_soft_cap` is among the options that must be None.
    """
    if softmax_scale is None:
        softmax_scale = (queries_nope.shape[-1] + queries_pe.shape[-1]) ** -0.5
    if options.get("logits_soft_cap") is not None:
        raise NotImplementedError(
            f"logits_soft_cap: got {options['logits_soft_cap']!r}, expected None"
        )
    return mla_ragged_paged_attention(
        queries_nope,
        queries_pe,
        keys_values,
        keys_pe,
        kv_cache,
        kv_lens,
        block_tables,
        query_start_loc,
        distribution,
        sm_scale=softmax_scale,
        implementation=implementation,
        **options,
    )


# The second version differs in its block sizes alone.
multi_latent_ragged_page_attention_v2 = multi_latent_ragged_page_attention


def _aligned(channels: int) -> int:
    return -(-channels // _ALIGNMENT) * _ALIGNMENT


def _pad(x: jax.Array) -> jax.Array:
    missing = _aligned(x.shape[-1]) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
