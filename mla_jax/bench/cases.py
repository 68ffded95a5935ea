# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What is measured: shapes, the work they hold, their data, and the float64 answer."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

D_K, D_V = 576, 512  # a cached token of DeepSeek's models: 512 latent channels, 64 rotary ones
PAGE_SIZE = 64
SCALE = D_K**-0.5

# A rotation of this many bytes of cache leaves nothing of a set in a last-level cache of 50 MB.
_ROTATION_BYTES = 150_000_000
_MAX_SETS = 32


@dataclass(frozen=True)
class Shape:
    """The shape of one call of the op; more than one query is causal.

    Attributes:
        b: sequences.
        s_q: queries of each.
        s_k: cached tokens of each, the mean where `varlen`.
        h_q: heads, of one KV head.
        varlen: whether the lengths differ, as in FlashMLA's benchmark.
    """

    b: int
    s_q: int
    s_k: int
    h_q: int
    varlen: bool = False

    def __post_init__(self) -> None:
        sizes = (self.b, self.s_q, self.s_k, self.h_q)
        if min(sizes) < 1 or self.s_k < self.s_q:
            raise ValueError(
                f"shapes: got {','.join(map(str, sizes))}, expected positive b,s_q,s_k,h_q "
                "and s_k at least s_q"
            )

    @property
    def causal(self) -> bool:
        """Whether a query sees only what comes before it."""
        return self.s_q > 1

    def __str__(self) -> str:
        return f"{self.b},{self.s_q},{self.s_k},{self.h_q}" + (" varlen" if self.varlen else "")

    def lengths(self) -> np.ndarray:
        """Returns the tokens of each sequence, `[b]` int32, the same in every call.

        Varied ones are normal with a deviation of half the mean, at least `s_q` each, as in
        FlashMLA's tests (https://github.com/deepseek-ai/FlashMLA).
        """
        if not self.varlen:
            return np.full(self.b, self.s_k, np.int32)
        rng = np.random.default_rng([self.b, self.s_q, self.s_k, self.h_q])
        return np.maximum(rng.normal(self.s_k, self.s_k / 2, self.b), self.s_q).astype(np.int32)

    def flops(self) -> int:
        """Counts the operations of both products over the tokens that each query sees."""
        seen = self.lengths().astype(np.int64)[:, None]
        if self.causal:
            seen = np.maximum(seen - np.arange(self.s_q), 0)
        else:
            seen = np.broadcast_to(seen, (self.b, self.s_q))
        return int(seen.sum()) * 2 * self.h_q * (D_K + D_V)

    def cache_bytes(self, itemsize: int) -> int:
        """Counts the bytes of the cached tokens, each once."""
        return int(self.lengths().sum(dtype=np.int64)) * D_K * itemsize

    def moved_bytes(self, itemsize: int) -> int:
        """Counts the bytes that must move: the cached tokens, the queries and the result."""
        rows = self.b * self.s_q * self.h_q
        return self.cache_bytes(itemsize) + rows * (D_K + D_V) * itemsize


def _grid(b: Sequence[int], s_q: Sequence[int], s_k: Sequence[int], h: Sequence[int]):
    return [Shape(w, x, y, z) for w in b for x in s_q for z in h for y in s_k]


# The grid of docs/performance.md.
GPU_SHAPES = (
    *_grid((128,), (1, 2), (1024, 4096, 16384), (128,)),
    *_grid((128,), (1,), (1024, 4096, 16384), (16, 32, 64)),
    Shape(16, 4, 8192, 16),
    Shape(64, 4, 4096, 32),
    *_grid((1, 4, 16), (1,), (1024, 8192, 65536), (16, 128)),
)
CPU_SHAPES = (
    Shape(1, 1, 1024, 16),
    Shape(8, 1, 4096, 16),
    Shape(4, 2, 1024, 16),
    Shape(2, 1, 2048, 128),
)
_MODEL_HEADS = {"deepseek-v2-lite": 16, "deepseek-v3": 128, "kimi-k2": 64}
MODELS = tuple(_MODEL_HEADS)


def model_shapes(model: str, platform: str) -> list[Shape]:
    """Returns decode steps of a model on one device, smaller on a CPU.

    Raises:
        ValueError: the model has no preset.
    """
    if model not in _MODEL_HEADS:
        raise ValueError(f"model: got {model!r}, expected one of {list(MODELS)}")
    heads = (_MODEL_HEADS[model],)
    if platform == "cpu":
        return _grid((1, 4), (1,), (512, 2048), heads)
    return _grid((1, 16, 128), (1,), (4096, 16384), heads)


def parse_shape(text: str) -> Shape:
    """Reads `b,s_q,s_k,h_q`.

    Raises:
        ValueError: it is not four positive integers.
    """
    try:
        b, s_q, s_k, h_q = map(int, text.split(","))
    except ValueError:
        raise ValueError(
            f"shapes: got {text!r}, expected four integers b,s_q,s_k,h_q such as 128,1,4096,128"
        ) from None
    return Shape(b, s_q, s_k, h_q)


@dataclass(frozen=True)
class Data:
    """The inputs of many calls of one shape, no two of them alike.

    Call `i` takes `queries[i]`, `tables[i]`, `pools[i % len(pools)]` and the common `lengths`. A
    pool holds the used pages and no others; the tables of its calls order them differently.

    Attributes:
        queries: each `[b, s_q, h_q, 576]`.
        pools: each `[num_pages, 64, 1, 576]`.
        tables: each `[b, max_pages_per_seq]` int32, -1 where a sequence has no page.
        lengths: `[b]` int32.
    """

    queries: list[jax.Array]
    pools: list[jax.Array]
    tables: list[jax.Array]
    lengths: jax.Array

    def call(self, i: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns the arrays of call `i` in the order of the op."""
        return self.queries[i], self.pools[i % len(self.pools)], self.tables[i], self.lengths


def num_pools(shape: Shape, itemsize: int) -> int:
    """Counts the pools to rotate so that no call finds its cache in a last-level cache."""
    return min(_MAX_SETS, -(-_ROTATION_BYTES // shape.cache_bytes(itemsize)))


def draw(shape: Shape, calls: int, dtype: jnp.dtype, seed: int = 0) -> Data:
    """Draws the inputs of `calls` calls from N(0, 1), on the default device."""
    lengths = shape.lengths()
    pages = -(-lengths // PAGE_SIZE)
    total = int(pages.sum())
    pools = min(num_pools(shape, dtype.itemsize), calls)
    # "rbg" is the generator of the hardware, many times as fast as the default one.
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), calls + pools)

    def normal(key: jax.Array, *dims: int) -> jax.Array:
        return _normal(key, dims, dtype)

    rng = np.random.default_rng(seed)
    own = np.arange(pages.max()) < pages[:, None]
    tables = []
    for _ in range(calls):
        table = np.full(own.shape, -1, np.int32)
        table[own] = rng.permutation(total)
        tables.append(jnp.asarray(table))
    return Data(
        [normal(key, shape.b, shape.s_q, shape.h_q, D_K) for key in keys[:calls]],
        [normal(key, total, PAGE_SIZE, 1, D_K) for key in keys[calls:]],
        tables,
        jnp.asarray(lengths),
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, dims: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    # In float32: random numbers made in bfloat16 take few values.
    return jax.random.normal(key, dims, jnp.float32).astype(dtype)


def some_sequences(lengths: np.ndarray, count: int = 3) -> np.ndarray:
    """Picks sequences to check: the first, the last, the longest, the shortest, at most `count`."""
    picked = [len(lengths) - 1, 0, int(np.argmax(lengths)), int(np.argmin(lengths))]
    return np.array(sorted(dict.fromkeys(picked[:count])))


def reference(
    q: jax.Array, pool: jax.Array, table: jax.Array, lengths: jax.Array, rows: np.ndarray
) -> np.ndarray:
    """Computes the op in float64 for the sequences `rows`, causal where there are several queries.

    Returns:
        `[len(rows), s_q, h_q, 512]` float64.
    """
    ids, seqlens = np.asarray(table), np.asarray(lengths)
    out = []
    for i in rows:
        length = int(seqlens[i])
        used = ids[i, : -(-length // PAGE_SIZE)]
        keys = np.asarray(pool[used]).astype(np.float64).reshape(-1, D_K)[:length]
        queries = np.asarray(q[i]).astype(np.float64)
        scores = SCALE * np.einsum("shd,nd->shn", queries, keys, optimize=True)
        if len(queries) > 1:
            last = length - len(queries) + np.arange(len(queries))
            hidden = np.arange(length) > last[:, None, None]
            scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out.append(np.einsum("shn,nv->shv", weights, keys[:, :D_V], optimize=True))
    return np.stack(out)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest error of a sequence, its norm over that of the right answer.

    Args:
        got: `[n, s_q, h_q, 512]`.
        expected: the same in float64.

    Returns:
        The error, infinite where `got` is not finite.
    """
    axes = (1, 2, 3)
    error = np.sqrt(((got.astype(np.float64) - expected) ** 2).sum(axes))
    error = (error / np.sqrt((expected**2).sum(axes))).max()
    return float(error) if np.isfinite(error) else float("inf")
