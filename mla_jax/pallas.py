# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Implementation "pallas": the op as Mosaic-GPU kernels, for Hopper GPUs, with nothing compiled."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.schedule import get_mla_metadata


def _decode(q, k_cache, block_table, cache_seqlens, *, head_dim_v, softmax_scale, causal, interpret=None, num_sms=None):
    from mla_jax import pallas_kernel

    b, s_q, h_q, d_k = q.shape
    num_pages, page_size, h_kv, _ = k_cache.shape
    group = h_q // h_kv
    config = pallas_kernel.Config(d_k=d_k, d_v=head_dim_v, page_size=page_size, heads_per_kv=group, s_q=s_q, causal=causal, scale=softmax_scale, interpret=interpret)
    seqlens = jnp.clip(cache_seqlens, 0, block_table.shape[1] * page_size)
    metadata, num_splits = get_mla_metadata(seqlens, s_q * group, h_kv, num_sms=num_sms)
    rows = q.reshape(b, s_q, h_kv, group, d_k).transpose(0, 2, 1, 3, 4).reshape(b * h_kv, s_q * group, d_k)
    rows = jnp.pad(rows, ((0, 0), (0, config.rows - s_q * group), (0, 0)))
    out, lse, pout, plse = pallas_kernel.decode(rows, k_cache.reshape(num_pages, page_size, h_kv * d_k), block_table, seqlens, metadata, num_splits, config)
    # combine
    slots = pout.shape[0] // h_kv
    seq = jnp.searchsorted(num_splits, jnp.arange(slots), side="right") - 1
    n = (num_splits[1:] - num_splits[:-1])
    split = (n > 1)[jnp.clip(seq, 0, b - 1)] & (seq < b)
    plse = jnp.where(split[:, None, None], plse.reshape(slots, h_kv, -1), -jnp.inf)
    pout = jnp.where((plse > -jnp.inf)[..., None], pout.reshape(slots, h_kv, config.rows, -1), 0)
    onehot = seq[None] == jnp.arange(b)[:, None]
    top = jnp.max(jnp.where(onehot[:, :, None, None], plse[None], -jnp.inf), 1)
    safe = jnp.where(top == -jnp.inf, 0, top)
    w = jnp.where(onehot[:, :, None, None], jnp.exp(plse[None] - safe[:, None]), 0)
    tot = w.sum(1)
    o = jnp.einsum("bshr,shrd->bhrd", w, pout) / jnp.where(tot > 0, tot, 1)[..., None]
    l = jnp.where(tot > 0, safe + jnp.log(jnp.where(tot > 0, tot, 1)), jnp.inf)
    sp = (n > 1)[:, None, None]
    out = jnp.where(sp[..., None], o.astype(q.dtype), out.reshape(b, h_kv, config.rows, -1))
    lse = jnp.where(sp, l, lse.reshape(b, h_kv, -1))
    out = out[:, :, : s_q * group].reshape(b, h_kv, s_q, group, head_dim_v).transpose(0, 2, 1, 3, 4).reshape(b, s_q, h_q, head_dim_v)
    lse = lse[:, :, : s_q * group].reshape(b, h_kv, s_q, group).transpose(0, 1, 3, 2).reshape(b, h_q, s_q)
    return out, lse
