# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Implementation "ffi": our compiled library, called by XLA through its foreign function interface.

On a CPU it is the op in C++ (xla_ffi/cpu). The library is optional: where it is absent or cannot
run under this jaxlib, `unsupported_reason` says why.
"""

import ctypes
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_TARGET = "mla_jax_decode"


class LibraryError(Exception):
    """Why the library cannot be used."""


def find_library() -> Path:
    """Returns the path of the library, or raises `LibraryError`."""
    # By the import system: the folder of an editable install's sources does not hold the library.
    spec = importlib.util.find_spec("mla_jax.mla_jax_cpu")
    if spec is None or spec.origin is None:
        raise LibraryError(
            "the library mla_jax_cpu is not installed: pip found no C++ compiler when it "
            "installed mla-jax, or the package runs from its sources"
        )
    return Path(spec.origin)


def _runtime_version() -> tuple[int, int]:
    """Reads the version of XLA's FFI in this process from the headers that jaxlib ships."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return int(found["MAJOR"]), int(found["MINOR"])


def _load() -> ctypes.CDLL:
    """Loads the library and registers its targets, or raises `LibraryError`."""
    path = find_library()
    try:
        library = ctypes.CDLL(str(path))
        built = (library.mla_jax_ffi_major(), library.mla_jax_ffi_minor())
        handler = library.mla_jax_decode_cpu
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path} does not load: {error}") from error
    runtime = _runtime_version()
    # Registering one that is too new would break the whole process, jnp.ones included.
    if built[0] != runtime[0] or built[1] > runtime[1]:
        raise LibraryError(
            f"{path} was built for XLA FFI {built[0]}.{built[1]}, this jaxlib has "
            f"{runtime[0]}.{runtime[1]}: build it with a jaxlib that is no newer than this one"
        )
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    return library


@functools.cache
def _library_reason() -> str | None:
    """Loads the library once per process; says why it cannot be used, or None."""
    try:
        _load()
    except LibraryError as error:
        return str(error)
    return None


def instruction_set() -> str:
    """Names the instruction set that the library uses: "baseline", "avx2" or "avx512".

    The environment variable MLA_JAX_CPU_ISA, read once per process, caps it.
    """
    library = _load()
    library.mla_jax_cpu_isa.restype = ctypes.c_char_p
    return library.mla_jax_cpu_isa().decode()


def _default_platform() -> str:
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def unsupported_reason(**_: object) -> str | None:
    """Says why these inputs cannot run here, or None: on a CPU all valid ones can."""
    platform = _default_platform()
    if platform in ("cuda", "gpu"):
        return "the CUDA kernel is not connected yet; ffi runs on CPUs"
    if platform != "cpu":
        return f"the default device is a {platform}, ffi runs on CPUs"
    return _library_reason()


@functools.partial(
    jax.jit, static_argnames=("head_dim_v", "softmax_scale", "causal", "batch_invariant")
)
def decode(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    batch_invariant: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attends each query to the cached tokens of its sequence.

    The arguments are those of `mla_jax.flash_mla_with_kvcache`, already checked. On a CPU a row's
    arithmetic is its own, so `batch_invariant` asks for nothing more.

    Returns:
        out `[b, s_q, h_q, head_dim_v]` in q's dtype and lse `[b, h_q, s_q]` float32.

    Raises:
        NotImplementedError: it is lowered for another platform than the CPU.
    """
    del batch_invariant
    # Fails when it is lowered for a platform that has no branch here, not when it runs there.
    return jax.lax.platform_dependent(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        cpu=functools.partial(
            _call_cpu, head_dim_v=head_dim_v, softmax_scale=softmax_scale, causal=causal
        ),
    )


def _call_cpu(
    q: jax.Array, *arrays: jax.Array, head_dim_v: int, softmax_scale: float, causal: bool
) -> Any:
    b, s_q, h_q, _ = q.shape
    shapes = (
        jax.ShapeDtypeStruct((b, s_q, h_q, head_dim_v), q.dtype),
        jax.ShapeDtypeStruct((b, h_q, s_q), jnp.float32),
    )
    call = jax.ffi.ffi_call(_TARGET, shapes)
    return tuple(call(q, *arrays, softmax_scale=np.float32(softmax_scale), causal=causal))
