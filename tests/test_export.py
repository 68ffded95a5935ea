# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""One exported program for several platforms, in another process, and with any batch.

`python tests/test_export.py FILE` writes programs to a file, as a CPU's process exports them; where
MLA_JAX_EXPORTED names it, on another machine and above all on one with a GPU, they run there.
"""

import functools
import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from reference import assert_close, attend, problem

import mla_jax
from mla_jax import ffi

ALLOWED = [jax.export.DisabledSafetyCheck.custom_call("mla_jax_decode")]
export = functools.partial(
    jax.export.export, platforms=("cpu", "cuda"), disabled_checks=ALLOWED
)  # fmt: skip

_LOAD = """
import pickle
import sys
import jax
import mla_jax  # registers what the program calls

program, arrays = pickle.load(sys.stdin.buffer)
results = jax.export.deserialize(program).call(*arrays)
pickle.dump([jax.device_get(x) for x in results], sys.stdout.buffer)
"""


def step(q, k_cache, block_table, cache_seqlens):
    return mla_jax.flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, causal=True)


@pytest.mark.skipif(importlib.util.find_spec("flatbuffers") is None, reason="needs flatbuffers")
def test_in_a_new_process():
    p = problem([130, 0, 64], s_q=2, dtype="bfloat16")
    exported = export(jax.jit(step))(*p.arrays())
    assert exported.platforms == ("cpu", "cuda")
    arrays = (p.q, p.k_cache, p.block_table, p.cache_seqlens)
    done = subprocess.run(
        [sys.executable, "-P", "-c", _LOAD],
        input=pickle.dumps((exported.serialize(), arrays)),
        check=True,
        stdout=subprocess.PIPE,
        timeout=120,
    )
    got = pickle.loads(done.stdout)
    assert_close(got, attend(p, causal=True))
    for x, y in zip(got, step(*p.arrays()), strict=True):
        np.testing.assert_array_equal(x, y)


def write(path):
    """Exports a step for the kernel and one for the plain form, with inputs and results here."""
    programs = []
    with jax.default_matmul_precision("highest"):
        for dtype in ("bfloat16", "float32"):
            p = problem([130, 0, 64, 1000], s_q=2, h_q=16, dtype=dtype)
            exported = export(jax.jit(step))(*p.arrays())
            programs.append((exported.serialize(), p, jax.device_get(exported.call(*p.arrays()))))
    Path(path).write_bytes(pickle.dumps(programs))


@pytest.mark.skipif("MLA_JAX_EXPORTED" not in os.environ, reason="MLA_JAX_EXPORTED names no file")
def test_exported_on_another_machine():
    for program, p, there in pickle.loads(Path(os.environ["MLA_JAX_EXPORTED"]).read_bytes()):
        exported = jax.export.deserialize(program)
        assert exported.platforms == ("cpu", "cuda")
        got = exported.call(*p.arrays())
        assert_close(got, attend(p, causal=True))
        assert_close(got, [np.asarray(x, np.float64) for x in there])


def test_each_platform_has_what_suits_it():
    """Traced on one machine, no implementation is named: each platform takes its own."""
    arrays = problem([3], dtype="float32").arrays()
    text = export(jax.jit(step))(*arrays).mlir_module()
    # The CUDA kernel takes no float32: there it is the plain form.
    assert text.count("mla_jax_decode") == (ffi._library_reason("cpu") is None)
    assert "stablehlo.while" in text


def test_any_batch(op):
    """A symbolic number of sequences: one program, called with others than it was traced for."""
    p = problem([130, 0, 64], s_q=2, dtype="float32")
    scope = jax.export.SymbolicScope()
    (b,) = jax.export.symbolic_shape("b", scope=scope)
    shapes = [
        jax.ShapeDtypeStruct(x.shape if i == 1 else (b, *x.shape[1:]), x.dtype)
        for i, x in enumerate(p.arrays())
    ]
    run = jax.jit(lambda *a: op(*a, 512, causal=True))
    exported = jax.export.export(run, disabled_checks=ALLOWED)(*shapes)
    for rows in (slice(0, 3), slice(1, 3)):
        some = p.rows(rows)
        assert_close(exported.call(*some.arrays()), attend(some, causal=True))


if __name__ == "__main__":
    write(sys.argv[1])
