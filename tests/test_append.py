# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What finishes new latents and writes them: against float64, in place, and what it refuses.

On a GPU the widths are those that its kernel takes.
"""

import ctypes
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hlo import IN_PLACE, pool_sized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import collectives, mesh, on_gpu, put
from reference import assert_rounded
from shapes import floats, ints, shaped

from mla_jax import PagedKVCache, ffi

C, R = (512, 64) if on_gpu() else (24, 8)
PLATFORM = "cuda" if on_gpu() else "cpu"
DTYPES = ["bfloat16", "float16"] if on_gpu() else ["bfloat16", "float16", "float32"]
EPSILON, LAYERS, PAGES, SIZE, WIDTH = 1e-6, 3, 12, 16, 3

REASON = ffi._library_reason(PLATFORM) or (on_gpu() and ffi._device_reason()) or None
needs_kernel = pytest.mark.skipif(REASON is not None, reason=f"ffi: {REASON}")


def drawn(dtype="bfloat16", t=5, scale_dtype="float32"):
    """A cache poisoned but for what it must keep, and operands poisoned where none may read."""
    rng = np.random.default_rng(t)
    # Crosses a page's border; nothing; one token at the start; more than t; the last of a page.
    seqlens, num_new = np.array([18, 20, 1, 40, 32]), np.array([min(4, t), 0, 1, t, min(2, t)])
    table = rng.permutation(PAGES)[: 4 * WIDTH].reshape(4, WIDTH).astype(np.int32)
    table = np.concatenate([table, [[-1, -1, -1]]]).astype(np.int32)  # without pages: dropped
    latents = rng.standard_normal((5, t, C + R)).astype(dtype)
    latents[np.arange(t) < t - num_new[:, None]] = np.nan
    cache = PagedKVCache.create(
        num_layers=LAYERS, num_pages=PAGES, max_seqs=5, max_pages_per_seq=WIDTH, page_size=SIZE,
        d_k=C + R, dtype=dtype,
    )  # fmt: skip
    cache = dataclasses.replace(
        cache,
        pages=jnp.full_like(cache.pages, jnp.nan),
        block_table=jnp.asarray(table),
        seqlens=jnp.asarray(seqlens, jnp.int32),
        num_new=jnp.asarray(num_new, jnp.int32),
    )
    angle = rng.uniform(-3, 3, (5, t, R // 2))
    scale = rng.standard_normal(C).astype(scale_dtype)
    return cache, (latents, scale, np.cos(angle).astype("f4"), np.sin(angle).astype("f4"))


def expected(cache, layer, operands, interleaved):
    """The pages in float64."""
    tokens = (cache.block_table, cache.seqlens, cache.num_new)
    options = {"interleaved": interleaved, "epsilon": EPSILON}
    return reference.append(cache.pages, operands, *tokens, layer, PAGES, **options)


def append(cache, layer, operands, **options):
    return cache.append_projected(layer, *operands, epsilon=EPSILON, **options).pages


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["xla", pytest.param("ffi", marks=needs_kernel)])
def test_is_the_definition(name, dtype, interleaved):
    for t, scale_dtype, layer in ((1, dtype, 0), (5, "float32", 2)):
        cache, operands = drawn(dtype, t, scale_dtype)
        got = append(cache, layer, operands, interleaved=interleaved, implementation=name)
        assert got.dtype == dtype
        assert_rounded(got, expected(cache, layer, operands, interleaved))


@pytest.mark.parametrize("name", ["xla", pytest.param("ffi", marks=needs_kernel)])
def test_wild_values_write_nothing_elsewhere(name):
    """Whatever layers, ids, lengths and counts say: a token goes to its place or nowhere."""
    extremes = [-(2**31), -(2**30), -17, -1, 0, 3, PAGES - 1, PAGES, 2**30, 2**31 - 1]
    rng = np.random.default_rng(0)
    cache, operands = drawn(t=5)
    operands = (jnp.ones_like(operands[0]), *operands[1:])
    run = jax.jit(functools.partial(append, implementation=name))
    written = 0
    for _ in range(200):
        table, seqlens, num_new, layer = (
            rng.choice(extremes, shape).astype(np.int32) for shape in ((5, WIDTH), 5, 5, ())
        )
        wild = dataclasses.replace(cache, block_table=table, seqlens=seqlens, num_new=num_new)
        touched = ~np.isnan(np.asarray(run(wild, layer, operands), np.float32))
        assert touched.all(axis=(2, 3)).sum() == touched.any(axis=(2, 3)).sum()
        rows = set(np.flatnonzero(touched.any(axis=(1, 2, 3))))
        ids = table[(table >= 0) & (table < PAGES)]
        assert rows <= (
            {int(layer) * PAGES + int(i) for i in ids} if 0 <= layer < LAYERS else set()
        )
        written += len(rows)
    assert written  # some were right


@needs_kernel
def test_both_forms_drop_the_same():
    """As above, for places: positions past the table's end go to its last page in both."""
    cache, operands = drawn("float16", t=5)
    cache = dataclasses.replace(cache, seqlens=cache.seqlens + 30)
    got, want = (append(cache, 1, operands, implementation=name) for name in ("ffi", "xla"))
    assert_rounded(got, np.asarray(want, np.float64))


def steps(cache, operands, implementation="ffi"):
    """A loop of steps over all layers."""

    def step(_, cache):
        for layer in range(LAYERS):
            cache = cache.append_projected(
                layer, *operands, epsilon=EPSILON, implementation=implementation
            )
        return dataclasses.replace(cache, seqlens=cache.seqlens + 1)

    return jax.lax.fori_loop(0, 3, step, cache)


@needs_kernel
def test_the_pool_is_written_in_place():
    cache, operands = drawn()
    size, pointer = cache.pages.size, cache.pages.unsafe_buffer_pointer()
    compiled = jax.jit(steps, donate_argnums=0).lower(cache, operands).compile()
    text = compiled.as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="mla_jax_append"' in line]
    assert len(calls) == LAYERS
    assert all("output_to_operand_aliasing={{}: (0, {})}" in line for line in calls)
    assert pool_sized(text, size) <= IN_PLACE | {"custom-call"}
    assert compiled.memory_analysis().temp_size_in_bytes < cache.pages.nbytes
    want = np.asarray(steps(cache, operands, "xla").pages, np.float64)
    got = compiled(cache, operands)
    assert cache.pages.is_deleted()
    assert got.pages.unsafe_buffer_pointer() == pointer
    assert_rounded(got.pages, want)


@needs_kernel
def test_a_scan_over_layers_with_pools_and_weights_of_their_own():
    """XLA must not make the call work on the slices: pool and result would be two."""
    cache, (latents, scale, *angles) = drawn()
    pools = cache.pages.reshape(LAYERS, PAGES, *cache.pages.shape[1:])
    scales = jnp.stack([scale, 2 * scale, -scale])
    first = dataclasses.replace(cache, num_layers=1)

    def layer(_, x):
        pool, scale = x
        own = dataclasses.replace(first, pages=pool)
        return None, append(own, 0, (latents, scale, *angles), implementation="ffi")

    written = jax.jit(lambda *xs: jax.lax.scan(layer, None, xs)[1])(pools, scales)
    for got, pool, scale in zip(written, pools, scales, strict=True):
        own = dataclasses.replace(first, pages=pool)
        assert_rounded(got, expected(own, 0, (latents, scale, *angles), True))


@needs_kernel
def test_outside_jit_the_old_pool_stays():
    cache, operands = drawn()
    append(cache, 0, operands, implementation="ffi")
    assert np.isnan(np.asarray(cache.pages, np.float32)).all()


def test_which_form_is_lowered():
    cache, operands = drawn()
    there = REASON is None

    def calls(implementation, operands=operands):
        run = jax.jit(functools.partial(append, implementation=implementation))
        return run.lower(cache, 0, operands).as_text().count("@mla_jax_append")

    assert [calls(name) for name in (None, "ffi", ("pallas", "ffi"))] == 3 * [int(there)]
    assert [calls(name) for name in ("xla", "pallas")] == [0, 0]
    # What the kernels do not take: latents of another type, of which rounding is plain XLA's.
    assert calls("ffi", (operands[0].astype("f4"), *operands[1:])) == 0
    with pytest.raises(ValueError, match="implementation: got 'cuda', expected"):
        calls("cuda")


# --- Under transformations ------------------------------------------------------------------------


@needs_kernel
def test_vmap():
    cache, operands = drawn(dtype="bfloat16")
    pools = jnp.stack([cache.pages, cache.pages + 1])
    latents = jnp.stack([operands[0], 2 * operands[0]])

    def run(pages, latents):
        return append(
            dataclasses.replace(cache, pages=pages), 1, (latents, *operands[1:]),
            implementation="ffi",
        )  # fmt: skip

    got = jax.jit(jax.vmap(run))(pools, latents)
    for i in range(2):
        want = expected(cache, 1, (np.asarray(latents[i]), *operands[1:]), True)
        assert_rounded(got[i], want)


@needs_kernel
def test_gradients_are_those_of_the_plain_form():
    cache, operands = drawn(DTYPES[-1])
    cache = dataclasses.replace(cache, pages=jnp.zeros_like(cache.pages))
    operands = (np.nan_to_num(operands[0]), *operands[1:])
    weight = jax.random.normal(jax.random.key(0), cache.pages.shape)

    def loss(pages, operands, name):
        pages = append(
            dataclasses.replace(cache, pages=pages), 1, operands, implementation=name
        )  # fmt: skip
        return jnp.sum(pages.astype(jnp.float32) * weight)

    got, want = (
        jax.tree.leaves(jax.grad(loss, (0, 1))(cache.pages, operands, name))
        for name in ("ffi", "xla")
    )
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(x, "f4"), np.asarray(y, "f4"), rtol=1e-5, atol=1e-5)
    assert all(np.asarray(x, "f4").any() for x in got)


CUTS = {
    "pages": ("x", None),
    "slots": (None, "x"),
    "both": ("y", "x"),
    "whole": (None, None),
}


@needs_kernel
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("cut", CUTS)
def test_a_pool_that_is_cut(cut, kind):
    """Each device writes what lies in its part; nothing is exchanged."""
    m = mesh(kind, x=2, y=2) if jax.device_count() >= 4 else mesh(kind, x=2, y=1)
    cache, operands = drawn()
    want = expected(cache, 2, operands, True)
    cache = jax.tree.map(lambda x: put(x, m), cache)
    cache = dataclasses.replace(cache, pages=put(cache.pages, m, *CUTS[cut]))
    operands = tuple(put(x, m) for x in operands)
    run = jax.jit(
        lambda cache, operands: dataclasses.replace(
            cache, pages=append(cache, 2, operands, implementation="ffi")
        ),
        donate_argnums=0,
    )
    compiled = run.lower(cache, operands).compile()
    text = compiled.as_text()
    assert "mla_jax_append" in text
    assert not collectives(text)
    got = compiled(cache, operands).pages
    assert got.sharding.is_equivalent_to(cache.pages.sharding, 4)
    assert_rounded(got, want)


@needs_kernel
@pytest.mark.parametrize("names", [("x",), ("x", "context")], ids=str)
def test_inside_shard_map(names):
    """Sequences over one axis, with a pool each; where another stays automatic, names decide."""
    m = mesh(x=2, context=2) if jax.device_count() >= 4 else mesh(x=2, context=1)
    cache, operands = drawn()
    want = expected(cache, 1, operands, True)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (cache.pages, operands))

    def run(pages, operands):
        pages, operands = jax.tree.map(lambda x: x[0], (pages, operands))
        one = dataclasses.replace(cache, pages=pages)
        return append(one, 1, operands, implementation="ffi")[None]

    mapped = jax.shard_map(run, mesh=m, in_specs=P("x"), out_specs=P("x"), axis_names=set(names))
    for got in jax.jit(mapped)(*stacked):
        assert_rounded(got, want)


@needs_kernel
def test_export():
    cache, operands = drawn()
    run = jax.jit(
        lambda pages, operands: append(dataclasses.replace(cache, pages=pages), 1, operands)
    )
    allowed = [jax.export.DisabledSafetyCheck.custom_call("mla_jax_append")]
    exported = jax.export.export(run, platforms=("cpu", "cuda"), disabled_checks=allowed)
    program = exported(cache.pages, operands)
    module = program.mlir_module()
    # Around each call: see mla_jax/ffi.py.
    calls = module.count("custom_call @mla_jax_append")
    assert module.count("stablehlo.optimization_barrier") == 2 * calls > 0
    assert_rounded(program.call(cache.pages, operands), expected(cache, 1, operands, True))


# --- What the handlers refuse ---------------------------------------------------------------------


RIGHT = {
    "pages": shaped(6, 16, 1, 576),
    "latents": shaped(2, 3, 576),
    "scale": floats(512),
    "cos": floats(2, 3, 32),
    "sin": floats(2, 3, 32),
    "block_table": ints(2, 4),
    "seqlens": ints(2),
    "num_new": ints(2),
    "place": ints(3),
    "num_layers": np.int32(2),
    "num_pages": np.int32(3),
    "page_size": np.int32(16),
    "epsilon": np.float32(1e-6),
    "interleaved": True,
}
OPERANDS = tuple(RIGHT)[:9]

# What differs from a right call, and what the error says.
REFUSALS = [
    (
        {"pages": ints(6, 16, 1, 576)},
        r"pages: got int32\[6, 16, 1, 576\], expected bfloat16, float",
    ),
    (
        {"pages": shaped(6, 16, 576)},
        r"pages: got bfloat16\[6, 16, 576\], expected 4 axes \[num_row",
    ),
    ({"pages": shaped(6, 16, 2, 576)}, r"pages: got bfloat16\[6, 16, 2, 576\], expected 4 axes"),
    (
        {"latents": floats(2, 3, 576)},
        r"latents: got float32\[2, 3, 576\], expected bfloat16\[b, t, ",
    ),
    (
        {"latents": shaped(2, 3, 575)},
        r"latents: got bfloat16\[2, 3, 575\], expected .*c \+ r=576\]",
    ),
    ({"latents": shaped(6, 576)}, r"latents: got bfloat16\[6, 576\], expected bfloat16\[b, t, c"),
    (
        {"scale": shaped(512, dtype=jnp.float16)},
        r"scale: got float16\[512\], expected bfloat16\[c\]",
    ),
    ({"scale": floats(512, 1)}, r"scale: got float32\[512, 1\], expected bfloat16\[c\] or float32"),
    ({"scale": floats(0)}, r"scale: got float32\[0\], expected at least 1 channel"),
    (
        {"scale": floats(511)},
        r"scale: got float32\[511\], expected .* an even number of the 576 le",
    ),
    (
        {"scale": floats(578)},
        r"scale: got float32\[578\], expected .* an even number of the 576 le",
    ),
    (
        {"cos": floats(2, 3, 31)},
        r"cos: got float32\[2, 3, 31\], expected float32\[b, t, r / 2=32\]",
    ),
    ({"cos": shaped(2, 3, 32)}, r"cos: got bfloat16\[2, 3, 32\], expected float32\[b, t, r / 2=32"),
    (
        {"sin": floats(3, 2, 32)},
        r"sin: got float32\[3, 2, 32\], expected float32\[b, t, r / 2=32\]",
    ),
    ({"block_table": ints(3, 4)}, r"block_table: got int32\[3, 4\], expected int32\[b=2, max_page"),
    ({"block_table": floats(2, 4)}, r"block_table: got float32\[2, 4\], expected int32\[b=2, max_"),
    ({"block_table": ints(2, 0)}, "block_table: got max_pages_per_seq 0, expected at least 1"),
    ({"seqlens": ints(3)}, r"seqlens: got int32\[3\], expected int32\[b=2\]"),
    ({"num_new": floats(2)}, r"num_new: got float32\[2\], expected int32\[b=2\]"),
    ({"place": ints(2)}, r"place: got int32\[2\], expected int32\[3\]"),
    ({"num_layers": np.int32(0)}, "num_layers: got 0, expected at least 1"),
    ({"num_pages": np.int32(-1)}, "num_pages: got -1, expected at least 1"),
    ({"page_size": np.int32(0)}, "page_size: got 0, expected at least 1"),
    ({"epsilon": np.float32(-1)}, "epsilon: got -1.0+, expected a finite number of at least 0"),
    ({"epsilon": np.float32("nan")}, "epsilon: got nan, expected a finite number"),
    ({"interleaved": np.float32(2)}, "Wrong scalar data type: expected PRED but got F32"),
    (
        {"aliases": None},
        r"result: got bfloat16\[6, 16, 1, 576\] of its own, expected the memory of ",
    ),
]
CUDA_REFUSALS = [
    ({"pages": floats(6, 16, 1, 576), "latents": floats(2, 3, 576)},
     r"pages: got float32\[6, 16, 1, 576\], expected bfloat16 or float16 on a GPU"),
    ({"scale": floats(448), "cos": floats(2, 3, 64), "sin": floats(2, 3, 64)},
     r"scale: got float32\[448\], expected 512 channels, and 64 to rotate, on a GPU"),
    REFUSALS[-1],
]  # fmt: skip


def call(target, change):
    wrong = RIGHT | {"aliases": {0: 0}} | change
    operands = [jnp.zeros(wrong[name].shape, wrong[name].dtype) for name in OPERANDS]
    attributes = {name: wrong[name] for name in tuple(RIGHT)[9:]}
    made = jax.ffi.ffi_call(target, wrong["pages"], input_output_aliases=wrong["aliases"])
    return jax.block_until_ready(made(*operands, **attributes))


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
@needs_kernel
def test_handler_refuses(change, message):
    """The custom call itself, as another program might write it."""
    assert not call("mla_jax_append", {}).any()  # the right call: tokens of no sequence
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call("mla_jax_append", change)


@pytest.mark.parametrize(("change", "message"), CUDA_REFUSALS, ids=[m for _, m in CUDA_REFUSALS])
@pytest.mark.skipif(
    on_gpu() or ffi._library_reason("cuda") is not None, reason="a target of CPUs, or no library"
)
def test_handler_for_gpus_refuses(change, message):
    """Its checks, which come before any call to CUDA, as a target on CPUs."""
    library = ctypes.CDLL(str(ffi.find_library("cuda")))
    handler = jax.ffi.pycapsule(library.mla_jax_check_append_cuda)
    jax.ffi.register_ffi_target("mla_jax_check_append_cuda", handler, platform="cpu")
    assert not call("mla_jax_check_append_cuda", {}).any()
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"mla_jax_append: {message}"):
        call("mla_jax_check_append_cuda", change)
