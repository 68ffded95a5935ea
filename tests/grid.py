# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""FlashMLA's grid whole, 2336 cases in two dtypes with two kinds of data, on the default device.

    for i in $(seq 0 11); do
        PYTHONPATH=. python tests/grid.py ffi pallas --share $i 12 --limit 200 &
    done; wait

The cases are test_decode.py's GRID and ZEROS, for bfloat16 and float16, with FlashMLA's data and
bounds and with N(0, 1) and ours; what must not be read is poisoned. Several implementations are
also held to each other. Each share draws, runs and compares on the device; its last line says what
was done and how far off the worst result was. The exit status is 1 after a failure, or when the
time limit came first.

One program serves all batches and lengths of a (s_q, heads, causal, dtype): batches are filled up
with empty sequences, and all tables are as wide as the widest. A program per case would compile
for longer than all cases run.
"""

import argparse
import collections
import os
import random
import re
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # shares share a GPU
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")

import jax
import jax.numpy as jnp
import numpy as np
from reference import _BOUNDS, UNUSED, Problem, attend
from test_decode import GRID, ZEROS, Case

import mla_jax

D_K, D_V, PAGE_SIZE = 576, 512, 64
DTYPES = ("bfloat16", "float16")
CHUNK, BATCH = 16, 8  # pages of a sequence that the oracle takes at once; of how many sequences
# FlashMLA's bounds: an element's absolute or relative error, and the difference of the cosine.
FLASHMLA = ((8e-4, 2.01 / 128, 5e-6), (1e-6, 8.01 / 65536, 1e-7))  # of out, of lse


class Group(NamedTuple):
    """The cases that programs are shared by, and their padded batch."""

    batch: int
    s_q: int
    h_q: int
    h_kv: int
    dtype: str

    @property
    def rows(self) -> int:
        """Rows of a KV head in the oracle: filled up, so that few oracles serve all groups."""
        real = self.s_q * self.h_q // self.h_kv
        return min(n for n in (16, 128, 512) if n >= real)


class Sizes(NamedTuple):
    """What all cases have in common: columns of the tables and pages of the pools."""

    width: int
    pages: int


def lengths_of(case: Case) -> np.ndarray:
    """Draws the lengths of a case as FlashMLA does; both values of `causal` have the same."""
    rng = np.random.default_rng(case[:5])
    drawn = np.maximum(rng.normal(case.s_k, case.s_k / 2, case.b), case.s_q).astype(int)
    if case.zeros:
        drawn[rng.random(case.b) < 0.5] = 0
    return drawn if case.varlen else np.full(case.b, case.s_k)


def pages_of(lengths: np.ndarray) -> np.ndarray:
    return -(-lengths // PAGE_SIZE)


# --- Data -----------------------------------------------------------------------------------------


def normal(key: jax.Array, shape: tuple[int, ...], flashmla: Any) -> jax.Array:
    x = jax.random.normal(key, shape)
    return jnp.where(flashmla, jnp.clip(x / 10, -1, 1), x)


@jax.jit(static_argnames=("h_kv", "dtype"))
def draw_pool(key: jax.Array, used: jax.Array, flashmla: Any, *, h_kv: int, dtype: str):
    """Draws a pool; slots from `used[page]` on hold NaN."""
    x = normal(key, (len(used), PAGE_SIZE, h_kv, D_K), flashmla).astype(dtype)
    return jnp.where((jnp.arange(PAGE_SIZE) < used[:, None])[..., None, None], x, jnp.nan)


@jax.jit(static_argnames=("group",))
def draw_q(key: jax.Array, flashmla: Any, *, group: Group) -> tuple[jax.Array, jax.Array]:
    """Draws queries, and gives them also as the oracle's rows `[batch, h_kv, rows, d_k]`."""
    batch, s_q, h_q, h_kv, dtype = group
    q = normal(key, (batch, s_q, h_q, D_K), flashmla).astype(dtype)
    rows = q.reshape(batch, s_q, h_kv, -1, D_K).swapaxes(1, 2).reshape(batch, h_kv, -1, D_K)
    return q, jnp.pad(rows, [(0, 0), (0, 0), (0, group.rows - rows.shape[2]), (0, 0)])


def tables(lengths: np.ndarray, batch: int, sizes: Sizes, rng: np.random.Generator):
    """Deals shuffled pages out.

    Returns:
        The table `[batch, width]`, the lengths `[batch]`, and how many slots of each page are used.
    """
    shuffled = rng.permutation(sizes.pages).astype(np.int32)
    table = np.full((batch, sizes.width), UNUSED, np.int32)
    used = np.zeros(sizes.pages, np.int32)
    for row, n, pages in zip(table, lengths, pages_of(lengths), strict=False):
        row[:pages], shuffled = shuffled[:pages], shuffled[pages:]
        used[row[:pages]] = np.minimum(n - PAGE_SIZE * np.arange(pages), PAGE_SIZE)
    return table, np.pad(lengths, (0, batch - len(lengths))).astype(np.int32), used


# --- The oracle -----------------------------------------------------------------------------------


@jax.jit
def sums(q, k_cache, table, seen, pieces, steps):
    """Attends in float64, without a maximum: its exponents reach far beyond these scores.

    Args:
        q: `[batch, h_kv, rows, d_k]`.
        k_cache: `[pages, page_size, h_kv, d_k]`.
        table: `[batch, width]`, width a multiple of CHUNK.
        seen: `[batch, rows]` how many tokens a row sees.
        pieces: `[2, n * BATCH]` sequence and first page of each piece of a sequence; a sequence
            outside the batch stands for none.
        steps: number of BATCHes of pieces that there are.

    Returns:
        out `[batch, h_kv, rows, d_v]` and lse `[batch, h_kv, rows]`, 0 and +inf for what sees none.
    """

    def step(i, carry):
        total, values = carry
        sequence, page = jax.lax.dynamic_slice_in_dim(pieces, i * BATCH, BATCH, 1)
        column = page[:, None] + jnp.arange(CHUNK)
        ids = table.at[sequence[:, None], column].get(mode="clip")
        tokens = k_cache.at[ids].get(mode="clip").reshape(BATCH, -1, *k_cache.shape[2:])
        position = (column[..., None] * PAGE_SIZE + jnp.arange(PAGE_SIZE)).reshape(BATCH, 1, 1, -1)
        limit = seen.at[sequence].get(mode="clip")[:, None, :, None]
        any_row = (position < limit.max(2, keepdims=True)).reshape(BATCH, -1, 1, 1)
        keys = jnp.where(any_row, tokens, 0).astype(jnp.float64)  # [BATCH, tokens, h_kv, d_k]
        queries = q.at[sequence].get(mode="clip").astype(jnp.float64)
        scores = jnp.einsum("ihrd,ithd->ihrt", queries, keys) * D_K**-0.5
        weights = jnp.where(position < limit, jnp.exp(scores), 0)
        part = jnp.einsum("ihrt,ithd->ihrd", weights, keys[..., :D_V])
        return total.at[sequence].add(weights.sum(3)), values.at[sequence].add(part)

    start = jnp.zeros(q.shape[:3]), jnp.zeros((*q.shape[:3], D_V))
    total, values = jax.lax.fori_loop(0, steps, step, start)
    return values / jnp.where(total > 0, total, 1)[..., None], jnp.where(
        total > 0, jnp.log(total), jnp.inf
    )


def oracle(rows, k_cache, table, lengths: np.ndarray, group: Group, causal: bool):
    """Calls `sums` for a case: says what each row sees, and cuts the sequences into pieces."""
    query = np.arange(group.rows) // (group.h_q // group.h_kv)
    seen = lengths[:, None] - causal * (group.s_q - 1 - query)
    seen = np.where(query < group.s_q, np.maximum(seen, 0), 0)
    cuts = [(i, at) for i, n in enumerate(pages_of(lengths)) for at in range(0, n, CHUNK)]
    pieces = np.full((2, group.batch * table.shape[1] // CHUNK), group.batch)
    pieces[:, : len(cuts)] = np.array(cuts).reshape(-1, 2).T
    with jax.enable_x64(True):
        return sums(rows, k_cache, table, seen, pieces, -(-len(cuts) // BATCH))


def check_oracle() -> None:
    """Holds the oracle to the one of the test suite, which is slow."""
    for group in (Group(4, 2, 6, 3, "bfloat16"), Group(4, 4, 63, 1, "float16")):
        lengths = np.array([1100, 0, 65])
        table, full, used = tables(lengths, 4, Sizes(32, 24), np.random.default_rng(0))
        k_cache = draw_pool(jax.random.key(0), used, False, h_kv=group.h_kv, dtype=group.dtype)
        q, rows = draw_q(jax.random.key(1), False, group=group)
        for causal in (False, True):
            got = oracle(rows, k_cache, table, full, group, causal)
            got = [np.asarray(x) for x in unpack(*got, group=group)]
            problem = Problem(np.asarray(q), np.asarray(k_cache), table, full)
            for x, y in zip(got, attend(problem, causal=causal), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


# --- Comparison -----------------------------------------------------------------------------------


def unpack(out, lse, *, group: Group):
    """Brings the oracle's rows into the op's order."""
    batch, s_q, h_q, h_kv, _ = group
    real = s_q * h_q // h_kv
    out = out[:, :, :real].reshape(batch, h_kv, s_q, -1, D_V).swapaxes(1, 2)
    lse = lse[:, :, :real].reshape(batch, h_kv, s_q, -1).swapaxes(2, 3)
    return out.reshape(batch, s_q, h_q, D_V), lse.reshape(batch, h_q, s_q)


@jax.jit(static_argnames=("group",))
def measure(got, expected, bounds, flashmla, slack, *, group: Group):
    """Measures each result against the oracle, and each against the one before it.

    Returns:
        `[results + pairs, 2, 5]`, of out and of lse: elements out of bounds or not finite, elements
        that are not 0 or +inf where nothing is seen, and the sums of squares of the difference and
        of both results where something is.
    """
    expected = unpack(*expected, group=group)
    nothing = jnp.isinf(expected[1])
    where = (nothing.swapaxes(1, 2)[..., None], nothing)
    got = [tuple(x.astype(jnp.float64) for x in result) for result in got]
    pairs = [(x, expected, 1) for x in got]
    pairs += [(x, y, slack) for x, y in zip(got[1:], got, strict=False)]
    table = []
    for left, right, factor in pairs:
        for x, y, skip, special, bound in zip(
            left, right, where, (0, jnp.inf), bounds, strict=True
        ):
            absolute, relative = bound[0] * factor, bound[1] * factor * jnp.abs(y)
            error = jnp.abs(x - y)
            either = (error <= absolute) | (error <= relative)
            right_ = jnp.where(flashmla, either, error <= absolute + relative)
            table.append((~right_ & ~skip).sum())
            table.append(((x != special) & skip).sum())
            table += [jnp.where(skip, 0, z * z).sum() for z in (error, x, y)]
    return jnp.stack([jnp.asarray(x, jnp.float64) for x in table]).reshape(-1, 2, 5)


def faults(row: np.ndarray, flashmla: bool, dtype: str, slack: int) -> list[str]:
    """Says what is wrong in a row of `measure`; `slack` 2 is the sum of two results' bounds."""
    found = []
    for name, bound, (wrong, special, error, x, y) in zip(
        ("out", "lse"), FLASHMLA, row, strict=True
    ):
        if wrong or special:
            found.append(f"{name}: {wrong:.0f} elements off, {special:.0f} where nothing is seen")
        if flashmla and not error <= bound[2] * slack**2 * (x + y):  # 1 - 2xy / (x^2 + y^2)
            found.append(f"{name}: cosine off by {error / (x + y):.1e}")
        if not flashmla and name == "out" and not error <= (_BOUNDS[dtype][0] * slack) ** 2 * y:
            found.append(f"out: off by {(error / y) ** 0.5:.2e} of its norm")
    return found


# --- The run --------------------------------------------------------------------------------------


def compiled(name: str, group: Group, causal: bool, sizes: Sizes) -> Any:
    """Compiles one implementation for a group."""
    shaped = jax.ShapeDtypeStruct
    arrays = (
        shaped((group.batch, group.s_q, group.h_q, D_K), group.dtype),
        shaped((sizes.pages, PAGE_SIZE, group.h_kv, D_K), group.dtype),
        shaped((group.batch, sizes.width), jnp.int32),
        shaped((group.batch,), jnp.int32),
    )
    call = lambda *x: mla_jax.flash_mla_with_kvcache(  # noqa: E731
        *x, D_V, causal=causal, implementation=name
    )
    return jax.jit(call).lower(*arrays).compile()


class Tally:
    """What was done: cases, failures and the worst error of each implementation and pair."""

    def __init__(self, names: list[str], cases: int) -> None:
        self.names = [*names, *(f"{y}-{x}" for x, y in zip(names[1:], names, strict=False))]
        self.cases, self.done, self.failed = cases, 0, collections.Counter[str]()
        self.worst = collections.defaultdict[tuple[str, str, str], float](float)

    def add(self, case: Case, dtype: str, flashmla: bool, table: np.ndarray) -> None:
        data = "flashmla" if flashmla else "normal"
        self.done += 1
        for name, row in zip(self.names, table, strict=True):
            found = faults(row, flashmla, dtype, slack=2 if "-" in name else 1)
            if found:
                self.failed[name] += 1
                print(f"FAILED {name} {case} {dtype} {data}: {'; '.join(found)}", flush=True)
            kind = (name, dtype, data)
            error = np.sqrt(row[0, 2] / row[0, 4])
            self.worst[kind] = float(np.maximum(self.worst[kind], error))  # NaN if any is

    def __str__(self) -> str:
        worst = ", ".join(f"{' '.join(k)} {v:.2e}" for k, v in sorted(self.worst.items()))
        failed = {name: self.failed[name] for name in self.names}
        return f"{self.done} of {self.cases} cases done; failed {failed}; worst norms: {worst}"


def run(group: Group, cases: list[Case], programs: dict[bool, list[Any]], sizes, tally, end):
    """Runs the cases of a group until the time `end`."""
    drawn = collections.defaultdict(list)
    for case in cases:
        drawn[case._replace(causal=False)].append(case)
    for base, both in drawn.items():
        rng = np.random.default_rng([*base[:6], DTYPES.index(group.dtype)])
        table, lengths, used = tables(lengths_of(base), group.batch, sizes, rng)
        for flashmla in (True, False):
            if time.monotonic() > end:
                return
            keys = jax.random.split(jax.random.key(rng.integers(2**31)))
            kinds = {"h_kv": group.h_kv, "dtype": group.dtype}
            k_cache = draw_pool(keys[0], used, flashmla, **kinds)
            q, rows = draw_q(keys[1], flashmla, group=group)
            for case in both:
                got = [
                    f(q, k_cache, jnp.asarray(table), jnp.asarray(lengths))
                    for f in programs[case.causal]
                ]
                expected = oracle(rows, k_cache, table, lengths, group, case.causal)
                bounds = np.array([_BOUNDS[group.dtype][1:], (2e-5, 8.01 / 65536)])
                bounds = np.array(FLASHMLA)[:, :2] if flashmla else bounds
                with jax.enable_x64(True):
                    result = measure(got, expected, bounds, flashmla, 2, group=group)
                tally.add(case, group.dtype, flashmla, np.asarray(result))
            del q, rows, k_cache, got, expected  # before the next are drawn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("implementations", nargs="+")
    parser.add_argument("--share", nargs=2, type=int, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--cases", default="", help="a regular expression that their names match")
    options = parser.parse_args()
    end = time.monotonic() + options.limit

    cases = [case for case in GRID + ZEROS if re.search(options.cases, str(case))]
    pages = [pages_of(lengths_of(case)) for case in cases]
    width = max(p.max() for p in pages) + 1
    sizes = Sizes(int(-(-width // CHUNK) * CHUNK), int(max(p.sum() for p in pages) + 3))
    groups = collections.defaultdict(list)
    for case in cases:
        for dtype in DTYPES:
            batch = 128 if case.zeros else 64
            groups[Group(batch, case.s_q, case.h_q, case.h_kv, dtype)].append(case)
    mine = sorted(groups)
    random.Random(0).shuffle(mine)  # shares of about the same work
    mine = mine[options.share[0] :: options.share[1]]
    tally = Tally(options.implementations, 2 * sum(len(groups[g]) for g in mine))

    if options.share[0] == 0:
        check_oracle()
    with ThreadPoolExecutor(1) as pool:  # compiles the next group's programs meanwhile
        waiting: dict[Group, dict[bool, list[Future[Any]]]] = {
            group: {
                causal: [
                    pool.submit(compiled, name, group, causal, sizes)
                    for name in options.implementations
                ]
                for causal in sorted({case.causal for case in groups[group]})
            }
            for group in mine
        }
        try:
            for group in mine:
                programs = {
                    causal: [f.result(max(0.0, min(end - time.monotonic(), 1e6))) for f in futures]
                    for causal, futures in waiting.pop(group).items()
                }
                run(group, groups[group], programs, sizes, tally, end)
                print(f"{tally.done} of {tally.cases}", flush=True)
                if time.monotonic() > end:
                    break
        except TimeoutError:
            print("the time limit came while programs were compiled")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    print(f"share {options.share[0]} of {options.share[1]}: {tally}", flush=True)
    return int(tally.done < tally.cases or any(tally.failed.values()))


if __name__ == "__main__":
    sys.exit(main())
