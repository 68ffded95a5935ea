# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The gradient of the op, in plain JAX, for every implementation and over the devices of a mesh.

Letters as in xla.py: `b` sequences, `h` KV heads, `r` query rows that share their keys, `n` tokens
of a chunk, `d` width of a key, `v` width of a value.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.partitioning import partitioned_gradient
from mla_jax.xla import Chunks, capacity, from_rows, to_rows, visible_tokens

Attend = Callable[..., tuple[jax.Array, jax.Array]]


def differentiable(attend: Attend, *, softmax_scale: float, causal: bool) -> Attend:
    """Gives `attend(q, k_cache, block_table, cache_seqlens)` its gradient by q and k_cache.

    Only the results `out` and `lse` are kept for it, not the weights: they are computed again
    (FlashAttention, arXiv:2205.14135, appendix B.4). Forward-mode differentiation is refused by
    JAX with a TypeError, a second derivative with a NotImplementedError.
    """

    @jax.custom_vjp
    def call(*arrays: jax.Array) -> Any:
        return attend(*arrays)

    def forward(*arrays: jax.Array) -> Any:
        results = attend(*arrays)
        return results, (*arrays, *results)

    whole = partial(_backward, scale=softmax_scale)
    cut = jax.custom_batching.custom_vmap(partitioned_gradient(whole, causal=causal))

    @cut.def_vmap
    def cut_batched(_: int, batched: list[bool], *arrays: jax.Array) -> Any:
        # Plain JAX has a rule for it: each element's gradient by a pool that they share is its own.
        axes = [0 if is_batched else None for is_batched in batched]
        return jax.vmap(partial(whole, causal=causal), axes)(*arrays), (True, True)

    def backward(residuals: Any, cotangents: Any) -> Any:
        gradients = cut(*residuals, *cotangents)
        dq, dk = (_like(g, x) for g, x in zip(gradients, residuals, strict=False))
        return dq, dk, None, None  # integers have no gradient

    call.defvjp(forward, backward)
    return call


def _like(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """Brings a gradient to the dtype of what it is of, and, where types say, to its devices."""
    gradient = gradient.astype(x.dtype)
    lies = jax.typeof(x).sharding
    return jax.sharding.reshard(gradient, lies) if lies.mesh.explicit_axes else gradient


def _backward(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    *,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Computes the cotangents of q and k_cache from those of `out` and `lse`.

    With p the weights, `dS = p * (d_out v^T - rowsum(d_out * out) + d_lse)`, `dQ = scale * dS K`
    and `dK = scale * dS^T Q`, to whose first channels `dV = p^T d_out` is added, since values are
    channels of the keys. One pass over the tokens in chunks of whole pages: memory is that of the
    results, the pool in float32 and one chunk, whatever the lengths. Sums are float32, the weights
    rounded as in `xla.attend_pages`.

    Returns:
        As q and k_cache, float32. Pages that several sequences share collect from all of them;
        slots that no one sees get zeros, whatever they hold. A query that saw nothing passes
        nothing on, whatever its cotangents.
    """
    _, s_q, h_q, _ = q.shape
    _, page_size, h_kv, d_k = k_cache.shape
    d_v = out.shape[-1]
    group = h_q // h_kv
    visible = visible_tokens(cache_seqlens, s_q, causal, capacity(k_cache, block_table))
    visible = jnp.repeat(visible, group, axis=1)[:, None, :, None]
    chunks = Chunks(k_cache, block_table, visible[:, 0, :, 0])

    # [b, h_q, s_q] as rows: like a query of width 1.
    lse, d_lse = (to_rows(x.swapaxes(1, 2)[..., None], h_kv) for x in (lse, d_lse))
    seen = lse != jnp.inf
    d_out = jnp.where(seen, to_rows(d_out, h_kv), 0)
    products = d_out.astype(jnp.float32) * to_rows(out, h_kv).astype(jnp.float32)
    delta = jnp.where(seen, products.sum(-1, keepdims=True) - d_lse, 0)
    rows = to_rows(q, h_kv)

    def product(formula: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(formula, *operands, preferred_element_type=jnp.float32)

    def step(i: jax.Array, state: tuple[jax.Array, jax.Array]):
        dq, dk_cache = state
        ids, token, k = chunks.load(i)
        scores = scale * product("bhrd,bnhd->bhrn", rows, k)
        p = jnp.where(token < visible, jnp.exp(scores - lse), 0)
        dp = product("bhrv,bnhv->bhrn", d_out, k[..., :d_v])
        ds = (scale * p * (dp - delta)).astype(k.dtype)
        dq += product("bhrn,bnhd->bhrd", ds, k)
        dk = product("bhrn,bhrd->bnhd", ds, rows)
        dk = dk.at[..., :d_v].add(product("bhrn,bhrv->bnhv", p.astype(k.dtype), d_out))
        # Not even a NaN among the cotangents may reach what lies past the length.
        dk = jnp.where(chunks.holds(token)[:, :, None, None], dk, 0)
        dk = dk.reshape(*ids.shape, page_size, h_kv, d_k)
        return dq, dk_cache.at[ids].add(dk, mode="drop")

    start = tuple(jnp.zeros_like(x, jnp.float32) for x in (rows, k_cache))
    dq, dk_cache = jax.lax.fori_loop(0, chunks.count, step, start)
    return from_rows(dq, s_q), dk_cache
