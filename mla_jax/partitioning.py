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
# Those, out, lse and their cotangents -> the cotangents of q and k_cache.
Backward = Callable[..., tuple[jax.Array, jax.Array]]
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

    def gradient_on_device(self, backward: Backward, causal: bool) -> Backward:
        """Returns the gradient on each device; `backward` is that of the op on one device."""

        def run(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            if not self.pages + self.slots:
                dq, dk_cache = backward(*arrays, causal=causal)
            else:
                dq, dk_cache = _backward_shards(
                    backward, *arrays, pages_axis=self.pages, slots_axis=self.slots, causal=causal
                )
            # Sums over devices with other tokens of the same queries, and the other way round.
            queries = self.b + (() if self.h_kv else self.h)
            return _sum(dq, self.pages + self.slots), _sum(dk_cache, queries)

        return run


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
    rows = s_q if causal else 1  # sequences that one becomes
    table, lengths = _own_tokens(
        k_cache, block_table, cache_seqlens, rows, pages_axis=pages_axis, slots_axis=slots_axis
    )
    out, lse = attend(
        q.reshape(b * rows, s_q // rows, *q.shape[2:]), k_cache, table, lengths, causal=False
    )
    lse = lse.reshape(b, rows, h_q, s_q // rows).swapaxes(1, 2).reshape(b, h_q, s_q)
    axes = pages_axis + slots_axis
    return merge(
        out.reshape(b, s_q, h_q, -1),
        lse,
        largest=partial(jax.lax.pmax, axis_name=axes),
        total=partial(jax.lax.psum, axis_name=axes),
    )


def _backward_shards(
    backward: Backward,
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    *,
    pages_axis: Axes,
    slots_axis: Axes,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Differentiates by this device's tokens, which is simple once `lse` is that of all tokens.

    The arguments are those of `attend_shards` and, the same on all devices of the axes, its results
    and their cotangents. Returns this device's part of the gradient by q, to be summed over the
    axes, and the gradient by its `k_cache`.
    """
    b, s_q, h_q, _ = q.shape
    rows = s_q if causal else 1
    table, lengths = _own_tokens(
        k_cache, block_table, cache_seqlens, rows, pages_axis=pages_axis, slots_axis=slots_axis
    )
    q, out, d_out = (x.reshape(b * rows, s_q // rows, *x.shape[2:]) for x in (q, out, d_out))
    lse, d_lse = (
        x.reshape(b, h_q, rows, s_q // rows).swapaxes(1, 2).reshape(b * rows, h_q, s_q // rows)
        for x in (lse, d_lse)
    )
    dq, dk_cache = backward(q, k_cache, table, lengths, out, lse, d_out, d_lse, causal=False)
    return dq.reshape(b, s_q, *dq.shape[2:]), dk_cache


def _own_tokens(
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    rows: int,
    *,
    pages_axis: Axes,
    slots_axis: Axes,
) -> tuple[jax.Array, jax.Array]:
    """Describes this device's tokens as sequences of its own.

    Returns:
        `block_table` and `cache_seqlens` for the op on this device, of `rows` sequences for each
        one; where those are more than one, they are its queries, each of which sees one token more.
    """
    num_pages, slots = k_cache.shape[:2]
    num_shards, shard = _size_and_index(pages_axis)
    num_slices, first_slot = _size_and_index(slots_axis)
    page_size = num_slices * slots
    visible = visible_tokens(
        cache_seqlens, rows, rows > 1, num_slices * capacity(k_cache, block_table)
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

    lengths = count.sum(-1, dtype=jnp.int32).reshape(-1)
    return jnp.repeat(table, rows, axis=0), lengths


def partitioned(attend: Attend, *, causal: bool) -> Attend:
    """Cuts `attend` as its operands are cut, whatever the way their mesh is used."""
    return _cut_by_operands(
        lambda layout: layout.on_device(attend, causal),
        Layout.operands,
        Layout.results,
        rule="b s h d, n p k d, b w, b -> b s h v, b h s",
    )


def partitioned_gradient(backward: Backward, *, causal: bool) -> Backward:
    """Cuts `backward` as the op's operands are cut: the pool and its gradient lie alike."""
    return _cut_by_operands(
        lambda layout: layout.gradient_on_device(backward, causal),
        lambda layout: layout.operands() + 2 * layout.results(),
        lambda layout: layout.operands()[:2],
        rule="b s h d, n p k d, b w, b, b s h v, b h s, b s h v, b h s -> b s h d, n p k d",
    )


def partitioned_append(append: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array]]:
    """Gives each device the new tokens that lie in its part of the pool, however that is cut.

    Args:
        append: the append on one device: the arrays below, the last of them `[3]` int32 `place`.

    Returns:
        A function of latents, pages, scale, cos, sin, block_table, seqlens, num_new and the layer,
        `[1]` int32, that gives pages alone.
    """

    def on_device(layout: Layout) -> Callable[..., tuple[jax.Array]]:
        def run(latents: jax.Array, pages: jax.Array, *arrays: jax.Array) -> tuple[jax.Array]:
            *rest, layer = arrays
            part = (_size_and_index(axes)[1] for axes in (layout.pages, layout.slots))
            first = (n * i for n, i in zip(pages.shape[:2], part, strict=True))
            place = jnp.stack([layer[0], *first]).astype(jnp.int32)
            return (append(latents, pages, *rest, place),)

        return run

    whole = PartitionSpec()
    return _cut_by_operands(
        on_device,
        lambda layout: (whole, layout.operands()[1], *7 * (whole,)),
        lambda layout: (layout.operands()[1],),
        rule="b t e, n p k d, c, b t r, b t r, b w, b, b, l -> n p k d",
    )


def _cut_by_operands(
    on_device: Callable[[Layout], Callable[..., Any]],
    operands: Callable[[Layout], tuple[PartitionSpec, ...]],
    results: Callable[[Layout], tuple[PartitionSpec, ...]],
    *,
    rule: str,
) -> Callable[..., Any]:
    """Runs a function of the op's arrays on the devices of the mesh where these lie.

    Where JAX's types say how arrays lie (a mesh with explicit axes), it is a `shard_map`; where
    XLA's partitioner decides (automatic axes), it asks here. Without that, a custom call would get
    all operands whole on every device, the pool included.

    Args:
        on_device: what each device runs, by layout.
        operands: how operands lie, by layout; the second is the pool.
        results: how results lie, by layout.
        rule: the same for XLA's partitioner, as letters.
    """

    def run(*arrays: jax.Array) -> Any:
        mesh = jax.typeof(arrays[1]).sharding.mesh
        if mesh.explicit_axes:
            layout = Layout.of([jax.typeof(x).sharding.spec for x in arrays], arrays[1].shape[2])
            to = (NamedSharding(mesh, spec) for spec in operands(layout))
            arrays = tuple(map(jax.sharding.reshard, arrays, to))
            return over_mesh(layout, *arrays, mesh=mesh, axis_names=set(mesh.explicit_axes))
        around = jax.sharding.get_abstract_mesh()
        if not around.manual_axes:
            return by_partitioner(*arrays)
        if around.auto_axes:
            # XLA cannot ask how to cut a call where axes are partly manual: convention decides.
            layout, axis_names = _by_names(around, *arrays[:2]), set(around.auto_axes)
            return varying(partial(over_mesh, layout, axis_names=axis_names))(*arrays)
        return on_device(Layout())(*arrays)

    def over_mesh(layout: Layout, *arrays: Any, mesh: Any = None, axis_names: set[str]) -> Any:
        return jax.shard_map(
            on_device(layout),
            mesh=mesh,  # by default the one around
            in_specs=operands(layout),
            out_specs=results(layout),
            axis_names=axis_names,
            check_vma=False,
        )(*arrays)

    @custom_partitioning
    def by_partitioner(*arrays: Any) -> Any:
        return on_device(Layout())(*arrays)

    def partition(mesh: Mesh, arrays: Any, _: Any) -> Any:
        layout = Layout.of([x.sharding.spec for x in arrays], arrays[1].shape[2])
        to, of = (
            tuple(NamedSharding(mesh, spec) for spec in specs(layout))
            for specs in (results, operands)
        )
        return mesh, on_device(layout), to, of

    by_partitioner.def_partition(partition, sharding_rule=rule)
    return run


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Makes arrays vary over the same axes of a `shard_map`, as loops over them need it.

    Its transpose is the sum that the gradient of what varies less needs.
    """
    axes = _axes_of(*arrays)
    return tuple(_vary(x, axes) for x in arrays)


def varying(run: Callable[..., Any]) -> Callable[..., Any]:
    """Makes results vary as operands do; a custom call says nothing of the axes they vary over."""
    return lambda *arrays: jax.tree.map(partial(_vary, axes=_axes_of(*arrays)), run(*arrays))


def _axes_of(*arrays: jax.Array) -> frozenset[str]:
    return frozenset().union(*(jax.typeof(x).mat.varying for x in arrays))


def _vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - jax.typeof(x).mat.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


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


def _sum(x: jax.Array, axes: Axes) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x


def _size_and_index(axes: Axes) -> tuple[int, Any]:
    return (jax.lax.axis_size(axes), jax.lax.axis_index(axes)) if axes else (1, 0)


def _axes(entry: Any) -> Axes:
    """One entry of a PartitionSpec as a tuple."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
