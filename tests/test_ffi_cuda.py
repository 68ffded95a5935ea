# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Implementation "ffi" for NVIDIA GPUs.

Without a GPU: what is lowered, refused and loaded. With one: what may change under one recorded
program. test_decode.py holds the results to the oracle.
"""

import ctypes
import functools
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Problem, assert_close, assert_same_bits, attend, problem
from shapes import IN_STEP, floats, ints, shaped

import mla_jax
from mla_jax import ffi
from mla_jax.decode import flash_mla_of_parts

REASON = ffi._library_reason("cuda")
ON_GPU = jax.default_backend() == "gpu"
REQUIRED = "ffi" in os.environ.get("MLA_JAX_REQUIRE", "").split(",")
run = functools.partial(mla_jax.flash_mla_with_kvcache, head_dim_v=512, implementation="ffi")


pytestmark = pytest.mark.skipif(REASON is not None, reason=f"ffi: {REASON}")


@pytest.fixture
def on_gpu():
    """Skips where the kernel cannot run, saying why; fails if ffi is required of a GPU there."""
    reason = ffi._device_reason() if ON_GPU else "no GPU"
    if reason is not None and ON_GPU and REQUIRED:
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(f"ffi: {reason}")


gpu = pytest.mark.usefixtures("on_gpu")


def inputs(h_q=4, h_kv=1, d_k=576, page_size=64, width=3, dtype=jnp.bfloat16):
    q = shaped(2, 1, h_q, d_k, dtype=dtype)
    return q, shaped(5, page_size, h_kv, d_k, dtype=dtype), ints(2, width), ints(2)


# --- Lowered for a GPU, on any machine ------------------------------------------------------------

ALLOWED = [jax.export.DisabledSafetyCheck.custom_call("mla_jax_decode")]


def lower(function, *arrays, platforms=("cuda",)):
    exported = jax.export.export(jax.jit(function), platforms=platforms, disabled_checks=ALLOWED)
    return exported(*arrays).mlir_module()


@pytest.mark.parametrize("name", [None, "ffi"])
def test_the_call_that_is_lowered(name):
    options = {"softmax_scale": 0.25, "causal": True, "implementation": name}
    text = lower(functools.partial(run, **options), *inputs())
    (call,) = [line for line in text.splitlines() if "custom_call" in line]
    assert "@mla_jax_decode(%arg0, %arg1, %arg2, %arg3)" in call
    assert "batch_invariant = false, causal = true, softmax_scale = 2.500000e-01 : f32" in call
    results = "(tensor<2x1x4x512xbf16>, tensor<2x4x1xf32>, tensor<{}xui8>)"
    assert results.format(ffi._workspace_bytes(2, 1, 4, 1, 3, 64, False)) in call
    assert "stablehlo.transpose" not in text  # one KV head: q is as the kernel wants it


def test_heads_of_one_kv_head_are_brought_together():
    text = lower(run, *inputs(h_q=6, h_kv=3))
    assert "tensor<2x1x3x2x576xbf16>) -> tensor<2x1x2x3x576xbf16>" in text


@pytest.mark.parametrize("b", [2, 1])  # rows enough to be worth it, and one sequence less
def test_queries_in_parts_are_not_put_together(b):
    """Where the parts come from elsewhere; XLA drops a concatenation that only slices read."""
    shapes = (shaped(b, 1, 128, 512), shaped(b, 1, 128, 64), *inputs()[1:2], ints(b, 3), ints(b))

    def step(q_latent, q_pe, *rest):
        return flash_mla_of_parts((q_latent, q_pe), *rest, 512, implementation="ffi")

    (call,) = [line for line in lower(step, *shapes).splitlines() if "custom_call" in line]
    operands = re.search(r" : \((.*)\) -> ", call)[1].split(", ")
    assert len(operands) == (5 if b == 2 else 4)
    assert operands[0] == ("tensor<128x2x512xbf16>" if b == 2 else "tensor<1x1x128x576xbf16>")


def test_one_program_for_both_platforms():
    for implementation in (None, "ffi"):
        function = functools.partial(run, implementation=implementation)
        text = lower(function, *inputs(), platforms=("cpu", "cuda"))
        assert text.count("@mla_jax_decode(") == 2


@pytest.mark.parametrize("changed", [{"dtype": jnp.float32}, {"page_size": 8}], ids=str)
def test_none_lowers_for_a_gpu_what_the_kernel_does_not_take(changed):
    arrays = inputs(**changed)
    absent = "@mla_jax_decode" if ON_GPU else "custom_call"  # there Pallas takes pages of 8
    assert absent not in lower(functools.partial(run, implementation=None), *arrays)
    # Asked for by name it is not replaced: refused at once where a GPU is the default device.
    with pytest.raises(NotImplementedError, match="platform cuda|^ffi: .*the CUDA kernel"):
        lower(run, *arrays)


@pytest.mark.parametrize(
    ("width", "pieces"),
    [(1, 1), (8, 1), (9, 2), (64, 8), (256, 16), (257, 17), (512, 32), (4096, 32)],
)
def test_workspace_of_batch_invariant_calls(width, pieces):
    """For each piece of a sequence and tile, 64 x 512 fp16, or 16 x 512 float, and statistics."""
    counters, stats = 1152, 64 * 16
    size = ffi._workspace_bytes(3, 2, 128, 2, width, 64, True)
    assert size == counters + 3 * 2 * 2 * pieces * (64 * 512 * 2 + stats)  # tiles, KV heads
    size = ffi._workspace_bytes(3, 1, 16, 1, width, 64, True)
    assert size == counters + 3 * pieces * (16 * 512 * 4 + stats)
    text = lower(functools.partial(run, batch_invariant=True), *inputs())
    assert "batch_invariant = true" in text


# --- What is refused ------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch):
    """Makes GPUs of the given compute capabilities the default devices."""

    def make(*capabilities):
        devices = [
            SimpleNamespace(compute_capability=c, device_kind=f"card {c}") for c in capabilities
        ]
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "local_devices", lambda backend: devices)

    return make


@pytest.mark.parametrize(
    ("arrays", "options", "reason"),
    [
        (inputs(dtype=jnp.float32), {}, "q: got dtype float32, the CUDA kernel takes bfloat16 and"),
        (inputs(d_k=528), {}, "q: got d_k 528, the CUDA kernel takes 576 and 512"),
        (inputs(), {"head_dim_v": 448}, "head_dim_v: got 448, the CUDA kernel takes 512"),
        (inputs(page_size=8), {}, "k_cache: got page_size 8, the CUDA kernel takes 16, 32, 64 and"),
        (inputs(page_size=256), {}, "k_cache: got page_size 256, the CUDA kernel takes"),
        (inputs(width=2**24 + 1), {}, "block_table: got 2 x 16777217 pages of 64 tokens"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_python_refuses_on_a_gpu(pretend, arrays, options, reason):
    pretend("9.0")
    options = {"head_dim_v": 512, "implementation": "ffi"} | options
    found = mla_jax.explain(*arrays, **options)
    assert found.implementation is None
    assert found.reasons["ffi"].startswith(reason)
    with pytest.raises(NotImplementedError, match=f"^ffi: {reason[:20]}"):
        jax.eval_shape(functools.partial(mla_jax.flash_mla_with_kvcache, **options), *arrays)


@pytest.mark.parametrize("capabilities", [("8.0",), ("9.0", "10.0"), ("gfx942",)])
def test_other_gpus(pretend, capabilities):
    pretend(*capabilities)
    found = mla_jax.explain(*inputs(), 512)
    assert found.implementation == "xla"
    worst = capabilities[-1]
    assert f"card {worst} has compute capability {worst}, the CUDA kernel" in found.reasons["ffi"]


def test_a_hopper_gpu(pretend):
    pretend("9.0", "9.0")
    assert mla_jax.explain(*inputs(), 512) == mla_jax.Explanation("ffi", {})


def test_library_absent(pretend, monkeypatch):
    pretend("9.0")
    ffi._library_reason.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(ffi.importlib.util, "find_spec", lambda name: None)
        reason = mla_jax.explain(*inputs(), 512).reasons["ffi"]
    ffi._library_reason.cache_clear()
    assert reason.startswith("the library mla_jax_cuda is not installed: pip found no CUDA comp")


def test_library_built_for_a_newer_ffi(pretend, monkeypatch):
    pretend("9.0")
    ffi._library_reason.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(ffi, "_runtime_version", lambda: (0, 0))
        reason = mla_jax.explain(*inputs(), 512).reasons["ffi"]
    ffi._library_reason.cache_clear()
    assert "mla_jax_cuda" in reason
    assert re.search(r"was built for XLA FFI 0\.\d, this jaxlib has 0\.0: build it", reason)


@pytest.fixture(scope="module")
def checks():
    """The handler's checks, which come before any call to CUDA, as a target on CPUs."""
    library = ctypes.CDLL(str(ffi.find_library("cuda")))
    handler = jax.ffi.pycapsule(library.mla_jax_check_cuda)
    jax.ffi.register_ffi_target("mla_jax_check_cuda", handler, platform="cpu")


def workspace(missing=0, invariant=False):
    size = ffi._workspace_bytes(2, 1, 4, 1, 3, 64, invariant)
    return shaped(size - missing, dtype=jnp.uint8)


# What differs from a right call, and what the error says; test_ffi.py has what both handlers share.
REFUSALS = [
    ({"q": floats(2, 1, 4, 576), "k_cache": floats(5, 64, 1, 576), "out": floats(2, 1, 4, 512)},
     r"q: got float32\[2, 1, 4, 576\], expected bfloat16 or float16 on a GPU"),
    ({"q": shaped(2, 1, 4, 640), "k_cache": shaped(5, 64, 1, 640)}, "q: got d_k 640, expected 576"),
    ({"out": shaped(2, 1, 4, 256)}, "out: got head_dim_v 256, expected 512 on a GPU"),
    ({"k_cache": shaped(5, 8, 1, 576)}, "k_cache: got page_size 8, expected 16, 32, 64 or 128"),
    ({"k_cache": shaped(5, 48, 1, 576)}, "k_cache: got page_size 48, expected 16, 32, 64 or 128"),
    ({"k_cache": shaped(5, 256, 1, 576)}, "k_cache: got page_size 256, expected 16, 32, 64 or"),
    ({"block_table": ints(1, 2**24 + 1), "q": shaped(1, 1, 4, 576), "cache_seqlens": ints(1),
      "out": shaped(1, 1, 4, 512), "lse": floats(1, 4, 1)},
     r"block_table: got int32\[1, 16777217\], expected pages of at most 2\^30 tokens a sequence"),
    ({"workspace": lambda: workspace(1)}, r"workspace: got \d+ bytes, expected at least \d+"),
    ({"workspace": lambda: workspace(1, True), "batch_invariant": True},
     r"workspace: got \d+ bytes, expected at least \d+"),
    ({"lse": floats(2, 4, 2)}, r"lse: got float32\[2, 4, 2\], expected float32\[b, h_q, s_q\]"),
    ({"softmax_scale": np.float32(-1)}, "softmax_scale: got -1.0+, expected a positive finite"),
    ({"q_pe": shaped(2, 4, 64)}, r"q: got bfloat16\[2, 1, 4, 576\], expected \[h_q, b, 512\] besi"),
    ({"q": shaped(4, 2, 512), "q_pe": shaped(4, 2, 64)},
     r"q_pe: got bfloat16\[4, 2, 64\], expected \[b, h_q, 64\] of q's dtype"),
    ({"q": shaped(4, 2, 512), "q_pe": floats(2, 4, 64)}, r"q_pe: got float32\[2, 4, 64\], expect"),
    ({"q": shaped(4, 2, 512), "q_pe": shaped(2, 4, 64), "k_cache": shaped(5, 64, 2, 576)},
     r"k_cache: got bfloat16\[5, 64, 2, 576\], expected 4 axes, one head beside q_pe"),
    ({"q": shaped(4, 3, 512), "q_pe": shaped(3, 4, 64)}, r"block_table: got int32\[2, 3\], expec"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
@pytest.mark.skipif(ON_GPU, reason="a target of CPUs")
def test_handler_refuses(checks, change, message):
    right = dict(zip(("q", "k_cache", "block_table", "cache_seqlens"), inputs(), strict=True))
    right |= {"out": shaped(2, 1, 4, 512), "lse": floats(2, 4, 1), "workspace": workspace}
    right |= {"softmax_scale": np.float32(0.1), "causal": False, "batch_invariant": False}

    def call(**call):
        call["workspace"] = call["workspace"]()
        results = tuple(call.pop(name) for name in ("out", "lse", "workspace"))
        names = ("softmax_scale", "causal", "batch_invariant")
        attributes = {name: call.pop(name) for name in names}
        arrays = [jnp.zeros(x.shape, x.dtype) for x in call.values()]
        jax.block_until_ready(
            jax.ffi.ffi_call("mla_jax_check_cuda", results)(*arrays, **attributes)
        )

    call(**right)
    call(**(right | {"q": shaped(4, 2, 512), "q_pe": shaped(2, 4, 64)}))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"mla_jax_decode: {message}"):
        call(**(right | change))


def test_only_our_symbols_are_visible():
    path = ffi.find_library("cuda")
    names = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True)
    if names.returncode:
        pytest.skip("nm is not installed")
    symbols = {line.split()[-1] for line in names.stdout.splitlines()}
    assert symbols == {
        "mla_jax_append_cuda",
        "mla_jax_check_append_cuda",
        "mla_jax_check_cuda",
        "mla_jax_check_layer_cuda",
        "mla_jax_cuda_layer_workspace_bytes",
        "mla_jax_cuda_workspace_bytes",
        "mla_jax_decode_cuda",
        "mla_jax_ffi_major",
        "mla_jax_ffi_minor",
        "mla_jax_layer_cuda",
    }
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout
    assert "libcuda" not in needed  # neither the driver's library nor a shared runtime


# --- On a GPU: lengths and tables change under one recorded program -------------------------------


@gpu
@pytest.mark.parametrize(("s_q", "h_q"), [(1, 16), (2, 128)])
def test_replays_of_one_loop(s_q, h_q):
    """200 executions of one jitted loop; lengths cross borders of pages and go to and from 0."""
    p = problem([700, 130, 64, 400], s_q=s_q, h_q=h_q, page_size=32, poison=0)
    q, k_cache, *_ = p.arrays()

    @jax.jit
    def loop(table, lengths):
        step = lambda carry, n: (carry, run(q, k_cache, table, n, causal=True))  # noqa: E731
        return jax.lax.scan(step, None, lengths)[1]

    rng = np.random.default_rng(0)
    base = np.array([637, 126, 61, 397], np.int32) + np.arange(6, dtype=np.int32)[:, None]
    lengths = np.where(rng.random((200, 6, 4)) < 0.3, 0, base).astype(np.int32)
    tables = np.repeat(p.block_table[None], 200, axis=0)
    tables[:, :, :2] = rng.integers(0, len(p.k_cache), (200, 4, 2))
    # One step of each execution. All are under way before the first is read. The oracle is slow: it
    # sees every tenth, and all have the bits of a call outside of the loop.
    take = jax.jit(lambda results, t: jax.tree.map(lambda x: x[t], results))
    results = [take(loop(tables[i], lengths[i]), i % 6) for i in range(200)]
    for i, result in enumerate(results):
        call = Problem(p.q, p.k_cache, tables[i], lengths[i, i % 6])
        assert_same_bits(result, run(q, k_cache, tables[i], lengths[i, i % 6], causal=True))
        if i % 10 == 0:
            assert_close(result, attend(call, causal=True))


@gpu
@pytest.mark.parametrize("name", ["ffi", "pallas"])
@pytest.mark.parametrize(
    "flags",
    [
        "--xla_gpu_enable_command_buffer=",
        "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1",
        "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL,WHILE,CONDITIONAL"
        " --xla_gpu_graph_min_graph_size=1",
    ],
    ids=["off", "calls", "loops"],
)
def test_command_buffers(flags, name):
    """The loops of this file where XLA records single calls, whole loops, or nothing."""
    reason = mla_jax.explain(*inputs(), 512, implementation=name).reasons.get(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    environment = dict(os.environ, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {flags}")
    done = subprocess.run(
        [sys.executable, __file__, name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@gpu
def test_while_loop_of_10_000_steps():
    """Each step attends one token more of 20 pages; all outputs count in the sum."""
    p = problem([1280, 640], h_q=16, poison=0)
    q, k_cache, table, _ = p.arrays()

    @jax.jit
    def loop(steps):
        def step(state):
            i, total, _ = state
            lengths = jnp.stack([i % 1281, (7 * i) % 641]).astype(jnp.int32)
            out, lse = run(q, k_cache, table, lengths)
            return i + 1, total + out.astype(jnp.float32), lse

        start = (jnp.int32(0), jnp.zeros((*q.shape[:3], 512)), jnp.zeros((2, 16, 1)))
        return jax.lax.while_loop(lambda state: state[0] < steps, step, start)

    _, total, lse = loop(10_000)
    last = Problem(p.q, p.k_cache, p.block_table, np.array([9999 % 1281, 7 * 9999 % 641], np.int32))
    np.testing.assert_allclose(lse, attend(last)[1], 8.01 / 65536, 2e-5)
    again = loop(10_000)
    assert_same_bits((total, lse), again[1:])
    # In float32 the same sum, by the implementation that is the definition.
    some = sum(
        np.asarray(
            run(q, k_cache, table, jnp.array([i % 1281, (7 * i) % 641], jnp.int32))[0], np.float32
        )
        for i in range(50)
    )
    np.testing.assert_allclose(loop(50)[1], some, 1e-5, 1e-4)


@gpu
def test_second_execution_has_other_buffers():
    """A recorded program must not keep the addresses of its first execution."""
    compiled = None
    for seed in range(4):
        p = problem([300, 1000], seed=seed, h_q=16, width=20, num_pages=30)
        arrays = p.arrays()
        compiled = compiled or jax.jit(run).lower(*arrays).compile()
        keep = [jnp.ones(seed * 1000 + 1) for _ in range(3)]
        assert_close(compiled(*arrays), attend(p))
        del keep


@gpu
@pytest.mark.parametrize(("s_q", "h_q", "lengths"), [(1, 16, [3000, 5, 0]), (2, 128, [1000] * 9)])
def test_same_bits_100_times(s_q, h_q, lengths):
    arrays = problem(lengths, s_q=s_q, h_q=h_q).arrays()
    first = run(*arrays)
    for _ in range(100):
        assert_same_bits(run(*arrays), first)


@gpu
@pytest.mark.parametrize("width", [None, 4000])
@pytest.mark.parametrize(("s_q", "h_q"), [(1, 128), (1, 40), (2, 64), (3, 128)])
@pytest.mark.parametrize("lengths", [[1000], [900, 0, 1500], [300] * 8, [5000], [20_000]], ids=str)
def test_tables_with_room_for_few_blocks_and_for_many(lengths, s_q, h_q, width):
    """Tiles of 16 rows where there is little room, else of the height that the lengths ask for."""
    p = problem(lengths, s_q=s_q, h_q=h_q, width=width)
    assert_close(run(*p.arrays(), causal=True), attend(p, causal=True))


@gpu
@pytest.mark.parametrize(("s_q", "h_q"), [(1, 16), (1, 128), (2, 128), (3, 40)])
def test_batch_invariant(s_q, h_q):
    """A row's bits alone, in batches of 2 to 128, in other slots, among other neighbours."""
    lengths = [9000, 40_000, 5000, 700, 512, 513, 64, 0]
    width, num_pages = 640, 1000
    p = problem(lengths, s_q=s_q, h_q=h_q, width=width, num_pages=num_pages)
    call = functools.partial(run, causal=True, batch_invariant=True)
    whole = call(*p.arrays())
    assert_close(whole, attend(p, causal=True))
    rng = np.random.default_rng(0)
    for b in (1, 2, 5, 16, 128):
        slots = rng.integers(0, len(lengths), b)
        slots[rng.integers(b)] = rng.integers(2)  # a long one always
        assert_same_bits(call(*p.rows(slots).arrays()), [np.asarray(x)[slots] for x in whole])
    # A table with less room: the first sequence has no place beyond.
    short = p.rows(np.array([0, 3]))
    short = Problem(short.q, short.k_cache, short.block_table[:, :142], short.cache_seqlens)
    assert_same_bits(call(*short.arrays()), [np.asarray(x)[[0, 3]] for x in whole])
    # Pages of 16 tokens instead of 64, in another order: the same tokens, so the same bits.
    small = p.k_cache.reshape(num_pages * 4, 16, 1, -1)
    moved = rng.permutation(len(small)).astype(np.int32)
    table = 4 * np.minimum(p.block_table, num_pages - 1)[:, :, None] + np.arange(4, dtype=np.int32)
    pages = np.empty_like(small)
    pages[moved] = small
    table = moved[table].reshape(len(lengths), -1)
    assert_same_bits(call(p.q, pages, table, p.cache_seqlens), whole)


@gpu
def test_independent_calls_of_one_program():
    """XLA may run them side by side; each has a workspace and counters of its own."""
    p = problem([2000, 70], h_q=16, width=40, num_pages=40)
    q, *rest = p.arrays()
    queries = [q * (0.5 + i / 8) for i in range(8)]
    many = jax.jit(lambda queries: [run(q, *rest) for q in queries])
    once = [run(q, *rest) for q in queries]
    for _ in range(20):
        for got, expected in zip(many(queries), once, strict=True):
            assert_same_bits(got, expected)


@gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_queries_in_parts_give_the_same_bits(dtype):
    """As two arrays of their own, as products, and where XLA must cut them out of one."""
    p = problem([300, 0, 64, 1000] * 16, h_q=128, dtype=dtype)
    q, *rest = p.arrays()
    latent, rotated = q[..., :512], q[..., 512:]
    run_parts = functools.partial(flash_mla_of_parts, head_dim_v=512, implementation="ffi")
    whole = run(q, *rest)
    assert_close([x[:4] for x in whole], attend(p.rows(slice(0, 4))))
    apart = jax.jit(lambda *parts: run_parts(parts, *rest))
    assert "concatenate" not in apart.lower(latent, rotated).compile().as_text()
    assert_same_bits(apart(latent, rotated), whole)
    one = jnp.broadcast_to(jnp.eye(512, dtype=dtype), (128, 512, 512))
    made = jax.jit(lambda x, y: run_parts((jnp.einsum("bthn,hnc->bthc", x, one), y), *rest))
    assert_same_bits(made(latent, rotated), whole)


@gpu
@pytest.mark.parametrize("page_size", [16, 64])
def test_tiles_that_keep_in_step(page_size):
    """66 tiles go through the same blocks: each waits for all."""
    lengths, s_q, h_q = IN_STEP[0]
    p = problem(lengths, s_q=s_q, h_q=h_q, page_size=page_size)
    got = run(*p.arrays())
    some = slice(None, None, 8)
    assert_close((got[0][:, some], got[1][:, :, some]), attend(replace(p, q=p.q[:, some])))
    for _ in range(5):
        assert_same_bits(run(*p.arrays()), got)


@gpu
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("h_q", [16, 128])
def test_garbage_in_every_table_entry_and_length(page_size, h_q):
    int32 = np.iinfo(np.int32)
    p = problem([200], s_q=2, h_q=h_q, page_size=page_size, poison=0)
    rng = np.random.default_rng(h_q + page_size)
    q, k_cache, *_ = p.arrays()
    q = jnp.broadcast_to(q, (7, *q.shape[1:]))
    for _ in range(20):
        table = rng.integers(int32.min, int32.max, (7, 33), np.int32, endpoint=True)
        lengths = rng.integers(int32.min, int32.max, 7, np.int32, endpoint=True)
        out, _ = run(q, k_cache, jnp.asarray(table), jnp.asarray(lengths), causal=True)
        assert not out.any()  # pages of zeros, but for an id in 2^32 / num_pages


@gpu
def test_two_devices():
    """Both GPUs in one process, by one function; nothing belongs to the first."""
    devices = jax.local_devices()
    if len(devices) < 2:
        pytest.skip("one GPU")
    p = problem([3000, 100], h_q=16)
    placed = [jax.device_put(p.arrays(), device) for device in devices[:2]]
    for _ in range(10):
        results = [run(*arrays) for arrays in placed]
        for device, result in zip(devices, results, strict=False):
            assert result[0].devices() == {device}
            assert_close(result, attend(p))


if __name__ == "__main__":  # of test_command_buffers
    run = functools.partial(run, implementation=sys.argv[1])
    test_replays_of_one_loop(1, 16)
    test_replays_of_one_loop(2, 128)
    test_while_loop_of_10_000_steps()
    test_second_execution_has_other_buffers()
    test_independent_calls_of_one_program()
