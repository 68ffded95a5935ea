# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The op alone: one decode step of Multi-head Latent Attention over a paged cache.

Run: python examples/op.py
"""

import jax
import jax.numpy as jnp
import numpy as np

import mla_jax

PAGE_SIZE = 64
HEADS = 16
LATENT, ROPE = 512, 64  # DeepSeek's kv_lora_rank and qk_rope_head_dim: a cached token is 576 wide

# The pool: pages of 64 tokens, shared by all sequences. Only the latents are cached; all heads read
# the same one, and the first 512 of its channels are the values too.
rng = np.random.default_rng(0)
pool = jnp.asarray(rng.standard_normal((12, PAGE_SIZE, 1, LATENT + ROPE)), jnp.bfloat16)

# Three sequences. A row of the table names the pages of one, in order; pages may lie anywhere, and
# entries that a length does not reach may hold anything.
block_table = jnp.asarray([[7, 2, 9], [4, -1, -1], [0, 11, -1]], jnp.int32)
lengths = jnp.asarray([150, 10, 100], jnp.int32)  # tokens cached, the new one included

# One new token per sequence; in the model its queries come from the absorbed projections.
q = jnp.asarray(rng.standard_normal((3, 1, HEADS, LATENT + ROPE)), jnp.bfloat16)


@jax.jit
def decode_step(q, pool, block_table, lengths):
    """Runs one layer's attention; the schedule would serve every layer of the step."""
    schedule, num_splits = mla_jax.get_mla_metadata(lengths, HEADS, 1)
    return mla_jax.flash_mla_with_kvcache(
        q, pool, block_table, lengths, LATENT, schedule, num_splits
    )


def plain(q, pool, table, length):
    """The formula for one sequence: softmax(q k^T / sqrt(576)) v."""
    k = pool[table].reshape(-1, LATENT + ROPE)[:length].astype(jnp.float32)
    scores = q[0].astype(jnp.float32) @ k.T / (LATENT + ROPE) ** 0.5
    return jax.nn.softmax(scores, axis=-1) @ k[:, :LATENT]


print(mla_jax.explain(q, pool, block_table, lengths, LATENT))
out, lse = decode_step(q, pool, block_table, lengths)
print(f"out {out.dtype}{list(out.shape)}, lse {lse.dtype}{list(lse.shape)}")
for i, length in enumerate(lengths.tolist()):
    expected = plain(q[i], pool, block_table[i], length)
    error = jnp.linalg.norm(out[i, 0] - expected) / jnp.linalg.norm(expected)
    print(f"sequence {i}: {length} tokens, differs from the formula by {error:.1e} of its norm")
    assert error < 4e-3  # what rounding to bfloat16 makes

# Lengths and tables are data: another step runs the same executable.
decode_step(q, pool, block_table, lengths + 1)
print(f"executables compiled: {decode_step._cache_size()}")
