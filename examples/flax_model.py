# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""`MultiHeadLatentAttention` inside a Flax model of your own: train it, then decode with it.

A two-layer transformer learns to copy: it reads a random word, a separator, and must write the word
again. It trains by the module's differentiable path and then writes token by token over a
`PagedKVCache`, by absorbed attention, with the same parameters.

Run: python examples/flax_model.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mla_jax

VOCAB, WORD, WIDTH, LAYERS = 16, 6, 64, 2
SEPARATOR = 0
PROMPT = WORD + 1


class Layer(nnx.Module):
    """Attention and a feed-forward layer, both residual."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = mla_jax.MultiHeadLatentAttention(
            WIDTH,
            4,
            q_lora_rank=None,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=16,
            rngs=rngs,
        )
        self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def feed_forward(self, x):
        return x + self.down(jax.nn.silu(self.up(self.mlp_norm(x))))

    def __call__(self, x):
        return self.feed_forward(x + self.attention(self.attention_norm(x)))

    def decode(self, x, cache, index):
        x, cache = self.attention.decode(x, cache, index, norm=self.attention_norm)
        return self.feed_forward(x), cache


class Model(nnx.Module):
    """A transformer whose cache is one `PagedKVCache` for all layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List(Layer(rngs) for _ in range(LAYERS))
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def logits(self, x):
        return self.embed.attend(self.norm(x))

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.logits(x)

    def decode(self, tokens, cache):
        x = self.embed(tokens)
        for index, layer in enumerate(self.layers):
            x, cache = layer.decode(x, cache, index)
        return self.logits(x[:, -1]), cache


def batch(key, b):
    """Draws `[b, 2 * WORD + 1]` tokens: a word, the separator, the word again."""
    word = jax.random.randint(key, (b, WORD), 1, VOCAB)
    return jnp.concatenate([word, jnp.full((b, 1), SEPARATOR), word], axis=1)


@nnx.jit
def train_step(model, optimizer, key):
    """Takes one step of Adam on the loss of the second word."""
    tokens = batch(key, 64)

    def loss(model):
        logits = model(tokens[:, :-1])[:, WORD:]
        targets = tokens[:, PROMPT:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


@nnx.jit
def write(model, prompt, cache):
    """Reads the prompt and writes WORD tokens greedily, in one `lax.scan`; returns `[b, WORD]`."""
    b = prompt.shape[0]
    cache, _ = cache.reserve(jnp.full(b, PROMPT))
    logits, cache = model.decode(prompt, cache)
    graphdef, params = nnx.split(model)

    def step(carry, _):
        cache, logits = carry
        token = logits.argmax(-1)
        cache, _ = cache.reserve(jnp.ones(b, jnp.int32))
        logits, cache = nnx.merge(graphdef, params).decode(token[:, None], cache)
        return (cache, logits), token

    _, tokens = jax.lax.scan(step, (cache, logits), length=WORD)
    return tokens.T


model = Model(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
for number in range(400):
    loss = train_step(model, optimizer, jax.random.key(number))
    if number % 100 == 0 or number == 399:
        print(f"step {number:3}: loss {loss:.4f}")

b = 8
cache = mla_jax.PagedKVCache.create(
    num_layers=LAYERS,
    num_pages=4 * b,
    max_seqs=b,
    max_pages_per_seq=4,
    page_size=4,
    d_k=model.layers[0].attention.d_cache,
    dtype=jnp.float32,
)
tokens = batch(jax.random.key(1234), b)
written = write(model, tokens[:, :PROMPT], cache)
for prompt, answer in zip(tokens[:3, :WORD].tolist(), written[:3].tolist(), strict=True):
    print(f"{prompt} -> {answer}")
right = (written == tokens[:, PROMPT:]).mean()
print(f"{100 * right:.0f} % of the tokens copied")
assert right > 0.9
