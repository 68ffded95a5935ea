# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of decode steps share: options, programs, the time of a step, the report."""

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mla_jax.bench.timing import Ceilings, TimedCalls
from mla_jax.config import DTYPES

Row = TypeVar("Row")
Key = TypeVar("Key")


@dataclass
class Report(Generic[Row]):
    """A whole run.

    Attributes:
        model: its name.
        layers: how many of its layers ran.
        weight_bytes: of these.
        dtype: of weights, computation and cache.
        rounds: that count.
        steps: of the shorter of both runs whose difference is measured.
        ceilings: of the device, measured in this run.
        compile_seconds: that all programs of steps took together.
        rows: one a measured case.
    """

    model: str
    layers: int
    weight_bytes: int
    dtype: str
    rounds: int
    steps: int
    ceilings: Ceilings
    compile_seconds: float
    rows: list[Row]


class TimedSteps(TimedCalls):
    """Decode steps by one compiled program: a step is a call, and a run begins anew.

    Attributes:
        calls: steps of the shorter of the two runs whose difference is measured.
    """

    @abstractmethod
    def decode(self, steps: int) -> float:
        """Decodes some steps from the end of the context; returns the seconds it took."""

    def run(self, times: int) -> float:
        """Decodes so many times `calls` steps; returns the seconds it took."""
        return self.decode(times * self.calls)


def check_options(numbers: Mapping[str, int], lists: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError, naming the option, unless all these numbers are positive."""
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    for name, values in lists.items():
        if min(values) < 1:
            raise ValueError(f"{name}: got {list(values)}, expected positive numbers")


def check_dtype(dtype: str) -> None:
    """Raises ValueError for a dtype that no model has."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {list(DTYPES)}")


def compile_all(
    lower: Callable[[Key, str], Any],
    keys: Sequence[Key],
    names: Sequence[str],
    done: Callable[[Key], None] = lambda _: None,
) -> dict[tuple[Key, str], Any]:
    """Compiles a program for each key and implementation; one that fails gives its exception.

    Keys go at once, implementations one after the other: they have their matrix products in
    common, and what XLA measures to choose a form of those serves all programs that follow.

    Args:
        lower: returns the lowered program of a key and a name.
        keys: what programs are for, such as batches; at least one.
        names: of implementations.
        done: told of each key whose programs are there.

    Returns:
        The programs by key and name.
    """

    def compiled(key: Key) -> dict[tuple[Key, str], Any]:
        programs: dict[tuple[Key, str], Any] = {}
        for name in names:
            try:
                programs[key, name] = lower(key, name).compile()
            except Exception as error:  # one that fails must not take the others with it
                programs[key, name] = error
        return programs

    found: dict[tuple[Key, str], Any] = {}
    with ThreadPoolExecutor(min(len(keys), os.cpu_count() or 1)) as workers:
        tasks = {workers.submit(compiled, key): key for key in keys}
        for task in as_completed(tasks):
            found |= task.result()
            done(tasks[task])
    return found


def one_line(error: Exception) -> str:
    """Returns what an exception says as one line that fits a table's footnote."""
    return " ".join(str(error).split())[:300]
