# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The op under `vmap`: a mapped axis becomes part of the batch, for every implementation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Attend = Callable[..., tuple[jax.Array, jax.Array]]


def fold_vmap(attend: Attend) -> Attend:
    """Makes `attend(q, k_cache, block_table, cache_seqlens)` one call of more sequences in `vmap`.

    Left to JAX, a custom call would become a loop of calls, and the plain form would gather each
    sequence's pages once more for every value of an axis over which only queries are mapped.
    """

    @jax.custom_batching.custom_vmap
    def call(*arrays: jax.Array) -> Any:
        return attend(*arrays)

    @call.def_vmap
    def call_batched(size: int, batched: list[bool], *arrays: jax.Array) -> Any:
        out, lse = call(*_fold(size, batched, *arrays))
        unfolded = (x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in (out, lse))
        return tuple(unfolded), (True, True)

    return call


def _fold(
    size: int,
    batched: list[bool],
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
) -> tuple[jax.Array, ...]:
    """Joins a mapped axis, first where `batched`, with the sequences and, if mapped, the pools."""

    def join(x: jax.Array, is_batched: bool) -> jax.Array:
        x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
        return x.reshape(size * x.shape[1], *x.shape[2:])

    if batched[1]:
        num_pages = k_cache.shape[1]
        k_cache = join(k_cache, True)
        # Page i of pool n is now n * num_pages + i; what is in no pool must not enter another's.
        first = num_pages * jnp.arange(size, dtype=jnp.int32)[:, None, None]
        valid = (block_table >= 0) & (block_table < num_pages)
        block_table = jnp.where(valid, block_table + first, -1)
        batched = [batched[0], True, True, batched[3]]
    return (
        join(q, batched[0]),
        k_cache,
        join(block_table, batched[2]),
        join(cache_seqlens, batched[3]),
    )
