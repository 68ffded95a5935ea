# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Implementation "pallas": the op as Mosaic-GPU kernels, for Hopper GPUs, with nothing to build.

The kernels are in pallas_kernel.py and pallas_combine.py, imported when they are first needed:
where they cannot run, nothing of Pallas is loaded.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.hopper import local_gpus, unsuitable
from mla_jax.pallas_config import Config
from mla_jax.schedule import BLOCK, num_parts
from mla_jax.xla import from_rows, lse_from_rows, to_rows

# What starting a sequence (loading q, writing the result) costs, in blocks.
_OVERHEAD = 3
# Blocks of a split that does not depend on the batch.
_INVARIANT_BLOCKS = 32
_JAX_VERSION = (0, 11)


def unsupported_reason(
    *,
    platform: str,
    q: Any,
    k_cache: Any,
    block_table: Any,
    head_dim_v: int,
    **_: object,
) -> str | None:
    """Says why these inputs cannot run on a platform, or None.

    Args:
        platform: as XLA names it: "cpu", "cuda", another.
        q: as for `mla_jax.flash_mla_with_kvcache`, already checked; here and below.
        k_cache: as there.
        block_table: as there.
        head_dim_v: as there.
    """
    if platform != "cuda":
        return f"not on {platform}: Mosaic-GPU kernels run on NVIDIA Hopper GPUs"
    reason = _device_reason()
    if reason is not None:
        return reason
    if jax.__version_info__ < _JAX_VERSION:
        return f"it needs jax 0.11 or newer, this is {jax.__version__}"
    return kernel_reason(q, k_cache, block_table, head_dim_v)


def kernel_reason(q: Any, k_cache: Any, block_table: Any, head_dim_v: int) -> str | None:
    """Says what the kernels do not take of inputs that are right for the op, or None."""
    d_k, page_size = q.shape[3], k_cache.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q: got dtype {q.dtype}, the kernels take bfloat16 and float16"
    if head_dim_v not in (256, 512):
        return f"head_dim_v: got {head_dim_v}, the kernels take 256 and 512"
    if d_k - head_dim_v not in (0, 64):
        return f"q: got d_k {d_k}, the kernels take head_dim_v or head_dim_v + 64"
    if page_size not in (8, 16, 32, 64, 128):
        return f"k_cache: got page_size {page_size}, the kernels take 8, 16, 32, 64 and 128"
    if block_table.shape[1] * page_size > 2**30:
        return (
            f"block_table: got {block_table.shape[1]} pages of {page_size} tokens a sequence, "
            "the kernels take 2^30 tokens"
        )
    return None


def _device_reason() -> str | None:
    """Says which GPU of this process the kernels cannot run on, or that there is none.

    Without one, a program for another machine takes another implementation: tracing these kernels,
    which are traced for all platforms, would slow down every program of a CPU.
    """
    devices = local_gpus()
    if not devices:
        return "this process has no NVIDIA GPU"
    return unsuitable(devices, "the kernels are")


@functools.partial(
    jax.jit,
    static_argnames=(
        "head_dim_v",
        "softmax_scale",
        "causal",
        "batch_invariant",
        "platform",
        "num_sms",
        "interpret",
    ),
)
def decode(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    tile_scheduler_metadata: jax.Array | None = None,
    num_splits: jax.Array | None = None,
    *,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    batch_invariant: bool,
    platform: str | None = None,
    num_sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends each query to the cached tokens of its sequence.

    The arguments are those of `mla_jax.flash_mla_with_kvcache`, already checked.

    Args:
        q: as there, here and below.
        k_cache: as there.
        block_table: as there.
        cache_seqlens: as there.
        tile_scheduler_metadata: a schedule in the format of `get_mla_metadata`, for these lengths;
            None schedules here. A batch-invariant call always does.
        num_splits: the schedule's second array.
        head_dim_v: as there.
        softmax_scale: as there.
        causal: as there.
        batch_invariant: as there.
        platform: that of the caller's branch, where it has branches by platform; always "cuda".
        num_sms: multiprocessors to schedule for; by default those of the default device.
        interpret: for tests: Pallas' parameters of interpretation.

    Returns:
        out `[b, s_q, h_q, head_dim_v]` in q's dtype and lse `[b, h_q, s_q]` float32.
    """
    from mla_jax import pallas_combine, pallas_kernel

    del platform
    b, s_q, h_q, d_k = q.shape
    num_pages, page_size, h_kv, _ = k_cache.shape
    group = h_q // h_kv
    if b == 0:
        out = jnp.zeros((b, s_q, h_q, head_dim_v), q.dtype)
        return out, jnp.zeros((b, h_q, s_q), jnp.float32)
    config = Config(
        d_k=d_k,
        d_v=head_dim_v,
        page_size=page_size,
        heads_per_kv=group,
        s_q=s_q,
        causal=causal,
        scale=softmax_scale,
        interpret=interpret,
    )
    capacity = block_table.shape[1] * page_size
    seqlens = jnp.clip(cache_seqlens, 0, capacity)
    if batch_invariant:
        schedule = invariant_schedule(seqlens, capacity)
    elif tile_scheduler_metadata is None or num_splits is None:
        schedule = balanced_schedule(seqlens, num_parts(s_q * group, h_kv, num_sms))
    else:
        schedule = tile_scheduler_metadata, num_splits

    num_rows = s_q * group
    rows = to_rows(q, h_kv).reshape(b * h_kv, num_rows, d_k)
    rows = jnp.pad(rows, ((0, 0), (0, config.rows - num_rows), (0, 0)))
    pages = k_cache.reshape(num_pages, page_size, h_kv * d_k)
    results = pallas_kernel.decode(rows, pages, block_table, cache_seqlens, *schedule, config)
    out, lse = pallas_combine.combine(*results, *schedule, config)
    out = out[:, :num_rows].reshape(b, h_kv, num_rows, head_dim_v)
    lse = lse[:, :num_rows].reshape(b, h_kv, num_rows)
    return from_rows(out, s_q), lse_from_rows(lse, s_q)


def balanced_schedule(seqlens: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """Schedules the blocks of all sequences so that all parts of the machine end together.

    The blocks are laid on one line, which is cut into equal parts. Either each sequence is preceded
    by a gap that stands for the cost of starting it, and the cut is rounded up if sequences of one
    length then end at a cut; or, if that leaves few parts idle, each is padded to whole parts, so
    that no part works on two. Sums of comparisons instead of scans and searches: XLA makes a few
    small kernels of them.

    Args:
        seqlens: `[b]` int32, not negative; b is not 0.
        parts: the number of parts.

    Returns:
        The two arrays of `get_mla_metadata`.
    """
    b = seqlens.shape[0]
    blocks = jnp.maximum(_blocks(seqlens), 1)
    total, longest = blocks.sum(), blocks.max()

    size = _ceil(total + b * _OVERHEAD, parts)
    whole = _ceil(size, longest + _OVERHEAD) * (longest + _OVERHEAD)
    size = jnp.where(whole - size <= 2 + size // 32, whole, size)
    cost = blocks + _OVERHEAD
    gap = jnp.int32(_OVERHEAD)
    if b <= parts:
        sizes = _ceil(longest, jnp.arange(1, parts + 1, dtype=jnp.int32))
        needed = _ceil(blocks, sizes[:, None]).sum(axis=1)
        padded = jnp.where(needed <= parts, sizes, longest).min()
        pad = padded <= size + 2 + size // 16
        size = jnp.where(pad, padded, size)
        cost = jnp.where(pad, _ceil(blocks, size) * size, cost)
        gap = jnp.where(pad, 0, gap)

    index = jnp.arange(b, dtype=jnp.int32)
    end = jnp.where(index <= index[:, None], cost, 0).sum(axis=1)
    cuts = jnp.arange(parts + 1, dtype=jnp.int32) * size
    # A cut falls into sequence `seq` before its block `block`; one inside the gap moves to the
    # sequence's start. Cuts at or past the end of the line are (b, 0).
    passed = end <= cuts[:, None]
    seq = passed.sum(axis=1, dtype=jnp.int32)
    start = jnp.where(passed, cost, 0).sum(axis=1)
    block = jnp.where(seq < b, jnp.maximum(cuts - start - gap, 0), 0)

    divides = block > 0
    part = jnp.arange(parts + 1, dtype=jnp.int32)
    earlier = divides & (part < part[:, None]) & (seq == seq[:, None])
    first_split = jnp.where(divides, 1 + earlier.sum(axis=1, dtype=jnp.int32), 0)
    index = jnp.arange(b + 1, dtype=jnp.int32)
    num_splits = index + (divides & (seq < index[:, None])).sum(axis=1, dtype=jnp.int32)
    return _metadata(seq[:-1], block[:-1], seq[1:], block[1:], first_split[:-1]), num_splits


def invariant_schedule(seqlens: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Cuts each sequence into splits of one size: the same whatever else is in the batch.

    Args:
        seqlens: `[b]` int32, in `[0, capacity]`.
        capacity: tokens that a sequence may have.

    Returns:
        The two arrays of `get_mla_metadata`; a part is one split, those that are not needed empty.
    """
    b = seqlens.shape[0]
    blocks = jnp.maximum(_blocks(seqlens), 1)[:, None]
    most = max(1, -(-capacity // (BLOCK * _INVARIANT_BLOCKS)))
    split = jnp.arange(most, dtype=jnp.int32)
    begin = jnp.broadcast_to(split * _INVARIANT_BLOCKS, (b, most))
    end = jnp.minimum(begin + _INVARIANT_BLOCKS, blocks)
    used = begin < blocks
    seq = jnp.where(used, jnp.arange(b, dtype=jnp.int32)[:, None], b)
    begin, end, split = (jnp.where(used, x, 0) for x in (begin, end, split))
    metadata = _metadata(*(x.reshape(-1) for x in (seq, begin, seq, end, split)))
    counts = used.sum(axis=1, dtype=jnp.int32)
    return metadata, jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts)])


def _blocks(seqlens: jax.Array) -> jax.Array:
    return _ceil(seqlens, BLOCK)


def _ceil(x: Any, y: Any) -> Any:
    return (x + y - 1) // y


def _metadata(*columns: jax.Array) -> jax.Array:
    zero = jnp.zeros_like(columns[0])
    return jnp.stack((*columns, zero, zero, zero), axis=1)
