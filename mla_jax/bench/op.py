# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""`mla-jax bench op`: one call of the op by everything that can run it here, shape by shape."""

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.bench import cases
from mla_jax.bench.cases import Data, Shape
from mla_jax.bench.peers import PEERS, PeerVariant
from mla_jax.bench.peers import unsupported_reason as peer_reason
from mla_jax.bench.runs import check_dtype, compile_all, one_line
from mla_jax.bench.timing import (
    PROGRAM,
    Ceilings,
    JaxVariant,
    Variant,
    interleave,
    looped,
    measure_ceilings,
)
from mla_jax.decode import check_implementation, explain, flash_mla_with_kvcache

# Error of a sequence, relative to its norm, above which a result counts as wrong. A right kernel is
# off by half as much; float32 leaves room for the shorter format in which GPUs multiply.
BOUNDS = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 2e-3}
# XLA compiles loops for each call of `xla`, so it gets one, whose cache may stay near where it is
# small: that favours `xla`.
_MAX_CALLS = {"xla": 1}
_SLOWER = {"xla": 40}  # times a fused kernel's time, as it comes out for most shapes
INVARIANT = "-invariant"  # behind the name of one of ours: called with batch_invariant=True

Tick = Callable[[str], None]
Programs = dict[tuple[Shape, str], Any]


@dataclass(frozen=True)
class Result:
    """What one variant gave at one shape.

    Attributes:
        us: microseconds of a call, the median over rounds; None where noise covers it.
        us_low: the lower quartile.
        us_high: the upper quartile.
        of_floor: floor over `us`: 1 is the most the device gives.
        error: largest relative error of the sequences checked against float64.
        correct: whether it is within the bound of the dtype.
        calls: calls in the program that was timed.
    """

    us: float | None
    us_low: float | None
    us_high: float | None
    of_floor: float | None
    error: float
    correct: bool
    calls: int


@dataclass(frozen=True)
class Row:
    """The results at one shape.

    Attributes:
        shape: of the call.
        tokens: cached tokens of all sequences.
        bytes: that must move.
        flops: that must be done.
        floor_us: the larger of both bounds, by the ceilings of this run.
        results: by name.
        reasons: why the others gave none, by name.
    """

    shape: Shape
    tokens: int
    bytes: int
    flops: int
    floor_us: float
    results: dict[str, Result]
    reasons: dict[str, str]

    def speedup(self, name: str, other: str) -> float | None:
        """Returns how many times as fast `name` is as `other`, if both are right and timed."""
        times = []
        for key in (other, name):
            result = self.results.get(key)
            if result is None or result.us is None or not result.correct:
                return None
            times.append(result.us)
        return times[0] / times[1]

    def better_peer(self) -> str | None:
        """Names the fastest peer that is right."""
        found = {
            peer: r.us
            for peer in PEERS
            if (r := self.results.get(peer)) is not None and r.correct and r.us is not None
        }
        return min(found, key=found.__getitem__) if found else None


@dataclass(frozen=True)
class Report:
    """A whole run.

    Attributes:
        dtype: of queries and cache.
        rounds: that count.
        ceilings: of the device, measured in this run.
        names: what was asked for, ours first.
        compare: two names whose ratio is wanted, or None.
        rows: one a shape.
    """

    dtype: str
    rounds: int
    ceilings: Ceilings
    names: tuple[str, ...]
    compare: tuple[str, str] | None
    rows: list[Row]

    @property
    def ours(self) -> tuple[str, ...]:
        """The names that are implementations of this package."""
        return tuple(name for name in self.names if name not in PEERS)


def variant_names(implementations: Sequence[str] | None = None) -> tuple[str, ...]:
    """Returns the names to measure, ours first.

    Args:
        implementations: some of ours, of the peers, and of ours with "-invariant" behind their
            names, which are called with `batch_invariant=True`; by default all but the last.

    Raises:
        ValueError: a name is unknown or there is none.
    """
    ours = check_implementation(None)
    known = (*ours, *(name + INVARIANT for name in ours), *PEERS)
    if implementations is None:
        return (*ours, *PEERS)
    unknown = [name for name in implementations if name not in known]
    if unknown or not implementations:
        raise ValueError(
            f"implementations: got {list(implementations)!r}, expected some of {list(known)}"
        )
    return tuple(name for name in known if name in implementations)


def run(
    shapes: Sequence[Shape],
    *,
    dtype: str = "bfloat16",
    implementations: Sequence[str] | None = None,
    compare: Sequence[str] | None = None,
    rounds: int = 7,
    tick: Tick = lambda _: None,
    done: Callable[[Report], None] = lambda _: None,
    ceilings: Ceilings | None = None,
) -> Report:
    """Measures the op at each shape, the variants in turn.

    Args:
        shapes: what to measure.
        dtype: "bfloat16", "float16" or "float32".
        implementations: as `variant_names` takes them.
        compare: two of them, for their ratio.
        rounds: measurements of which the median counts.
        tick: told what is under way, `rounds + 3` times a shape.
        done: given the report so far after each shape.
        ceilings: of the device, if known; measured by default.

    Raises:
        ValueError: an argument is wrong.
    """
    names = variant_names(implementations)
    if not shapes:
        raise ValueError("shapes: got none, expected at least one")
    check_dtype(dtype)
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, expected at least 1")
    if compare is not None and (len(set(compare)) != 2 or not set(compare) <= set(names)):
        raise ValueError(f"compare: got {list(compare)!r}, expected two of {list(names)}")
    kind = jnp.dtype(dtype)
    pair = None if compare is None else (compare[0], compare[1])
    found = ceilings or measure_ceilings(kind, jax.default_backend())
    report = Report(dtype, rounds, found, names, pair, [])
    programs = compile_all(
        functools.partial(_lower, dtype=kind),
        shapes,
        report.ours,
        lambda shape: tick(f"{shape}: compiled"),
    )
    for shape in shapes:
        report.rows.append(_measure(shape, kind, names, programs, rounds, found, tick))
        done(report)
        gc.collect()  # caches of the last shape, before those of the next
    return report


def _measure(
    shape: Shape,
    dtype: jnp.dtype,
    names: Sequence[str],
    programs: Programs,
    rounds: int,
    ceilings: Ceilings,
    tick: Tick,
) -> Row:
    tick(f"{shape}: data")
    data = cases.draw(shape, num_calls(shape, dtype.itemsize), dtype)
    checked = cases.some_sequences(shape.lengths())
    expected = cases.reference(*data.call(0), checked)
    variants: dict[str, Variant] = {}
    errors, reasons = {}, {}
    for name in names:
        reason = _reason(name, shape, data)
        if reason is None:
            try:
                variants[name] = variant(name, shape, data, programs.get((shape, name)))
                got = variants[name].first_result()
                errors[name] = cases.relative_error(got[checked], expected)
                continue
            except Exception as error:  # one that fails must not take the others with it
                variants.pop(name, None)
                reason = f"failed: {type(error).__name__}: {one_line(error)}"
        reasons[name] = reason
    times = interleave(variants, rounds, tick=lambda: tick(f"{shape}: rounds"))
    moved, flops = shape.moved_bytes(dtype.itemsize), shape.flops()
    floor = ceilings.floor(moved, flops)
    results = {}
    for name, time in times.items():
        results[name] = Result(
            us=None if time is None else 1e6 * time.median,
            us_low=None if time is None else 1e6 * time.low,
            us_high=None if time is None else 1e6 * time.high,
            of_floor=None if time is None else floor / time.median,
            error=errors[name],
            correct=errors[name] <= BOUNDS[dtype.name],
            calls=variants[name].calls,
        )
    tokens = int(shape.lengths().sum(dtype=np.int64))
    return Row(shape, tokens, moved, flops, 1e6 * floor, results, reasons)


def num_calls(shape: Shape, itemsize: int) -> int:
    """Counts the calls of a round: each pool once, and enough that its launch does not show."""
    pools = cases.num_pools(shape, itemsize)
    if jax.default_backend() == "cpu":
        return max(pools, 2)
    size = shape.cache_bytes(itemsize)
    return max(pools, 4 if size > 1e9 else 10 if size > 1e8 else 24)


def _implementation(name: str) -> str:
    return name.removesuffix(INVARIANT)


def _op(name: str, shape: Shape) -> functools.partial[Any]:
    return functools.partial(
        flash_mla_with_kvcache,
        head_dim_v=cases.D_V,
        softmax_scale=cases.SCALE,
        causal=shape.causal,
        batch_invariant=name.endswith(INVARIANT),
        implementation=_implementation(name),
    )


def _reason(name: str, shape: Shape, data: Data) -> str | None:
    if name in PEERS:
        return peer_reason(name, data.queries[0].dtype.name)
    options = _op(name, shape).keywords
    return explain(*data.call(0), **options).reasons.get(_implementation(name))


def _lower(shape: Shape, name: str, dtype: jnp.dtype) -> jax.stages.Lowered:
    def draw() -> tuple[Any, ...]:
        data = _used(name, cases.draw(shape, num_calls(shape, dtype.itemsize), dtype))
        return data.queries, data.pools, data.tables, data.lengths

    queries, pools, tables, lengths = jax.eval_shape(draw)
    program = _program(name, shape, Data(queries, pools, tables, lengths))
    return program.lower((queries, pools, tables), lengths)


def variant(
    name: str, shape: Shape, data: Data, program: Any = None, seconds: float = PROGRAM
) -> Variant:
    """Returns what measures one name, ours or a peer's.

    Args:
        name: of it.
        shape: of the calls.
        data: inputs of a round's calls.
        program: ours, compiled, or why it was not; by default it is compiled when needed.
        seconds: that a run takes, about.
    """
    if isinstance(program, Exception):
        raise program
    data = _used(name, data)
    repeats = _repeats(name, shape, data, seconds)
    if name in PEERS:
        return PeerVariant(name, shape, data, len(data.queries), repeats)
    program = program or _program(name, shape, data, seconds)
    return JaxVariant(program, data, len(data.queries) * repeats)


def _used(name: str, data: Data) -> Data:
    calls = _MAX_CALLS.get(_implementation(name), len(data.queries))
    return Data(data.queries[:calls], data.pools, data.tables[:calls], data.lengths)


def _program(name: str, shape: Shape, data: Data, seconds: float = PROGRAM) -> jax.stages.Wrapped:
    chained = jax.default_backend() == "cpu"
    repeats = _repeats(name, shape, data, seconds)
    return looped(_op(name, shape), len(data.queries), repeats, chained)


def _repeats(name: str, shape: Shape, data: Data, seconds: float) -> int:
    return num_repeats(name, shape, len(data.queries), data.queries[0].dtype.itemsize, seconds)


def num_repeats(
    name: str, shape: Shape, calls: int, itemsize: int, seconds: float = PROGRAM
) -> int:
    """Counts the rounds of a program that is long enough, by what a call takes at about the least.

    That is 10 us, and 3 TB/s of the cache; on a CPU 100 us, and 3 GB/s.
    """
    size = shape.cache_bytes(itemsize)
    if jax.default_backend() == "cpu":
        call = 1e-4 + size / 3e9
    else:
        call = _SLOWER.get(_implementation(name), 1) * (1e-5 + size / 3e12)
    return max(1, round(seconds / (calls * call)))
