# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Implementation "ffi": our compiled libraries, called through XLA's foreign function interface.

On an NVIDIA Hopper GPU it is the CUDA kernel (xla_ffi/cuda), on a CPU the op in C++ (xla_ffi/cpu):
one target name, and XLA takes the one of the platform that it lowers for. Each library is optional:
where it is absent or cannot run under this jaxlib, `unsupported_reason` says why.
"""

import ctypes
import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.hopper import local_gpus, unsuitable
from mla_jax.xla import result_shapes

_DECODE, _APPEND, _LAYER = "mla_jax_decode", "mla_jax_append", "mla_jax_layer"
_TARGETS = {"cpu": (_DECODE, _APPEND), "cuda": (_DECODE, _APPEND, _LAYER)}
PLATFORMS = tuple(_TARGETS)
# Rows of q from which the CUDA kernel takes it in parts: putting it together costs a memory's pass,
# not doing so a kernel more where few rows make that the shorter. (On an H100 12.3 and 2.5 us for
# 16384 rows; a layer of a step takes 1 to 2 us less in parts with 256 to 2048, no less with 128.)
_ROWS_IN_PARTS = 256
# What the CUDA kernels take: tokens of a page, and the most that a row of a block table stands for.
_PAGE_SIZES, _MAX_SEQUENCE_TOKENS = (16, 32, 64, 128), 2**30
# What the kernels of a whole layer take, as xla_ffi/mla.h has it: heads, and channels of its input.
_LAYER_MAX_HEADS, _LAYER_MAX_WIDTH = 128, 8192
_COMPILER = {"cpu": "C++", "cuda": "CUDA"}


class LibraryError(Exception):
    """Why a library cannot be used."""


def find_library(platform: str) -> Path:
    """Returns the path of a platform's library, or raises `LibraryError`."""
    # By the import system: the folder of an editable install's sources does not hold the library.
    spec = importlib.util.find_spec(f"mla_jax.mla_jax_{platform}")
    if spec is None or spec.origin is None:
        raise LibraryError(
            f"the library mla_jax_{platform} is not installed: pip found no {_COMPILER[platform]} "
            "compiler when it installed mla-jax, or the package runs from its sources"
        )
    return Path(spec.origin)


def _runtime_version() -> tuple[int, int]:
    """Reads the version of XLA's FFI in this process from the headers that jaxlib ships."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return int(found["MAJOR"]), int(found["MINOR"])


def _load(platform: str) -> ctypes.CDLL:
    """Loads a platform's library and registers its targets, or raises `LibraryError`."""
    path = find_library(platform)
    try:
        library = ctypes.CDLL(str(path))
        built = (library.mla_jax_ffi_major(), library.mla_jax_ffi_minor())
        handlers = {name: getattr(library, f"{name}_{platform}") for name in _TARGETS[platform]}
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path} does not load: {error}") from error
    runtime = _runtime_version()
    # Registering one that is too new would break the whole process, jnp.ones included.
    if built[0] != runtime[0] or built[1] > runtime[1]:
        raise LibraryError(
            f"{path} was built for XLA FFI {built[0]}.{built[1]}, this jaxlib has "
            f"{runtime[0]}.{runtime[1]}: build it with a jaxlib that is no newer than this one"
        )
    # JAX keeps it until there is such a platform in the process.
    name = {"cpu": "cpu", "cuda": "CUDA"}[platform]
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform=name)
    return library


@functools.cache
def _library_reason(platform: str) -> str | None:
    """Loads a library once per process; says why it cannot be used, or None."""
    try:
        _load(platform)
    except LibraryError as error:
        return str(error)
    return None


def register() -> None:
    """Loads the libraries that are there: exported programs name their targets, and no more."""
    for platform in PLATFORMS:
        _library_reason(platform)


def instruction_set() -> str:
    """Names the instruction set of the CPU's library.

    "baseline", "avx2", "avx512", "avx512bf16" or "amx"; the environment variable MLA_JAX_CPU_ISA,
    read once per process, caps it. The last two multiply bfloat16 as it is, "amx" by matrices;
    Intel's processors are slower with "avx512bf16", and use it only if asked to.
    """
    library = _load("cpu")
    library.mla_jax_cpu_isa.restype = ctypes.c_char_p
    return library.mla_jax_cpu_isa().decode()


@functools.cache
def _workspace_bytes(*sizes: int) -> int:
    """Asks the CUDA library for the bytes that a call's partial results take."""
    library = _load("cuda")
    library.mla_jax_cuda_workspace_bytes.restype = ctypes.c_size_t
    return library.mla_jax_cuda_workspace_bytes(*map(ctypes.c_int32, sizes))


@functools.cache
def _layer_workspace_bytes(h: int) -> int:
    """Asks the CUDA library for the bytes that what passes between a layer's kernels takes."""
    library = _load("cuda")
    library.mla_jax_cuda_layer_workspace_bytes.restype = ctypes.c_size_t
    return library.mla_jax_cuda_layer_workspace_bytes(ctypes.c_int32(h))


def unsupported_reason(
    *,
    platform: str,
    q: Any,
    k_cache: Any,
    block_table: Any,
    head_dim_v: int,
    **_: object,
) -> str | None:
    """Says why these inputs cannot run on a platform, or None: a CPU takes all valid ones.

    Args:
        platform: as XLA names it: "cpu", "cuda", another.
        q: as for `mla_jax.flash_mla_with_kvcache`, already checked; here and below.
        k_cache: as there.
        block_table: as there.
        head_dim_v: as there.
    """
    if platform not in PLATFORMS:
        return f"not on {platform}: it runs on CPUs and on NVIDIA Hopper GPUs"
    if platform == "cuda":
        reason = _kernel_reason(q, k_cache, block_table, head_dim_v)
        reason = _device_reason() or reason
        if reason is not None:
            return reason
    return _library_reason(platform)


def _kernel_reason(q: Any, k_cache: Any, block_table: Any, head_dim_v: int) -> str | None:
    """Says what the CUDA kernel does not take; xla_ffi/handlers/cuda.cc checks the same."""
    page_size = k_cache.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q: got dtype {q.dtype}, the CUDA kernel takes bfloat16 and float16"
    if q.shape[3] not in (512, 576):
        return f"q: got d_k {q.shape[3]}, the CUDA kernel takes 576 and 512"
    if head_dim_v != 512:
        return f"head_dim_v: got {head_dim_v}, the CUDA kernel takes 512"
    if page_size not in _PAGE_SIZES:
        return f"k_cache: got page_size {page_size}, the CUDA kernel takes 16, 32, 64 and 128"
    b, max_pages = block_table.shape
    if max_pages * page_size > _MAX_SEQUENCE_TOKENS or b * max_pages * page_size > 2**34:
        return (
            f"block_table: got {b} x {max_pages} pages of {page_size} tokens, the CUDA "
            "kernel takes 2^30 tokens a sequence and 2^34 in all"
        )
    return None


def _device_reason() -> str | None:
    """Names a GPU of this process that the CUDA kernel cannot run on.

    Where there is none, the program is for another machine, and the handler will look there.
    """
    return unsuitable(local_gpus(), "the CUDA kernel is")


@functools.partial(
    jax.jit,
    static_argnames=(
        "head_dim_v",
        "softmax_scale",
        "causal",
        "batch_invariant",
        "in_parts",
        "platform",
    ),
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
    in_parts: bool = False,
    platform: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends each query to the cached tokens of its sequence.

    The arguments are those of `mla_jax.flash_mla_with_kvcache`, already checked. On a CPU a row's
    arithmetic is its own, so `batch_invariant` asks for nothing more. `in_parts` says that q is the
    concatenation of its first `head_dim_v` channels and the others. `platform` is given where the
    caller has branches by platform: JAX lowers each branch for all of them.

    Returns:
        out `[b, s_q, h_q, head_dim_v]` in q's dtype and lse `[b, h_q, s_q]` float32.

    Raises:
        NotImplementedError: it is lowered for a platform that cannot run it.
    """
    options = {"head_dim_v": head_dim_v, "softmax_scale": softmax_scale, "causal": causal}
    inputs: dict[str, Any] = {"q": q, "k_cache": k_cache, "block_table": block_table} | options
    calls: dict[str, Callable[..., Any]] = {
        "cpu": _call_cpu,
        "cuda": functools.partial(_call_cuda, batch_invariant=batch_invariant, in_parts=in_parts),
    }
    if platform is not None:
        return calls[platform](q, k_cache, block_table, cache_seqlens, **options)
    branches = {
        name: functools.partial(call, **options)
        for name, call in calls.items()
        if unsupported_reason(platform=name, **inputs) is None
    }
    # Fails when it is lowered for a platform that has no branch here, not when it runs there.
    return jax.lax.platform_dependent(q, k_cache, block_table, cache_seqlens, **branches)


def _call_cpu(
    q: jax.Array, *arrays: jax.Array, head_dim_v: int, softmax_scale: float, causal: bool
) -> Any:
    call = jax.ffi.ffi_call(_DECODE, result_shapes(q, head_dim_v))
    return tuple(call(q, *arrays, softmax_scale=np.float32(softmax_scale), causal=causal))


def _call_cuda(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    batch_invariant: bool,
    in_parts: bool,
) -> Any:
    b, s_q, h_q, d_k = q.shape
    _, page_size, h_kv, _ = k_cache.shape
    sizes = (b, s_q, h_q, h_kv, block_table.shape[1], page_size, batch_invariant)
    # Partial results of split sequences: memory of the call, which no one else reads.
    workspace = jax.ShapeDtypeStruct((_workspace_bytes(*sizes),), jnp.uint8)
    call = jax.ffi.ffi_call(_DECODE, (*result_shapes(q, head_dim_v), workspace))
    rest: tuple[jax.Array, ...] = (k_cache, block_table, cache_seqlens)
    if h_kv > 1:  # the kernel wants all rows that read the same keys at one stride
        q = q.reshape(b, s_q, h_kv, h_q // h_kv, d_k).swapaxes(2, 3).reshape(q.shape)
    elif in_parts and s_q == 1 and d_k > head_dim_v and h_q * b >= _ROWS_IN_PARTS:
        # XLA makes of slices of a concatenation what was concatenated, which it then leaves out.
        # Heads come first in what a product by heads gives.
        q, q_pe = jnp.split(q, [head_dim_v], axis=-1)
        q, rest = jnp.swapaxes(q[:, 0], 0, 1), (*rest, q_pe[:, 0])
    options = {"causal": causal, "batch_invariant": batch_invariant}
    return tuple(call(q, *rest, softmax_scale=np.float32(softmax_scale), **options)[:2])


def append_reason(platform: str, pages: Any, latents: Any, scale: Any) -> str | None:
    """Says why the append of these inputs cannot run on a platform, or None.

    Args:
        platform: "cpu" or "cuda".
        pages: as for `mla_jax.append.append`, here and below.
        latents: as there.
        scale: as there.
    """
    if latents.dtype != pages.dtype:
        return f"latents: got dtype {latents.dtype}, the kernels take that of pages {pages.dtype}"
    if scale.dtype not in (pages.dtype, jnp.float32):
        return f"scale: got dtype {scale.dtype}, the kernels take that of pages and float32"
    if platform == "cuda":
        if pages.dtype not in (jnp.bfloat16, jnp.float16):
            return f"pages: got dtype {pages.dtype}, the CUDA kernel takes bfloat16 and float16"
        if (scale.size, pages.shape[3]) != (512, 576):
            return (
                f"pages: got {scale.size} channels and {pages.shape[3] - scale.size} to rotate, "
                "the CUDA kernel takes 512 and 64"
            )
        reason = _device_reason()
        if reason is not None:
            return reason
    elif pages.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"pages: got dtype {pages.dtype}, it takes bfloat16, float16 and float32"
    return _library_reason(platform)


def append(
    latents: jax.Array,
    pages: jax.Array,
    scale: jax.Array,
    *arrays: jax.Array,
    pool: Any,
    epsilon: float,
    interleaved: bool,
) -> jax.Array:
    """Finishes latents and writes them to their pages, of whose memory the result is.

    Args:
        latents: as for `mla_jax.append.append`, here and below.
        pages: as there.
        scale: as there.
        *arrays: cos, sin, block_table, seqlens, num_new as there, and place as for `scatter`.
        pool: as for `append`.
        epsilon: as there.
        interleaved: as there.
    """
    result = jax.ShapeDtypeStruct(pages.shape, pages.dtype)
    # XLA makes a call work on a slice of an array at once, such as a layer's weights in a scan, or
    # write into one, and forgets that pages and result are to be the same memory (seen with jax
    # 0.11.2 for GPUs): what is not written would be lost. The handler refuses such a call.
    arrays = jax.lax.optimization_barrier((pages, latents, scale, *arrays))
    written = jax.ffi.ffi_call(_APPEND, result, input_output_aliases={0: 0})(
        *arrays,
        num_layers=np.int32(pool.num_layers),
        num_pages=np.int32(pool.num_pages),
        page_size=np.int32(pool.page_size),
        epsilon=np.float32(epsilon),
        interleaved=interleaved,
    )
    return jax.lax.optimization_barrier(written)


def layer_reason(
    x: Any, pages: Any, block_table: Any, weights: Any, layer: Any, num_layers: int
) -> str | None:
    """Says why the kernels of a layer cannot run, or None; xla_ffi/handlers/cuda.cc checks as much.

    Args:
        x: as for `layer`, here and below, but of any shape.
        pages: as there.
        block_table: as there.
        weights: as there.
        layer: as there, or what is no Python number, such as a traced one.
        num_layers: as there.
    """
    page_size, max_pages = pages.shape[1], block_table.shape[1]
    if x.ndim != 3 or x.shape[:2] != (1, 1):
        return f"x: got {list(x.shape)}, the kernels take one token of one sequence"
    if pages.dtype not in (jnp.bfloat16, jnp.float16):
        return f"pages: got dtype {pages.dtype}, the kernels take bfloat16 and float16"
    if page_size not in _PAGE_SIZES or pages.shape[3] != 576:
        return (
            f"pages: got page_size {page_size} and {pages.shape[3]} channels, "
            "the kernels take 16, 32, 64 and 128, and 576"
        )
    if max_pages * page_size > _MAX_SEQUENCE_TOKENS:
        return f"block_table: got {max_pages} pages of {page_size} tokens, the kernels take 2^30"
    if not isinstance(layer, int | np.integer) or not 0 <= layer < num_layers:
        return f"layer: got {layer}, the kernels take a Python number in [0, {num_layers})"
    d, h = x.shape[2], weights.w_uk.shape[0]
    if d % 512 or d > _LAYER_MAX_WIDTH:
        return f"x: got {d} channels, the kernels take multiples of 512 up to {_LAYER_MAX_WIDTH}"
    if h > _LAYER_MAX_HEADS:
        return f"w_uk: got {h} heads, the kernels take up to {_LAYER_MAX_HEADS}"
    shapes = {
        "w_q": (d, h * (128 + 64)),
        "w_kv": (d, 576),
        "kv_norm": (512,),
        "w_uk": (h, 512, 128),
        "w_uv": (h, 512, 128),
        "w_o": (h * 128, d),
        "norm": (d,),
    }
    for name, array in {"x": x, **weights._asdict()}.items():
        if array is None:  # no norm
            continue
        if array.dtype != pages.dtype:
            return f"{name}: got dtype {array.dtype}, the kernels take that of pages {pages.dtype}"
        if name in shapes and array.shape != shapes[name]:
            return f"{name}: got {list(array.shape)}, the kernels take {list(shapes[name])}"
    return _device_reason() or _library_reason("cuda")


def layer(
    x: jax.Array,
    pages: jax.Array,
    weights: Any,
    *arrays: jax.Array,
    layer: int,
    num_layers: int,
    norm_epsilon: float,
    kv_norm_epsilon: float,
    softmax_scale: float,
    interleaved: bool,
) -> tuple[jax.Array, jax.Array]:
    """Runs an attention layer of one token; the letters are those of `mla_jax.layer`.

    Args:
        x: `[1, 1, d]`.
        pages: `[num_layers * num_pages, page_size, 1, c + r]`.
        weights: `mla_jax.layer.Weights`.
        *arrays: cos, sin, block_table, seqlens and num_new, as for `mla_jax.append.append`.
        layer: index of the layer in `pages`.
        num_layers: layers in `pages`.
        norm_epsilon: of the layer's own norm, any where it has none.
        kv_norm_epsilon: of the latent's.
        softmax_scale: factor of the scores.
        interleaved: of the rotation.

    Returns:
        `pages`, the same memory, and `[1, 1, d]`: the layer's output, plus x if it has a norm.
    """
    *always, norm = weights
    operands = (pages, x, *always, *arrays, *([] if norm is None else [norm]))
    workspace = jax.ShapeDtypeStruct((_layer_workspace_bytes(len(weights.w_uk)),), jnp.uint8)
    results = (*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (pages, x)), workspace)
    written, y, _ = jax.ffi.ffi_call(_LAYER, results, input_output_aliases={0: 0})(
        *jax.lax.optimization_barrier(operands),  # as for the append, like that of the results
        layer=np.int32(layer),
        num_layers=np.int32(num_layers),
        num_pages=np.int32(pages.shape[0] // num_layers),
        norm_epsilon=np.float32(norm_epsilon),
        kv_norm_epsilon=np.float32(kv_norm_epsilon),
        softmax_scale=np.float32(softmax_scale),
        interleaved=interleaved,
    )
    return jax.lax.optimization_barrier((written, y))
