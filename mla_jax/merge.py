# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Merging attention over parts of the tokens into attention over all of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def merge_attention_states(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merges results of `flash_mla_with_kvcache` over disjoint parts of the same queries' tokens.

    `lse = log(sum_i exp(lse_i))` and `out = sum_i exp(lse_i - lse) out_i`. A part in which a query
    saw nothing has lse +inf, the op's sign for it, and is the neutral element: its `out` does not
    count, whatever it holds. Other libraries write -inf there; that counts as nothing, too.

    Args:
        outs: `[n, b, s_q, h_q, head_dim_v]`, n at least 1.
        lses: `[n, b, h_q, s_q]` float32, natural logarithms (FlashInfer's are base 2 by default:
            multiply by `log(2)`).

    Returns:
        out `[b, s_q, h_q, head_dim_v]` in the dtype of `outs`, computed in float32, and lse
        `[b, h_q, s_q]` float32; 0 and +inf where no part saw anything.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    outs, lses = jnp.asarray(outs), jnp.asarray(lses)
    if outs.ndim != 5 or outs.shape[0] == 0 or not jnp.issubdtype(outs.dtype, jnp.floating):
        raise ValueError(
            f"outs: got {outs.dtype}{list(outs.shape)}, "
            "expected floating [n >= 1, b, s_q, h_q, head_dim_v]"
        )
    n, b, s_q, h_q, _ = outs.shape
    if lses.shape != (n, b, h_q, s_q) or lses.dtype != jnp.float32:
        raise ValueError(
            f"lses: got {lses.dtype}{list(lses.shape)}, expected float32{[n, b, h_q, s_q]}"
        )
    return merge(
        outs,
        lses,
        largest=lambda x: x.max(axis=0, keepdims=True),
        total=lambda x: x.sum(axis=0),
    )


def merge(
    out: jax.Array,
    lse: jax.Array,
    *,
    largest: Callable[[jax.Array], jax.Array],
    total: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Merges parts that `largest` and `total` reduce: along an axis, or among the shards of a mesh.

    Args:
        out: `[..., b, s_q, h_q, head_dim_v]`.
        lse: `[..., b, h_q, s_q]` float32.
        largest: the maximum of all parts, broadcastable to one.
        total: the sum of all parts.

    Returns:
        As `merge_attention_states`.
    """
    lse = jnp.where(lse == jnp.inf, -jnp.inf, lse)
    # Any number serves that is near the largest; so it needs no gradient.
    top = jax.lax.stop_gradient(largest(jax.lax.stop_gradient(lse)))
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weight = jnp.exp(lse - top)
    weight_of_out = jnp.swapaxes(weight, -1, -2)[..., None]
    weighted = jnp.where(weight_of_out == 0, 0.0, weight_of_out * out.astype(jnp.float32))
    sum_of_weights, merged = total(weight), total(weighted)
    seen = sum_of_weights != 0
    sum_of_weights = jnp.where(seen, sum_of_weights, 1.0)
    merged = merged / jnp.swapaxes(sum_of_weights, -1, -2)[..., None]
    top = top.reshape(sum_of_weights.shape)
    return merged.astype(out.dtype), jnp.where(seen, top + jnp.log(sum_of_weights), jnp.inf)
