# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The op: checks of the arguments and choice of the implementation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import ffi, pallas, xla
from mla_jax.batching import fold_vmap
from mla_jax.gradient import differentiable
from mla_jax.partitioning import partitioned, vary_alike, varying
from mla_jax.schedule import METADATA_WIDTH

# In order of preference. Each has `unsupported_reason` and `decode`; the last takes everything.
_IMPLEMENTATIONS: dict[str, ModuleType] = {"ffi": ffi, "pallas": pallas, "xla": xla}
# What a program may be lowered for, wherever it is traced; "default" is any other platform.
_PLATFORMS = ("cpu", "cuda", "default")
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)

Implementation = str | Sequence[str] | None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        implementation: the one that runs, or None where none asked for can.
        reasons: for each implementation that was considered and cannot run, why.
    """

    implementation: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"runs: {self.implementation or 'none'}"]
        lines += [f"not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def flash_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    head_dim_v: int,
    tile_scheduler_metadata: jax.Array | None = None,
    num_splits: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    batch_invariant: bool = False,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends queries to a paged cache of latents: `softmax(scale * q k^T) k[..., :head_dim_v]`.

    The function, its argument order and its conventions are FlashMLA's; the values are the first
    `head_dim_v` channels of the keys, as absorbed Multi-head Latent Attention has them
    (DeepSeek-V2, arXiv:2405.04434, section 2.1). Shapes are static; lengths and tables are data,
    and no value of them compiles anything anew.

    Reverse-mode gradients by `q` and `k_cache`, of both results, are plain XLA for every
    implementation, with memory that grows with the pool and not with `s_q * s_k`. Slots and pages
    that are not read get zeros.

    Args:
        q: `[b, s_q, h_q, d_k]` bfloat16, float16 or float32. Head `i` reads KV head
            `i // (h_q // h_kv)`.
        k_cache: `[num_pages, page_size, h_kv, d_k]` of q's dtype. Slots past a sequence's length
            and pages that no used table entry names may hold anything, NaN included.
        block_table: `[b, max_pages_per_seq]` int32: the page of each `page_size` tokens of a
            sequence. Entries past the last used page may hold anything. A used entry outside
            `[0, num_pages)` reads as a page of zeros, never outside the pool.
        cache_seqlens: `[b]` int32: tokens in the cache, the `s_q` new ones included. Clamped to
            `[0, max_pages_per_seq * page_size]`.
        head_dim_v: width of the values, 512 for DeepSeek; at most `d_k`.
        tile_scheduler_metadata: first result of `get_mla_metadata`, as FlashMLA takes it. Checked
            and not used: the implementations schedule inside.
        num_splits: second result of `get_mla_metadata`; given if and only if the first is.
        softmax_scale: factor of the scores, a Python number; None is `d_k ** -0.5`.
        causal: query j sees the first `cache_seqlens - s_q + j + 1` tokens instead of all.
        batch_invariant: gives each sequence the same bits whatever the batch, its slot and its
            pages.
        implementation: `None` takes the first that supports these inputs here, a name takes that
            one or fails, a sequence of names is an order of preference. "Here" is the default
            device. A program that is lowered for another platform takes the first that supports
            the inputs there; of its GPUs no more is known than that they may be Hopper's.

    Returns:
        out: `[b, s_q, h_q, head_dim_v]` in q's dtype, 0 where a query sees nothing.
        lse: `[b, h_q, s_q]` float32, the natural logarithm of the sum of exponentials of the scaled
        scores, +inf where a query sees nothing.

    Raises:
        ValueError: an argument is wrong for every implementation.
        NotImplementedError: the implementation asked for by name cannot run these inputs here.
        ExceptionGroup: none of several can; one NotImplementedError each.
    """
    return flash_mla_of_parts(
        (q,),
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits,
        softmax_scale,
        causal,
        batch_invariant=batch_invariant,
        implementation=implementation,
    )


def flash_mla_of_parts(
    parts: Sequence[jax.Array],
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    head_dim_v: int,
    tile_scheduler_metadata: jax.Array | None = None,
    num_splits: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    batch_invariant: bool = False,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Is `flash_mla_with_kvcache` for q whole, or as its first `head_dim_v` channels and the rest.

    Where an implementation takes the parts as they are, XLA need not put them together.
    """
    q = jnp.concatenate(parts, axis=-1) if len(parts) > 1 else jnp.asarray(parts[0])
    k_cache, block_table, cache_seqlens = map(jnp.asarray, (k_cache, block_table, cache_seqlens))
    schedule = (tile_scheduler_metadata, num_splits)
    options = _check(q, k_cache, block_table, cache_seqlens, head_dim_v, schedule, softmax_scale)
    options |= {"causal": bool(causal), "batch_invariant": bool(batch_invariant)}
    inputs = {"q": q, "k_cache": k_cache, "block_table": block_table} | options
    here = _choose(implementation, _default_platform(), **inputs)
    if here.implementation is None:
        errors = [NotImplementedError(f"{n}: {why}") for n, why in here.reasons.items()]
        if len(errors) == 1:
            raise errors[0]
        raise ExceptionGroup("no implementation can run these inputs here", errors)
    chosen = tuple((p, _choose(implementation, p, **inputs).implementation) for p in _PLATFORMS)
    options |= {"names": check_implementation(implementation), "in_parts": len(parts) > 1}
    return _attend(q, k_cache, block_table, cache_seqlens, chosen=chosen, **options)


# Jitted, so that a call outside `jit` traces what it is wrapped in once and not each time. `chosen`
# is a key of that: what is installed and where may change what runs.
@partial(
    jax.jit,
    static_argnames=(
        "names",
        "chosen",
        "head_dim_v",
        "softmax_scale",
        "causal",
        "batch_invariant",
        "in_parts",
    ),
)
def _attend(*arrays: jax.Array, chosen: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Runs an implementation as JAX's transformations see it."""
    causal = options.pop("causal")
    attend = fold_vmap(partitioned(partial(_run, **options), causal=causal))
    scale = options["softmax_scale"]
    return differentiable(attend, softmax_scale=scale, causal=causal)(*vary_alike(*arrays))


def _run(*arrays: jax.Array, names: tuple[str, ...], in_parts: bool, **options: Any) -> Any:
    """Runs, for these shapes (on a mesh, one device's), what suits the platform lowered for."""

    def decode(name: str, **more: Any) -> Any:
        if name == "ffi":
            more["in_parts"] = in_parts
        return varying(partial(_IMPLEMENTATIONS[name].decode, **more, **options))

    inputs = dict(zip(("q", "k_cache", "block_table"), arrays, strict=False)) | options
    found = {p: _choose(names, p, **inputs) for p in _PLATFORMS}
    running = {p: x.implementation for p, x in found.items() if x.implementation is not None}
    if not running:  # a device's part is not what was asked for and could run
        reasons = found.get(_default_platform(), found["default"]).reasons
        raise NotImplementedError(f"for a device's part of the operands: {reasons}")
    if len(set(running.values())) == 1:
        return decode(next(iter(running.values())))(*arrays)
    branches = {platform: decode(name, platform=platform) for platform, name in running.items()}
    return jax.lax.platform_dependent(*arrays, **branches)


def explain(
    q: jax.Array | jax.ShapeDtypeStruct,
    k_cache: jax.Array | jax.ShapeDtypeStruct,
    block_table: jax.Array | jax.ShapeDtypeStruct,
    cache_seqlens: jax.Array | jax.ShapeDtypeStruct,
    head_dim_v: int,
    tile_scheduler_metadata: jax.Array | jax.ShapeDtypeStruct | None = None,
    num_splits: jax.Array | jax.ShapeDtypeStruct | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    batch_invariant: bool = False,
    implementation: Implementation = None,
) -> Explanation:
    """Says which implementation `flash_mla_with_kvcache` runs here for these arguments, and why.

    Args:
        q: as for `flash_mla_with_kvcache`; arrays or `jax.ShapeDtypeStruct`, here and below.
        k_cache: as there.
        block_table: as there.
        cache_seqlens: as there.
        head_dim_v: as there.
        tile_scheduler_metadata: as there.
        num_splits: as there.
        softmax_scale: as there.
        causal: as there.
        batch_invariant: as there.
        implementation: as there.

    Raises:
        ValueError: an argument is wrong for every implementation.
    """
    # What the op makes of its arguments, without their values.
    q, k_cache, block_table, cache_seqlens = jax.eval_shape(
        lambda *arrays: arrays, q, k_cache, block_table, cache_seqlens
    )
    schedule = (tile_scheduler_metadata, num_splits)
    options = _check(q, k_cache, block_table, cache_seqlens, head_dim_v, schedule, softmax_scale)
    options |= {"causal": bool(causal), "batch_invariant": bool(batch_invariant)}
    return _choose(
        implementation,
        _default_platform(),
        q=q,
        k_cache=k_cache,
        block_table=block_table,
        **options,
    )


def check_implementation(implementation: Implementation) -> tuple[str, ...]:
    """Returns the implementations to consider, in order, or raises ValueError for unknown names."""
    if implementation is None:
        return tuple(_IMPLEMENTATIONS)
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or any(name not in _IMPLEMENTATIONS for name in names):
        raise ValueError(
            f"implementation: got {implementation!r}, expected None, one of "
            f"{list(_IMPLEMENTATIONS)} or a sequence of those"
        )
    return names


def _default_platform() -> str:
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        platform = jax.default_backend()
    else:
        platform = device if isinstance(device, str) else device.platform
    return "cuda" if platform == "gpu" else platform


def _choose(implementation: Implementation, platform: str, **inputs: Any) -> Explanation:
    reasons: dict[str, str] = {}
    for name in check_implementation(implementation):
        reason = _IMPLEMENTATIONS[name].unsupported_reason(platform=platform, **inputs)
        if reason is None:
            return Explanation(name, reasons)
        reasons[name] = reason
    return Explanation(None, reasons)


def _describe(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _check(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int,
    schedule: tuple[Any, Any],
    scale: float | None,
) -> dict[str, Any]:
    """Raises ValueError for arguments that no implementation takes; returns its static options."""
    if q.ndim != 4:
        raise ValueError(f"q: got {_describe(q)}, expected 4 axes [b, s_q, h_q, d_k]")
    if q.dtype not in _DTYPES:
        raise ValueError(f"q: got dtype {q.dtype}, expected bfloat16, float16 or float32")
    if 0 in q.shape[1:]:
        raise ValueError(f"q: got {_describe(q)}, expected at least one query, head and channel")
    b, _, h_q, d_k = q.shape
    if k_cache.ndim != 4:
        raise ValueError(
            f"k_cache: got {_describe(k_cache)}, expected 4 axes [num_pages, page_size, h_kv, d_k]"
        )
    if 0 in k_cache.shape:
        raise ValueError(
            f"k_cache: got {_describe(k_cache)}, expected at least one page, slot, head"
        )
    if k_cache.dtype != q.dtype:
        raise ValueError(f"k_cache: got dtype {k_cache.dtype}, expected q's dtype {q.dtype}")
    h_kv = k_cache.shape[2]
    if k_cache.shape[3] != d_k:
        raise ValueError(f"k_cache: got d_k {k_cache.shape[3]}, expected q's d_k {d_k}")
    if h_q % h_kv:
        raise ValueError(f"q: got {h_q} heads, expected a multiple of k_cache's {h_kv} heads")
    if block_table.ndim != 2 or block_table.dtype != jnp.int32 or block_table.shape[0] != b:
        raise ValueError(
            f"block_table: got {_describe(block_table)}, expected int32[b={b}, max_pages_per_seq]"
        )
    if block_table.shape[1] == 0:
        raise ValueError(f"block_table: got {_describe(block_table)}, expected at least one column")
    if cache_seqlens.shape != (b,) or cache_seqlens.dtype != jnp.int32:
        raise ValueError(f"cache_seqlens: got {_describe(cache_seqlens)}, expected int32[b={b}]")
    if not isinstance(head_dim_v, int | np.integer) or not 1 <= head_dim_v <= d_k:
        raise ValueError(f"head_dim_v: got {head_dim_v!r}, expected an int in [1, d_k={d_k}]")
    if isinstance(scale, jax.core.Tracer):
        raise ValueError("softmax_scale: got a traced value, expected a Python number or None")
    if scale is not None and not (float(scale) > 0 and math.isfinite(scale)):
        raise ValueError(f"softmax_scale: got {scale!r}, expected a positive finite number or None")
    _check_schedule(*schedule, b)
    scale = d_k**-0.5 if scale is None else float(scale)
    return {"head_dim_v": int(head_dim_v), "softmax_scale": scale}


def _check_schedule(metadata: Any, num_splits: Any, b: int) -> None:
    if metadata is None and num_splits is None:
        return
    if metadata is None or num_splits is None:
        raise ValueError(
            "tile_scheduler_metadata and num_splits: got one without the other, "
            "expected both results of get_mla_metadata or neither"
        )
    metadata, num_splits = jax.eval_shape(lambda *arrays: arrays, metadata, num_splits)
    if metadata.ndim != 2 or metadata.shape[1] != METADATA_WIDTH or metadata.dtype != jnp.int32:
        raise ValueError(
            f"tile_scheduler_metadata: got {_describe(metadata)}, "
            f"expected int32[num_parts, {METADATA_WIDTH}] from get_mla_metadata"
        )
    if num_splits.shape != (b + 1,) or num_splits.dtype != jnp.int32:
        raise ValueError(
            f"num_splits: got {_describe(num_splits)}, expected int32[b + 1 = {b + 1}]"
        )
