# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""A decode loop written by hand: parallel samples of one prompt that share its pages.

The prompt is prefilled once. Its sequence is forked into as many as are wanted; forks share all
pages, and the last, partly filled one is copied when a fork first writes to it. Everything after
prefill, forks and releases included, is one jitted function over a donated cache.

Run: python examples/decode_loop.py
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer

import mla_jax

SAMPLES, NEW_TOKENS, PAGE_SIZE = 4, 48, 16
FOLDER = Path(mla_jax.__file__).parent / "tiny"

tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
model = mla_jax.DeepseekForCausalLM.from_pretrained(FOLDER, param_dtype=jnp.float32)
graphdef, params = nnx.split(model)
prompt = jnp.asarray(
    tokenizer.encode("HAMLET.\nTo be, or not to be, that is the question:\nWhether").ids
)
config = model.config

cache = mla_jax.PagedKVCache.create(
    num_layers=config.num_hidden_layers,
    num_pages=32,
    max_seqs=SAMPLES,
    max_pages_per_seq=8,
    page_size=PAGE_SIZE,
    d_k=config.d_cache,
    dtype=model.dtype,
)


@partial(jax.jit, donate_argnames="cache")
def prefill(params, tokens, cache):
    """Fills slot 0 with the prompt; the other slots get no tokens."""
    cache, _ = cache.reserve(jnp.zeros(SAMPLES, jnp.int32).at[0].set(tokens.size))
    columns = jnp.broadcast_to(tokens, (SAMPLES, tokens.size))
    return nnx.merge(graphdef, params).step(columns, cache, prefill=True)


@partial(jax.jit, donate_argnames="cache", compiler_options=mla_jax.step_options(SAMPLES))
def sample(params, logits, cache, key):
    """Forks slot 0 into all others and decodes every one of them; returns `[SAMPLES, n]` tokens."""
    others = jnp.arange(1, SAMPLES)
    cache = cache.fork(jnp.zeros_like(others), others)
    free_after_fork = cache.num_free_pages

    def step(carry, key):
        cache, logits = carry
        tokens = jax.random.categorical(key, logits / 0.7).astype(jnp.int32)
        cache, _ = cache.reserve(jnp.ones(SAMPLES, jnp.int32))
        logits, cache = nnx.merge(graphdef, params).step(tokens[:, None], cache)
        return (cache, logits), tokens

    logits = jnp.broadcast_to(logits[:1], logits.shape)
    keys = jax.random.split(key, NEW_TOKENS)
    (cache, _), tokens = jax.lax.scan(step, (cache, logits), keys)
    used = cache.num_pages - cache.num_free_pages
    cache = cache.release(jnp.ones(SAMPLES, bool))
    return tokens.T, cache, free_after_fork, used


logits, cache = prefill(params, prompt, cache)
pages_of_prompt = 32 - int(cache.num_free_pages)
tokens, cache, free_after_fork, used = sample(params, logits, cache, jax.random.key(4))

for i, row in enumerate(tokens.tolist()):
    print(f"--- sample {i}\n{tokenizer.decode(prompt.tolist() + row)}")
alone = -(-(prompt.size + NEW_TOKENS) // PAGE_SIZE)
print(
    f"\nthe prompt took {pages_of_prompt} pages, the forks none "
    f"({32 - int(free_after_fork)} in use after forking);\n"
    f"at the end {int(used)} pages were in use, {SAMPLES * alone} without sharing"
)
assert int(free_after_fork) == 32 - pages_of_prompt
assert int(used) == SAMPLES * alone - (SAMPLES - 1) * (prompt.size // PAGE_SIZE)
assert int(cache.num_free_pages) == 32
