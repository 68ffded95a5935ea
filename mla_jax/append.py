# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What a step writes: the latents of its new tokens, into the pages in place.

Letters: `b` sequences, `t` columns of a step, `c` channels of the latent, `r` rotated channels.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax import ffi
from mla_jax.partitioning import partitioned_append, vary_alike, varying
from mla_jax.rope import apply_rope


@dataclasses.dataclass(frozen=True)
class Pool:
    """Sizes of a pool of pages, whole: `num_layers * num_pages` rows of `page_size` slots."""

    num_layers: int
    num_pages: int
    page_size: int


def positions(seqlens: jax.Array, t: int) -> jax.Array:
    """Positions of a step's `t` columns: `[b, t]` int32, negative only in padding."""
    return seqlens[:, None] - t + jnp.arange(t, dtype=jnp.int32)


def scatter(
    pages: jax.Array,
    latents: jax.Array,
    block_table: jax.Array,
    seqlens: jax.Array,
    num_new: jax.Array,
    place: Any,
    *,
    pool: Pool,
) -> jax.Array:
    """Writes the last `num_new[i]` columns of each sequence to their places, and drops the others.

    Args:
        pages: `[rows, slots, 1, c + r]`, all of the pool or a part of it.
        latents: `[b, t, c + r]` of the dtype of `pages`.
        block_table: `[b, max_pages_per_seq]` int32, page ids; what is none is dropped.
        seqlens: `[b]` int32, the new tokens included.
        num_new: `[b]` int32.
        place: three int32: the layer, and the pool's row and slot where `pages` begins.
        pool: sizes of the pool.
    """
    layer, first_row, first_slot = place
    t = latents.shape[1]
    position = positions(seqlens, t)
    is_new = jnp.arange(t) >= t - num_new[:, None]
    is_new &= (position >= 0) & (layer >= 0) & (layer < pool.num_layers)
    page = jnp.take_along_axis(block_table, position // pool.page_size, axis=1, mode="clip")
    is_new &= (page >= 0) & (page < pool.num_pages)
    row = layer * pool.num_pages + page - first_row
    slot = position % pool.page_size - first_slot
    is_new &= (row >= 0) & (row < pages.shape[0]) & (slot >= 0) & (slot < pages.shape[1])
    # A scatter drops what lies outside the pool. Each dropped column has an index of its own, so
    # that all indices are unique, and the writes need be neither ordered nor atomic.
    outside = pages.shape[0] + jnp.arange(position.size).reshape(position.shape)
    row = jnp.where(is_new, row, outside)
    return pages.at[row, slot, 0].set(latents, mode="drop", unique_indices=True)


def finish(
    latents: jax.Array,
    scale: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    epsilon: float,
    interleaved: bool,
) -> jax.Array:
    """Normalises the first c channels (RMS norm, in float32) and rotates the others.

    Args:
        latents: `[b, t, c + r]`, as projected.
        scale: `[c]`, the weight of the norm.
        cos: `[b, t, r / 2]` float32.
        sin: like cos.
        epsilon: of the norm.
        interleaved: of the rotation.

    Returns:
        `[b, t, c + r]` float32, not rounded.
    """
    x, k_pe = jnp.split(latents.astype(jnp.float32), [scale.size], axis=-1)
    factor = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    k_pe = apply_rope(k_pe, cos, sin, interleaved=interleaved)
    return jnp.concatenate([x * (factor * scale), k_pe], axis=-1)


def append(
    pages: jax.Array,
    latents: jax.Array,
    scale: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    block_table: jax.Array,
    seqlens: jax.Array,
    num_new: jax.Array,
    layer: jax.Array,
    *,
    pool: Pool,
    epsilon: float,
    interleaved: bool,
    fused: bool,
) -> jax.Array:
    """Finishes projected latents and writes them: `finish`, then `scatter`.

    Reverse-mode gradients, `vmap` over anything and pools that are cut among devices by pages or
    slots are those of the plain form, which also runs where there is no kernel.

    Args:
        pages: as for `scatter`.
        latents: as for `finish`.
        scale: as there.
        cos: as there.
        sin: as there.
        block_table: as for `scatter`.
        seqlens: as there.
        num_new: as there.
        layer: int32 scalar.
        pool: sizes of `pages`.
        epsilon: as for `finish`.
        interleaved: as there.
        fused: one kernel does both where implementation "ffi" has one.

    Returns:
        `pages`, the same memory where XLA may reuse it.
    """
    options: dict[str, Any] = {"pool": pool, "epsilon": float(epsilon)}
    options["interleaved"] = bool(interleaved)
    arrays = (latents, pages, scale, cos, sin, block_table, seqlens, num_new, layer[None])
    platforms = tuple(
        name
        for name in ffi.PLATFORMS
        if fused and ffi.append_reason(name, pages, latents, scale) is None
    )
    if not platforms:
        return _plain(*arrays, **options)
    return _fused(*arrays, platforms=platforms, **options)


def _plain(
    latents: jax.Array, pages: jax.Array, *rest: jax.Array, pool: Pool, **options: Any
) -> jax.Array:
    """The definition, of `append`'s operands; the last, `place`, may be a whole pool's layer."""
    *of_latents, block_table, seqlens, num_new, place = rest
    x = finish(latents, *of_latents, **options).astype(pages.dtype)
    whole = (place[0], 0, 0) if place.size == 1 else tuple(place)
    return scatter(pages, x, block_table, seqlens, num_new, whole, pool=pool)


# Jitted, so that a call outside `jit` traces what it is wrapped in once and not each time.
@partial(jax.jit, static_argnames=("platforms", "pool", "epsilon", "interleaved"))
def _fused(*arrays: jax.Array, platforms: tuple[str, ...], **options: Any) -> jax.Array:
    """Runs the kernel on the platforms that have it, as JAX's transformations see it."""
    plain = partial(_plain, **options)
    branches: dict[str, Callable[..., Any]] = {
        name: varying(partial(ffi.append, **options)) for name in platforms
    }
    cut = partitioned_append(
        lambda *arrays: jax.lax.platform_dependent(*arrays, **branches, default=varying(plain))
    )

    @jax.custom_batching.custom_vmap
    def mapped(*arrays: jax.Array) -> Any:
        return cut(*arrays)[0]

    @mapped.def_vmap
    def _(_: int, batched: list[bool], *arrays: jax.Array) -> Any:
        # Left to JAX, a custom call would become a loop of calls.
        return jax.vmap(plain, [0 if is_batched else None for is_batched in batched])(*arrays), True

    @jax.custom_vjp
    def call(*arrays: jax.Array) -> Any:
        return mapped(*arrays)

    def forward(latents: jax.Array, pages: jax.Array, *rest: jax.Array) -> Any:
        # The pool is no residual: keeping it would copy it.
        return mapped(latents, pages, *rest), (latents, *rest)

    def backward(residuals: Any, cotangent: jax.Array) -> Any:
        latents, scale, cos, sin, *indices = residuals

        # The result is linear in the pool, so its values do not matter.
        floats = (latents, jnp.zeros_like(cotangent), scale, cos, sin)
        gradients = jax.vjp(lambda *floats: plain(*floats, *indices), *floats)[1](cotangent)
        return *gradients, None, None, None, None  # integers have no gradient

    call.defvjp(forward, backward)
    return call(*vary_alike(*arrays))
