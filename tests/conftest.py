# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Settings of the test processes, and the op as each implementation gives it.

Environment:
    MLA_JAX_IMPLEMENTATIONS: implementations to test, comma-separated; by default all there are
        (pallas, which needs one, where there is a GPU).
    MLA_JAX_REQUIRE: implementations of which no promised case may be skipped, comma-separated.
    MLA_JAX_FULL_GRID: 1 runs FlashMLA's grid whole, and, as on a GPU, that of ragged queries,
        instead of parts that suit a CPU.
    MLA_JAX_EXPORTED: a file that test_export.py wrote on another machine.
"""

import os
import shutil

# Before NumPy and JAX start: the processes of xdist share the cores and the memory of a GPU.
_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _PROCESSES)))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Most of the time is compilation: on a CPU half of it LLVM's optimisation, on a GPU autotuning.
# On a CPU there are eight devices, for tests of meshes.
_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
    if shutil.which("nvidia-smi") is None
    else "--xla_gpu_autotune_level=0"
)
os.environ.setdefault("XLA_FLAGS", _FLAGS)
# GPUs multiply float32 in a shorter format unless told.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

import mla_jax  # noqa: E402
from mla_jax import decode  # noqa: E402


def _names(variable: str) -> list[str]:
    return [name for name in os.environ.get(variable, "").split(",") if name]


@pytest.hookimpl(trylast=True)  # the implementation varies fastest: one oracle result serves all
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        on_gpu = jax.default_backend() == "gpu"
        there = [name for name in decode._IMPLEMENTATIONS if on_gpu or name != "pallas"]
        names = _names("MLA_JAX_IMPLEMENTATIONS") or there
        metafunc.parametrize("implementation", names)


@pytest.fixture
def op(implementation: str) -> Callable[..., Any]:
    """Returns `flash_mla_with_kvcache` by one implementation; where it cannot, skips saying why."""

    def call(
        q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any, head_dim_v: int, **options: Any
    ) -> Any:
        options = dict(options, implementation=implementation)
        arguments = (q, k_cache, block_table, cache_seqlens, head_dim_v)
        found = mla_jax.explain(*arguments, **options)
        if found.implementation is None:
            reason = f"{implementation}: {found.reasons[implementation]}"
            promised = _promised(q, k_cache, head_dim_v)
            if promised and implementation in _names("MLA_JAX_REQUIRE"):
                pytest.fail(reason)
            pytest.skip(reason)
        return mla_jax.flash_mla_with_kvcache(*arguments, **options)

    return call


def _promised(q: Any, k_cache: Any, head_dim_v: int) -> bool:
    """Says whether every implementation is meant to run this where its device is present."""
    return (
        q.dtype.name in ("bfloat16", "float16")
        and q.shape[3] in (512, 576)
        and head_dim_v == 512
        and k_cache.shape[1] in (16, 32, 64, 128)
    )
