# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""`mla-jax bench step`: decode steps of a stack of attention layers, against what they are made of.

A layer is a norm, the attention with all its projections and the residual sum; there is no
feed-forward. The floor of a step is that of its matrix products, by the ceilings of the device,
plus the op's own time, measured in turn with the steps.
"""

import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mla_jax.bench import cases, models, op
from mla_jax.bench.runs import Report, TimedSteps, check_dtype, check_options, compile_all, one_line
from mla_jax.bench.timing import (
    PROGRAM,
    RUN,
    Ceilings,
    Clock,
    Timed,
    interleave,
    measure_ceilings,
    steps_that_fit,
)
from mla_jax.cache import PagedKVCache
from mla_jax.config import DeepseekConfig
from mla_jax.decode import check_implementation
from mla_jax.generate import step_options
from mla_jax.module import MultiHeadLatentAttention
from mla_jax.schedule import get_mla_metadata

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What one implementation gave.

    Attributes:
        us: microseconds of a step, the median over rounds; None where noise covers it.
        us_low: the lower quartile.
        us_high: the upper quartile.
        op_us: the op's own time, of one layer.
        ratio: `us` over the floor: the projections' and `layers * op_us`.
    """

    us: float | None
    us_low: float | None
    us_high: float | None
    op_us: float | None
    ratio: float | None


@dataclass(frozen=True)
class Row:
    """The results at one batch and context.

    Attributes:
        b: sequences, one new token each.
        context: tokens of each before the first step.
        pools: how many layers have a cache of their own; where memory is short, the others share
            them (each layer still reads and writes as much, and no pool stays in a cache).
        projections_us: floor of the matrix products of all layers.
        results: by name.
        reasons: why the others gave none, by name.
    """

    b: int
    context: int
    pools: int
    projections_us: float
    results: dict[str, Result]
    reasons: dict[str, str]


class Stack(nnx.Module):
    """The attention layers of a model, one after the other."""

    def __init__(self, config: DeepseekConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norms = nnx.List(
            nnx.RMSNorm(config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
            for _ in range(config.num_hidden_layers)
        )
        self.layers = nnx.List(
            MultiHeadLatentAttention(
                config.hidden_size,
                config.num_attention_heads,
                q_lora_rank=config.q_lora_rank,
                rope=config.rope,
                dtype=dtype,
                param_dtype=dtype,
                rngs=rngs,
            )
            for _ in range(config.num_hidden_layers)
        )


def _jitted(b: int) -> Any:
    """Returns `_decode` to be compiled as `generate` compiles its own steps of `b` tokens."""
    return jax.jit(
        _decode,
        static_argnames=("graphdef", "implementation"),
        donate_argnames="cache",
        compiler_options=step_options(b),
    )


def _decode(
    graphdef: Any,
    params: Any,
    x: jax.Array,
    cache: PagedKVCache,
    steps: jax.Array,
    *,
    implementation: str,
) -> tuple[jax.Array, PagedKVCache]:
    """Decodes `steps` tokens, each from the same input; returns the last output."""
    stack = nnx.merge(graphdef, params)
    absorbed = [layer.absorb() for layer in stack.layers]
    one = jnp.ones(x.shape[0], jnp.int32)

    def step(_: jax.Array, carry: tuple[jax.Array, PagedKVCache]) -> tuple[jax.Array, PagedKVCache]:
        cache, _ = carry[1].reserve(one)
        schedule = get_mla_metadata(cache.seqlens, stack.layers[0].num_heads, 1)
        y = x
        for i, (norm, layer) in enumerate(zip(stack.norms, stack.layers, strict=True)):
            y, cache = layer.decode(
                y,
                cache,
                i % cache.num_layers,
                norm=norm,
                absorbed=absorbed[i],
                schedule=schedule,
                implementation=implementation,
            )
        return y, cache

    return jax.lax.fori_loop(0, steps, step, (x, cache))


class Session:
    """The cache that all implementations take in turn."""

    def __init__(self, cache: PagedKVCache):
        self.cache, self.table = cache, jnp.copy(cache.block_table)


class Steps(TimedSteps):
    """Steps with one implementation.

    Args:
        compiled: `_decode`.
        arguments: parameters and input.
        session: what it works on.
        context: tokens in the cache.
        steps: of the shorter of the two runs whose difference is measured.
        clock: seconds.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        arguments: tuple[Any, jax.Array],
        session: Session,
        context: int,
        steps: int,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.calls = steps
        self._compiled, self._arguments, self._session = compiled, arguments, session
        self._context, self._clock = jnp.int32(context), clock

    def decode(self, steps: int) -> float:
        """Decodes some steps from the end of the context; returns the seconds it took."""
        session, number = self._session, jnp.int32(steps)
        cache = models.at_context(session.cache, session.table, self._context)
        jax.block_until_ready(cache)
        start = self._clock()
        _, session.cache = jax.block_until_ready(self._compiled(*self._arguments, cache, number))
        return self._clock() - start


def run(
    model: str,
    *,
    layers: int | None = None,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    dtype: str = "bfloat16",
    implementations: Sequence[str] | None = None,
    rounds: int = 5,
    steps: int = 8,
    tick: Tick = lambda _: None,
    done: Callable[[Report[Row]], None] = lambda _: None,
    profile: Callable[[str, Callable[[], Any]], None] | None = None,
    ceilings: Ceilings | None = None,
) -> Report[Row]:
    """Measures decode steps of a model's attention layers with random weights.

    Args:
        model: a name of `models.PRESETS`.
        layers: how many of its layers; all by default.
        batches: numbers of sequences.
        contexts: tokens in the cache of each before the first step.
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
    batches = (1, 4) if small and batches is None else batches or (1, 16, 128)
    contexts = (256,) if small and contexts is None else contexts or (4096, 16384)
    check_options({"rounds": rounds, "steps": steps}, {"batches": batches, "contexts": contexts})
    check_dtype(dtype)
    kind = jnp.dtype(dtype)
    names = check_implementation(implementations or None)
    found = ceilings or measure_ceilings(kind, platform)
    tick("weights")
    graphdef, params = nnx.split(
        models.randomized(nnx.eval_shape(lambda: Stack(config, kind, nnx.Rngs(0))))
    )
    weights, depth = models.num_bytes(params), config.num_hidden_layers
    report: Report[Row] = Report(model, depth, weights, dtype, rounds, steps, found, 0.0, [])
    room = max(contexts) + 2 * steps
    inputs = {b: _input(config, b, kind) for b in batches}

    width = config.d_cache * kind.itemsize
    pools = {b: _num_pools(depth, b * room * width) for b in batches}

    def new_cache(b: int) -> PagedKVCache:
        return models.filled_cache(
            num_layers=pools[b], b=b, room=room, d_k=config.d_cache, dtype=kind
        )

    def lower(b: int, name: str) -> Any:
        cache = jax.eval_shape(lambda: new_cache(b))
        arguments = (graphdef, params, inputs[b], cache, jnp.int32(0))
        return _jitted(b).lower(*arguments, implementation=name)

    tick("compilation")
    start = time.perf_counter()
    programs = compile_all(lower, batches, names)
    report.compile_seconds = time.perf_counter() - start

    def measured(b: int, context: int, session: Session) -> Row:
        shape = cases.Shape(b, 1, context, config.num_attention_heads)
        data = cases.draw(shape, op.num_calls(shape, kind.itemsize), kind)
        variants: dict[str, Timed] = {}
        stacks: dict[str, Steps] = {}
        reasons = {}
        for name in names:
            program = programs[b, name]
            if isinstance(program, Exception):
                reasons[name] = one_line(program)
                continue
            stack = Steps(program, (params, inputs[b]), session, context, steps)
            stack.decode(1)
            stack.calls = steps_that_fit(stack.decode(2) / 2, steps)
            # As long a run as one of steps: a card near its power limit slows down in a long one.
            alone = op.variant(name, shape, data, seconds=PROGRAM if small else RUN)
            alone.first_result()
            variants[f"op {name}"] = alone
            variants[name] = stacks[name] = stack
        times = interleave(variants, rounds)
        floor = projections(b)
        results = {}
        for name, stack in stacks.items():
            took, own = times[name], times[f"op {name}"]
            ratio = None
            if took is not None and own is not None:
                ratio = took.median / (floor + depth * own.median)
            results[name] = Result(
                us=None if took is None else 1e6 * took.median,
                us_low=None if took is None else 1e6 * took.low,
                us_high=None if took is None else 1e6 * took.high,
                op_us=None if own is None else 1e6 * own.median,
                ratio=ratio,
            )
            if profile is not None:
                label = f"{model}-step-{b}-{context}-{name}"
                profile(label, functools.partial(stack.decode, 2))
        return Row(b, context, pools[b], 1e6 * floor, results, reasons)

    def projections(b: int) -> float:
        return projections_floor(config, b, kind.itemsize, found) * depth

    for b in batches:
        session = None
        for context in contexts:
            tick(f"b {b}, context {context}")
            try:
                session = session or Session(new_cache(b))
                row = measured(b, context, session)
            except RuntimeError as error:  # out of memory: the other rows stay
                session = None  # what failed may have taken the cache with it
                why = dict.fromkeys(names, one_line(error))
                row = Row(b, context, pools[b], 1e6 * projections(b), {}, why)
            report.rows.append(row)
            done(report)
            gc.collect()
        session = None
        gc.collect()  # this cache, before the next
    return report


def projections_floor(config: DeepseekConfig, b: int, itemsize: int, ceilings: Ceilings) -> float:
    """Returns the least seconds of a layer's matrix products, each on its own."""
    h, c = config.num_attention_heads, config.kv_lora_rank
    d, n, v = config.hidden_size, config.qk_nope_head_dim, config.v_head_dim
    d_q = h * (n + config.qk_rope_head_dim)
    products = [(1, d, config.d_cache), (h, n, c), (h, c, v), (1, h * v, d)]
    if config.q_lora_rank is None:
        products.append((1, d, d_q))
    else:
        products += [(1, d, config.q_lora_rank), (1, config.q_lora_rank, d_q)]
    return sum(
        ceilings.floor(heads * itemsize * (k * m + b * (k + m)), 2.0 * heads * b * k * m)
        for heads, k, m in products
    )


def _input(config: DeepseekConfig, b: int, dtype: jnp.dtype) -> jax.Array:
    x = jax.random.normal(jax.random.key(3), (b, 1, config.hidden_size), jnp.float32)
    return x.astype(dtype)


def _num_pools(layers: int, pool_bytes: int) -> int:
    """Counts the layers that can have a pool of their own in half of the memory that is left."""
    stats = models.memory_stats()
    if "bytes_limit" not in stats:
        return layers
    left = stats["bytes_limit"] - stats["bytes_in_use"]
    return max(1, min(layers, left // 2 // pool_bytes))
