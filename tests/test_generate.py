# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Generation: sampling, stopping, the pool, and what compiles."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_jax import DeepseekConfig, DeepseekForCausalLM, PagePoolFullError, generate, stream

# The package's attribute of that name is the function.
generation = importlib.import_module("mla_jax.generate")

CONFIG = DeepseekConfig(
    model_type="deepseek_v3",
    vocab_size=200,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=24,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    max_position_embeddings=512,
)
PROMPTS = [[5, 9, 3, 30, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def model():
    model = DeepseekForCausalLM(CONFIG, rngs=nnx.Rngs(3))
    # Sharp logits, so that greedy tokens vary and do not hang on rounding.
    model.lm_head.kernel[...] *= 8
    return model


def _naive_greedy(model, prompt, n):
    forward = nnx.jit(lambda m, tokens: m(tokens))
    tokens = list(prompt)
    for _ in range(n):
        padded = np.zeros((1, 40), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(forward(model, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_equals_the_uncached_model(model):
    expected = [_naive_greedy(model, prompt, 20) for prompt in PROMPTS]
    assert min(len(set(tokens)) for tokens in expected) > 3
    assert generate(model, PROMPTS, max_new_tokens=20, page_size=8) == expected


def test_no_prompts_no_tokens(model):
    assert generate(model, [], max_new_tokens=4) == []
    assert list(stream(model, [], max_new_tokens=4)) == []


def test_eos_ends_a_prompt_and_stays_in_its_tokens(model):
    free = generate(model, PROMPTS, max_new_tokens=20)
    ends = free[0][6]
    got = generate(model, PROMPTS, max_new_tokens=20, eos_token_id=[199, ends])
    for tokens, all_tokens in zip(got, free, strict=True):
        stop = [i for i, token in enumerate(all_tokens) if token in (199, ends)]
        assert tokens == all_tokens[: stop[0] + 1 if stop else 20]
    assert len(got[0]) <= 7


def test_eos_of_the_config_is_the_default(model):
    free = generate(model, PROMPTS[:1], max_new_tokens=20)[0]
    with_eos = DeepseekForCausalLM(
        DeepseekConfig(**(vars(CONFIG) | {"eos_token_id": free[4]})), rngs=nnx.Rngs(0)
    )
    nnx.update(with_eos, nnx.state(model))
    assert generate(with_eos, PROMPTS[:1], max_new_tokens=20)[0] == free[: free.index(free[4]) + 1]
    assert generate(with_eos, PROMPTS[:1], max_new_tokens=20, eos_token_id=()) == [free]


def test_stream_yields_the_same_tokens_in_parts(model):
    options = {"max_new_tokens": 20, "temperature": 0.7, "seed": 5}
    parts = list(stream(model, PROMPTS, every=6, **options))
    assert [len(tokens) for tokens in parts[0]] == [1, 1, 1]
    assert [len(part[1]) for part in parts] == [1, 6, 6, 6, 1]
    joined = [sum(tokens, []) for tokens in zip(*parts, strict=True)]
    assert joined == generate(model, PROMPTS, **options)


def test_seed_decides_and_neighbours_do_not(model):
    options = {"max_new_tokens": 16, "temperature": 1.0}
    first = generate(model, PROMPTS, seed=1, **options)
    assert generate(model, PROMPTS, seed=1, **options) == first
    assert generate(model, PROMPTS, seed=2, **options) != first
    assert generate(model, [PROMPTS[0], [8, 8], [30]], seed=1, **options)[0] == first[0]


def test_pages_of_finished_prompts_serve_the_others(model):
    """Two prompts end early; the third then takes more pages than were left beside them."""
    free = generate(model, PROMPTS, max_new_tokens=40, page_size=4)
    ends = [next(t for t in tokens if t not in free[2]) for tokens in free[:2]]
    early = [tokens[: 1 + min(map(tokens.index, set(ends) & set(tokens)))] for tokens in free[:2]]
    assert max(map(len, early)) < 8
    # The third grows to 9 + 39 tokens: all 12 pages.
    options = {"max_new_tokens": 40, "page_size": 4, "num_pages": 12}
    got = generate(model, PROMPTS, eos_token_id=ends, **options)
    assert got == [*early, free[2]]
    with pytest.raises(PagePoolFullError, match="num_pages: got 12 pages of 4 tokens, too few"):
        generate(model, PROMPTS, eos_token_id=(), **options)


def test_a_pool_too_small_for_the_prompts(model):
    with pytest.raises(PagePoolFullError, match=r"prompts \[2\] stopped after \[0\] new tokens"):
        generate(model, PROMPTS, max_new_tokens=2, page_size=4, num_pages=4)


def test_new_values_compile_nothing(model):
    options = {"page_size": 8, "prefill_chunk": 16}
    generate(model, PROMPTS, max_new_tokens=11, temperature=0.5, top_k=3, **options)
    list(stream(model, PROMPTS, max_new_tokens=9, every=3, temperature=0.5, top_p=0.9, **options))
    sizes = generation._prefill._cache_size(), generation._decode._cache_size()
    other = [[3] * 14, [2, 2], [9] * 16]
    for extra in ({"top_k": 7}, {"top_p": 0.5, "seed": 9}, {"top_k": 2, "num_pages": None}):
        generate(model, other, max_new_tokens=30, temperature=2.0, **options, **extra)
        list(stream(model, other, max_new_tokens=64, every=20, temperature=0.1, **options, **extra))
    assert (generation._prefill._cache_size(), generation._decode._cache_size()) == sizes


def test_many_rows_take_a_loop_with_options_of_its_own(model, monkeypatch):
    options = {"max_new_tokens": 20, "page_size": 8}
    expected = generate(model, PROMPTS, **options)
    monkeypatch.setattr(generation, "_MANY_TOKENS", len(PROMPTS))
    loops = (generation._decode, generation._decode_many)
    sizes = [loop._cache_size() for loop in loops]
    assert generate(model, PROMPTS, **options) == expected
    assert [loop._cache_size() for loop in loops] == [sizes[0], sizes[1] + 1]
    assert generate(model, PROMPTS[:2], **options) == expected[:2]
    assert [loop._cache_size() for loop in loops] == [sizes[0] + 1, sizes[1] + 1]
    few, many = generation.step_options(2), generation.step_options(3)
    assert few.items() < many.items()


def test_the_loops_hold_no_copy_of_the_pool(model):
    """The pool is as large as memory allows: prefill and decode must write it in place."""
    seen = {}
    for name in ("_prefill", "_decode"):
        jitted = getattr(generation, name)

        def spy(*args, name=name, jitted=jitted, **kwargs):
            seen[name] = jitted.lower(*args, **kwargs).compile().as_text()
            return jitted(*args, **kwargs)

        setattr(generation, name, spy)
        try:
            generate(model, PROMPTS, max_new_tokens=3, page_size=8, num_pages=37)
        finally:
            setattr(generation, name, jitted)
        pool = r"f32\[74,8,1,32\]"  # 2 layers of 37 pages
        text = seen[name]
        assert re.search(pool, text)
        assert "input_output_alias" in text
        assert not re.search(rf"= {pool}\S* copy", text)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.6), (5, 0.7)])
def test_sampling_follows_the_filtered_distribution(top_k, top_p):
    logits = np.random.default_rng(0).standard_normal(12).astype(np.float32) * 2
    temperature, draws = 0.9, 20_000
    p = np.exp(logits.astype(np.float64) / temperature)
    order = np.argsort(-p)
    p[order[top_k:] if top_k else []] = 0
    p /= p.sum()
    if top_p:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
        p /= p.sum()
    sampling = generation.Sampling.create(temperature, top_k, top_p, seed=4)
    tokens = jax.jit(sampling.draw)(
        jnp.tile(logits, (draws, 1)), jnp.arange(draws), jnp.zeros(draws, jnp.int32)
    )
    counts = np.bincount(tokens, minlength=12)
    assert counts[p == 0].sum() == 0
    chi_square = (((counts - draws * p) ** 2)[p > 0] / (draws * p[p > 0])).sum()
    assert chi_square < 40  # 11 degrees of freedom: 1e-5 of right samplers fail


def test_draws_differ_by_row_and_step():
    sampling = generation.Sampling.create(1.0, seed=0)
    flat = jnp.zeros((64, 1000))
    first, second = (sampling.draw(flat, jnp.arange(64), jnp.full(64, step)) for step in (0, 1))
    assert len(set(first.tolist())) > 50
    assert (first != second).sum() > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected a positive int"),
        ({"temperature": -1.0}, "temperature: got -1.0, expected a number of at least 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_k": 0}, "top_k: got 0, expected a positive int or None"),
        ({"top_p": 0.0}, r"top_p: got 0.0, expected a number in \(0, 1\] or None"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"seed": -1}, r"seed: got -1, expected an int in \[0, 2\*\*32\)"),
        ({"page_size": 0}, "page_size: got 0, expected a positive int"),
        ({"prefill_chunk": 0}, "prefill_chunk: got 0, expected a positive int"),
        ({"num_pages": 0}, "num_pages: got 0"),
        ({"implementation": "cuda"}, "implementation: got 'cuda', expected None, one of"),
        ({"prompts": [[1], []]}, r"prompts\[1\]: got \[\], expected a list of token ids"),
        ({"prompts": [[1.5]]}, r"prompts\[0\]: got \[1.5\], expected a list of token ids"),
        ({"prompts": [[1], [200]]}, r"prompts\[1\]: got token 200, .* \[0, vocab_size=200\)"),
        ({"prompts": [[-2]]}, r"prompts\[0\]: got token -2"),
        ({"max_new_tokens": 508}, "got 5 tokens and max_new_tokens 508, .* = 512 together"),
    ],
)
def test_refusals(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **({"prompts": PROMPTS, "max_new_tokens": 4} | options))
