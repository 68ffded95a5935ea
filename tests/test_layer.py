# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""An attention layer of one token as one call on GPUs.

Without a GPU: when it is lowered, what it is differentiated and mapped as, and what it refuses.
With one: against float64, and that it touches nothing else.
"""

import ctypes
import dataclasses
import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import mesh, on_gpu
from reference import Problem, assert_rounded, assert_same_bits
from shapes import floats, ints, shaped

import mla_jax
from mla_jax import MultiHeadLatentAttention, PagedKVCache, RopeConfig, ffi
from mla_jax import layer as one_call
from mla_jax.linear import dot_general

REASON = ffi._library_reason("cuda")
C, R, N, V = 512, 64, 128, 128
LAYERS, UNUSED = 3, 2147480000
EPSILON, KV_EPSILON = 0.25, 0.125  # of both norms, such that leaving them out shows
needs_library = pytest.mark.skipif(REASON is not None, reason=f"ffi: {REASON}")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """With several devices there is no such call, and CPUs of tests have eight."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.fixture
def hopper():
    """Skips where the kernels cannot run, saying why; fails if ffi is required of a GPU there."""
    reason = REASON or (ffi._device_reason() if on_gpu() else "no GPU")
    if (
        reason is not None
        and on_gpu()
        and "ffi" in os.environ.get("MLA_JAX_REQUIRE", "").split(",")
    ):
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(f"ffi: {reason}")


gpu = pytest.mark.usefixtures("hopper")


class Layer(nnx.Module):
    """An attention with its norm; their vectors are random, so that ignoring them shows."""

    def __init__(self, h=2, d=512, dtype="bfloat16", interleaved=True, seed=0, **options):
        rngs = nnx.Rngs(seed)
        options = {"q_lora_rank": None, "dtype": dtype, "param_dtype": dtype} | options
        rope = RopeConfig(interleaved=interleaved)
        self.attention = MultiHeadLatentAttention(d, h, rope=rope, rngs=rngs, **options)
        self.norm = nnx.RMSNorm(
            d, epsilon=EPSILON, dtype=dtype, param_dtype=options["param_dtype"], rngs=rngs
        )
        self.attention.kv_a_layernorm.epsilon = KV_EPSILON
        for norm in (self.attention.kv_a_layernorm, self.norm):
            scale = norm.scale[...]
            norm.scale[...] = scale + 0.3 * jax.random.normal(
                rngs.noise(), scale.shape, scale.dtype
            )


def decode(layer, x, cache, index=1, norm=True, **options):
    return layer.attention.decode(x, cache, index, norm=layer.norm if norm else None, **options)


def drawn(length=40, d=512, *, new=1, page_size=16, dtype="bfloat16", seed=0, index=1):
    """One token's input, and a cache that is poisoned but for what this token of it may see."""
    rng = np.random.default_rng([seed, length])
    used = -(-length // page_size)
    width, num_pages = used + 2, used + 3
    table = np.full((1, width), UNUSED, np.int32)
    table[0, :used] = rng.permutation(num_pages)[:used]
    pages = np.full((LAYERS, num_pages, page_size, 1, C + R), np.nan, "f4")
    cached = max(length - new, 0)
    tokens = np.arange(cached)
    pages[index, table[0, tokens // page_size], tokens % page_size, 0] = rng.standard_normal(
        (cached, C + R), "f4"
    )
    cache = PagedKVCache(
        pages=jnp.asarray(pages.reshape(-1, *pages.shape[2:]), dtype),
        block_table=jnp.asarray(table),
        seqlens=jnp.array([length], jnp.int32),
        num_new=jnp.array([new], jnp.int32),
        refcounts=jnp.zeros(num_pages, jnp.int32),
        num_layers=LAYERS,
    )
    return jnp.asarray(rng.standard_normal((1, 1, d)), dtype), cache


def definition(layer, x, cache, index, norm):
    """The output in float64, what attention adds to it, and the pages."""
    attention = layer.attention
    p = {
        ".".join(path): np.asarray(value[...]).astype(np.float64)
        for path, value in nnx.to_flat_state(nnx.state(layer, nnx.Param))
    }
    x, h = np.asarray(x, np.float64)[0, 0], attention.num_heads
    z = x
    if norm:
        z = x / np.sqrt((x**2).mean() + EPSILON) * p["norm.scale"]
    position = np.float32(int(cache.seqlens[0]) - 1)
    frequency = (10000.0 ** (-np.arange(0, R, 2) / R)).astype(np.float32)
    angle = (position * frequency).astype(np.float64)  # the product is of float32 by definition
    q = (z @ p["attention.q_proj.kernel"]).reshape(h, N + R)
    q_pe = q[:, N:]
    interleaved = attention.rope.interleaved
    pairs = (q_pe[:, 0::2], q_pe[:, 1::2]) if interleaved else np.split(q_pe, 2, axis=1)
    turned = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angle)
    q_pe = np.stack([turned.real, turned.imag], axis=2 if interleaved else 1).reshape(h, R)
    up = p["attention.kv_b_proj.kernel"].reshape(C, h, N + V)
    operands = (
        (z @ p["attention.kv_a_proj_with_mqa.kernel"])[None, None],
        p["attention.kv_a_layernorm.scale"],
        np.cos(angle)[None, None],
        np.sin(angle)[None, None],
    )
    tokens, num_pages = (cache.block_table, cache.seqlens, cache.num_new), cache.num_pages
    pages = reference.append(
        cache.pages,
        operands,
        *tokens,
        index,
        num_pages,
        interleaved=interleaved,
        epsilon=KV_EPSILON,
    )
    q = np.concatenate([np.einsum("hn,chn->hc", q[:, :N], up[..., :N]), q_pe], axis=1)
    own = pages[index * num_pages : (index + 1) * num_pages]
    seen = Problem(q[None, None], own, np.asarray(cache.block_table), np.asarray(cache.seqlens))
    out, _ = reference.attend(seen, softmax_scale=(N + R) ** -0.5)
    out = np.einsum("hc,chv->hv", out[0, 0], up[..., N:]).reshape(-1)
    added = out @ p["attention.o_proj.kernel"]
    return (x + added if norm else added), added, pages


# Norm of the error relative to that of what attention adds, but for the rounding of the result.
BOUNDS = {"bfloat16": 5e-3, "float16": 7e-4}


def assert_near(y, want, added, factor=1.0):
    half, y = float(jnp.finfo(y.dtype).eps) / 2, np.asarray(y).astype(np.float64)[0, 0]
    error = np.maximum(abs(y - want) - half * abs(want), 0)
    assert np.isfinite(y).all()
    bound = factor * BOUNDS["bfloat16" if half > 1e-3 else "float16"]
    off = np.linalg.norm(error) / (np.linalg.norm(added) or 1)
    assert off <= bound, f"off by {off:.2e}"


def layer_of(case, index=1):
    """A layer, its input and cache, and whether it has its norm, for one of CASES."""
    h, d, length, page_size, dtype, interleaved, norm = case
    drawing = drawn(length, d, page_size=page_size, dtype=dtype, index=index)
    return Layer(h, d, dtype, interleaved), *drawing, norm


def assert_is_the_definition(got, layer, x, cache, index, norm):
    """Holds the output and the pages of a call to float64."""
    want, added, written = definition(layer, x, cache, index, norm)
    y, pages = got
    assert y.dtype == x.dtype
    assert_near(y, want, added)
    assert_rounded(pages, written)


def assert_alike(got, want, bound=2e-2):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = (np.asarray(a).astype(np.float64) for a in (x, y))
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        x, y = np.nan_to_num(x), np.nan_to_num(y)
        assert np.linalg.norm(x - y) <= bound * np.linalg.norm(y)


# --- The definition, on any device ----------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_plain_form_is_the_definition(interleaved, norm):
    """It rounds more often than the kernels, and holds the oracle of their tests to account."""
    for length, new, dtype in ((1, 1, "bfloat16"), (40, 1, "float16"), (33, 0, "bfloat16")):
        layer = Layer(3, dtype=dtype, interleaved=interleaved)
        x, cache = drawn(length, new=new, dtype=dtype)
        want, added, pages = definition(layer, x, cache, 1, norm)
        y, got = jax.jit(functools.partial(decode, layer, norm=norm, implementation="xla"))(
            x, cache
        )
        assert_near(y, want, added, factor=2)
        assert_alike(got.pages, pages)


def test_norm_is_the_layers_own(implementation):
    """`decode(norm=norm)` is `x + decode(norm(x))`, and so are all its gradients."""
    layer = Layer()
    x, cache = drawn(50)
    cache = dataclasses.replace(cache, pages=jnp.nan_to_num(cache.pages))
    q = shaped(1, 1, 2, 576)
    found = mla_jax.explain(
        q, cache.pages, cache.block_table, cache.seqlens, 512, implementation=implementation
    )
    if found.implementation is None:
        pytest.skip(found.reasons[implementation])

    def whole(layer, x, pages):
        own = dataclasses.replace(cache, pages=pages)
        return decode(layer, x, own, implementation=implementation)

    def parts(layer, x, pages):
        own = dataclasses.replace(cache, pages=pages)
        y, own = decode(layer, layer.norm(x), own, norm=False, implementation=implementation)
        return x + y, own

    arguments = (layer, x, cache.pages)
    (y, got), (want, pages) = nnx.jit(whole)(*arguments), nnx.jit(parts)(*arguments)
    assert_alike((y, got.pages), (want, pages.pages), 1e-2)

    weight = jax.random.normal(jax.random.key(1), x.shape)

    def loss(function, *arguments):
        y, written = function(*arguments)
        return jnp.sum(y * weight) + jnp.sum(written.pages.astype(jnp.float32) ** 2)

    gradients = [
        nnx.jit(nnx.grad(functools.partial(loss, function), argnums=(0, 1, 2)))(*arguments)
        for function in (whole, parts)
    ]
    assert_alike(*gradients)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(gradients[0]))


def test_calls_outside_jit_are_checked():
    x, cache = drawn(40, new=2)
    with pytest.raises(ValueError, match="latents: got t = 1 columns, expected at least 2"):
        decode(Layer(), x, cache)
    with pytest.raises(ValueError, match=r"x: got \[1, 1, 40\], expected .*hidden_size=512"):
        decode(Layer(), x[..., :40], cache)


# --- Which form is lowered for a GPU, on any machine ----------------------------------------------


def lowered(layer, x, cache, index=1, platforms=("cuda",), **options):
    """The program of a step, of shapes and dtypes alone."""
    graphdef, state = nnx.split(layer)

    def step(state, x, cache):
        return decode(nnx.merge(graphdef, state), x, cache, index, **options)

    return jax.jit(step).trace(state, x, cache).lower(lowering_platforms=platforms).as_text()


def shapes(b=1, t=1, d=512, page_size=16, width=4, d_k=C + R, dtype=jnp.bfloat16):
    cache = PagedKVCache(
        pages=shaped(LAYERS * 5, page_size, 1, d_k, dtype=dtype),
        block_table=ints(b, width),
        seqlens=ints(b),
        num_new=ints(b),
        refcounts=ints(5),
        num_layers=LAYERS,
    )
    return shaped(b, t, d, dtype=dtype), cache


def abstract(**options):
    return nnx.eval_shape(lambda: Layer(**options))


@needs_library
@pytest.mark.parametrize("norm", [True, False])
def test_the_call_that_is_lowered(norm):
    text = lowered(abstract(h=3, d=1024), *shapes(d=1024), index=np.int64(2), norm=norm)
    (call,) = [line for line in text.splitlines() if "stablehlo.custom_call" in line]
    assert "@mla_jax_layer" in call
    assert "output_tuple_indices = [0], operand_index = 0, operand_tuple_indices = []" in call
    assert text.count("stablehlo.optimization_barrier") == 2  # around the call: mla_jax/ffi.py
    operands = (
        "15x16x1x576xbf16 1x1x1024xbf16 1024x576xbf16 1024x576xbf16 512xbf16 3x512x128xbf16 "
        "3x512x128xbf16 384x1024xbf16 1x1x32xf32 1x1x32xf32 1x4xi32 1xi32 1xi32"
    ).split() + ["1024xbf16"] * norm
    size = ffi._layer_workspace_bytes(3)
    results = ["15x16x1x576xbf16", "1x1x1024xbf16", f"{size}xui8"]
    signature = call[call.rindex(" : (") :]
    assert re.findall(r"tensor<(\w+)>", signature) == operands + results
    for attribute in (
        "interleaved = true", "kv_norm_epsilon = 1.250000e-01 : f32", "layer = 2 : i32",
        "num_layers = 3 : i32", "num_pages = 5 : i32", "softmax_scale = 0.0721687824 : f32",
        f"norm_epsilon = {'2.500000e-01' if norm else '0.000000e+00'} : f32",
    ):  # fmt: skip
        assert attribute in call


def with_adapter(layer):
    layer.attention.q_proj = nnx.LoRALinear(
        512, 384, lora_rank=2, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16,
        dot_general=dot_general, rngs=nnx.Rngs(0),
    )  # fmt: skip


def with_other_product(layer):
    layer.attention.o_proj.dot_general = jax.lax.dot_general


def with_wider_result(layer):
    layer.attention.kv_b_proj.preferred_element_type = jnp.float32


def with_float32_scale(layer):
    layer.norm.scale = nnx.Param(jnp.ones(512))


def with_norm_over_devices(layer):
    layer.norm.axis_name = "x"


class OtherNorm(nnx.RMSNorm):
    def __call__(self, x, mask=None):
        return -super().__call__(x)


def with_other_norm(layer):
    layer.norm = OtherNorm(512, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


class OtherAttention(MultiHeadLatentAttention):
    def _project(self, out):
        return -super()._project(out)


def with_other_attention(layer):
    layer.attention = OtherAttention(
        512, 2, q_lora_rank=None, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )


# Changes of the layer, of x and the cache, of the call, and of the layer once it is made.
F32 = {"dtype": jnp.float32}
GATES = {
    "as it is": ({}, {}, {}, None),
    "float16": ({"dtype": "float16"}, {"dtype": jnp.float16}, {}, None),
    "follows its parameters": ({"dtype": None, "param_dtype": jnp.bfloat16}, {}, {}, None),
    "ffi": ({}, {}, {"implementation": "ffi"}, None),
    "ffi first": ({}, {}, {"implementation": ("ffi", "xla")}, None),
    "most heads": ({"h": 128}, {}, {}, None),
    "widest": ({"d": 8192}, {"d": 8192}, {}, None),
    "pages of 128": ({}, {"page_size": 128}, {}, None),
    "half-split": ({"interleaved": False}, {}, {}, None),
}
NOT = {
    "two tokens": ({}, {"t": 2}, {}, None),
    "two sequences": ({}, {"b": 2}, {}, None),
    "queries with a latent": ({"q_lora_rank": 64}, {}, {}, None),
    "biases": ({"attention_bias": True}, {}, {}, None),
    "float32": (F32, F32, {}, None),
    "float32 parameters": ({"param_dtype": jnp.float32}, {}, {}, None),
    "float32 computation": ({"param_dtype": jnp.bfloat16, **F32}, {}, {}, None),
    "other cache": ({"dtype": "float16"}, {}, {}, None),
    "xla": ({}, {}, {"implementation": "xla"}, None),
    "pallas": ({}, {}, {"implementation": ("pallas", "ffi", "xla")}, None),
    "narrow heads": ({"qk_nope_head_dim": 64}, {}, {}, None),
    "narrow values": ({"v_head_dim": 64}, {}, {}, None),
    "narrow latent": ({"kv_lora_rank": 256}, {"d_k": 256 + R}, {}, None),
    "wide rotation": ({"qk_rope_head_dim": 128}, {"d_k": C + 128}, {}, None),
    "same width otherwise cut": (
        {"kv_lora_rank": 448, "qk_rope_head_dim": 128}, {}, {}, None
    ),
    "too many heads": ({"h": 129}, {}, {}, None),
    "too wide": ({"d": 8704}, {"d": 8704}, {}, None),
    "odd width": ({"d": 640}, {"d": 640}, {}, None),
    "pages of 8": ({}, {"page_size": 8}, {}, None),
    "long sequences": ({}, {"width": 2**26 + 1}, {}, None),
    "adapter": ({}, {}, {}, with_adapter),
    "other product": ({}, {}, {}, with_other_product),
    "wider result": ({}, {}, {}, with_wider_result),
    "float32 scale": ({}, {}, {}, with_float32_scale),
    "other norm": ({}, {}, {}, with_other_norm),
    "other attention": ({}, {}, {}, with_other_attention),
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("name", GATES | NOT)
def test_when_it_is_lowered(name):
    options, changed, call, alter = (GATES | NOT)[name]

    def make():
        layer = Layer(**options)
        if alter is not None:
            alter(layer)
        return layer

    text = lowered(nnx.eval_shape(make), *shapes(**changed), **call)
    assert text.count("@mla_jax_layer") == (name in GATES)


@needs_library
def test_a_norm_over_devices_is_not_the_kernels():
    layer = Layer()
    x, cache = shapes()
    assert one_call.takes(layer.attention, layer.norm, x, cache, 1, None)
    with_norm_over_devices(layer)
    assert not one_call.takes(layer.attention, layer.norm, x, cache, 1, None)


@needs_library
def test_absorbed_of_another_type_is_not_the_kernels():
    layer = Layer()
    absorbed = layer.attention.absorb()
    assert "@mla_jax_layer" in lowered(layer, *shapes(), absorbed=absorbed)
    absorbed = tuple(x.astype(jnp.float32) for x in absorbed)
    assert "@mla_jax_layer" not in lowered(layer, *shapes(), absorbed=absorbed)


@needs_library
def test_not_for_a_traced_layer_or_several_devices(monkeypatch):
    layer = abstract()
    graphdef, state = nnx.split(layer)

    def step(state, x, cache, index):
        return decode(nnx.merge(graphdef, state), x, cache, index)

    traced = jax.jit(step).trace(state, *shapes(), ints())
    assert "@mla_jax_layer" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert "@mla_jax_layer" not in lowered(layer, *shapes())


@needs_library
def test_one_program_for_several_platforms():
    text = lowered(abstract(), *shapes(), platforms=("cuda", "cpu"))
    assert text.count("@mla_jax_layer") == 1
    assert "@mla_jax_layer" not in lowered(abstract(), *shapes(), platforms=("cpu",))


@needs_library
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_in_meshes_of_one_device(kind):
    layer = abstract()
    with jax.set_mesh(mesh(kind, x=1)):
        assert "@mla_jax_layer" in lowered(layer, *shapes())


@needs_library
@pytest.mark.parametrize("check", [True, False])
def test_inside_shard_map(check):
    """Results vary as operands do, over axes that a custom call does not know of."""
    x, cache = shapes()
    graphdef, state = nnx.split(abstract())

    def step(state, x, pages):
        own = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
        y, own = decode(nnx.merge(graphdef, state), x, dataclasses.replace(own, pages=pages))
        return y, own.pages

    specs = {"in_specs": (P(), P("x"), P("x")), "out_specs": (P("x"), P("x"))}
    mapped = jax.jit(jax.shard_map(step, mesh=mesh(x=1), check_vma=check, **specs))
    traced = mapped.trace(state, x, cache.pages)
    assert "@mla_jax_layer" in traced.lower(lowering_platforms=("cuda",)).as_text()


REASONS = [
    ({"x": shaped(1, 2, 512)}, r"x: got \[1, 2, 512\], the kernels take one token of one sequence"),
    ({"x": shaped(1, 1)}, r"x: got \[1, 1\], the kernels take one token of one sequence"),
    ({"pages": floats(15, 16, 1, 576)}, "pages: got dtype float32, the kernels take bfloat16 and"),
    ({"pages": shaped(15, 8, 1, 576)}, "pages: got page_size 8 and 576 channels, the kernels take"),
    ({"pages": shaped(15, 16, 1, 512)}, "pages: got page_size 16 and 512 channels, the kernels"),
    ({"block_table": ints(1, 2**27)}, "block_table: got 134217728 pages of 16 tokens, the kernels"),
    ({"layer": 3}, r"layer: got 3, the kernels take a Python number in \[0, 3\)"),
    ({"layer": -1}, "layer: got -1, the kernels take a Python number"),
    ({"x": shaped(1, 1, 640)}, "x: got 640 channels, the kernels take multiples of 512 up to 8192"),
    ({"x": shaped(1, 1, 8704)}, "x: got 8704 channels, the kernels take multiples of 512 up to"),
    ({"w_uk": shaped(129, 512, 128)}, "w_uk: got 129 heads, the kernels take up to 128"),
    ({"x": floats(1, 1, 512)}, "x: got dtype float32, the kernels take that of pages bfloat16"),
    ({"w_o": floats(256, 512)}, "w_o: got dtype float32, the kernels take that of pages"),
    ({"w_q": shaped(512, 256)}, r"w_q: got \[512, 256\], the kernels take \[512, 384\]"),
    ({"norm": shaped(256)}, r"norm: got \[256\], the kernels take \[512\]"),
]  # fmt: skip


@needs_library
@pytest.mark.parametrize(("change", "message"), REASONS, ids=[m for _, m in REASONS])
def test_reasons(change, message):
    right = {name: RIGHT[name] for name in (*one_call.Weights._fields, "x", "pages", "block_table")}

    def reason(values):
        values = {"layer": 1, "num_layers": 3} | values
        weights = one_call.Weights(*(values.pop(name) for name in one_call.Weights._fields))
        return ffi.layer_reason(weights=weights, **values)

    assert reason(right) is None
    assert reason(right | {"norm": None}) is None
    assert re.match(message, reason(right | change))


@needs_library
def test_a_library_without_the_layer_is_not_used(monkeypatch):
    monkeypatch.setitem(ffi._TARGETS, "cuda", ("mla_jax_decode", "mla_jax_of_tomorrow"))
    with pytest.raises(ffi.LibraryError, match="does not load: .*mla_jax_of_tomorrow_cuda"):
        ffi._load("cuda")


@needs_library
def test_vmap_is_that_of_the_plain_form():
    layer = Layer()
    x, cache = drawn(40)
    many = jnp.stack([x, 2 * x, -x])

    def step(x):
        y, written = decode(layer, x, cache)
        return y, written.pages

    mapped = jax.jit(jax.vmap(step))
    text = mapped.trace(many).lower(lowering_platforms=("cuda",)).as_text()
    assert "@mla_jax_layer" not in text
    assert "@mla_jax_decode" in text
    y, pages = mapped(many)
    for i in range(3):
        assert_alike((y[i], pages[i]), jax.jit(step)(many[i]))
    by_x = jax.grad(lambda x: jnp.sum(step(x)[0].astype(jnp.float32) ** 2))
    assert_alike(jax.jit(jax.vmap(by_x))(many)[1], jax.jit(by_x)(many[1]))


# --- What the handler refuses ---------------------------------------------------------------------

RIGHT = {
    "pages": shaped(15, 16, 1, 576),
    "x": shaped(1, 1, 512),
    "w_q": shaped(512, 384),
    "w_kv": shaped(512, 576),
    "kv_norm": shaped(512),
    "w_uk": shaped(2, 512, 128),
    "w_uv": shaped(2, 512, 128),
    "w_o": shaped(256, 512),
    "cos": floats(1, 1, 32),
    "sin": floats(1, 1, 32),
    "block_table": ints(1, 4),
    "seqlens": ints(1),
    "num_new": ints(1),
    "norm": shaped(512),
}
ATTRIBUTES = {
    "layer": np.int32(1),
    "num_layers": np.int32(3),
    "num_pages": np.int32(5),
    "norm_epsilon": np.float32(1e-5),
    "kv_norm_epsilon": np.float32(1e-6),
    "softmax_scale": np.float32(0.1),
    "interleaved": True,
}
F16 = functools.partial(shaped, dtype=jnp.float16)

# What differs from a right call, and what the error says.
REFUSALS = [
    ({"pages": floats(15, 16, 1, 576)}, r"pages: got float32\[15, 16, 1, 576\], expected bfloat16"),
    ({"pages": shaped(15, 16, 576)}, r"pages: got bfloat16\[15, 16, 576\], expected \[num_layers"),
    ({"pages": shaped(15, 16, 2, 576)}, r"pages: got bfloat16\[15, 16, 2, 576\], expected \[num_l"),
    ({"pages": shaped(15, 16, 1, 512)}, r"pages: got bfloat16\[15, 16, 1, 512\], expected \[num_l"),
    ({"pages": shaped(15, 8, 1, 576)}, "pages: got page_size 8, expected 16, 32, 64 or 128"),
    ({"pages": shaped(15, 48, 1, 576)}, "pages: got page_size 48, expected 16, 32, 64 or 128"),
    ({"pages": shaped(14, 16, 1, 576)}, r"pages: got 14 rows, expected num_layers \* num_pages ="),
    ({"num_layers": np.int32(0)}, "num_layers: got 0, expected at least 1"),
    ({"num_pages": np.int32(-5), "num_layers": np.int32(-3)}, "num_layers: got -3, expected at le"),
    ({"num_pages": np.int32(0), "pages": shaped(0, 16, 1, 576)}, "num_pages: got 0, expected at l"),
    ({"num_pages": np.int32(2**30), "num_layers": np.int32(2**30)}, "pages: got 15 rows, expected"),
    ({"layer": np.int32(3)}, "layer: got 3, expected 0 <= layer < num_layers = 3"),
    ({"layer": np.int32(-1)}, "layer: got -1, expected 0 <= layer < num_layers = 3"),
    ({"x": shaped(1, 512)}, r"x: got bfloat16\[1, 512\], expected \[1, 1, d\], d a multiple of 51"),
    ({"x": shaped(1, 1, 640)}, r"x: got bfloat16\[1, 1, 640\], expected \[1, 1, d\], d a multiple"),
    ({"x": shaped(1, 1, 0)}, r"x: got bfloat16\[1, 1, 0\], expected \[1, 1, d\], d a multiple of"),
    ({"x": shaped(1, 1, 8704)}, r"x: got bfloat16\[1, 1, 8704\], expected .* up to 8192"),
    ({"x": shaped(1, 2, 512)}, r"x: got bfloat16\[1, 2, 512\], expected bfloat16\[1, 1, 512\]"),
    ({"x": shaped(2, 1, 512)}, r"x: got bfloat16\[2, 1, 512\], expected bfloat16\[1, 1, 512\]"),
    ({"x": F16(1, 1, 512)}, r"x: got float16\[1, 1, 512\], expected bfloat16\[1, 1, 512\]"),
    ({"w_uk": shaped(512, 256)}, r"w_uk: got bfloat16\[512, 256\], expected \[h, 512, 128\], 1 <="),
    ({"w_uk": shaped(129, 512, 128)}, r"w_uk: got bfloat16\[129, 512, 128\], expected .* h <= 128"),
    ({"w_uk": shaped(0, 512, 128)}, r"w_uk: got bfloat16\[0, 512, 128\], expected .*1 <= h <= 128"),
    ({"w_uk": shaped(2, 128, 512)}, r"w_uk: got bfloat16\[2, 128, 512\], expected bfloat16\[2, 51"),
    ({"w_q": shaped(512, 192)}, r"w_q: got bfloat16\[512, 192\], expected bfloat16\[512, 384\]"),
    ({"w_q": F16(512, 384)}, r"w_q: got float16\[512, 384\], expected bfloat16\[512, 384\]"),
    ({"w_kv": shaped(576, 512)}, r"w_kv: got bfloat16\[576, 512\], expected bfloat16\[512, 576\]"),
    ({"kv_norm": floats(512)}, r"kv_norm: got float32\[512\], expected bfloat16\[512\]"),
    ({"kv_norm": shaped(448)}, r"kv_norm: got bfloat16\[448\], expected bfloat16\[512\]"),
    ({"w_uv": shaped(3, 512, 128)}, r"w_uv: got bfloat16\[3, 512, 128\], expected bfloat16\[2, 51"),
    ({"w_o": shaped(128, 512)}, r"w_o: got bfloat16\[128, 512\], expected bfloat16\[256, 512\]"),
    ({"cos": shaped(1, 1, 32)}, r"cos: got bfloat16\[1, 1, 32\], expected float32\[1, 1, 32\]"),
    ({"sin": floats(1, 1, 31)}, r"sin: got float32\[1, 1, 31\], expected float32\[1, 1, 32\]"),
    ({"block_table": ints(4)}, r"block_table: got int32\[4\], expected int32\[1, max_pages\]"),
    ({"block_table": ints(1, 0)}, r"block_table: got int32\[1, 0\], expected int32\[1, max_pages"),
    ({"block_table": ints(2, 4)}, r"block_table: got int32\[2, 4\], expected int32\[1, 4\]"),
    ({"block_table": floats(1, 4)}, r"block_table: got float32\[1, 4\], expected int32\[1, 4\]"),
    ({"block_table": ints(1, 2**26 + 1)}, "block_table: got .*, expected .* 1 to 2.30 tokens in a"),
    ({"seqlens": ints(2)}, r"seqlens: got int32\[2\], expected int32\[1\]"),
    ({"num_new": floats(1)}, r"num_new: got float32\[1\], expected int32\[1\]"),
    ({"norm": shaped(576)}, r"norm: got bfloat16\[576\], expected bfloat16\[512\]"),
    ({"norm": floats(512)}, r"norm: got float32\[512\], expected bfloat16\[512\]"),
    ({"norm_epsilon": np.float32(-1)}, "norm_epsilon: got -1.0+, expected a finite number of at l"),
    ({"kv_norm_epsilon": np.float32("nan")}, "kv_norm_epsilon: got nan, expected a finite number"),
    ({"softmax_scale": np.float32(0)}, "softmax_scale: got 0.0+, expected a positive finite numbe"),
    ({"softmax_scale": np.float32("inf")}, "softmax_scale: got inf, expected a positive finite"),
    ({"y": shaped(1, 1, 1024)}, r"y: got bfloat16\[1, 1, 1024\], expected bfloat16\[1, 1, 512\]"),
    ({"y": floats(1, 1, 512)}, r"y: got float32\[1, 1, 512\], expected bfloat16\[1, 1, 512\]"),
    ({"workspace": -1}, r"workspace: got \d+ bytes, expected at least \d+"),
    ({"aliases": None}, r"result: got bfloat16\[15, 16, 1, 576\] of its own, expected the memory"),
    ({"result": shaped(15, 16, 576), "aliases": None}, r"result: got bfloat16\[15, 16, 576\], exp"),
]  # fmt: skip


@pytest.fixture(scope="module")
def checks():
    """The handler's checks, which come before any call to CUDA, as a target on CPUs."""
    library = ctypes.CDLL(str(ffi.find_library("cuda")))
    handler = jax.ffi.pycapsule(library.mla_jax_check_layer_cuda)
    jax.ffi.register_ffi_target("mla_jax_check_layer_cuda", handler, platform="cpu")


@needs_library
@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
@pytest.mark.skipif(on_gpu(), reason="a target of CPUs")
def test_handler_refuses(checks, change, message):
    def call(change):
        options = {"aliases": {0: 0}, "workspace": 0} | change
        operands = {name: change.get(name, x) for name, x in RIGHT.items()}
        operands = {name: x for name, x in operands.items() if x is not None}
        size = ffi._layer_workspace_bytes(2) + options["workspace"]
        pages, x = (operands[name] for name in ("pages", "x"))
        results = (
            change.get("result", pages),
            change.get("y", x),
            shaped(size, dtype=jnp.uint8),
        )
        made = jax.ffi.ffi_call(
            "mla_jax_check_layer_cuda", results, input_output_aliases=options["aliases"]
        )
        arrays = [jnp.zeros(x.shape, x.dtype) for x in operands.values()]
        attributes = {name: change.get(name, value) for name, value in ATTRIBUTES.items()}
        jax.block_until_ready(made(*arrays, **attributes))

    call({})
    call({"norm": None})
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"mla_jax_layer: {message}"):
        call(change)


# --- The kernels ----------------------------------------------------------------------------------

# Heads, channels of x, tokens, page size, dtype, interleaved, norm.
CASES = [
    (1, 512, 1, 16, "bfloat16", True, True),
    (1, 2048, 63, 128, "float16", False, False),
    (3, 512, 64, 32, "float16", True, True),
    (3, 1024, 65, 16, "bfloat16", False, True),
    (16, 2048, 1, 64, "float16", True, False),
    (16, 2048, 2, 64, "bfloat16", True, False),
    (16, 2048, 63, 64, "bfloat16", True, True),
    (16, 2048, 64, 64, "bfloat16", False, True),
    (16, 2048, 65, 64, "bfloat16", True, False),
    (16, 2048, 1000, 32, "float16", True, True),
    (16, 2048, 4096, 64, "bfloat16", True, True),
    (16, 2048, 4097, 128, "bfloat16", True, False),
    (16, 2048, 16384, 64, "bfloat16", True, True),
    (16, 512, 50001, 16, "float16", False, False),
    (17, 1536, 300, 64, "bfloat16", True, False),
    (33, 512, 1000, 128, "bfloat16", True, True),
    (33, 512, 20000, 64, "float16", True, False),
    (64, 1024, 129, 64, "bfloat16", False, True),
    (128, 512, 1, 16, "bfloat16", True, False),
    (128, 512, 4096, 16, "bfloat16", True, False),
    (128, 512, 16500, 64, "float16", False, True),
    (128, 7168, 1000, 64, "bfloat16", True, True),
    (16, 8192, 40, 64, "bfloat16", True, True),
]


@functools.cache
def jitted():
    """The call alone, for any layer."""

    def step(graphdef, state, x, cache, index, norm):
        y, cache = decode(nnx.merge(graphdef, state), x, cache, index, norm, implementation="ffi")
        return y, cache.pages

    return jax.jit(step, static_argnums=(0, 4, 5))


def run(layer, x, cache, index=1, norm=True):
    attention, own = layer.attention, layer.norm if norm else None
    assert one_call.takes(attention, own, x, cache, index, None)
    return jitted()(*nnx.split(layer), x, cache, index, norm)


@gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_definition(case):
    for index in (0, 2) if case[2] < 100 else (1,):
        layer, x, cache, norm = layer_of(case, index)
        got = run(layer, x, cache, index, norm)
        assert_is_the_definition(got, layer, x, cache, index, norm)
        assert_same_bits(run(layer, x, cache, index, norm), got)


@gpu
@pytest.mark.parametrize("length", [0, 1, 40, 64, 1000])
def test_without_a_new_token(length):
    """Nothing is written, and the query sees what is cached."""
    layer = Layer(16)
    x, cache = drawn(length, new=0, page_size=64)
    for norm in (True, False):
        want, added, _ = definition(layer, x, cache, 1, norm)
        y, pages = run(layer, x, cache, 1, norm)
        assert_near(y, want, added)
        assert_same_bits((pages,), (cache.pages,))


@gpu
@pytest.mark.parametrize("wrong", [-1, -7, 10, 11, 29, 30, 2**30, -(2**31), 2**31 - 1])
def test_pages_that_are_none(wrong):
    """Read as zeros, and a new token for one is dropped; other layers keep their poison."""
    layer = Layer(16)
    for place in (0, 3, 6):  # the last has the new token
        x, cache = drawn(110, page_size=16, index=1)
        assert cache.num_pages == 10
        table = cache.block_table.at[0, place].set(wrong)
        own = jnp.nan_to_num(cache.pages[10:20])  # a page may be seen by no entry now
        cache = dataclasses.replace(cache, block_table=table, pages=cache.pages.at[10:20].set(own))
        assert_is_the_definition(run(layer, x, cache), layer, x, cache, 1, True)


@gpu
def test_wild_values_touch_nothing_else():
    """Whatever ids, lengths and counts say: the token goes to its place or nowhere.

    Past the table's end that is a place in a page of the table, as for the append.
    """
    extremes = [-(2**31), -(2**30), -17, -1, 0, 3, 4, 5, 17, 2**30, 2**31 - 1]
    rng = np.random.default_rng(0)
    layer = Layer(16)
    x, cache = drawn(40)  # 6 pages of 16 tokens a layer, 5 columns
    pages = jnp.full_like(cache.pages, jnp.nan).at[6:12].set(0.0)
    written = 0
    for _ in range(200):
        table, seqlen, new = (rng.choice(extremes, n).astype(np.int32) for n in ((1, 5), 1, 1))
        if rng.random() < 0.5:
            seqlen = rng.integers(-2, 90, 1).astype(np.int32)
        wild = dataclasses.replace(
            cache,
            pages=pages,
            block_table=jnp.asarray(table),
            seqlens=jnp.asarray(seqlen),
            num_new=jnp.asarray(new),
        )
        y, got = run(layer, x, wild)
        assert np.isfinite(np.asarray(y, "f4")).all()
        if seqlen[0] <= 5 * 16 and min(seqlen[0], new[0]) > extremes[0]:  # int32 holds them less 1
            assert_rounded(got, definition(layer, x, wild, 1, True)[2])
        touched = np.nan_to_num(np.asarray(got, "f4")).any(axis=-1)[..., 0]  # [rows, slots]
        assert touched.sum() <= 1
        assert {row - 6 for row in np.flatnonzero(touched.any(axis=1))} <= set(table[0]) & {
            *range(6)
        }
        assert np.isnan(np.asarray(got, "f4")).sum() == np.isnan(np.asarray(pages, "f4")).sum()
        written += touched.any()
    assert 5 < written < 195


@gpu
@pytest.mark.parametrize("options", [{}, mla_jax.step_options(1)], ids=["", "graph"])
def test_200_steps_over_borders_of_pages(options):
    """A loop of steps that reserve, in place, against the plain form; and the same bits again."""
    steps, depth, first = 200, 2, 30
    layers = [Layer(16, 1024, seed=seed) for seed in range(depth)]
    inputs = jax.random.normal(jax.random.key(0), (steps, 1, 1, 1024), jnp.bfloat16)

    def loop(cache, implementation):
        def step(i, carry):
            cache, outputs = carry
            cache, _ = cache.reserve(jnp.ones(1, jnp.int32))
            y = inputs[i]
            for index, layer in enumerate(layers):
                y, cache = decode(layer, y, cache, index, implementation=implementation)
            return cache, outputs.at[i].set(y)

        return jax.lax.fori_loop(0, steps, step, (cache, jnp.zeros_like(inputs)))

    def start():
        cache = PagedKVCache.create(
            num_layers=depth, num_pages=20, max_seqs=1, max_pages_per_seq=16, page_size=16
        )
        cache, _ = cache.reserve(np.array([first]))
        filled = jax.random.normal(jax.random.key(1), cache.pages.shape, cache.dtype)
        return dataclasses.replace(cache, pages=filled)

    compiled = {
        name: jax.jit(
            functools.partial(loop, implementation=name),
            donate_argnums=0,
            compiler_options=options,
        )
        .lower(start())
        .compile()
        for name in ("ffi", "xla")
    }
    text = compiled["ffi"].as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="mla_jax_layer"' in line]
    assert len(calls) == depth
    assert all("output_to_operand_aliasing={{0}: (0, {})}" in line for line in calls)
    cache, outputs = compiled["ffi"](start())
    want, plain = compiled["xla"](start())
    assert int(cache.seqlens[0]) == first + steps
    assert_alike((outputs, cache), (plain, want))
    again, same = compiled["ffi"](start())
    assert_same_bits((same, again.pages), (outputs, cache.pages))


@gpu
def test_layers_side_by_side():
    """Calls of one program that XLA may run at once: each has a workspace and a pool of its own."""
    layers = [Layer(16, seed=seed) for seed in range(6)]
    drawings = [drawn(700 + 300 * seed, seed=seed) for seed in range(6)]
    once = [run(layer, *drawing) for layer, drawing in zip(layers, drawings, strict=True)]

    @functools.partial(jax.jit, compiler_options=mla_jax.step_options(1))
    def many(drawings):
        steps = [decode(layer, *drawing) for layer, drawing in zip(layers, drawings, strict=True)]
        return [(y, cache.pages) for y, cache in steps]

    for _ in range(10):
        for got, want in zip(many(drawings), once, strict=True):
            assert_same_bits(got, want)


@gpu
def test_a_scan_over_layers_with_pools_and_weights_of_their_own():
    """XLA must not make the call work on the slices: pool and result would be two."""
    layers = [Layer(4, seed=seed) for seed in range(3)]
    x, cache = drawn(40)
    first = dataclasses.replace(cache, num_layers=1)
    pools = cache.pages.reshape(LAYERS, -1, *cache.pages.shape[1:])[jnp.array([1, 1, 1])]
    graphdef = nnx.graphdef(layers[0])
    states = jax.tree.map(lambda *xs: jnp.stack(xs), *(nnx.state(layer) for layer in layers))

    def step(x, own):
        state, pool = own
        pool = dataclasses.replace(first, pages=pool)
        y, pool = decode(nnx.merge(graphdef, state), x, pool, 0)
        return y, (y, pool.pages)

    _, (outputs, written) = jax.jit(lambda x, own: jax.lax.scan(step, x, own))(x, (states, pools))
    for layer, y, pages, pool in zip(layers, outputs, written, pools, strict=True):
        own = dataclasses.replace(first, pages=pool)
        assert_is_the_definition((y, pages), layer, x, own, 0, True)
        x = y


@gpu
def test_outside_jit_the_old_pool_stays():
    x, cache = drawn(40)
    before = np.asarray(cache.pages, "f4")
    _, written = decode(Layer(), x, cache)
    np.testing.assert_array_equal(np.asarray(cache.pages, "f4"), before)
    assert np.isnan(before).sum() - np.isnan(np.asarray(written.pages, "f4")).sum() == C + R
