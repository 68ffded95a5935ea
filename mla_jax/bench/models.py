# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Models by name, with random weights made on the device, and caches as after a long prompt."""

import dataclasses
import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax.bench.cases import PAGE_SIZE
from mla_jax.cache import PagedKVCache
from mla_jax.config import DeepseekConfig
from mla_jax.deepseek import DeepseekForCausalLM
from mla_jax.rope import RopeConfig, YarnScaling

Module = TypeVar("Module", bound=nnx.Module)

# The architectures of the checkpoints' config.json (https://huggingface.co/deepseek-ai,
# https://huggingface.co/moonshotai).
PRESETS = {
    "deepseek-v2-lite": DeepseekConfig(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=27,
        num_attention_heads=16,
        q_lora_rank=None,
        rope=RopeConfig(1e4, YarnScaling(40.0, 4096, mscale=0.707, mscale_all_dim=0.707)),
        max_position_embeddings=163840,
        n_routed_experts=64,
        n_shared_experts=2,
        moe_intermediate_size=1408,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
    ),
    "deepseek-v3": DeepseekConfig(
        model_type="deepseek_v3",
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=128,
        rope=RopeConfig(1e4, YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)),
        max_position_embeddings=163840,
        n_routed_experts=256,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        num_experts_per_tok=8,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        topk_method="noaux_tc",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
    "kimi-k2": DeepseekConfig(
        model_type="kimi_k2",
        vocab_size=163840,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=64,
        rope=RopeConfig(5e4, YarnScaling(32.0, 4096, 1.0, 1.0, 1.0, 1.0)),
        max_position_embeddings=131072,
        n_routed_experts=384,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        num_experts_per_tok=8,
        first_k_dense_replace=1,
        topk_method="noaux_tc",
        norm_topk_prob=True,
        routed_scaling_factor=2.827,
    ),
}
# On a CPU: everything small but the width of the cache, which belongs to the op.
_SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "n_routed_experts": 16,
    "moe_intermediate_size": 64,
}


def preset(name: str, platform: str, layers: int | None = None) -> DeepseekConfig:
    """Returns a model's architecture, small on a CPU.

    Args:
        name: "deepseek-v2-lite", "deepseek-v3" or "kimi-k2".
        platform: as JAX names it.
        layers: how many of its layers to keep, the first ones; None keeps all.

    Raises:
        ValueError: the model is unknown, or has fewer layers.
    """
    if name not in PRESETS:
        raise ValueError(f"model: got {name!r}, expected one of {list(PRESETS)}")
    config = PRESETS[name]
    if platform == "cpu":
        small: dict[str, Any] = dict(_SMALL)
        if config.q_lora_rank is not None:
            small["q_lora_rank"] = 64
        config = dataclasses.replace(config, **small)
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(
                f"layers: got {layers}, expected 1 to {config.num_hidden_layers}, those of {name}"
            )
        config = dataclasses.replace(config, num_hidden_layers=layers)
    return config


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, scale: float) -> jax.Array:
    # In float32: random numbers made in bfloat16 take few values.
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)


def randomized(module: Module) -> Module:
    """Gives an abstract module (of `nnx.eval_shape`) random weights, made on the default device.

    Matrices are normal with a variance of 1 over their rows, so that activations keep theirs;
    embeddings are of variance 1, norms 1 and biases 0. No more is held than the weights and one of
    them in float32.
    """
    graphdef, abstract = nnx.split(module)
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    # "rbg" is the generator of the hardware, many times as fast as the default one.
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))

    def make(key: jax.Array, path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if leaf.ndim == 1:
            return jnp.full(leaf.shape, 0 if "bias" in name else 1, leaf.dtype)
        scale = 1.0 if "embedding" in name else 1 / math.sqrt(leaf.shape[-2])
        return _normal(key, leaf.shape, leaf.dtype, scale)

    # One after the other: those under way at once would each hold memory for float32.
    made = [
        jax.block_until_ready(make(key, path, leaf))
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, made))


def language_model(config: DeepseekConfig, dtype: jnp.dtype) -> DeepseekForCausalLM:
    """Makes a language model with random weights.

    Raises:
        ValueError: the weights alone are larger than the device's memory.
    """
    model = nnx.eval_shape(lambda: DeepseekForCausalLM(config, param_dtype=dtype, rngs=nnx.Rngs(0)))
    need, limit = num_bytes(model), (memory_stats().get("bytes_limit") or math.inf)
    if need > limit:
        raise ValueError(
            f"model: got {config.num_hidden_layers} layers of {need / 1e9:.0f} GB in all, expected "
            f"at most the {limit / 1e9:.0f} GB of this device; --layers takes fewer"
        )
    return randomized(model)


def num_bytes(tree: Any) -> int:
    """Counts the bytes of a module's or pytree's arrays, abstract ones too."""
    tree = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def filled_cache(*, num_layers: int, b: int, room: int, d_k: int, dtype: jnp.dtype) -> PagedKVCache:
    """Makes a cache of `b` sequences with `room` tokens: N(0, 1) latents, pages in random order."""
    each = -(-room // PAGE_SIZE)
    cache = jax.eval_shape(
        lambda: PagedKVCache.create(
            num_layers=num_layers,
            num_pages=b * each,
            max_seqs=b,
            max_pages_per_seq=each,
            page_size=PAGE_SIZE,
            d_k=d_k,
            dtype=dtype,
        )
    )
    table = np.random.default_rng(0).permutation(b * each).astype(np.int32).reshape(b, each)
    return dataclasses.replace(
        cache,
        pages=_filled_pool(num_layers, cache.pages.shape, jnp.dtype(dtype)),
        block_table=jnp.asarray(table),
        seqlens=jnp.full(b, room, jnp.int32),
        num_new=jnp.zeros(b, jnp.int32),
        refcounts=jnp.ones(b * each, jnp.int32),
    )


@functools.partial(jax.jit, donate_argnames="cache")
def at_context(cache: PagedKVCache, table: jax.Array, context: jax.Array) -> PagedKVCache:
    """Sets each sequence's length, in the pages of `table`, the table of `filled_cache`."""
    held = jnp.arange(table.shape[1]) * PAGE_SIZE < context
    lengths = jnp.full(table.shape[0], context, jnp.int32)
    return cache._with_table(jnp.where(held, table, -1), lengths, jnp.zeros_like(lengths))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _filled_pool(num_layers: int, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """A pool of N(0, 1), layer by layer: in float32 the whole may not fit."""
    pages = shape[0] // num_layers

    def fill(layer: jax.Array, pool: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(1, impl="rbg"), layer)
        new = jax.random.normal(key, (pages, *shape[1:]), jnp.float32).astype(dtype)
        return jax.lax.dynamic_update_slice_in_dim(pool, new, layer * pages, 0)

    return jax.lax.fori_loop(0, num_layers, fill, jnp.zeros(shape, dtype))


def memory_stats() -> dict[str, int]:
    """Returns what the default device says of its memory; CPUs say nothing."""
    return jax.devices()[0].memory_stats() or {}
