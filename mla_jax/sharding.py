# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Models and long sequences over many devices.

Meshes have axes of these names: `data` for sequences, each of whose devices has a pool of its own;
`tensor` for heads and the widths of feed-forward layers; `context` for the tokens of a sequence.
"""

from functools import partial

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mla_jax.decode import Implementation, flash_mla_with_kvcache
from mla_jax.partitioning import CONTEXT, attend_shards


def context_parallel_decode(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    head_dim_v: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    axis_name: str | tuple[str, ...] = CONTEXT,
    cut: str = "slots",
    batch_invariant: bool = False,
    implementation: Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs `flash_mla_with_kvcache` inside `shard_map` over a pool that is cut among devices.

    Each device attends to the tokens it holds; the results, not the pool, are exchanged: one
    maximum and one sum of `b * s_q * h_q * (head_dim_v + 1)` float32. Under `jit`, without
    `shard_map`, the op itself does the same for a pool that is cut so.

    Args:
        q: as for the op, the same on all devices of the axis, like all arrays but `k_cache`.
        k_cache: this device's part of the pool `[num_pages, page_size, h_kv, d_k]`. By "slots",
            `page_size / n` slots of every page: every device then has the same share of every
            sequence and of every layer. By "pages", `num_pages / n` whole pages.
        block_table: `[b, max_pages_per_seq]` int32, pages of the whole pool.
        cache_seqlens: `[b]` int32, tokens on all devices together.
        head_dim_v: as for the op.
        softmax_scale: as for the op.
        causal: as for the op. With `s_q > 1` each query is a sequence of its own to the op on a
            device, so pages are read `s_q` times.
        axis_name: mesh axis or axes by which the pool is cut.
        cut: "slots" or "pages".
        batch_invariant: as for the op; the sum over devices has its order from the collective.
        implementation: as for the op.

    Returns:
        As the op, the same on every device of the axis.

    Raises:
        ValueError: `cut` is something else, or as the op.
    """
    if cut not in ("slots", "pages"):
        raise ValueError(f'cut: got {cut!r}, expected "slots" or "pages"')
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    attend = partial(
        flash_mla_with_kvcache,
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
        batch_invariant=batch_invariant,
        implementation=implementation,
    )
    return attend_shards(
        attend,
        q,
        k_cache,
        block_table,
        cache_seqlens,
        pages_axis=axes if cut == "pages" else (),
        slots_axis=axes if cut == "slots" else (),
        causal=causal,
    )


def shard(model: nnx.Module, mesh: Mesh) -> None:
    """Puts a model's parameters on a mesh, cut as their metadata say, in place.

    Each variable's `out_sharding` names mesh axes, as Flax has it (`nnx.get_partition_spec` shows
    them); this library's modules name `tensor`. An axis that the mesh lacks cuts nothing.

    Raises:
        ValueError: a dimension does not divide by the size of its axis.
    """

    def place(path: tuple, variable: nnx.Variable) -> None:
        names = variable.get_metadata("out_sharding", None) or ()
        spec = PartitionSpec(*(name if name in mesh.axis_names else None for name in names))
        value = variable[...]
        for size, name in zip(value.shape, spec, strict=False):
            if name is not None and size % mesh.shape[name]:
                raise ValueError(
                    f"model: got {'.'.join(map(str, path))} of shape {list(value.shape)}, expected "
                    f"{size} to be a multiple of the {mesh.shape[name]} devices of axis {name!r}"
                )
        variable[...] = jax.device_put(value, NamedSharding(mesh, spec))

    for path, variable in nnx.to_flat_state(nnx.state(model)):
        place(path, variable)
