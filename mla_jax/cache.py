# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The paged cache of latents, and its page bookkeeping as pure functions.

One array holds the pages of all layers; a page id names the same page in every layer. A page is
free exactly when no table entry names it, so there is no free list to fall out of step: free pages
are found by `refcounts == 0`, and `refcounts` is counted from the table. Pages become shared by
`fork` and `reorder` alone; `reserve` copies a partly filled page before a slot that shares it may
write there (copy-on-write), so a slot's new tokens always land in pages of its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from mla_jax.append import Pool, append, positions, scatter
from mla_jax.decode import Implementation, check_implementation

_INT32_MAX = 2**31 - 1


class PagePoolFullError(RuntimeError):
    """Raised by `reserve` outside `jit` when new tokens do not fit; nothing has changed."""


# eq=False: arrays have no single truth value, so caches compare by identity.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PagedKVCache:
    """Latents of many sequences, in pages shared by all layers.

    Every method returns a new cache and works inside `jit`, `scan` and `while_loop`; where the old
    one is donated, the pool is updated in place. (Outside `jit`, nothing is donated and a write
    copies the pool.) A slot holds one sequence, or is empty. One step is `reserve` once, then
    `append` once a layer; the other methods belong between steps.

    A step brings `t` columns per slot, and slot i's new tokens are the *last* `num_new[i]` of
    them, at positions `seqlens[i] - num_new[i] .. seqlens[i] - 1`: a ragged step is padded on the
    left, and the last column is always the newest token.

    Attributes:
        pages: `[num_layers * num_pages, page_size, 1, d_k]`, the pool; row `layer * num_pages + id`
            is page `id` of `layer`. What lies past a sequence's length, or in a free page, is
            arbitrary.
        block_table: `[max_seqs, max_pages_per_seq]` int32, the pages of each slot in order, then
            -1.
        seqlens: `[max_seqs]` int32, tokens per slot, those the last `reserve` granted included.
        num_new: `[max_seqs]` int32, tokens the last `reserve` granted.
        refcounts: `[num_pages]` int32, how many table entries name each page; 0 is a free page.
        num_layers: layers in the pool (static).
    """

    pages: jax.Array
    block_table: jax.Array
    seqlens: jax.Array
    num_new: jax.Array
    refcounts: jax.Array
    num_layers: int = dataclasses.field(metadata={"static": True})

    @staticmethod
    def create(
        *,
        num_layers: int,
        num_pages: int,
        max_seqs: int,
        max_pages_per_seq: int,
        page_size: int = 64,
        d_k: int = 576,
        dtype: DTypeLike = jnp.bfloat16,
    ) -> "PagedKVCache":
        """Makes an empty cache.

        Args:
            num_layers: attention layers that share the pool's page ids.
            num_pages: pages per layer.
            max_seqs: slots.
            max_pages_per_seq: width of the table; a slot holds at most `max_pages_per_seq *
                page_size` tokens.
            page_size: tokens per page.
            d_k: width of a latent: kv_lora_rank + qk_rope_head_dim.
            dtype: a floating type.

        Raises:
            ValueError: a size is not a positive int, a product of sizes passes int32, or `dtype` is
                not floating.
        """
        _require_positive(
            num_layers=num_layers,
            num_pages=num_pages,
            max_seqs=max_seqs,
            max_pages_per_seq=max_pages_per_seq,
            page_size=page_size,
            d_k=d_k,
        )
        _require_int32("num_layers * num_pages", num_layers * num_pages)
        _require_int32("max_pages_per_seq * page_size", max_pages_per_seq * page_size)
        _require_int32("max_seqs * max_pages_per_seq", max_seqs * max_pages_per_seq)
        _require_floating(dtype)
        return PagedKVCache(
            pages=jnp.zeros((num_layers * num_pages, page_size, 1, d_k), dtype),
            block_table=jnp.full((max_seqs, max_pages_per_seq), -1, jnp.int32),
            seqlens=jnp.zeros(max_seqs, jnp.int32),
            num_new=jnp.zeros(max_seqs, jnp.int32),
            refcounts=jnp.zeros(num_pages, jnp.int32),
            num_layers=num_layers,
        )

    @property
    def num_pages(self) -> int:
        """Pages per layer."""
        return self.refcounts.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.pages.shape[1]

    @property
    def max_seqs(self) -> int:
        """Slots."""
        return self.block_table.shape[0]

    @property
    def max_pages_per_seq(self) -> int:
        """Width of the table."""
        return self.block_table.shape[1]

    @property
    def d_k(self) -> int:
        """Width of a latent."""
        return self.pages.shape[3]

    @property
    def dtype(self) -> np.dtype:
        """Type of the latents."""
        return self.pages.dtype

    @property
    def num_free_pages(self) -> jax.Array:
        """Pages that no table entry names: an int32 scalar, traced inside `jit`."""
        return jnp.sum(self.refcounts == 0, dtype=jnp.int32)

    def reserve(self, num_tokens: ArrayLike) -> tuple["PagedKVCache", jax.Array]:
        """Makes room for new tokens at the end of each slot, in every layer.

        Slots are served in slot order while pages last. A slot takes a page for each one its new
        tokens open, and one more where they would go into a page that other slots still hold: that
        page's contents are then copied. A slot that does not fit, in the pool or in its row of the
        table, is refused whole, leaves nothing behind, and does not stop later slots that fit. The
        cost does not depend on `num_layers` but for the pages really copied.

        Args:
            num_tokens: `[max_seqs]` integers, at least 0. 0 is always granted. Inside `jit` a
                negative number is refused like one that does not fit.

        Returns:
            The cache with `seqlens` advanced and `num_new` set (0 where refused), and `granted`
            `[max_seqs]` bool.

        Raises:
            PagePoolFullError: outside `jit`, if any slot is refused.
            ValueError: `num_tokens` has another shape or type, or outside `jit` is negative.
        """
        wanted = _int_array("num_tokens", num_tokens, (self.max_seqs,), 2**31)
        cache, granted = _reserve(self, wanted)
        if _is_concrete(granted) and not np.all(granted):
            raise PagePoolFullError(_explain_refusal(self, np.asarray(wanted), np.asarray(granted)))
        return cache, granted

    def append(self, layer: ArrayLike, latents: ArrayLike) -> "PagedKVCache":
        """Writes a layer's latents of the tokens that the last `reserve` granted.

        Args:
            layer: index of the layer, may be traced. Inside `jit` nothing is written for a layer
                out of range.
            latents: `[max_seqs, t, d_k]` of the cache's dtype. The last `num_new[i]` columns of
                slot i are written and the others dropped, whatever they hold. A slot with
                `num_new[i] > t` (inside `jit`) gets its last t tokens only.

        Raises:
            ValueError: `latents` has another shape or dtype, `layer` is not an integer scalar, or
                outside `jit`: `layer` is out of range, or a slot was granted more than t tokens.
        """
        layer = _int_array("layer", layer, (), self.num_layers)
        latents = jnp.asarray(latents)
        self._check_latents(latents, self.dtype)
        place = (layer, 0, 0)
        tokens = (self.block_table, self.seqlens, self.num_new)
        pages = scatter(self.pages, latents, *tokens, place, pool=self._pool)
        return dataclasses.replace(self, pages=pages)

    def append_projected(
        self,
        layer: ArrayLike,
        latents: ArrayLike,
        scale: ArrayLike,
        cos: ArrayLike,
        sin: ArrayLike,
        *,
        epsilon: float = 1e-6,
        interleaved: bool = True,
        implementation: Implementation = None,
    ) -> "PagedKVCache":
        """Finishes latents as a projection gives them, and writes them as `append` does.

        The first c channels get an RMS norm with weight `scale`, the other r are rotated, both in
        float32 (DeepSeek-V2, arXiv:2405.04434, section 2.1). Where implementation "ffi" has a
        kernel for it, that does all, in place and with one rounding: on CPUs for latents of the
        cache's dtype, on Hopper GPUs if moreover that is bfloat16 or float16, c 512 and r 64.

        Args:
            layer: as for `append`.
            latents: `[max_seqs, t, d_k]` floating, `d_k = c + r`.
            scale: `[c]` floating.
            cos: `[max_seqs, t, r / 2]` float32, of `positions(t)`: `mla_jax.rope.rope_tables`.
            sin: like cos.
            epsilon: of the norm, a Python number.
            interleaved: whether rotated pairs are neighbours, or halves of the r channels.
            implementation: as for `flash_mla_with_kvcache`; of several names, "ffi" or plain XLA.

        Raises:
            ValueError: a shape or dtype is another, or as `append`.
        """
        layer = _int_array("layer", layer, (), self.num_layers)
        latents, scale, cos, sin = map(jnp.asarray, (latents, scale, cos, sin))
        self._check_latents(latents, jnp.floating)
        c = scale.size
        if scale.ndim != 1 or c < 1 or c > self.d_k or (self.d_k - c) % 2:
            raise ValueError(
                f"scale: got shape {scale.shape}, expected (c,) with d_k - c = {self.d_k} - c even"
            )
        angles = (*latents.shape[:2], (self.d_k - c) // 2)
        for name, x, shape, dtype in (
            ("scale", scale, scale.shape, jnp.floating),
            ("cos", cos, angles, jnp.float32),
            ("sin", sin, angles, jnp.float32),
        ):
            if x.shape != shape or not jnp.issubdtype(x.dtype, dtype):
                raise ValueError(
                    f"{name}: got {x.dtype} of shape {x.shape}, "
                    f"expected {dtype.__name__} of shape {shape}"
                )
        pages = append(
            self.pages,
            latents,
            scale,
            cos,
            sin,
            self.block_table,
            self.seqlens,
            self.num_new,
            layer,
            pool=self._pool,
            epsilon=epsilon,
            interleaved=interleaved,
            fused="ffi" in check_implementation(implementation),
        )
        return dataclasses.replace(self, pages=pages)

    @property
    def _pool(self) -> Pool:
        return Pool(self.num_layers, self.num_pages, self.page_size)

    def _check_latents(self, latents: jax.Array, dtype: Any) -> None:
        if latents.ndim != 3 or latents.shape[::2] != (self.max_seqs, self.d_k):
            raise ValueError(
                f"latents: got shape {latents.shape}, expected "
                f"(max_seqs, t, d_k) = ({self.max_seqs}, t, {self.d_k})"
            )
        if not jnp.issubdtype(latents.dtype, dtype):
            expected = getattr(dtype, "name", "a floating type")
            raise ValueError(f"latents: got dtype {latents.dtype}, expected {expected}")
        self.check_columns(latents.shape[1])

    def check_columns(self, t: int) -> None:
        """Raises ValueError if, outside `jit`, a slot was granted more than t tokens."""
        if _is_concrete(self.num_new) and np.any(np.asarray(self.num_new) > t):
            raise ValueError(
                f"latents: got t = {t} columns, expected at least "
                f"{np.max(np.asarray(self.num_new))}, the tokens granted to one slot"
            )

    def positions(self, t: int) -> jax.Array:
        """Positions of a step's `t` columns: `[max_seqs, t]` int32, negative only in padding."""
        _require_positive(t=t)
        return positions(self.seqlens, t)

    def layer_table(self, layer: ArrayLike) -> jax.Array:
        """Table of one layer's rows of `pages`, as the op takes it.

        Args:
            layer: index of the layer, may be traced.

        Returns:
            `[max_seqs, max_pages_per_seq]` int32. Entries past a slot's last page hold any value;
            the op never reads them.

        Raises:
            ValueError: `layer` is not an integer scalar, or outside `jit` is out of range.
        """
        layer = _int_array("layer", layer, (), self.num_layers)
        return self.block_table + layer * self.num_pages

    def release(self, mask: ArrayLike) -> "PagedKVCache":
        """Empties the slots where `mask` `[max_seqs]` bool is True; pages no one holds are free.

        Raises:
            ValueError: `mask` has another shape or is not bool.
        """
        mask = jnp.asarray(mask)
        if mask.shape != (self.max_seqs,) or mask.dtype != jnp.bool_:
            raise ValueError(
                f"mask: got {mask.dtype} of shape {mask.shape}, "
                f"expected bool of shape ({self.max_seqs},)"
            )
        return self._shorten(jnp.where(mask, 0, self.seqlens), jnp.where(mask, 0, self.num_new))

    def truncate(self, seqlens: ArrayLike) -> "PagedKVCache":
        """Keeps at most the first `seqlens[i]` tokens of slot i (rejected speculative tokens).

        Args:
            seqlens: `[max_seqs]` integers, at least 0. A slot that is shorter stays as it is.
                Inside `jit` a negative number counts as 0.

        Returns:
            The cache, pages no one holds freed, `num_new` 0 in every slot.

        Raises:
            ValueError: `seqlens` has another shape or type, or outside `jit` is negative.
        """
        seqlens = _int_array("seqlens", seqlens, (self.max_seqs,), 2**31)
        kept = jnp.maximum(jnp.minimum(self.seqlens, seqlens), 0)
        return self._shorten(kept, jnp.zeros_like(self.num_new))

    def fork(self, src: ArrayLike, dst: ArrayLike) -> "PagedKVCache":
        """Lets slots `dst` hold what slots `src` hold, sharing the pages; nothing is copied.

        Args:
            src: a slot, or `[n]` slots; one may occur many times. Inside `jit` a slot out of range
                counts as an empty one.
            dst: empty slots, each once, of the shape of `src`. Inside `jit` a slot that holds
                tokens is released first, and a slot out of range is skipped.

        Returns:
            The cache, `num_new` 0 in slots `dst`.

        Raises:
            ValueError: the shapes differ or have more than one dimension, the type is not integer,
                or outside `jit`: a slot is out of range, or `dst` names one twice or one with
                tokens.
        """
        shape = np.shape(src)
        if len(shape) > 1:
            raise ValueError(f"src: got shape {shape}, expected a slot or one dimension of slots")
        src = _int_array("src", src, shape, self.max_seqs)
        dst = _int_array("dst", dst, shape, self.max_seqs)
        if _is_concrete(dst):
            slots, count = np.unique(np.asarray(dst), return_counts=True)
            if np.any(count > 1):
                raise ValueError(f"dst: got slots {slots[count > 1]} twice, expected each once")
            if _is_concrete(self.seqlens) and np.any(held := np.asarray(self.seqlens)[slots] > 0):
                raise ValueError(f"dst: got slots {slots[held]} with tokens, expected empty slots")
        # A negative index would count from the end; `max_seqs` is outside, and so dropped.
        dst = jnp.where(dst < 0, self.max_seqs, dst)
        source = jnp.arange(self.max_seqs, dtype=jnp.int32).at[dst].set(src, mode="drop")
        return self._take(source)

    def reorder(self, src: ArrayLike) -> "PagedKVCache":
        """Lets each slot i hold what slot `src[i]` held before (beam search), sharing the pages.

        Args:
            src: `[max_seqs]` slots; one may occur many times or not at all. Inside `jit` a slot out
                of range counts as an empty one.

        Returns:
            The cache, pages no one holds freed, `num_new` 0 where a slot takes another's tokens.

        Raises:
            ValueError: `src` has another shape or type, or outside `jit` is out of range.
        """
        return self._take(_int_array("src", src, (self.max_seqs,), self.max_seqs))

    @staticmethod
    def bytes_per_token(*, num_layers: int, d_k: int = 576, dtype: DTypeLike = jnp.bfloat16) -> int:
        """Bytes one token takes in all layers: `num_layers * d_k * itemsize`.

        Raises:
            ValueError: a size is not a positive int, or `dtype` is not floating.
        """
        _require_positive(num_layers=num_layers, d_k=d_k)
        return num_layers * d_k * _require_floating(dtype).itemsize

    @staticmethod
    def tokens_that_fit(
        num_bytes: int,
        *,
        num_layers: int,
        page_size: int = 64,
        d_k: int = 576,
        dtype: DTypeLike = jnp.bfloat16,
    ) -> int:
        """Tokens a pool of `num_bytes` holds, in whole pages (the table's few bytes not counted).

        `num_pages` of that pool is this number over `page_size`.

        Raises:
            ValueError: a size is not a positive int, or `dtype` is not floating.
        """
        _require_positive(num_bytes=num_bytes, page_size=page_size)
        page = page_size * PagedKVCache.bytes_per_token(num_layers=num_layers, d_k=d_k, dtype=dtype)
        return num_bytes // page * page_size

    def _shorten(self, seqlens: jax.Array, num_new: jax.Array) -> "PagedKVCache":
        """Keeps the first `seqlens` tokens, at most those held, and the pages they lie in."""
        kept = jnp.arange(self.max_pages_per_seq) < _cdiv(seqlens, self.page_size)[:, None]
        return self._with_table(jnp.where(kept, self.block_table, -1), seqlens, num_new)

    def _take(self, source: jax.Array) -> "PagedKVCache":
        """Slot i gets the pages of slot `source[i]`, or none where that is out of range."""
        exists = (source >= 0) & (source < self.max_seqs)
        row = jnp.where(exists, source, 0)
        # The tokens just granted are written once, by the slot they were granted to.
        stays = source == jnp.arange(self.max_seqs)
        return self._with_table(
            jnp.where(exists[:, None], self.block_table[row], -1),
            jnp.where(exists, self.seqlens[row], 0),
            jnp.where(stays, self.num_new, 0),
        )

    def _with_table(
        self, block_table: jax.Array, seqlens: jax.Array, num_new: jax.Array
    ) -> "PagedKVCache":
        """The cache with another table, and the reference counts that follow from it."""
        page = jnp.where(block_table < 0, self.num_pages, block_table)
        refcounts = jnp.zeros_like(self.refcounts).at[page].add(1, mode="drop")
        return dataclasses.replace(
            self, block_table=block_table, seqlens=seqlens, num_new=num_new, refcounts=refcounts
        )


# granted, first, cost: see `_plan`.
_Plan = tuple[jax.Array, jax.Array, jax.Array]


# Jitted so that a call outside `jit` compiles its loops once and not each time.
@jax.jit
def _reserve(cache: PagedKVCache, wanted: jax.Array) -> tuple[PagedKVCache, jax.Array]:
    """`PagedKVCache.reserve` without the exception.

    A set of granted slots fixes what each takes (`_plan`). The loop starts from all slots that fit
    their row and strikes those that overdraw the pool, until the rest fit: no iteration where all
    fit, which is the common step, and one where the pool is empty.
    """
    num_free = cache.num_free_pages
    # A difference, since seqlens + wanted can pass int32.
    room = cache.max_pages_per_seq * cache.page_size - cache.seqlens
    fits_row = (wanted >= 0) & (wanted <= room)

    def overdrawn(state: _Plan) -> jax.Array:
        _, _, cost = state
        return jnp.sum(cost) > num_free

    def strike(state: _Plan) -> _Plan:
        granted, _, cost = state
        total = jnp.cumsum(cost)
        fits = total <= num_free
        # Slots up to the first that does not fit are settled. Striking it leaves `left` pages to
        # those after it, and can only raise their cost, so that any that costs more is out too.
        left = num_free - jnp.max(jnp.where(fits, total, 0))
        granted &= fits | (cost <= left)
        return _plan(cache, wanted, granted)

    granted, first, cost = lax.while_loop(overdrawn, strike, _plan(cache, wanted, fits_row))

    # The k-th free page, and for each table entry which of the pages taken it gets.
    is_free = cache.refcounts == 0
    rank = jnp.where(is_free, jnp.cumsum(is_free, dtype=jnp.int32) - 1, cache.num_pages)
    page_ids = jnp.arange(cache.num_pages, dtype=jnp.int32)
    free_pages = jnp.zeros_like(page_ids).at[rank].set(page_ids, mode="drop")
    nth = jnp.arange(cache.max_pages_per_seq, dtype=jnp.int32) - first[:, None]
    start = jnp.cumsum(cost) - cost
    table = jnp.where(
        (nth >= 0) & (nth < cost[:, None]),
        free_pages.at[start[:, None] + nth].get(mode="clip"),
        cache.block_table,
    )

    # Copy-on-write: the page at `first` was held before. The loop runs once a page really copied.
    copies = first < _cdiv(cache.seqlens, cache.page_size)
    slots = jnp.nonzero(copies, size=cache.max_seqs, fill_value=0)[0]
    from_page = cache.block_table[slots, first[slots]]
    to_page = table[slots, first[slots]]
    # The pool keeps its shape here: for a view with an axis of layers XLA may copy it whole.
    layer_start = jnp.arange(cache.num_layers, dtype=jnp.int32) * cache.num_pages

    def copy_page(n: jax.Array, pages: jax.Array) -> jax.Array:
        copied = pages[layer_start + from_page[n]]
        return pages.at[layer_start + to_page[n]].set(copied, unique_indices=True)

    num_copies = jnp.sum(copies, dtype=jnp.int32)
    pages = lax.fori_loop(0, num_copies, copy_page, cache.pages)

    num_new = jnp.where(granted, wanted, 0)
    cache = dataclasses.replace(cache, pages=pages)
    return cache._with_table(table, cache.seqlens + num_new, num_new), granted


def _plan(cache: PagedKVCache, wanted: jax.Array, granted: jax.Array) -> _Plan:
    """What each slot takes, if the slots `granted` grow in slot order and no others.

    A slot that writes into its last page must first have it alone: it takes a copy if others hold
    the page when its turn comes. Those before it that write there have left for their own copies,
    so the last holder, if all write, keeps the page.

    Returns:
        `granted`, and `[max_seqs]` int32 each: `first`, the first table entry that gets a new page
        (a page is copied where this is one of the entries held), and `cost`, how many get one.
    """
    held = _cdiv(cache.seqlens, cache.page_size)
    last = jnp.take_along_axis(cache.block_table, held[:, None] - 1, axis=1, mode="clip")[:, 0]
    grows = granted & (wanted > 0)
    writes = grows & (cache.seqlens % cache.page_size > 0)
    same_page = (last[:, None] == last) & writes
    left_before = jnp.sum(jnp.tril(same_page, -1), axis=1, dtype=jnp.int32)
    copies = writes & (cache.refcounts[last] - left_before > 1)
    first = held - copies
    end = jnp.where(grows, _cdiv(cache.seqlens + wanted, cache.page_size), held)
    return granted, first, end - first


def _explain_refusal(cache: PagedKVCache, wanted: np.ndarray, granted: np.ndarray) -> str:
    """Says which slots `reserve` refused and why."""
    capacity = cache.max_pages_per_seq * cache.page_size
    total = np.asarray(cache.seqlens).astype(np.int64) + wanted
    if np.any(too_long := total > capacity):
        slot = int(np.argmax(too_long))
        return (
            f"slot {slot} would hold {total[slot]} tokens, "
            f"{-(-total[slot] // cache.page_size)} pages of {cache.page_size}; "
            f"its row of the table has {cache.max_pages_per_seq} (max_pages_per_seq)"
        )
    *_, cost = _plan(cache, jnp.asarray(wanted), jnp.ones(cache.max_seqs, bool))
    return (
        f"the new tokens need {np.sum(cost)} pages, {cache.num_free_pages} of "
        f"{cache.num_pages} are free; slots {np.flatnonzero(~granted).tolist()} do not fit"
    )


def _cdiv(x: jax.Array, y: int) -> jax.Array:
    """Quotient of x >= 0 by y, rounded up; this form does not overflow."""
    return (x - 1) // y + 1


def _is_concrete(x: object) -> bool:
    return not isinstance(x, jax.core.Tracer)


def _int_array(name: str, value: ArrayLike, shape: tuple[int, ...], end: int) -> jax.Array:
    """Checks an integer argument's type, shape and, outside `jit`, range `[0, end)`; as int32."""
    array: Any = np.asarray(value) if _is_concrete(value) else value
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name}: got dtype {array.dtype}, expected integers")
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {shape}")
    if _is_concrete(value) and np.any(wrong := (array < 0) | (array >= end)):
        raise ValueError(f"{name}: got {array[wrong].tolist()}, expected 0 <= {name} < {end}")
    return jnp.asarray(array, jnp.int32)


def _require_positive(**sizes: object) -> None:
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}: got {size!r}, expected an int of at least 1")


def _require_int32(name: str, number: int) -> None:
    if number > _INT32_MAX:
        raise ValueError(f"{name}: got {number}, expected at most {_INT32_MAX} (int32)")


def _require_floating(dtype: DTypeLike) -> np.dtype:
    result = jnp.dtype(dtype)
    if not jnp.issubdtype(result, jnp.floating):
        raise ValueError(f"dtype: got {result}, expected a floating type")
    return result
