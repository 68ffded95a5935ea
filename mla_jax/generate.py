# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Generation: prefill and the whole decode loop, each one executable.

Letters: `b` prompts, `t` prompt tokens padded on the left, `n` new tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mla_jax.cache import PagedKVCache, PagePoolFullError
from mla_jax.decode import Implementation, check_implementation
from mla_jax.deepseek import DeepseekForCausalLM
from mla_jax.partitioning import CONTEXT, DATA

# Buffers for new tokens come in multiples of this, so that near limits share an executable.
_NEW_TOKENS_STEP = 64
# For XLA, wherever steps of a model are compiled. It counts a pool that is written in place twice,
# so that a large one seems not to fit, and to save memory that is not short it computes a product
# and norms of each layer twice. There is next to nothing to save in these programs.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}
# For loops of decode steps besides: the whole loop is one CUDA graph, without a way back to the
# host, and in it whatever does not need each other runs side by side.
_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
_STEP_OPTIONS = COMPILER_OPTIONS | {
    "xla_gpu_enable_command_buffer": _GRAPHS,
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}
# And for steps of many tokens: products stay whole, where XLA would join those of one operand and
# cut all of them into parts along the sum, to be written in float32 and added up. Measured with 128
# tokens; with one, parts are needed to keep a GPU busy.
_MANY_TOKENS = 128
_WHOLE_PRODUCTS = {
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_experimental_force_split_k": 1,
}


def step_options(tokens: int) -> dict[str, Any]:
    """Returns what `generate` tells XLA about a loop of decode steps; for loops of one's own, too.

    `jax.jit(loop, compiler_options=mla_jax.step_options(tokens))`, at the outermost `jit`. They are
    for GPUs, where a step took up to a quarter less time (docs/performance.md); CPUs ignore them.

    Args:
        tokens: new tokens of a step on one device. From 128 on, products are summed in another
            order than without these options.
    """
    return _STEP_OPTIONS | (_WHOLE_PRODUCTS if tokens >= _MANY_TOKENS else {})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; the numbers are data, the two flags choose the code.

    Attributes:
        temperature: divides the logits.
        top_k: keeps this many of the most likely tokens.
        top_p: then keeps the most likely ones until their probabilities reach this sum.
        seed: of the random stream. Prompt i's n-th token depends on (seed, i, n) alone.
        greedy: takes the most likely token (static).
        filtered: whether top_k or top_p keeps less than everything (static).
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array
    greedy: bool = dataclasses.field(metadata={"static": True})
    filtered: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> "Sampling":
        """Checks the options of `generate` and makes them data.

        Raises:
            ValueError: an option is out of its range.
        """
        if not temperature >= 0 or not np.isfinite(temperature):
            raise ValueError(f"temperature: got {temperature!r}, expected a number of at least 0")
        if top_k is not None and (not isinstance(top_k, int | np.integer) or top_k < 1):
            raise ValueError(f"top_k: got {top_k!r}, expected a positive int or None")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p: got {top_p!r}, expected a number in (0, 1] or None")
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
            raise ValueError(f"seed: got {seed!r}, expected an int in [0, 2**32)")
        return cls(
            temperature=jnp.float32(temperature),
            top_k=jnp.int32(min(top_k or 2**31 - 1, 2**31 - 1)),
            top_p=jnp.float32(top_p or 1.0),
            seed=jnp.uint32(seed),
            greedy=temperature == 0,
            filtered=top_k is not None or top_p is not None,
        )

    def draw(self, logits: jax.Array, prompt: jax.Array, step: jax.Array) -> jax.Array:
        """Draws one token per row.

        Args:
            logits: `[b, vocab_size]` float32.
            prompt: `[b]` int32, the number of each row's prompt.
            step: `[b]` int32, how many tokens each row has drawn before.

        Returns:
            `[b]` int32.
        """
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.filtered:
            logits = self._filter(logits)

        def draw_row(prompt: jax.Array, step: jax.Array, logits: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), prompt), step)
            return jax.random.categorical(key, logits)

        return jax.vmap(draw_row)(prompt, step, logits).astype(jnp.int32)

    def _filter(self, logits: jax.Array) -> jax.Array:
        """Sets to -inf what top_k and then top_p leave out."""
        ordered = jnp.sort(logits, axis=-1, descending=True)
        ordered = jnp.where(jnp.arange(logits.shape[-1]) < self.top_k, ordered, -jnp.inf)
        p = jax.nn.softmax(ordered, axis=-1)
        likelier = jnp.cumsum(p, axis=-1) - p  # the first token has 0: one always stays
        least = jnp.where((likelier < self.top_p) & (p > 0), ordered, jnp.inf).min(
            -1, keepdims=True
        )
        return jnp.where(logits >= least, logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """A generation under way.

    Attributes:
        cache: the slots of prompts that are finished are empty.
        prompt: `[b]` int32, the number of each row's prompt.
        tokens: `[b, n]` int32, the new tokens.
        num_tokens: `[b]` int32, how many of them each prompt has.
        finished: `[b]` bool.
        starved: `[b]` bool: the pool had no page for the next token.
        eos: `[e]` int32, tokens that end a sequence.
        sampling: how tokens are drawn.
    """

    cache: PagedKVCache
    prompt: jax.Array
    tokens: jax.Array
    num_tokens: jax.Array
    finished: jax.Array
    starved: jax.Array
    eos: jax.Array
    sampling: Sampling

    def take(self, logits: jax.Array, cache: PagedKVCache, granted: jax.Array) -> "_State":
        """Draws the next token of every unfinished prompt; frees the pages of those that end."""
        rows = jnp.arange(logits.shape[0])
        runs = ~self.finished & granted
        token = self.sampling.draw(logits, self.prompt, self.num_tokens)
        # Rows that do not run write past the end, where it is dropped.
        column = jnp.where(runs, self.num_tokens, self.tokens.shape[1])
        ends = (token[:, None] == self.eos).any(axis=1) | ~granted
        finished = self.finished | ends
        return dataclasses.replace(
            self,
            cache=cache.release(finished),
            tokens=self.tokens.at[rows, column].set(token, mode="drop"),
            num_tokens=self.num_tokens + runs,
            finished=finished,
            starved=self.starved | (~self.finished & ~granted),
        )


# How a state is cut over a mesh: rows and pools by `data`. Fields of a shard's cache are a cache.
_ROWS = PartitionSpec(DATA)
_FIELDS: dict[str, Any] = {field.name: _ROWS for field in dataclasses.fields(_State)}
_CUT = _State(**_FIELDS | {"eos": PartitionSpec(), "sampling": PartitionSpec()})


def _on_shards(mesh: Mesh | None, function: Any, *specs: Any) -> Any:
    """Runs `function`, which returns a state, on each shard of the rows; `specs` of its arguments.

    The other axes of the mesh stay automatic: XLA cuts the model by them as its parameters are.
    """
    if mesh is None:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=_CUT, axis_names={DATA}, check_vma=False
    )


def _anywhere(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Says whether any row of any shard is True: all shards must leave a loop together."""
    x = jnp.any(x)
    return x if mesh is None else jax.lax.pmax(x.astype(jnp.int32), DATA) > 0


@partial(
    jax.jit,
    static_argnames=("graphdef", "chunk", "mesh"),
    donate_argnames="state",
    compiler_options=COMPILER_OPTIONS,
)
def _prefill(
    graphdef: Any,
    params: Any,
    state: _State,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    chunk: int,
    mesh: Mesh | None,
) -> _State:
    """Runs the prompts through the model, `chunk` columns at a time, and draws the first tokens.

    Args:
        graphdef: with params, the model.
        params: its parameters.
        state: with an empty cache.
        prompts: `[b, t]` int32, padded on the left to a multiple of `chunk`.
        lengths: `[b]` int32.
        chunk: columns per pass.
        mesh: that of `generate`.
    """

    def run(params: Any, state: _State, prompts: jax.Array, lengths: jax.Array) -> _State:
        model = nnx.merge(graphdef, params)
        b, t = prompts.shape
        starts = jnp.arange(0, t, chunk)
        chunks = prompts.reshape(b, t // chunk, chunk).swapaxes(0, 1)

        def body(carry: Any, x: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            cache, granted, _ = carry
            start, tokens = x
            new = jnp.clip(start + chunk - (t - lengths), 0, chunk)
            cache, fits = cache.reserve(jnp.where(granted, new, 0))
            logits, cache = model.step(tokens, cache, prefill=True)
            return (cache, granted & fits, logits), None

        logits = jnp.zeros((b, model.config.vocab_size), jnp.float32)
        carry = (state.cache, jnp.ones(b, bool), logits)
        (cache, granted, logits), _ = jax.lax.scan(body, carry, (starts, chunks))
        return state.take(logits, cache, granted)

    shards = _on_shards(mesh, run, PartitionSpec(), _CUT, _ROWS, _ROWS)
    return shards(params, state, prompts, lengths)


def _decode_until(
    graphdef: Any,
    params: Any,
    state: _State,
    limit: jax.Array,
    *,
    implementation: Any,
    mesh: Mesh | None,
) -> _State:
    """Decodes until every prompt is finished or has `limit` new tokens, or one is starved."""

    def run(params: Any, state: _State, limit: jax.Array) -> _State:
        model = nnx.merge(graphdef, params)
        absorbed = model.absorb()

        def unfinished(state: _State) -> jax.Array:
            runs = ~state.finished & (state.num_tokens < limit)
            return _anywhere(mesh, runs) & ~_anywhere(mesh, state.starved)

        def body(state: _State) -> _State:
            column = state.num_tokens[:, None] - 1
            last = jnp.take_along_axis(state.tokens, column, axis=1, mode="clip")
            cache, granted = state.cache.reserve(jnp.where(state.finished, 0, 1))
            logits, cache = model.step(
                last, cache, absorbed=absorbed, implementation=implementation
            )
            return state.take(logits, cache, granted)

        return jax.lax.while_loop(unfinished, body, state)

    return _on_shards(mesh, run, PartitionSpec(), _CUT, PartitionSpec())(params, state, limit)


_decode, _decode_many = (
    jax.jit(
        _decode_until,
        static_argnames=("graphdef", "implementation", "mesh"),
        donate_argnames="state",
        compiler_options=step_options(rows),
    )
    for rows in (1, _MANY_TOKENS)
)


def decode_loop(rows: int) -> Any:
    """Returns the decode loop, jitted with the options for so many rows on a device."""
    return _decode_many if rows >= _MANY_TOKENS else _decode


def stream(
    model: DeepseekForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    every: int = 8,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    page_size: int = 64,
    prefill_chunk: int = 512,
    num_pages: int | None = None,
    implementation: Implementation = None,
    mesh: Mesh | None = None,
) -> Iterator[list[list[int]]]:
    """Generates like `generate` and yields the new tokens every few steps.

    The same executable runs as for `generate`: how far it decodes before it comes back is data.

    Args:
        model: as for `generate`, like all arguments but `every`.
        prompts: as there.
        max_new_tokens: as there.
        every: decode steps between yields; the first yield follows prefill.
        temperature: as there.
        top_k: as there.
        top_p: as there.
        seed: as there.
        eos_token_id: as there.
        page_size: as there.
        prefill_chunk: as there.
        num_pages: as there.
        implementation: as there.
        mesh: as there.

    Yields:
        For each prompt, the tokens that are new since the last yield; empty once it has ended.
        With no prompts nothing is yielded.

    Raises:
        ValueError: an argument is wrong.
        PagePoolFullError: `num_pages` did not suffice.
    """
    if len(prompts) == 0:
        return
    _check_positive(max_new_tokens=max_new_tokens, every=every)
    _check_positive(page_size=page_size, prefill_chunk=prefill_chunk)
    lengths = _check_prompts(model, prompts, max_new_tokens)
    sampling = Sampling.create(temperature, top_k, top_p, seed)
    implementation = check_implementation(implementation)
    _check_mesh(mesh, page_size)
    if eos_token_id is None:
        eos_token_id = model.config.eos_token_id
    # -1 is no token: XLA of jax 0.11 crashes on an array of no elements that leaves a shard_map.
    eos = np.append(() if eos_token_id is None else eos_token_id, -1).astype(np.int32)

    # Short prompts take one chunk no wider than they need, in powers of two to share executables.
    chunk = min(prefill_chunk, 1 << (max(lengths) - 1).bit_length())
    t = _round_up(max(lengths), chunk)
    n = _round_up(max_new_tokens, _NEW_TOKENS_STEP)
    shards = 1 if mesh is None else mesh.shape[DATA]
    b, pages_each = _round_up(len(prompts), shards), -(-(t + n) // page_size)
    tokens, rows = np.zeros((b, t), np.int32), np.arange(b)
    for row, prompt in enumerate(prompts):
        tokens[row, t - len(prompt) :] = prompt
    padded = np.pad(lengths, (0, b - len(prompts)))
    if num_pages is None:
        # Every prompt at its padded length, so that the shapes tell nothing of the lengths.
        num_pages = b // shards * pages_each
    state = _State(
        cache=_create_cache(
            mesh,
            num_layers=model.config.num_hidden_layers,
            num_pages=num_pages,
            max_seqs=b // shards,
            max_pages_per_seq=pages_each,
            page_size=page_size,
            d_k=model.config.d_cache,
            dtype=model.dtype,
        ),
        prompt=_place(mesh, rows.astype(np.int32), _ROWS),
        tokens=_place(mesh, np.zeros((b, n), np.int32), _ROWS),
        num_tokens=_place(mesh, np.zeros(b, np.int32), _ROWS),
        finished=_place(mesh, padded == 0, _ROWS),
        starved=_place(mesh, np.zeros(b, bool), _ROWS),
        eos=_place(mesh, eos, PartitionSpec()),
        sampling=jax.tree.map(lambda x: _place(mesh, x, PartitionSpec()), sampling),
    )

    graphdef, params = nnx.split(model)
    state = _prefill(
        graphdef,
        params,
        state,
        _place(mesh, tokens, _ROWS),
        _place(mesh, padded.astype(np.int32), _ROWS),
        chunk=chunk,
        mesh=mesh,
    )
    shown = np.zeros(b, np.int64)
    limit = 1
    while True:
        num_tokens, new, starved, finished = map(
            _fetch, (state.num_tokens, state.tokens, state.starved, state.finished)
        )
        yield [new[i, shown[i] : num_tokens[i]].tolist() for i in range(len(prompts))]
        shown = num_tokens
        if np.any(starved):
            raise PagePoolFullError(
                f"num_pages: got {num_pages} pages of {page_size} tokens, too few: prompts "
                f"{np.flatnonzero(starved).tolist()} stopped after "
                f"{num_tokens[starved].tolist()} new tokens"
            )
        if limit >= max_new_tokens or np.all(finished):
            return
        limit = min(limit + every, max_new_tokens)
        state = decode_loop(b // shards)(
            graphdef,
            params,
            state,
            _place(mesh, np.int32(limit), PartitionSpec()),
            implementation=implementation,
            mesh=mesh,
        )


def generate(
    model: DeepseekForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    page_size: int = 64,
    prefill_chunk: int = 512,
    num_pages: int | None = None,
    implementation: Implementation = None,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """Continues prompts of different lengths in one batch.

    Prefill is one executable and the whole decode loop another. Neither compiles anew for other
    prompts, lengths, limits or sampling numbers of the same padded shape: the number of prompts,
    the longest prompt rounded up to `prefill_chunk`, and max_new_tokens rounded up to 64.

    Args:
        model: the language model.
        prompts: token ids; at least one each.
        max_new_tokens: most new tokens per prompt.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draws among this many most likely tokens only.
        top_p: draws among the most likely tokens whose probabilities reach this sum.
        seed: of the random stream; the same seed gives the same tokens, and a prompt's tokens do
            not depend on the prompts beside it.
        eos_token_id: a token or tokens that end a sequence; None: those of the model's config; an
            empty sequence: none.
        page_size: tokens per page of the cache.
        prefill_chunk: prompt tokens per pass; less takes less memory.
        num_pages: pages of the cache per layer; None: enough for every prompt. With fewer, pages of
            sequences that ended serve the others.
        implementation: of decode, as for `flash_mla_with_kvcache`.
        mesh: devices to run on, with automatic axes. Prompts are cut over axis `data`, which it
            must have, and `num_pages` is then the pool of each of its devices; the model over
            `tensor`, as `mla_jax.shard` cut it; each page of the cache over `context`. Tokens are
            those of one device up to rounding. With several processes, each makes the same call.

    Returns:
        For each prompt its new tokens; one that ended does so with the token that ended it.

    Raises:
        ValueError: an argument is wrong.
        PagePoolFullError: `num_pages` did not suffice.
    """
    parts = list(
        stream(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            every=max(1, max_new_tokens),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_token_id=eos_token_id,
            page_size=page_size,
            prefill_chunk=prefill_chunk,
            num_pages=num_pages,
            implementation=implementation,
            mesh=mesh,
        )
    )
    return [list(chain.from_iterable(tokens)) for tokens in zip(*parts, strict=True)]


def _create_cache(mesh: Mesh | None, **sizes: Any) -> PagedKVCache:
    """Makes an empty cache, or on a mesh one of these sizes for each shard of the rows."""
    create = partial(PagedKVCache.create, **sizes)
    if mesh is None:
        return create()
    shards = jax.shard_map(
        create, mesh=mesh, in_specs=(), out_specs=_ROWS, axis_names={DATA}, check_vma=False
    )
    rows = NamedSharding(mesh, _ROWS)
    slots = CONTEXT if CONTEXT in mesh.axis_names else None
    layout = dataclasses.replace(
        jax.tree.map(lambda _: rows, jax.eval_shape(create)),
        pages=NamedSharding(mesh, PartitionSpec(DATA, slots)),
    )
    return jax.jit(shards, out_shardings=layout)()


def _place(mesh: Mesh | None, x: Any, spec: PartitionSpec) -> jax.Array:
    return jnp.asarray(x) if mesh is None else jax.device_put(x, NamedSharding(mesh, spec))


def _fetch(x: jax.Array) -> np.ndarray:
    """Brings an array to the host, from the devices of other processes, too."""
    if not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def _check_mesh(mesh: Mesh | None, page_size: int) -> None:
    if mesh is None:
        return
    if DATA not in mesh.axis_names or mesh.explicit_axes:
        raise ValueError(
            f"mesh: got {mesh}, expected an axis {DATA!r} (it may have one device) and automatic "
            "axes only (axis_types=jax.sharding.AxisType.Auto)"
        )
    if page_size % (slices := mesh.shape.get(CONTEXT, 1)):
        raise ValueError(
            f"page_size: got {page_size}, expected a multiple of the {slices} devices of axis "
            f"{CONTEXT!r} of mesh"
        )


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _check_positive(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a positive int")


def _check_prompts(
    model: DeepseekForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[int]:
    """Returns the prompts' lengths."""
    vocab_size, limit = model.config.vocab_size, model.config.max_position_embeddings
    for row, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"prompts[{row}]: got {prompt!r}, expected a list of token ids")
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(
                f"prompts[{row}]: got token {ids.min() if ids.min() < 0 else ids.max()}, "
                f"expected ids in [0, vocab_size={vocab_size})"
            )
        if ids.size + max_new_tokens > limit:
            raise ValueError(
                f"prompts[{row}]: got {ids.size} tokens and max_new_tokens {max_new_tokens}, "
                f"expected at most max_position_embeddings = {limit} together"
            )
    return [len(prompt) for prompt in prompts]
