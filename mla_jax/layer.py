# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""An attention layer of one new token of one sequence as one call, where there are kernels for it.

Letters as in module.py, and `r` rotated channels.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mla_jax import ffi
from mla_jax.cache import PagedKVCache
from mla_jax.linear import dot_general
from mla_jax.partitioning import vary_alike, varying
from mla_jax.rope import rope_tables


class Weights(NamedTuple):
    """The parameters of a layer, in the order of the call's operands.

    Attributes:
        w_q: `[d, h * (n + r)]`.
        w_kv: `[d, c + r]`.
        kv_norm: `[c]`.
        w_uk: `[h, c, n]`.
        w_uv: `[h, c, v]`.
        w_o: `[h * v, d]`.
        norm: `[d]`, or None where the layer has no norm of its own before it.
    """

    w_q: jax.Array
    w_kv: jax.Array
    kv_norm: jax.Array
    w_uk: jax.Array
    w_uv: jax.Array
    w_o: jax.Array
    norm: jax.Array | None


def weights(attention: Any, norm: Any, absorbed: Any) -> Weights | None:
    """Returns the parameters of a layer that does with them what the kernels do, or None.

    Submodules may have been replaced, by such with an adapter or with quantised parameters.

    Args:
        attention: a `MultiHeadLatentAttention`.
        norm: as for its `decode`, like the others.
        absorbed: as there.
    """
    if attention.q_lora_rank is not None:
        return None
    down, up = attention.kv_a_proj_with_mqa, attention.kv_b_proj
    linears = (attention.q_proj, down, up, attention.o_proj)
    norms = [attention.kv_a_layernorm] + ([] if norm is None else [norm])
    if not all(map(_is_plain_linear, linears)) or not all(map(_is_plain_norm, norms)):
        return None
    w_q, w_kv, _, w_o = (linear.kernel[...] for linear in linears)
    w_uk, w_uv = absorbed or attention.absorb()
    kv_norm, *own = (norm.scale[...] for norm in norms)
    return Weights(w_q, w_kv, kv_norm, w_uk, w_uv, w_o, own[0] if own else None)


def _is_plain_linear(x: Any) -> bool:
    return (
        type(x) is nnx.Linear
        and x.bias is None
        and x.dot_general is dot_general
        and x.preferred_element_type is None
        and _computes_in(x.dtype, x.kernel)
    )


def _is_plain_norm(x: Any) -> bool:
    return (
        type(x) is nnx.RMSNorm
        and x.scale is not None
        and (x.reduction_axes, x.feature_axes, x.axis_name) == (-1, -1, None)
        and _computes_in(x.dtype, x.scale)
    )


def _computes_in(dtype: Any, parameter: Any) -> bool:
    value = parameter[...]
    return isinstance(value, jax.Array) and (dtype is None or jnp.dtype(dtype) == value.dtype)


def takes(
    attention: Any, norm: Any, x: jax.Array, cache: PagedKVCache, layer: Any, absorbed: Any
) -> bool:
    """Says whether `decode` may be called; the arguments are its own.

    On one device only: on several, parameters may be cut among them, which a trace does not show
    where XLA's partitioner decides, and a custom call would get all of them whole on each device.
    """
    # First what is cheap, and says no for all but single tokens.
    if x.shape[:2] != (1, 1) or jax.device_count() != 1:
        return False
    found = jax.eval_shape(partial(weights, attention, norm, absorbed))
    return found is not None and (
        ffi.layer_reason(x, cache.pages, cache.block_table, found, layer, cache.num_layers) is None
    )


def decode(
    plain: Callable[..., tuple[jax.Array, PagedKVCache]],
    attention: Any,
    norm: Any,
    x: jax.Array,
    cache: PagedKVCache,
    layer: Any,
    absorbed: Any,
    schedule: Any,
    names: tuple[str, ...],
) -> tuple[jax.Array, PagedKVCache]:
    """Runs a layer that `takes` allows: on GPUs as one call, elsewhere as `plain`.

    The call keeps float32 between its steps where `plain` rounds; gradients and `vmap` are those of
    `plain`.

    Args:
        plain: the definition, a function of the other arguments.
        attention: a `MultiHeadLatentAttention`.
        norm: as for its `decode`, like the others.
        x: as there.
        cache: as there.
        layer: as there.
        absorbed: as there.
        schedule: as there; the call needs none.
        names: the implementations for `plain`.
    """
    cache.check_columns(1)
    graphdef, state = nnx.split((attention, norm))
    inputs = (state, x, cache, absorbed, schedule)
    pages, y = _decode(inputs, plain=plain, graphdef=graphdef, layer=int(layer), names=names)
    return y, dataclasses.replace(cache, pages=pages)


# Jitted, so that a call outside `jit` traces what it is wrapped in once and not each time.
@partial(jax.jit, static_argnames=("plain", "graphdef", "layer", "names"))
def _decode(
    inputs: Any, *, plain: Callable[..., Any], graphdef: Any, layer: int, names: tuple[str, ...]
) -> Any:
    """Gives the pages and the output, as JAX's transformations see them."""
    leaves, tree = jax.tree.flatten(inputs)

    def definition(*leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
        state, x, cache, absorbed, schedule = jax.tree.unflatten(tree, leaves)
        attention, norm = nnx.merge(graphdef, state)
        y, cache = plain(attention, norm, x, cache, layer, absorbed, schedule, names)
        return cache.pages, y

    def one_call(*leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
        state, x, cache, absorbed, _ = jax.tree.unflatten(tree, leaves)
        attention, norm = nnx.merge(graphdef, state)
        return ffi.layer(
            x,
            cache.pages,
            weights(attention, norm, absorbed),
            *rope_tables(attention.rope, cache.positions(1), attention.qk_rope_head_dim),
            cache.block_table,
            cache.seqlens,
            cache.num_new,
            layer=layer,
            num_layers=cache.num_layers,
            norm_epsilon=0.0 if norm is None else norm.epsilon,
            kv_norm_epsilon=attention.kv_a_layernorm.epsilon,
            softmax_scale=attention.softmax_scale,
            interleaved=attention.rope.interleaved,
        )

    @jax.custom_batching.custom_vmap
    def mapped(*leaves: jax.Array) -> Any:
        branches = {"cuda": varying(one_call), "default": varying(definition)}
        return jax.lax.platform_dependent(*leaves, **branches)

    @mapped.def_vmap
    def _(_: int, batched: list[bool], *leaves: jax.Array) -> Any:
        # Left to JAX, a custom call would become a loop of calls.
        axes = [0 if is_batched else None for is_batched in batched]
        return jax.vmap(definition, axes)(*leaves), (True, True)

    @jax.custom_vjp
    def call(*leaves: jax.Array) -> Any:
        return mapped(*leaves)

    call.defvjp(lambda *leaves: jax.vjp(definition, *leaves), lambda pullback, ct: pullback(ct))
    return call(*vary_alike(*leaves))
