# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Implementation "ffi" on a CPU: the handler's checks, its instruction sets, threads and library.

test_decode.py holds it to the oracle with the other implementations.
"""

import functools
import importlib.util
import itertools
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, assert_same_bits, attend, problem
from shapes import floats, ints, shaped

import mla_jax
from mla_jax import ffi

REASON = ffi._library_reason("cpu")
pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu" or REASON is not None, reason=f"ffi: {REASON or 'not on a CPU'}"
)
run = functools.partial(mla_jax.flash_mla_with_kvcache, head_dim_v=512, implementation="ffi")


def test_the_library_is_there_where_tests_run():
    """A build that silently left it out would skip this whole file."""
    assert REASON is None
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in problem([3]).arrays()]
    assert mla_jax.explain(*shapes, 512) == mla_jax.Explanation("ffi", {})


# --- What the handler refuses ---------------------------------------------------------------------


RIGHT = {
    "q": shaped(2, 1, 4, 576),
    "k_cache": shaped(5, 64, 1, 576),
    "block_table": ints(2, 3),
    "cache_seqlens": ints(2),
    "out": shaped(2, 1, 4, 512),
    "lse": floats(2, 4, 1),
    "softmax_scale": np.float32(0.1),
    "causal": False,
}
OPERANDS = ("q", "k_cache", "block_table", "cache_seqlens")

# What differs from a right call, and what the error says.
REFUSALS = [
    (
        {"q": shaped(2, 1, 4, 576, dtype=jnp.int8)},
        r"q: got another dtype\[2, 1, 4, 576\], expected",
    ),
    ({"q": ints(2, 1, 4, 576)}, r"q: got int32\[2, 1, 4, 576\], expected bfloat16, float16 or"),
    ({"q": shaped(2, 4, 576)}, r"q: got bfloat16\[2, 4, 576\], expected 4 axes \[b, s_q, h_q, d_k"),
    ({"q": shaped(2, 0, 4, 576)}, "q: got s_q 0, expected at least 1"),
    ({"q": shaped(2, 1, 0, 576)}, "q: got h_q 0, expected at least 1"),
    ({"q": shaped(2, 1, 4, 0)}, "q: got d_k 0, expected at least 1"),
    ({"q": floats(2, 1, 4, 576)}, r"k_cache: got bfloat16\[5, 64, 1, 576\], expected q's dtype fl"),
    ({"k_cache": shaped(5, 64, 576)}, r"k_cache: got bfloat16\[5, 64, 576\], expected 4 axes"),
    ({"k_cache": shaped(0, 64, 1, 576)}, "k_cache: got num_pages 0, expected at least 1"),
    ({"k_cache": shaped(5, 0, 1, 576)}, "k_cache: got page_size 0, expected at least 1"),
    ({"k_cache": shaped(5, 64, 0, 576)}, "k_cache: got h_kv 0, expected at least 1"),
    ({"k_cache": shaped(5, 64, 1, 512)}, "k_cache: got d_k 512, expected q's d_k 576"),
    (
        {"k_cache": shaped(5, 64, 3, 576)},
        "q: got 4 heads, expected a multiple of k_cache's 3 heads",
    ),
    ({"block_table": ints(6)}, r"block_table: got int32\[6\], expected int32\[b, max_pages_per_se"),
    ({"block_table": floats(2, 3)}, r"block_table: got float32\[2, 3\], expected int32\[b, max"),
    ({"block_table": ints(3, 3)}, r"block_table: got int32\[3, 3\], expected int32\[b=2, max_page"),
    ({"block_table": ints(2, 0)}, "block_table: got max_pages_per_seq 0, expected at least 1"),
    ({"cache_seqlens": ints(3)}, r"cache_seqlens: got int32\[3\], expected int32\[b=2\]"),
    ({"cache_seqlens": ints(2, 1)}, r"cache_seqlens: got int32\[2, 1\], expected int32\[b=2\]"),
    ({"cache_seqlens": floats(2)}, r"cache_seqlens: got float32\[2\], expected int32\[b=2\]"),
    ({"out": shaped(2, 1, 512)}, r"out: got bfloat16\[2, 1, 512\], expected 4 axes"),
    ({"out": shaped(2, 1, 4, 577)}, "out: got head_dim_v 577, expected at most d_k 576"),
    ({"out": shaped(2, 1, 4, 0)}, "out: got head_dim_v 0, expected at least 1"),
    ({"out": floats(2, 1, 4, 512)}, r"out: got float32\[2, 1, 4, 512\], expected bfloat16\[b, s_q"),
    (
        {"out": shaped(2, 1, 3, 512)},
        r"out: got bfloat16\[2, 1, 3, 512\], expected bfloat16\[b, s_q",
    ),
    ({"lse": shaped(2, 4, 1)}, r"lse: got bfloat16\[2, 4, 1\], expected float32\[b, h_q, s_q\]"),
    ({"lse": floats(2, 1, 4)}, r"lse: got float32\[2, 1, 4\], expected float32\[b, h_q, s_q\]"),
    ({"softmax_scale": np.float32(0)}, "softmax_scale: got 0.0+, expected a positive finite"),
    ({"softmax_scale": np.float32("nan")}, "softmax_scale: got nan, expected a positive finite"),
    ({"softmax_scale": np.float32("inf")}, "softmax_scale: got inf, expected a positive finite"),
    ({"softmax_scale": np.int32(1)}, "Wrong scalar data type: expected F32 but got S32"),
    ({"causal": np.float32(1)}, "Wrong scalar data type: expected PRED but got F32"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_handler_refuses(change, message):
    """The custom call itself, as another program might write it."""
    wrong = RIGHT | change
    call = jax.ffi.ffi_call("mla_jax_decode", (wrong["out"], wrong["lse"]))
    arrays = [jnp.zeros(wrong[name].shape, wrong[name].dtype) for name in OPERANDS]
    attributes = {name: wrong[name] for name in ("softmax_scale", "causal")}
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*arrays, **attributes))


def test_handler_takes_the_right_call():
    call = jax.ffi.ffi_call("mla_jax_decode", (RIGHT["out"], RIGHT["lse"]))
    arrays = [jnp.zeros(RIGHT[name].shape, RIGHT[name].dtype) for name in OPERANDS]
    out, lse = call(*arrays, softmax_scale=np.float32(0.1), causal=False)
    assert not out.any()
    assert np.isposinf(lse).all()


# --- What Python refuses, and why the library may be absent ---------------------------------------


def test_other_platforms(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    arrays = problem([3]).arrays()
    found = mla_jax.explain(*arrays, 512)
    assert found.implementation == "xla"
    reason = "not on tpu: it runs on CPUs and on NVIDIA Hopper GPUs"
    assert found.reasons["ffi"] == reason
    assert found.reasons["pallas"].startswith("not on tpu: ")
    with pytest.raises(NotImplementedError, match=f"^ffi: {reason}"):
        run(*arrays)
    with jax.default_device(jax.devices("cpu")[0]):  # asked for: the CPU beside it
        assert mla_jax.explain(*arrays, 512).implementation == "ffi"
        assert_close(run(*arrays), attend(problem([3])))


@pytest.fixture
def unloaded():
    """The state before the first use of the library, for one test."""
    ffi._library_reason.cache_clear()
    yield
    ffi._library_reason.cache_clear()
    assert ffi._library_reason("cpu") is None  # loading twice does no harm


def _refused(match):
    arrays = problem([3]).arrays()
    assert mla_jax.explain(*arrays, 512).implementation == "xla"
    with pytest.raises(NotImplementedError, match=match):
        run(*arrays)


def test_library_absent(unloaded, monkeypatch):
    monkeypatch.setattr(ffi.importlib.util, "find_spec", lambda name: None)
    _refused("^ffi: the library mla_jax_cpu is not installed: pip found no C\\+\\+ compiler")


def test_library_that_does_not_load(unloaded, monkeypatch, tmp_path):
    broken = tmp_path / "mla_jax_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(ffi, "find_library", lambda platform: broken)
    _refused(f"^ffi: {re.escape(str(broken))} does not load: ")


def test_library_without_our_symbols(unloaded, monkeypatch):
    monkeypatch.setattr(ffi, "find_library", lambda platform: None)  # ctypes: this very process
    monkeypatch.setattr(ffi.ctypes, "CDLL", lambda name: ffi.ctypes.PyDLL(None))
    _refused("does not load: .*mla_jax_ffi_major")


@pytest.mark.parametrize(
    ("runtime", "text"), [((0, 0), "0.0"), ((1, 1), "1.1")], ids=["newer minor", "other major"]
)
def test_library_built_for_another_ffi(unloaded, monkeypatch, runtime, text):
    monkeypatch.setattr(ffi, "_runtime_version", lambda: runtime)
    _refused(rf"was built for XLA FFI 0\.\d, this jaxlib has {text}: build it with a jaxlib")


# --- Threads --------------------------------------------------------------------------------------


def test_independent_calls_in_one_executable_do_not_deadlock():
    """XLA runs them on the pool whose threads they ask for help."""
    p = problem([2000, 70], s_q=1, width=40, num_pages=40)

    @jax.jit
    def many(scales):
        return [run(p.q * s.astype(p.q.dtype), *p.arrays()[1:]) for s in scales]

    scales = jnp.linspace(0.5, 2, 32)
    once = [run(p.q * s.astype(p.q.dtype), *p.arrays()[1:]) for s in scales]
    for _ in range(20):
        for got, expected in zip(many(scales), once, strict=True):
            assert_same_bits(got, expected)


_SCRIPT = """
import pickle
import sys
import numpy as np
import mla_jax
from mla_jax import ffi

problems = pickle.load(sys.stdin.buffer)
options = {"causal": True, "implementation": "ffi"}
results = [mla_jax.flash_mla_with_kvcache(*arguments, **options) for arguments in problems]
results = [(np.asarray(out), np.asarray(lse)) for out, lse in results]
pickle.dump((ffi.instruction_set(), results), sys.stdout.buffer)
"""


def _in_a_process(problems, **environment):
    """Runs the op in a new process, which reads `environment` anew; says its instruction set."""
    arguments = [(p.q, p.k_cache, p.block_table, p.cache_seqlens, p.head_dim_v) for p in problems]
    done = subprocess.run(
        [sys.executable, "-P", "-c", _SCRIPT],
        input=pickle.dumps(arguments),
        check=True,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
    )
    return pickle.loads(done.stdout)


# 2000 tokens are cut in three parts; 3 queries of 14 heads are two tiles of rows, one not full, or
# one where tiles are high, which they are with few threads.
PROBLEM = functools.partial(problem, [2000, 0, 2, 961, 48], s_q=3, h_q=14)


ONE_THREAD = {"NPROC": "1", "XLA_FLAGS": ""}  # the size of XLA's pool, also set by its devices


def test_one_thread_gives_the_same_bits():
    p = PROBLEM()
    _, (one,) = _in_a_process([p], **ONE_THREAD)
    assert_same_bits(one, run(*p.arrays(), causal=True))


# What the processor must have for each, besides what those before it need.
ISAS = {
    "baseline": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16"},
}


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_agree(isa):
    """The next narrower runs where the processor lacks one."""
    dtypes = ("bfloat16", "float16", "float32")
    problems = [PROBLEM(dtype=dtype) for dtype in dtypes]
    # Widths of no whole vectors.
    problems += [PROBLEM(dtype=dtype, d_k=d_k, d_v=37) for dtype in dtypes for d_k in (49, 100)]
    problems.append(PROBLEM(h_q=50))  # more rows than a tile may have
    used, results = _in_a_process(problems, MLA_JAX_CPU_ISA=isa, **ONE_THREAD)
    flags = set(Path("/proc/cpuinfo").read_text().split())
    asked = list(ISAS)[: list(ISAS).index(isa) + 1]
    assert used == [*itertools.takewhile(lambda name: ISAS[name] <= flags, asked)][-1]
    for p, got in zip(problems, results, strict=True):
        assert_close(got, attend(p, causal=True))


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_pattern_is_read_and_written_exactly(dtype):
    """One token of weight 1 comes out as it went in, float16's subnormals included."""
    values = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype)).reshape(128, 512)
    q = jnp.zeros((128, 1, 1, 512), dtype)
    table = jnp.arange(128, dtype=jnp.int32)[:, None]
    out, _ = run(q, jnp.asarray(values[:, None, None]), table, jnp.ones(128, jnp.int32))
    got, expected = np.asarray(out, np.float32)[:, 0, 0], values.astype(np.float32)
    # XLA's threads flush float32's subnormals to zero, and bfloat16's are among them.
    expected = np.where(np.abs(expected) < np.finfo(np.float32).tiny, 0, expected)
    finite = np.isfinite(expected).all(axis=1)
    assert_same_bits([got[finite] + 0], [expected[finite] + 0])
    # 0 * inf is NaN: an infinite channel makes the score NaN, and that shows.
    assert finite.sum() in (126, 124)
    assert np.isnan(got[~finite]).all()


@pytest.mark.parametrize(("dtype", "step"), [("bfloat16", 2**-7), ("float16", 2**-10)])
def test_results_round_to_the_nearest_even(dtype, step):
    # Means of two values that lie a step apart are ties; the even neighbour is the first or last.
    values = 1 + step * np.array([[0, 1], [1, 2]])
    k_cache = jnp.broadcast_to(jnp.asarray(values, dtype)[:, :, None, None], (2, 2, 1, 512))
    q = jnp.zeros((2, 1, 1, 512), dtype)
    table = jnp.arange(2, dtype=jnp.int32)[:, None]
    out, _ = run(q, k_cache, table, jnp.full(2, 2, jnp.int32))
    np.testing.assert_array_equal(np.asarray(out[:, 0, 0, 0], np.float64), [1, 1 + 2 * step])


def test_scores_of_minus_infinity_weigh_nothing():
    q = jnp.full((1, 1, 1, 512), -1e38, jnp.float32)
    arrays = (q, jnp.full((1, 64, 1, 512), 1e38), jnp.zeros((1, 1), jnp.int32), jnp.array([50]))
    out, lse = run(*arrays)
    assert not out.any()
    assert np.isposinf(lse).all()


def _assert_close_where_scores_are_large(got, expected):
    """Scores of hundreds, sums of 576 products, are off by some 2^-16, and weights by that part."""
    (out, lse), (expected_out, expected_lse) = got, expected
    assert 128 < np.abs(expected_lse).max() < 512
    error = np.linalg.norm(np.asarray(out, np.float64) - expected_out)
    assert error < 2**-16 * np.linalg.norm(expected_out)
    np.testing.assert_allclose(out, expected_out, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lse, expected_lse, rtol=2**-20)


def test_large_scores_neither_overflow_nor_vanish():
    p = problem([1000, 70], h_q=3, dtype="float32")
    p = type(p)(p.q * 100, p.k_cache, p.block_table, p.cache_seqlens)
    _assert_close_where_scores_are_large(run(*p.arrays()), attend(p))


def test_parts_whose_scores_lie_far_apart():
    """Tokens of the last part outweigh all before, or the reverse."""
    for order in (1, -1):
        p = problem([2880], h_q=2, dtype="float32", width=46, num_pages=46)
        k_cache = np.nan_to_num(p.k_cache)
        k_cache[p.block_table[0, :45]] *= np.linspace(0.1, 3, 45)[::order, None, None, None]
        scaled = type(p)(p.q, k_cache.astype(np.float32), p.block_table, p.cache_seqlens)
        got = run(*scaled.arrays(), softmax_scale=1.0)
        _assert_close_where_scores_are_large(got, attend(scaled, softmax_scale=1.0))


# --- Under transformations ------------------------------------------------------------------------


def test_vmap_is_one_call():
    p = problem([65, 3], poison=0)
    stacked = [jnp.stack([x, x]) for x in p.arrays()]
    text = jax.jit(jax.vmap(run)).lower(*stacked).as_text()
    assert text.count("mla_jax_decode") == 1
    nested = jax.vmap(jax.vmap(run))(*(x[None] for x in stacked))
    for i in range(2):
        assert_close([x[0, i] for x in nested], attend(p))


def test_vmap_keeps_pools_apart():
    """An id outside a pool is a page of zeros, not a page of the next pool."""
    p = problem([65], num_pages=4, poison=0)
    table = np.array([[4, -1, 0]], np.int32)
    arrays = (p.q, p.k_cache, table, np.array([130], np.int32))
    stacked = [jnp.stack([x, x]) for x in arrays]
    stacked[1] = stacked[1].at[1].add(1)
    out, lse = jax.vmap(run)(*stacked)
    for i in range(2):
        one = type(p)(*(np.asarray(x[i]) for x in stacked))
        assert_close((out[i], lse[i]), attend(one))


def test_export():
    p = problem([65, 3])
    allowed = [jax.export.DisabledSafetyCheck.custom_call("mla_jax_decode")]
    exported = jax.export.export(jax.jit(run), disabled_checks=allowed)(*p.arrays())
    if importlib.util.find_spec("flatbuffers"):
        exported = jax.export.deserialize(exported.serialize())
    assert_close(exported.call(*p.arrays()), attend(p))


def test_only_our_symbols_are_visible():
    """Others in the process must not meet the library's own names."""
    path = ffi.find_library("cpu")
    assert isinstance(path, Path)
    names = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True)
    if names.returncode:
        pytest.skip("nm is not installed")
    symbols = {line.split()[-1] for line in names.stdout.splitlines()}
    assert symbols == {
        "mla_jax_append_cpu",
        "mla_jax_decode_cpu",
        "mla_jax_cpu_isa",
        "mla_jax_ffi_major",
        "mla_jax_ffi_minor",
    }
