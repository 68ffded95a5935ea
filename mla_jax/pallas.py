# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Implementation "pallas": the op as Mosaic-GPU kernels, for Hopper GPUs, with nothing to build.

The kernels are in pallas_schedule.py, pallas_kernel.py and pallas_combine.py, imported when they
are first needed: where they cannot run, nothing of Pallas is loaded. A program exported with them
needs `jax.experimental.pallas.mosaic_gpu` imported in the process that loads it, for JAX then tells
XLA where its library for such kernels is.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.hopper import local_gpus, unsuitable
from mla_jax.pallas_config import Config
from mla_jax.schedule import num_parts
from mla_jax.xla import from_rows, lse_from_rows, result_shapes, to_rows

_JAX_VERSION = (0, 11)
_MOST_SEQUENCES = 2**15  # whose lengths fit in shared memory


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
    if not all(isinstance(n, int) for x in (q, k_cache, block_table) for n in x.shape):
        return f"q: got symbolic shapes, such as {q.shape}, the kernels take numbers"
    d_k, page_size = q.shape[3], k_cache.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q: got dtype {q.dtype}, the kernels take bfloat16 and float16"
    if head_dim_v not in (256, 512):
        return f"head_dim_v: got {head_dim_v}, the kernels take 256 and 512"
    if d_k - head_dim_v not in (0, 64):
        return f"q: got d_k {d_k}, the kernels take head_dim_v or head_dim_v + 64"
    if page_size not in (8, 16, 32, 64, 128):
        return f"k_cache: got page_size {page_size}, the kernels take 8, 16, 32, 64 and 128"
    if q.shape[0] > _MOST_SEQUENCES:
        return f"q: got {q.shape[0]} sequences, the kernels take {_MOST_SEQUENCES}"
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
            The caller then gives neither a schedule nor what follows.
        num_sms: multiprocessors to schedule for; by default those of the default device.
        interpret: for tests: Pallas' parameters of interpretation.

    Returns:
        out `[b, s_q, h_q, head_dim_v]` in q's dtype and lse `[b, h_q, s_q]` float32.
    """
    from mla_jax import pallas_combine, pallas_kernel, pallas_schedule
    from mla_jax.pallas_lowering import on_cuda

    b, s_q, h_q, d_k = q.shape
    if platform is not None:
        call = functools.partial(
            decode,
            head_dim_v=head_dim_v,
            softmax_scale=softmax_scale,
            causal=causal,
            batch_invariant=batch_invariant,
        )
        shapes = result_shapes(q, head_dim_v)
        return on_cuda(call, shapes, q, k_cache, block_table, cache_seqlens)  # type: ignore[return-value]
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
    if batch_invariant:
        schedule = pallas_schedule.invariant_schedule(cache_seqlens, capacity)
    elif tile_scheduler_metadata is None or num_splits is None:
        parts = num_parts(s_q * group, h_kv, num_sms)
        schedule = pallas_schedule.balanced_schedule(cache_seqlens, capacity, parts, interpret)
    else:
        schedule = pallas_schedule.given_schedule(tile_scheduler_metadata, num_splits)

    num_rows = s_q * group
    rows = to_rows(q, h_kv).reshape(b * h_kv, num_rows, d_k)
    rows = jnp.pad(rows, ((0, 0), (0, config.rows - num_rows), (0, 0)))
    pages = k_cache.reshape(num_pages, page_size, h_kv * d_k)
    results = pallas_kernel.decode(rows, pages, block_table, cache_seqlens, schedule, config)
    out, lse = pallas_combine.combine(*results, schedule, h_kv, config)
    out = out[:, :num_rows].reshape(b, h_kv, num_rows, head_dim_v)
    lse = lse[:, :num_rows].reshape(b, h_kv, num_rows)
    return from_rows(out, s_q), lse_from_rows(lse, s_q)
