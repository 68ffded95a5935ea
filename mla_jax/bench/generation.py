# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""`mla-jax bench generate`: tokens a second of `generate`'s own loop, after a long context."""

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax.bench import models
from mla_jax.bench.runs import Report, TimedSteps, check_dtype, check_options, compile_all, one_line
from mla_jax.bench.timing import (
    Ceilings,
    Clock,
    interleave,
    measure_ceilings,
    steps_that_fit,
)
from mla_jax.config import DeepseekConfig
from mla_jax.decode import check_implementation
from mla_jax.generate import Sampling, _State, decode_loop

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What one implementation gave at one batch.

    Attributes:
        ms: milliseconds of a step, the median over rounds; None where noise covers it.
        ms_low: the lower quartile.
        ms_high: the upper quartile.
        tokens_per_second: of all sequences together.
        same_first_tokens: share of the sequences whose first new token is that of the first
            implementation: random weights leave the most likely token to rounding in some.
    """

    ms: float | None
    ms_low: float | None
    ms_high: float | None
    tokens_per_second: float | None
    same_first_tokens: float


@dataclass(frozen=True)
class Row:
    """The results at one batch.

    Attributes:
        b: sequences.
        context: tokens of each before the first step.
        floor_ms: least time for a step to read the weights it needs (of experts, the number that
            tokens hit on average if all are equally likely) and the cache once.
        cache_bytes: of the pool.
        peak_bytes: most memory in use so far, as the device counts; None where it does not.
        results: by name.
        reasons: why the others gave none, by name.
    """

    b: int
    context: int
    floor_ms: float
    cache_bytes: int
    peak_bytes: int | None
    results: dict[str, Result]
    reasons: dict[str, str]


class Session:
    """The state of `generate`'s decode loop, which all implementations take in turn.

    Its cache is as after prompts of `context` tokens, of random latents.
    """

    def __init__(self, config: DeepseekConfig, b: int, context: int, steps: int, dtype: jnp.dtype):
        cache = models.filled_cache(
            num_layers=config.num_hidden_layers,
            b=b,
            room=context + 2 * steps,
            d_k=config.d_cache,
            dtype=dtype,
        )
        self.context = context
        self.table = jnp.copy(cache.block_table)
        self.state = _State(
            cache=cache,
            prompt=jnp.arange(b, dtype=jnp.int32),
            tokens=jax.random.randint(jax.random.key(2), (b, 2 * steps + 1), 0, config.vocab_size),
            num_tokens=jnp.ones(b, jnp.int32),
            finished=jnp.zeros(b, bool),
            starved=jnp.zeros(b, bool),
            eos=jnp.full(1, -1, jnp.int32),  # none
            sampling=Sampling.create(),
        )

    def rewind(self) -> Any:
        """Gives the state away, at the end of the context with one token drawn."""
        cache = models.at_context(self.state.cache, self.table, jnp.int32(self.context))
        ones = jnp.ones_like(self.state.num_tokens)
        return jax.block_until_ready(dataclasses.replace(self.state, cache=cache, num_tokens=ones))


class Loop(TimedSteps):
    """The loop with one implementation.

    Args:
        compiled: `generate`'s decode loop.
        params: of the model.
        session: what it works on.
        steps: of the shorter of the two runs whose difference is measured.
        clock: seconds.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        params: Any,
        session: Session,
        steps: int,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.calls = steps
        self._compiled, self._params = compiled, params
        self._session, self._clock = session, clock

    def first_result(self) -> np.ndarray:
        """Returns the first token that each sequence gets."""
        self.decode(1)
        return np.asarray(self._session.state.tokens[:, 1])

    def decode(self, steps: int) -> float:
        """Decodes some steps from the end of the context; returns the seconds it took."""
        state, limit = self._session.rewind(), jnp.int32(1 + steps)
        start = self._clock()
        self._session.state = jax.block_until_ready(self._compiled(self._params, state, limit))
        return self._clock() - start


def run(
    model: str,
    *,
    layers: int | None = None,
    batches: Sequence[int] | None = None,
    context: int | None = None,
    dtype: str = "bfloat16",
    implementations: Sequence[str] | None = None,
    rounds: int = 5,
    steps: int = 16,
    tick: Tick = lambda _: None,
    done: Callable[[Report[Row]], None] = lambda _: None,
    profile: Callable[[str, Callable[[], Any]], None] | None = None,
    ceilings: Ceilings | None = None,
) -> Report[Row]:
    """Measures decode steps of a whole model with random weights.

    Args:
        model: a name of `models.PRESETS`.
        layers: how many of its layers; all by default.
        batches: numbers of sequences.
        context: tokens in the cache of each before the first step.
        dtype: "bfloat16", "float16" or "float32".
        implementations: names of ours; by default all, each that cannot run with its reason.
        rounds: measurements of which the median counts.
        steps: most of the shorter of both runs whose difference is measured; slow ones take fewer.
        tick: told what is under way.
        done: given the report so far after each row.
        profile: given a name and a function that decodes two steps, for each result.
        ceilings: of the device, if known; measured by default.

    Raises:
        ValueError: an argument is wrong.
    """
    platform = jax.default_backend()
    small = platform == "cpu"
    config = models.preset(model, platform, layers)
    batches = (1, 4) if small and batches is None else batches or (1, 32, 128)
    context = (256 if small else 4096) if context is None else context
    check_options({"rounds": rounds, "steps": steps, "context": context}, {"batches": batches})
    check_dtype(dtype)
    kind = jnp.dtype(dtype)
    names = check_implementation(implementations or None)
    found = ceilings or measure_ceilings(kind, platform)
    tick("weights")
    language_model = models.language_model(config, kind)
    weights = models.num_bytes(language_model)
    graphdef, params = nnx.split(language_model)
    del language_model
    report: Report[Row] = Report(
        model, config.num_hidden_layers, weights, dtype, rounds, steps, found, 0.0, []
    )

    def lower(b: int, name: str) -> Any:
        state = jax.eval_shape(lambda: Session(config, b, context, steps, kind).state)
        arguments = (graphdef, params, state, jnp.int32(0))
        return decode_loop(b).lower(*arguments, implementation=name, mesh=None)

    tick("compilation")
    start = time.perf_counter()
    programs = compile_all(lower, batches, names)
    report.compile_seconds = time.perf_counter() - start

    def measured(b: int) -> Row:
        tick(f"b {b}")
        session = Session(config, b, context, steps, kind)
        variants, first, reasons = {}, {}, {}
        for name in names:
            program = programs[b, name]
            if isinstance(program, Exception):
                reasons[name] = one_line(program)
                continue
            variants[name] = Loop(program, params, session, steps)
            first[name] = variants[name].first_result()
            variants[name].calls = steps_that_fit(variants[name].decode(2) / 2, steps)
        times = interleave(variants, rounds)
        results = {
            name: Result(
                ms=None if time is None else 1e3 * time.median,
                ms_low=None if time is None else 1e3 * time.low,
                ms_high=None if time is None else 1e3 * time.high,
                tokens_per_second=None if time is None else b / time.median,
                same_first_tokens=float(np.mean(first[name] == next(iter(first.values())))),
            )
            for name, time in times.items()
        }
        if profile is not None:
            for name, variant in variants.items():
                profile(f"{model}-{b}-{name}", functools.partial(variant.decode, 2))
        cached = models.num_bytes(session.state.cache.pages)
        peak = models.memory_stats().get("peak_bytes_in_use")
        return Row(b, context, floor_ms(b), cached, peak, results, reasons)

    def floor_ms(b: int) -> float:
        return 1e3 * _bytes_needed(config, weights, b, context, kind.itemsize) / found.read

    for b in batches:
        try:
            row = measured(b)
        except RuntimeError as error:  # out of memory: the other rows stay
            row = Row(b, context, floor_ms(b), 0, None, {}, dict.fromkeys(names, one_line(error)))
        report.rows.append(row)
        done(report)
        gc.collect()  # this cache, before the next
    return report


def _bytes_needed(
    config: DeepseekConfig, weights: int, b: int, context: int, itemsize: int
) -> float:
    """Counts the bytes that a step must read: weights, of experts those hit, and the cache."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    idle = 0.0
    if config.n_routed_experts:
        width = config.hidden_size * config.moe_intermediate_size
        layers = config.num_hidden_layers - config.first_k_dense_replace
        missed = (1 - config.num_experts_per_tok / config.n_routed_experts) ** b
        idle = max(layers, 0) * config.n_routed_experts * 3 * width * missed
    cached = b * context * config.num_hidden_layers * config.d_cache
    return weights + itemsize * (cached - embedding - idle)
