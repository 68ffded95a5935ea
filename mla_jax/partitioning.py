# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The op over the devices of a mesh: what each one computes, and how results are merged.

Sequences and heads are independent, so each device takes its own. A pool that is cut by pages, or
each page by its slots, stays where it is: each device attends to the tokens it holds, and the
results are merged among the devices (context parallelism). Nothing here ever moves the pool.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mla_jax.merge import merge
from mla_jax.xla import capacity, visible_tokens

# q, k_cache, block_table, cache_seqlens -> out, lse.
Attend = Callable[..., tuple[jax.Array, jax.Array]]
Axes = tuple[str, ...]

# Axes of meshes, where names decide: sequences with a pool each; heads; tokens of a sequence.
DATA, TENSOR, CONTEXT = "data", "tensor", "context"


def cut(*axes: str | None) -> dict[str, Any]:
    """Metadata of a Flax variable that is cut over mesh axes; nothing moves before `shard`."""
    return {"out_sharding": axes, "eager_sharding": False}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh axes by which the op is cut; each may be none.

    Attributes:
        b: sequences.
        h: query heads.
        pages: pages of the pool.
        slots: slots of every page.
        h_kv: KV heads.
    """

    b: Axes = ()
    h: Axes = ()
    pages: Axes = ()
    slots: Axes = ()
    h_kv: Axes = ()

    @classmethod
    def of(cls, specs: Sequence[PartitionSpec], h_kv: int) -> "Layout":
        """Chooses the layout for operands that lie as `specs` say, whose pool has `h_kv` heads.

        Raises:
            ValueError: the pool is cut so that devices would have to exchange it.
        """
        (b, _, h, _), (pages, slots, heads, d) = (
            [_axes(x) for x in (*spec, *[None] * (4 - len(spec)))] for spec in specs[:2]
        )
        if d:
            raise ValueError(
                f"k_cache: got d_k cut over mesh axes {d}, expected pages, slots or heads to be "
                "cut, or nothing: every device would gather the whole pool"
            )
        # A device needs the queries of its KV heads.
        h = heads if h_kv > 1 else h
        # Devices that hold other tokens all need the same queries.
        b, h = (tuple(a for a in axes if a not in pages + slots) for axes in (b, h))
        return cls(b, h, pages, slots, heads if h_kv > 1 else ())

    def operands(self) -> tuple[PartitionSpec, ...]:
        """Returns the specs of q, k_cache, block_table, cache_seqlens."""
        b, h, pages, slots, h_kv = (x or None for x in dataclasses.astuple(self))
        return (
            PartitionSpec(b, None, h, None),
            PartitionSpec(pages, slots, h_kv, None),
            PartitionSpec(b, None),
            PartitionSpec(b),
        )

    def results(self) -> tuple[PartitionSpec, ...]:
        """Returns the specs of out and lse."""
        b, h = self.b or None, self.h or None
        return PartitionSpec(b, None, h, None), PartitionSpec(b, h, None)

    def on_device(self, attend: Attend, causal: bool) -> Attend:
        """Returns what each device runs on its parts; `attend` is the op on one device."""
        if not self.pages + self.slots:
            return partial(attend, causal=causal)
        return partial(
            attend_shards, attend, pages_axis=self.pages, slots_axis=self.slots, causal=causal
        )


def attend_shards(
    attend: Attend,
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    pages_axis: Axes = (),
    slots_axis: Axes = (),
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attends to a pool that is cut over mesh axes; runs on each of their devices.

    A device's tokens of a sequence, in their order, are a sequence of their own in pages of the
    device: attention does not mind gaps, and the page that is partly filled comes last. Which
    tokens the queries of one sequence see differs by query on some devices only, so where `causal`
    has more than one query, each becomes a sequence of its own; its pages are read once a query.

    Args:
        attend: the op on one device.
        q: as for the op, the same on all devices of the axes, like all but `k_cache`.
        k_cache: `[pages, slots, h_kv, d_k]`, this device's part. Page `i` of the k-th device of
            `pages_axis` is page `k * pages + i` to `block_table`; slot `i` of the k-th device of
            `slots_axis` is slot `k * slots + i` of its page.
        block_table: as for the op. Ids in no device's pool read as zeros.
        cache_seqlens: as for the op.
        pages_axis: axes by which pages are cut, the first outermost.
        slots_axis: axes by which each page is cut.
        causal: as for the op.
    """
    b, s_q, h_q, _ = q.shape
    num_pages, slots = k_cache.shape[:2]
    num_shards, shard = _size_and_index(pages_axis)
    num_slices, first_slot = _size_and_index(slots_axis)
    page_size = num_slices * slots
    rows = s_q if causal else 1  # sequences that one becomes
    visible = visible_tokens(
        cache_seqlens, rows, causal, num_slices * capacity(k_cache, block_table)
    )

    before = page_size * jnp.arange(block_table.shape[1]) + first_slot * slots
    count = jnp.clip(visible[..., None] - before, 0, slots)  # [b, rows, pages of the table]
    table = block_table
    if pages_axis:
        outside = (table < 0) | (table >= num_shards * num_pages)
        local = jnp.where(outside, -1, table - shard * num_pages)
        # Pages of zeros belong to the first device.
        mine = jnp.where(outside, shard == 0, (local >= 0) & (local < num_pages))
        count = jnp.where(mine[:, None], count, 0)
        order = jnp.argsort(~mine, axis=1, stable=True)
        table = jnp.take_along_axis(local, order, axis=1)

    out, lse = attend(
        q.reshape(b * rows, s_q // rows, *q.shape[2:]),
        k_cache,
        jnp.repeat(table, rows, axis=0),
        count.sum(-1, dtype=jnp.int32).reshape(-1),
        causal=False,
    )
    lse = lse.reshape(b, rows, h_q, s_q // rows).swapaxes(1, 2).reshape(b, h_q, s_q)
    axes = pages_axis + slots_axis
    return merge(
        out.reshape(b, s_q, h_q, -1),
        lse,
        largest=partial(jax.lax.pmax, axis_name=axes),
        total=partial(jax.lax.psum, axis_name=axes),
    )


def partitioned(attend: Attend, *, causal: bool) -> Attend:
    """Cuts `attend` as its operands are cut, whatever the way their mesh is used.

    Where JAX's types say how arrays lie (a mesh with explicit axes), it is a `shard_map`; where
    XLA's partitioner decides (automatic axes), it asks here. Without that, a custom call would get
    all operands whole on every device, the pool included.
    """

    def run(*arrays: jax.Array) -> Any:
        mesh = jax.typeof(arrays[1]).sharding.mesh
        if not mesh.explicit_axes:
            around = jax.sharding.get_abstract_mesh()
            if not around.manual_axes or not around.auto_axes:
                return by_partitioner(*arrays)
            # XLA cannot ask how to cut a call where axes are partly manual: convention decides.
            layout, axis_names = _by_names(around, *arrays[:2]), set(around.auto_axes)
            return over_mesh(attend, layout, causal, axis_names=axis_names)(*arrays)
        layout = Layout.of([jax.typeof(x).sharding.spec for x in arrays], arrays[1].shape[2])
        to = (NamedSharding(mesh, spec) for spec in layout.operands())
        arrays = tuple(map(jax.sharding.reshard, arrays, to))
        axis_names = set(mesh.explicit_axes)
        return over_mesh(attend, layout, causal, mesh=mesh, axis_names=axis_names)(*arrays)

    @custom_partitioning
    def by_partitioner(q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any) -> Any:
        return attend(q, k_cache, block_table, cache_seqlens, causal=causal)

    def partition(mesh: Mesh, operands: Any, results: Any) -> Any:
        layout = Layout.of([x.sharding.spec for x in operands], operands[1].shape[2])
        to, of = (
            tuple(NamedSharding(mesh, spec) for spec in specs)
            for specs in (layout.results(), layout.operands())
        )
        return mesh, layout.on_device(attend, causal), to, of

    by_partitioner.def_partition(
        partition, sharding_rule="b s h d, n p k d, b w, b -> b s h v, b h s"
    )
    return run


def over_mesh(
    attend: Attend, layout: Layout, causal: bool, *, mesh: Any = None, axis_names: set[str]
) -> Attend:
    """Runs `attend` on the devices of a mesh, by default the one around, cut by `layout`."""
    return jax.shard_map(
        layout.on_device(attend, causal),
        mesh=mesh,
        in_specs=layout.operands(),
        out_specs=layout.results(),
        axis_names=axis_names,
        check_vma=False,  # a custom call says nothing of the axes its results vary over
    )


def _by_names(mesh: AbstractMesh, q: jax.Array, k_cache: jax.Array) -> Layout:
    """Cuts heads over axis `tensor` and slots over `context`, of those that are automatic."""
    unknown = [a for a in mesh.auto_axes if a not in (TENSOR, CONTEXT) and mesh.shape[a] > 1]
    if unknown:
        raise ValueError(
            f"flash_mla_with_kvcache: got a shard_map that leaves mesh axes {unknown} automatic, "
            f"expected {TENSOR!r} or {CONTEXT!r} or none: map these axes too"
        )
    # A device needs the queries of its KV heads, so where there are several these are cut.
    heads = q.shape[2] if k_cache.shape[2] == 1 else k_cache.shape[2]
    h, slots = (
        (name,) if name in mesh.auto_axes and size % mesh.shape[name] == 0 else ()
        for name, size in ((TENSOR, heads), (CONTEXT, k_cache.shape[1]))
    )
    return Layout(h=h, slots=slots, h_kv=h if k_cache.shape[2] > 1 else ())


def _size_and_index(axes: Axes) -> tuple[int, Any]:
    return (jax.lax.axis_size(axes), jax.lax.axis_index(axes)) if axes else (1, 0)


def _axes(entry: Any) -> Axes:
    """One entry of a PartitionSpec as a tuple."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
