# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The model against Hugging Face's float32 outputs on the reference checkpoints."""

import re
from functools import partial

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from mla_jax import DeepseekForCausalLM, PagedKVCache, generate
from mla_jax.bench import models
from mla_jax.config import DeepseekConfig
from mla_jax.linear import dot_general
from mla_jax.moe import Experts, MoE, Router
from mla_jax.rope import inverse_frequencies, rope_tables

LOGITS = {"rtol": 0, "atol": 2e-3}
LAYER = {"rtol": 0, "atol": 1e-4}
STRIDE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(scope="module", params=checkpoints.NAMES)
def ref(request, tmp_path_factory):
    return checkpoints.load(request.param, tmp_path_factory.mktemp("checkpoints"))


def _new_cache(model, b, page_size, tokens=192):
    # Pages hold NaN before they are written: what is read too early or too far shows.
    cache = PagedKVCache.create(
        num_layers=model.config.num_hidden_layers,
        num_pages=b * tokens // page_size,
        max_seqs=b,
        max_pages_per_seq=tokens // page_size,
        page_size=page_size,
        d_k=model.config.d_cache,
        dtype=jnp.float32,
    )
    return jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, cache)


def test_full_forward_one_prompt_at_a_time(ref):
    for i, (prompt, greedy) in enumerate(zip(ref.prompts, ref.greedy, strict=True)):
        tokens = np.zeros((1, 160), np.int32)  # one shape for all; causality hides what follows
        tokens[0, : len(prompt) + 32] = prompt + greedy
        logits = np.asarray(_apply(*nnx.split(ref.model), tokens)[0])
        kept = ref.oracle[f"logits_{i}"]
        end = len(prompt)
        np.testing.assert_allclose(logits[end - len(kept) : end], kept, **LOGITS)
        predicted = logits[end - 1 : end + 31]
        np.testing.assert_allclose(predicted, ref.oracle[f"gen_logits_{i}"], **LOGITS)
        assert predicted.argmax(-1).tolist() == greedy


@pytest.mark.parametrize(("page_size", "chunk"), [(64, 112), (16, 7)])
def test_ragged_batch_over_the_cache(ref, page_size, chunk):
    """Ragged prompts, left-padded, in chunks; then 32 steps fed with Hugging Face's own tokens."""
    columns = 112  # of the padded prompts, a multiple of 7
    lengths = np.array([len(prompt) for prompt in ref.prompts])
    b = len(lengths)
    padded = np.zeros((b, columns), np.int32)
    for row, prompt in enumerate(ref.prompts):
        padded[row, columns - len(prompt) :] = prompt
    cache = _new_cache(ref.model, b, page_size)
    for start in range(0, columns, chunk):
        new = np.clip(start + chunk - (columns - lengths), 0, chunk)
        logits, cache, granted = _step(
            *nnx.split(ref.model), padded[:, start : start + chunk], cache, new, prefill=True
        )
        assert granted.all()
    _check_cached_latents(ref, cache)
    for k in range(32):
        expected = np.stack([ref.oracle[f"gen_logits_{i}"][k] for i in range(b)])
        np.testing.assert_allclose(logits, expected, **LOGITS)
        tokens = np.array([[greedy[k]] for greedy in ref.greedy], np.int32)
        np.testing.assert_array_equal(np.argmax(logits, -1), tokens[:, 0])
        logits, cache, _ = _step(
            *nnx.split(ref.model), tokens, cache, np.ones(b, np.int32), prefill=False
        )


@partial(jax.jit, static_argnames=("graphdef", "prefill"), donate_argnames="cache")
def _step(graphdef, params, tokens, cache, new, *, prefill):
    cache, granted = cache.reserve(new)
    logits, cache = nnx.merge(graphdef, params).step(tokens, cache, prefill=prefill)
    return logits, cache, granted


def _check_cached_latents(ref, cache):
    config = ref.model.config
    for index in range(config.num_hidden_layers):
        held = cache.pages[cache.layer_table(index)[0]].reshape(-1, config.d_cache)
        latent, k_pe = np.split(held[: len(ref.prompts[0])], [config.kv_lora_rank], axis=-1)
        if config.is_v3 and config.rope.interleaved:
            k_pe = np.concatenate([k_pe[:, 0::2], k_pe[:, 1::2]], axis=-1)
        np.testing.assert_allclose(latent, ref.oracle[f"cache_ckv_{index}"], **LAYER)
        np.testing.assert_allclose(k_pe, ref.oracle[f"cache_krope_{index}"], **LAYER)


def test_generate_gives_the_greedy_tokens(ref):
    new = generate(
        ref.model, ref.prompts, max_new_tokens=32, eos_token_id=(), page_size=16, prefill_chunk=7
    )
    assert new == ref.greedy


@partial(jax.jit, static_argnames="graphdef")
def _apply(graphdef, params, *args):
    return nnx.merge(graphdef, params)(*args)


def test_attention_and_mlp_of_each_layer(ref):
    for index, layer in enumerate(ref.model.model.layers):
        x = ref.oracle[f"attn_in_{index}"][None]
        out = _apply(*nnx.split(layer.self_attn), x, jnp.arange(x.shape[1])[None])
        np.testing.assert_allclose(out[0], ref.oracle[f"attn_out_{index}"], **LAYER)
        out = _apply(*nnx.split(layer.mlp), ref.oracle[f"mlp_in_{index}"][None])
        np.testing.assert_allclose(out[0], ref.oracle[f"mlp_out_{index}"], **LAYER)

    x = ref.oracle["attn_in_0"][None]
    attention = ref.model.model.layers[0].self_attn
    out = _apply(*nnx.split(attention), x, 17 * jnp.arange(x.shape[1])[None])
    np.testing.assert_allclose(out[0], ref.oracle["attn_stride_out_0"], **STRIDE)


def test_router_chooses_and_weighs_the_same_experts(ref):
    layers = ref.model.model.layers
    moe = [i for i, layer in enumerate(layers) if isinstance(layer.mlp, MoE)]
    assert moe == [i for i in range(len(layers)) if f"router_idx_{i}" in ref.oracle]
    for index in moe:
        gate = layers[index].mlp.gate
        experts, weights = _apply(*nnx.split(gate), ref.oracle[f"mlp_in_{index}"])
        order = np.argsort(experts, axis=-1)
        ascending = np.take_along_axis(np.asarray(experts), order, -1)
        np.testing.assert_array_equal(ascending, ref.oracle[f"router_idx_{index}"])
        weights = np.take_along_axis(np.asarray(weights), order, -1)
        np.testing.assert_allclose(weights, ref.oracle[f"router_w_{index}"], rtol=1e-4)


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_router_of_16_bit_numbers_sums_in_float32(n, dtype):
    config = models.preset("deepseek-v2-lite", "gpu")
    router = Router(config, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(n), (n, config.hidden_size), dtype)
    experts, weights = _apply(*nnx.split(router), x)
    logits = np.asarray(x, np.float64) @ np.asarray(router.kernel[...], np.float64)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-scores, axis=-1)[:, : config.num_experts_per_tok]
    np.testing.assert_array_equal(experts, best)
    expected = np.take_along_axis(scores, best, -1) * config.routed_scaling_factor
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_rope_and_softmax_scale(ref):
    config = ref.model.config
    dim = config.qk_rope_head_dim
    inv_freq = inverse_frequencies(config.rope, dim)
    np.testing.assert_allclose(inv_freq, ref.oracle["rope_inv_freq"], rtol=1e-6)
    cos, _ = rope_tables(config.rope, jnp.zeros(1, jnp.int32), dim)
    np.testing.assert_allclose(cos, np.full((1, dim // 2), ref.oracle["rope_attention_scaling"]))
    scale = ref.model.model.layers[0].self_attn.softmax_scale
    np.testing.assert_allclose(scale, ref.oracle["softmax_scale"], rtol=1e-6)


def test_bfloat16_stays_close(tmp_path):
    """Attention in bfloat16, true latent width: within a relative 1e-2 of float32."""
    exact = checkpoints.load("true_dims", tmp_path)
    model = DeepseekForCausalLM.from_pretrained(tmp_path / "true_dims", param_dtype=jnp.bfloat16)
    for index, layer in enumerate(model.model.layers):
        x = exact.oracle[f"attn_in_{index}"][None].astype(jnp.bfloat16)
        out = np.asarray(_apply(*nnx.split(layer.self_attn), x)[0], np.float32)
        expected = exact.oracle[f"attn_out_{index}"]
        assert np.linalg.norm(out - expected) < 1e-2 * np.linalg.norm(expected)


def _experts(x, ids, weights, kernels):
    """The definition, token by token in float64."""
    gate, up, down = (np.asarray(kernel, np.float64) for kernel in kernels)
    out = np.zeros_like(x, np.float64)
    for i, token in enumerate(x.astype(np.float64)):
        for e, weight in zip(ids[i], weights[i], strict=True):
            a = token @ gate[e]
            out[i] += weight * ((a / (1 + np.exp(-a)) * (token @ up[e])) @ down[e])
    return out


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9])
def test_experts_of_few_tokens_several_and_in_turns(n, monkeypatch):
    """An expert that a token did not choose has no part in it, whatever it makes of the token."""
    monkeypatch.setattr("mla_jax.moe._TOKENS_AT_A_TIME", 4)
    config = DeepseekConfig(
        "deepseek_v2", 8, 12, 8, 2, 1, n_routed_experts=9, moe_intermediate_size=6,
        num_experts_per_tok=2,
    )  # fmt: skip
    experts = Experts(config, dtype=None, param_dtype=jnp.float32, rngs=nnx.Rngs(1))
    for kernel in (experts.gate_proj, experts.up_proj, experts.down_proj):
        kernel[...] = kernel[...].at[8].set(1e30)  # its products overflow
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, 12), np.float32)
    ids = np.stack([rng.permutation(8)[:2] for _ in range(n)])  # all different, never the last
    weights = rng.random((n, 2), np.float32)
    kernels = [k[...] for k in (experts.gate_proj, experts.up_proj, experts.down_proj)]
    expected = _experts(x, ids, weights, kernels)
    out = _apply(*nnx.split(experts), x, ids, weights)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)

    def total(x):
        return (experts(x, ids, weights) ** 2).sum()

    assert np.isfinite(jax.grad(total)(x)).all()


def test_one_row_is_multiplied_as_two_on_gpus():
    """XLA would make a sum over products of elements, which it may write to memory."""
    layer = partial(dot_general, dimension_numbers=(((2,), (0,)), ((), ())))
    kernel = jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)
    for platform, shape, rows in [
        ("cuda", (1, 1, 4), 2),
        ("cpu", (1, 1, 4), 1),
        ("cuda", (3, 1, 4), 3),
    ]:
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        text = export.export(jax.jit(layer), platforms=[platform])(x, kernel).mlir_module()
        assert re.findall(r"dot_general.*-> tensor<(\d+)x1x6xbf16>", text) == [str(rows)]
    x, kernel = (
        np.random.default_rng(0).standard_normal(s, np.float32) for s in ((1, 1, 4), (4, 6))
    )
    np.testing.assert_allclose(layer(x, kernel), x @ kernel, rtol=1e-5)


def test_absorbed_once_or_in_every_step():
    model = DeepseekForCausalLM(
        DeepseekConfig("deepseek_v2", 8, 12, 8, 2, 3, None, 16, 6, 4, 10), rngs=nnx.Rngs(0)
    )
    cache = _new_cache(model, 2, 4, 16)
    cache, _ = cache.reserve(jnp.array([1, 1]))
    graphdef, params = nnx.split(model)

    @jax.jit
    def step(absorbed):
        tokens = jnp.array([[1], [2]])
        return nnx.merge(graphdef, params).step(tokens, cache, absorbed=absorbed)[0]

    expected = step(None)
    np.testing.assert_allclose(step(model.absorb()), expected, rtol=1e-5, atol=1e-6)
    swapped = step(model.absorb()[::-1])
    assert not np.allclose(swapped, expected, rtol=1e-3)  # each layer takes its own
