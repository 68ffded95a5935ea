# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Implementation "pallas" without a GPU: interpreted, lowered, scheduled, refused.

Where there is a Hopper GPU, test_decode.py holds it to the oracle with the other implementations.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, attend, problem

import mla_jax
from mla_jax import decode, ffi, pallas
from mla_jax.pallas_config import Config

RUNS = jax.__version_info__ >= pallas._JAX_VERSION
needs_new_jax = pytest.mark.skipif(not RUNS, reason=f"jax {jax.__version__} is too old for it")

if RUNS:
    from pallas_interpreter import CASES
else:
    CASES = {}


# --- In the interpreter, with race detection ------------------------------------------------------


def interpret(*arguments: str) -> subprocess.CompletedProcess:
    script = Path(__file__).with_name("pallas_interpreter.py")
    path = os.pathsep.join([str(Path(mla_jax.__file__).parents[1]), *sys.path])
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )


@needs_new_jax
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str):
    done = interpret(case)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{case} ok\n"


@needs_new_jax
def test_balanced_schedules():
    done = interpret("--schedules")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_new_jax
@pytest.mark.parametrize(
    "mistake",
    [  # some of them, for time: `python tests/pallas_interpreter.py --mistake NAME` makes any
        "a block is not waited for",
        "a buffer is freed before the product",
        "weights are not committed",
        "the output is not committed",
    ],
)
def test_interpreter_reports(mistake: str):
    done = interpret("--mistake", mistake)
    assert done.returncode != 0
    said = done.stdout + done.stderr  # races are printed to stdout before jax 0.12
    assert "RACE DETECTED" in said or "ValueError" in said, said


# --- Lowered for a GPU that is not there ----------------------------------------------------------

TEMPLATES = [
    # b, s_q, h_q, h_kv, d_k, d_v, page_size, dtype, causal
    (2, 1, 16, 1, 576, 512, 64, jnp.bfloat16, False),
    (2, 2, 128, 1, 576, 512, 128, jnp.bfloat16, True),
    (1, 3, 9, 1, 576, 512, 16, jnp.float16, True),
    (200, 1, 6, 2, 512, 512, 32, jnp.float16, False),
    (2, 1, 64, 1, 320, 256, 8, jnp.bfloat16, True),
    (2, 1, 1, 1, 256, 256, 64, jnp.float16, False),
    (1, 1, 16384, 1, 576, 512, 64, jnp.bfloat16, False),  # nothing to combine: one part
]


@needs_new_jax
@pytest.mark.parametrize("template", TEMPLATES, ids=str)
def test_lowers_for_cuda(template):
    b, s_q, h_q, h_kv, d_k, d_v, page_size, dtype, causal = template
    shapes = (
        jax.ShapeDtypeStruct((b, s_q, h_q, d_k), dtype),
        jax.ShapeDtypeStruct((20, page_size, h_kv, d_k), dtype),
        jax.ShapeDtypeStruct((b, 8), jnp.int32),
        jax.ShapeDtypeStruct((b,), jnp.int32),
    )
    assert pallas.kernel_reason(*shapes[:3], d_v) is None

    def call(*arrays):
        return pallas.decode(
            *arrays,
            head_dim_v=d_v,
            softmax_scale=0.1,
            causal=causal,
            batch_invariant=False,
            num_sms=132,
        )

    exported = jax.export.export(jax.jit(call), platforms=["cuda"])(*shapes)
    assert [x.shape for x in exported.out_avals] == [(b, s_q, h_q, d_v), (b, h_q, s_q)]
    module, combines = exported.mlir_module(), h_q < 16384
    assert module.count("@mosaic_gpu") == 2 + combines  # schedule and decode
    # Else a scan over calls loses what is not split: see pallas_combine.py.
    assert module.count("stablehlo.optimization_barrier") == combines


# --- Schedules ------------------------------------------------------------------------------------


@needs_new_jax
def test_invariant_schedule_does_not_depend_on_the_batch():
    from pallas_interpreter import assert_whole, walk

    from mla_jax import pallas_schedule

    chunk = pallas_schedule._INVARIANT_BLOCKS * 64
    lengths = np.asarray([0, 1, chunk, chunk + 1, 5 * chunk - 3, 9 * chunk], np.int32)
    clamped = np.minimum(lengths, 5 * chunk)
    pieces = walk(pallas_schedule.invariant_schedule(lengths, 5 * chunk), clamped)
    assert_whole(pieces, clamped)
    assert [len(p) for p in pieces] == [1, 1, 1, 2, 5, 5]
    for i, length in enumerate(lengths[:-1]):
        alone = walk(pallas_schedule.invariant_schedule(lengths[i : i + 1], 9 * chunk), [length])
        assert alone == pieces[i : i + 1]


# --- Refusals -------------------------------------------------------------------------------------


def reason(*, b=2, h_q=4, d_k=576, d_v=512, page_size=64, width=3, dtype=jnp.bfloat16, **options):
    shapes = {
        "q": jax.ShapeDtypeStruct((b, 1, h_q, d_k), dtype),
        "k_cache": jax.ShapeDtypeStruct((5, page_size, 1, d_k), dtype),
        "block_table": jax.ShapeDtypeStruct((b, width), jnp.int32),
    }
    return pallas.unsupported_reason(**shapes, head_dim_v=d_v, **options)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"dtype": jnp.float32}, "q: got dtype float32, the kernels take bfloat16 and float16"),
        ({"d_v": 128}, "head_dim_v: got 128, the kernels take 256 and 512"),
        ({"d_k": 544}, "q: got d_k 544, the kernels take head_dim_v or head_dim_v \\+ 64"),
        ({"page_size": 48}, "k_cache: got page_size 48, the kernels take 8, 16, 32, 64 and 128"),
        ({"b": 2**15 + 1}, "q: got 32769 sequences, the kernels take 32768"),
        ({"width": 2**25}, "block_table: got 33554432 pages of 64 tokens .* take 2\\^30 tokens"),
    ],
)
@needs_new_jax
def test_refused_inputs(monkeypatch, inputs, expected):
    monkeypatch.setattr(pallas, "_device_reason", lambda: None)
    assert reason(platform="cuda") is None
    refused = reason(platform="cuda", **inputs)
    assert refused is not None
    assert re.search(expected, refused), refused


def test_refused_places(monkeypatch):
    assert reason(platform="cpu") == "not on cpu: Mosaic-GPU kernels run on NVIDIA Hopper GPUs"
    assert "not on rocm" in reason(platform="rocm")
    if jax.default_backend() == "cpu":
        assert reason(platform="cuda") == "this process has no NVIDIA GPU"

    class Ampere:
        device_kind, compute_capability = "NVIDIA A100", "8.0"

    monkeypatch.setattr(jax, "local_devices", lambda backend: [Ampere()])
    assert reason(platform="cuda") == (
        "NVIDIA A100 has compute capability 8.0, the kernels are for 9.0 (Hopper: H100, H200, "
        "GH200)"
    )
    monkeypatch.setattr(Ampere, "compute_capability", "9.0")
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    assert reason(platform="cuda") == "it needs jax 0.11 or newer, this is 0.10.2"


def arguments(dtype=jnp.bfloat16):
    shapes = [((2, 1, 4, 576), dtype), ((5, 64, 1, 576), dtype), ((2, 3), "int32"), ((2,), "int32")]
    return (*(jax.ShapeDtypeStruct(*x) for x in shapes), 512)


@needs_new_jax
def test_chosen_on_a_gpu_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(pallas, "_device_reason", lambda: None)
    monkeypatch.setattr(decode, "_default_platform", lambda: "cuda")
    monkeypatch.setattr(ffi, "unsupported_reason", lambda **_: "no library")
    found = mla_jax.explain(*arguments())
    assert str(found) == "runs: pallas\nnot ffi: no library"
    found = mla_jax.explain(*arguments(jnp.float32))
    assert found.implementation == "xla"
    assert list(found.reasons) == ["ffi", "pallas"]


@needs_new_jax
def test_a_program_for_several_platforms(monkeypatch):
    monkeypatch.setattr(pallas, "_device_reason", lambda: None)
    monkeypatch.setattr(ffi, "unsupported_reason", lambda **_: "no library")
    p = problem([70, 0, 3], s_q=2)
    call = jax.jit(lambda *a: mla_jax.flash_mla_with_kvcache(*a, 512, causal=True))
    exported = jax.export.export(call, platforms=("cpu", "cuda"))(*p.arrays())
    assert exported.mlir_module().count("@mosaic_gpu") == 3
    if jax.default_backend() == "cpu":  # there it is the plain form
        assert_close(exported.call(*p.arrays()), attend(p, causal=True))


@needs_new_jax
def test_symbolic_shapes_are_refused():
    (b,) = jax.export.symbolic_shape("b")
    refused = pallas.kernel_reason(
        jax.ShapeDtypeStruct((b, 1, 4, 576), "bfloat16"), *arguments()[1:3], 512
    )
    assert refused == "q: got symbolic shapes, such as (b, 1, 4, 576), the kernels take numbers"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="for CPUs")
def test_a_cpu_process_does_not_choose_it():
    assert mla_jax.explain(*arguments()).implementation in ("ffi", "xla")
    found = mla_jax.explain(*arguments(), implementation="pallas")
    assert found.implementation is None
    assert "not on cpu" in found.reasons["pallas"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"page_size": 24}, "page_size: got 24, expected a power of two in 8..128"),
        ({"d_k": 544}, "d_k, d_v: got 544, 512, expected d_v 256 or 512, d_k - d_v 0 or 64"),
        ({"weights_registers": 100}, "registers: expected multiples of 8"),
        ({"output_registers": 168}, "registers: got 96 \\+ 168, expected at most 256"),
    ],
)
def test_config_refuses(changes, expected):
    right = {
        "d_k": 576,
        "d_v": 512,
        "page_size": 64,
        "heads_per_kv": 4,
        "s_q": 1,
        "causal": False,
        "scale": 0.1,
    }
    Config(**right)
    with pytest.raises(ValueError, match=expected):
        Config(**(right | changes))
