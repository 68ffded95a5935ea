# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What the op and the append are held to: float64 oracles, poisoned inputs, the comparisons.

The oracles are NumPy and share no code with the package.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

UNUSED = 2147480000  # FlashMLA's choice for table entries that no one may follow


@dataclass(frozen=True)
class Problem:
    """The array arguments of one call of the op, in its order, and the width of the values.

    Attributes:
        q: `[b, s_q, h_q, d_k]`.
        k_cache: `[num_pages, page_size, h_kv, d_k]`.
        block_table: `[b, max_pages_per_seq]` int32.
        cache_seqlens: `[b]` int32.
        head_dim_v: width of the values.
    """

    q: np.ndarray
    k_cache: np.ndarray
    block_table: np.ndarray
    cache_seqlens: np.ndarray
    head_dim_v: int = 512

    def arrays(self) -> tuple[Any, ...]:
        """Returns the four arrays as JAX holds them, in the order of the op."""
        fields = (self.q, self.k_cache, self.block_table, self.cache_seqlens)
        return tuple(jnp.asarray(x) for x in fields)

    def rows(self, index: Any) -> "Problem":
        """Returns the problem of the sequences `index` alone, over the same pool."""
        return replace(
            self,
            q=self.q[index],
            block_table=self.block_table[index],
            cache_seqlens=self.cache_seqlens[index],
        )


def problem(
    lengths: Sequence[int],
    *,
    seed: int | Sequence[int] = 0,
    s_q: int = 1,
    h_q: int = 4,
    h_kv: int = 1,
    d_k: int = 576,
    d_v: int = 512,
    page_size: int = 64,
    width: int | None = None,
    num_pages: int | None = None,
    dtype: Any = jnp.bfloat16,
    flashmla: bool = False,
    poison: float = np.nan,
) -> Problem:
    """Draws a problem in which all that must not be read is poisoned.

    The pages of the sequences are shuffled over the pool; slots past a length and pages of no
    sequence hold the poison; table entries past the last used page are 2147480000.

    Args:
        lengths: the tokens of each sequence, 0 or more.
        seed: of the random numbers.
        s_q: queries per sequence.
        h_q: query heads.
        h_kv: KV heads.
        d_k: width of queries and keys.
        d_v: width of the values.
        page_size: tokens per page.
        width: columns of the table; by default one more than needed.
        num_pages: pages of the pool; by default three more than needed.
        dtype: of queries and cache.
        flashmla: draws as FlashMLA's tests do, N(0, 0.01) clamped to [-1, 1], instead of N(0, 1).
        poison: what unused slots hold.
    """
    rng = np.random.default_rng(seed)

    # A bank of random numbers, read from random places on: the largest cases take a billion.
    bank = rng.standard_normal(2**20 + 7, dtype=np.float32)
    bank = (np.clip(bank / 10, -1, 1) if flashmla else bank).astype(dtype)

    def draw(*shape: int) -> np.ndarray:
        return np.resize(bank[rng.integers(len(bank) // 2) :], shape)

    pages = [-(-n // page_size) for n in lengths]
    width = max(pages) + 1 if width is None else width
    num_pages = sum(pages) + 3 if num_pages is None else num_pages
    shuffled = rng.permutation(num_pages).astype(np.int32)
    table = np.full((len(lengths), width), UNUSED, np.int32)
    k_cache = np.full((num_pages, page_size, h_kv, d_k), poison, dtype)
    slots = k_cache.reshape(-1, h_kv, d_k)
    for i, (n, used) in enumerate(zip(lengths, pages, strict=True)):
        ids, shuffled = shuffled[:used], shuffled[used:]
        table[i, :used] = ids
        slots[(ids[:, None] * page_size + np.arange(page_size)).reshape(-1)[:n]] = draw(
            n, h_kv, d_k
        )
    q = draw(len(lengths), s_q, h_q, d_k)
    return Problem(q, k_cache, table, np.asarray(lengths, np.int32), d_v)


def attend(
    p: Problem, *, softmax_scale: float | None = None, causal: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the op in float64, query by query.

    A length counts within [0, the table's capacity]; a page id outside the pool names zeros.

    Args:
        p: the problem.
        softmax_scale: factor of the scores, by default `d_k ** -0.5`.
        causal: query j sees the first `length - s_q + j + 1` tokens.

    Returns:
        out `[b, s_q, h_q, d_v]` and lse `[b, h_q, s_q]`, float64; 0 and +inf where nothing is seen.
    """
    b, s_q, h_q, d_k = p.q.shape
    num_pages, page_size, h_kv, _ = p.k_cache.shape
    scale = 1 / np.sqrt(d_k) if softmax_scale is None else softmax_scale
    group = h_q // h_kv
    out = np.zeros((b, s_q, h_q, p.head_dim_v))
    lse = np.full((b, h_q, s_q), np.inf)
    for i in range(b):
        length = min(max(int(p.cache_seqlens[i]), 0), p.block_table.shape[1] * page_size)
        ids = p.block_table[i, : -(-length // page_size)]
        inside = (ids >= 0) & (ids < num_pages)
        pages = np.zeros((len(ids), page_size, h_kv, d_k))
        pages[inside] = p.k_cache[ids[inside]]
        tokens = pages.reshape(-1, h_kv, d_k)[:length]
        for kv in range(h_kv):
            heads = slice(kv * group, (kv + 1) * group)
            keys = tokens[:, kv]
            scores = scale * (p.q[i, :, heads].reshape(-1, d_k).astype(np.float64) @ keys.T)
            for j, row in enumerate(scores.reshape(s_q, group, length)):
                seen = length - s_q + j + 1 if causal else length
                if seen <= 0:
                    continue
                top = row[:, :seen].max(axis=1, keepdims=True)
                weights = np.exp(row[:, :seen] - top)
                total = weights.sum(axis=1, keepdims=True)
                out[i, j, heads] = weights @ keys[:seen, : p.head_dim_v] / total
                lse[i, heads, j] = (top + np.log(total))[:, 0]
    return out, lse


def append(
    pages: Any,
    operands: Sequence[Any],
    block_table: Any,
    seqlens: Any,
    num_new: Any,
    layer: int,
    num_pages: int,
    *,
    interleaved: bool,
    epsilon: float = 1e-6,
) -> np.ndarray:
    """Finishes latents and writes them to their pages in float64, token by token.

    Args:
        pages: `[num_layers * num_pages, page_size, 1, c + r]`, before.
        operands: latents `[b, t, c + r]`, scale `[c]`, cos and sin `[b, t, r / 2]`.
        block_table: `[b, max_pages_per_seq]`; what is none of the layer's `num_pages` is dropped.
        seqlens: `[b]`, the new tokens included; those past the table's end are dropped.
        num_new: `[b]`, how many of the last columns count.
        layer: dropped if the pool has none such.
        num_pages: of a layer.
        interleaved: whether rotated pairs are neighbours, or halves of the r channels.
        epsilon: of the norm.
    """
    latents, scale, cos, sin = (np.asarray(x, np.float64) for x in operands)
    pages, table = np.asarray(pages, np.float64).copy(), np.asarray(block_table)
    t, c, page_size = latents.shape[1], len(scale), pages.shape[1]
    if not 0 <= layer < len(pages) // num_pages:
        return pages
    for i, (length, new) in enumerate(zip(seqlens, num_new, strict=True)):
        for j in range(max(t - int(new), 0), t):
            position = int(length) - t + j
            if not 0 <= position < table.shape[1] * page_size:
                continue
            page = int(table[i, position // page_size])
            if not 0 <= page < num_pages:
                continue
            x = latents[i, j]
            first, second = (x[c::2], x[c + 1 :: 2]) if interleaved else np.split(x[c:], 2)
            turned = (first + 1j * second) * (cos[i, j] + 1j * sin[i, j])
            halves = np.stack([turned.real, turned.imag], axis=-1 if interleaved else 0)
            normed = x[:c] / np.sqrt(np.mean(x[:c] ** 2) + epsilon) * scale
            row = pages[layer * num_pages + page]
            row[position % page_size, 0] = np.concatenate([normed, halves.reshape(-1)])
    return pages


def assert_rounded(got: Any, want: np.ndarray) -> None:
    """Each number is within half a step of its format, and what was not written kept its bits."""
    half = float(jnp.finfo(got.dtype).eps) / 2
    got = np.asarray(got, np.float64)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    error = np.nan_to_num(abs(got - want))
    assert (error <= half * np.nan_to_num(abs(want)) * 1.01 + 3e-6).all()


def assert_as_flashmla(got: tuple[Any, Any], expected: tuple[np.ndarray, np.ndarray]) -> None:
    """Asserts FlashMLA's own bounds; an element passes by either the absolute or the relative."""
    for name, x, y, absolute, relative, cosine in (
        ("out", got[0], expected[0], 8e-4, 2.01 / 128, 5e-6),
        ("lse", got[1], expected[1], 1e-6, 8.01 / 65536, 1e-7),
    ):
        x, y = _finite(name, x, y)
        error = np.abs(x - y)
        wrong = (error > absolute) & (error > relative * np.abs(y))
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} off by {error[wrong].max()}"
        squares = (x * x).sum() + (y * y).sum()
        difference = 1 - 2 * (x * y).sum() / squares if squares else 0.0
        assert difference < cosine, f"{name}: cosine difference {difference}"


# dtype: (norm of the error relative to the result's, absolute and relative error of an element)
_BOUNDS = {
    "bfloat16": (4e-3, 5e-3, 2 / 128),
    "float16": (5e-4, 1e-3, 2 / 1024),
    "float32": (2e-6, 1e-5, 1e-5),
}


def assert_close(got: tuple[Any, Any], expected: tuple[np.ndarray, np.ndarray]) -> None:
    """Asserts that `(out, lse)` of N(0, 1) inputs is as near as the dtype of `out` allows."""
    norm, absolute, relative = _BOUNDS[str(got[0].dtype)]
    out, expected_out = _finite("out", got[0], expected[0])
    error = np.linalg.norm(out - expected_out)
    assert error <= norm * np.linalg.norm(expected_out), (
        f"out: off by {error / np.linalg.norm(expected_out):.2e} of its norm"
    )
    np.testing.assert_allclose(out, expected_out, relative, absolute, err_msg="out")
    lse, expected_lse = _finite("lse", got[1], expected[1])
    np.testing.assert_allclose(lse, expected_lse, 8.01 / 65536, 2e-5, err_msg="lse")


def assert_same_bits(got: Any, expected: Any) -> None:
    """Asserts that two tuples of arrays hold the same bits."""
    for x, y in zip(got, expected, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes(), f"{(x != y).sum()} of {x.size} elements differ"


def _finite(name: str, x: Any, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Checks shape and the places of what is not finite, and returns both arrays without it."""
    x = np.asarray(x).astype(np.float64)
    assert x.shape == y.shape, name
    special = ~np.isfinite(y)
    np.testing.assert_array_equal(x[special], y[special], err_msg=name)
    assert np.isfinite(x[~special]).all(), f"{name}: {(~np.isfinite(x)).sum()} NaN or infinite"
    return np.where(special, 0, x), np.where(special, 0, y)
