# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""How it is measured: device time of JAX programs, variants in turn, the ceilings of the device.

JAX has no timer on the device, and a wall clock is off by up to 0.1 ms. So a program makes the
calls many times over, and what counts is the difference of two runs and one: it holds nothing of
what the host does around a program, as the host does that while the device works.
"""

import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.bench.cases import Data

Clock = Callable[[], float]
Op = Callable[..., tuple[jax.Array, jax.Array]]
RUN = 0.3  # seconds of a run, where each call takes long
PROGRAM = 0.01  # seconds of a program of short calls: a wall clock is off by a percent of it
_PAUSE = 0.01  # seconds between measurements: a card near its power limit slows who comes next


class Timed(Protocol):
    """Something that can be timed."""

    def measure(self) -> float:
        """Returns the seconds of a call, measured once."""


class TimedCalls(ABC):
    """Calls of the op or steps of a model, timed alike whoever makes them.

    Attributes:
        calls: of a run.
    """

    calls: int

    @abstractmethod
    def run(self, times: int) -> float:
        """Makes the calls so many times over, without a pause; returns the seconds it took."""

    def measure(self) -> float:
        """Returns the seconds of a call on the device: one run, then two, less the one.

        A card at its power limit is slower the longer it has worked, so all have to come to what is
        timed from the same work.
        """
        once = self.run(1)
        return (self.run(2) - once) / self.calls


class Variant(Timed, Protocol):
    """A form of the op, whose result can be checked."""

    calls: int

    def first_result(self) -> np.ndarray:
        """Returns what call 0 of the timed program gives, `[b, s_q, h_q, 512]`."""


@dataclass(frozen=True)
class Times:
    """Seconds of a call over the rounds: the median and the quartiles around it."""

    median: float
    low: float
    high: float


def steps_that_fit(seconds: float, most: int) -> int:
    """Returns how many steps of so many seconds make a run that is long enough, at most `most`."""
    return max(1, min(most, int(RUN / max(seconds, 1e-9))))


def _seconds(program: Callable[[], Any], clock: Clock) -> float:
    start = clock()
    result = jax.block_until_ready(program())
    seconds = clock() - start
    del result  # freed outside the measurement
    return seconds


def looped(op: Op, calls: int, repeats: int, chained: bool) -> jax.stages.Wrapped:
    """Returns a program that loops over `repeats` rounds, which make `calls` calls each.

    The calls of a round are unrolled, and each has its own inputs, so that XLA can neither merge
    them nor take them out of the loop, whose rounds depend on each other. All results of the last
    round are returned, so that none is left out. How often the loop runs is known to XLA: else the
    device would ask the host after each round.

    On a GPU calls that do not depend on each other keep their order and do not overlap, in command
    buffers too, unless XLA is told to run those concurrently.

    Args:
        op: takes q, k_cache, block_table and cache_seqlens; gives out and lse.
        calls: of a round.
        repeats: rounds.
        chained: makes each call wait for the one before. XLA runs independent operations of a CPU
            program at once. On a GPU the wait would cost a kernel.

    Returns:
        A jitted function of `Data`'s queries, pools and tables, a tuple, and its lengths. It gives
        the lengths, for the next run to wait for, and the results of the last round.
    """

    def run(fields: tuple[Any, ...], lengths: jax.Array) -> tuple[jax.Array, Any]:
        view = Data(fields[0], fields[1], fields[2], lengths)

        def once(_: Any, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            lengths, results = carry[0], []
            for i in range(calls):
                out, lse = op(*view.call(i)[:3], lengths)
                if chained or i == calls - 1:
                    lengths = lengths + jnp.isnan(lse[:, 0, 0]).astype(jnp.int32)
                results.append((out, lse))
            return lengths, results

        shapes = jax.eval_shape(lambda: once(0, (lengths, None)))[1]
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.fori_loop(0, repeats, once, (lengths, blank))

    return jax.jit(run)


class JaxVariant(TimedCalls):
    """A JAX form of the op, as a program of `looped`.

    Args:
        program: that, jitted or compiled.
        data: its inputs.
        calls: in all its rounds.
        clock: seconds.

    Attributes:
        calls: as given.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        data: Data,
        calls: int,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.calls = calls
        self._clock = clock
        fields = (data.queries, data.pools, data.tables)
        self._lengths = data.lengths
        self._once = lambda lengths: program(fields, lengths)

    def first_result(self) -> np.ndarray:
        """Returns `out` of the first call of a round."""
        return np.asarray(self._once(self._lengths)[1][0][0])

    def run(self, times: int) -> float:
        """Runs the program so many times, each waiting for the one before."""

        def runs() -> Any:
            lengths = self._lengths
            for _ in range(times - 1):
                lengths = self._once(lengths)[0]
            return self._once(lengths)

        return _seconds(runs, self._clock)


def interleave(
    variants: Mapping[str, Timed],
    rounds: int,
    *,
    seed: int = 0,
    sleep: Callable[[float], None] = time.sleep,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Times | None]:
    """Measures the variants in turn, in another order each round.

    Args:
        variants: by name.
        rounds: that count; one more comes first and does not.
        seed: of the orders.
        sleep: pauses for some seconds.
        tick: called after each round.

    Returns:
        The times by name; None where the noise is as large as what was measured.
    """
    rng = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name in rng.sample(list(variants), len(variants)):
            sleep(_PAUSE)
            seconds = variants[name].measure()
            if number:
                samples[name].append(seconds)
        tick()
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: Sequence[float]) -> Times | None:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Times(float(median), float(low), float(high)) if median > 0 else None


@dataclass(frozen=True)
class Ceilings:
    """What the device gives at best: bytes read and operations of a matrix product, a second."""

    read: float
    product: float

    def floor(self, moved_bytes: float, flops: float) -> float:
        """Returns the least seconds that work can take: the larger of its two bounds."""
        return max(moved_bytes / self.read, flops / self.product)


def measure_ceilings(dtype: jnp.dtype, platform: str, clock: Clock = time.perf_counter) -> Ceilings:
    """Measures the ceilings with plain JAX: sums of large arrays, products of large matrices.

    The best form counts: sums along rows or columns; on a CPU products in float32 as well, which
    XLA multiplies faster there than narrower types.
    """
    small = platform == "cpu"
    count = 4 if small else 8  # too large together for a cache
    rows, columns = (2**12, 2**12) if small else (2**14, 2**14)
    arrays = [jnp.full((rows, columns), i, jnp.float32) for i in range(count)]
    sums = [_calls_a_second(partial(jnp.sum, axis=axis), arrays, clock) for axis in (0, 1)]
    read = max(sums) * arrays[0].nbytes
    del arrays

    n = 1024 if small else 8192
    keys = jax.random.split(jax.random.key(0), count)
    products = []
    for kind in {jnp.dtype(dtype), jnp.dtype(jnp.float32)} if small else {jnp.dtype(dtype)}:
        matrices = [jax.random.normal(key, (n, n), jnp.float32).astype(kind) for key in keys]
        products.append(_calls_a_second(lambda x: x @ x.T, matrices, clock))
    return Ceilings(read, max(products) * 2 * n**3)


def _calls_a_second(
    function: Callable[[jax.Array], jax.Array], arrays: list[jax.Array], clock: Clock
) -> float:
    """Returns how many times a second the device can call a function, each of an array in turn."""
    program = jax.jit(lambda xs: [function(x) for x in xs])
    return _programs_a_second(lambda: program(arrays), clock) * len(arrays)


def _programs_a_second(program: Callable[[], Any], clock: Clock) -> float:
    """Returns how many times a second the device can run a program, none waiting for the host."""

    # The best of several: a ceiling is what the device can give, not what a busy one gave.
    def best(times: int) -> float:
        runs = []
        for _ in range(7):
            time.sleep(_PAUSE)
            runs.append(_seconds(lambda: [program() for _ in range(times)], clock))
        return min(runs)

    jax.block_until_ready(program())
    times = math.ceil(PROGRAM / max(best(1), PROGRAM / 100))
    seconds = best(2 * times) - best(times)
    if seconds <= 0:
        raise RuntimeError("the device is too busy to be measured: twice the work took no longer")
    return times / seconds
