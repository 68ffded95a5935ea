# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Times the op and whole decode steps on one device and on two, by wall clock.

Run: python tests/mesh_times.py [--small]

bfloat16, N(0, 1). The op: 20 calls that depend on each other in one program, sequences of one
length. The step: four dense layers of DeepSeek-V3's sizes, with caches of about 1000 tokens.
`--small` takes sizes that a CPU can run, to try the script.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mla_jax

SMALL = "--small" in sys.argv
CALLS = 2 if SMALL else 20
PAGE_SIZE = 64

# How q, the pool, the table and the lengths lie; `data` is a shard_map: a pool for each device.
LAYOUTS = {
    None: (P(), P(), P(), P()),
    "tensor": (P(None, None, "tensor"), P(), P(), P()),
    "data": (P("data"), P("data"), P("data"), P("data")),
    "context": (P(), P(None, "context"), P(), P()),
}


def seconds(run: Callable[[], Any]) -> float:
    """Returns the median of some runs after one that does not count."""
    taken = []
    for _ in range(4 if SMALL else 10):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def op(axis: str | None, b: int, h_q: int, length: int) -> None:
    """Times the op; with `data`, each device's half of the sequences has pages of its own."""
    devices = jax.devices()[: 1 if axis is None else 2]
    mesh = Mesh(np.array(devices), (axis or "data",))
    specs = LAYOUTS[axis]
    width = length // PAGE_SIZE
    pools = 2 if axis == "data" else 1
    table = np.tile(np.arange(b // pools * width, dtype=np.int32).reshape(-1, width), (pools, 1))

    def draw(seed: int, spec: P, *shape: int) -> jax.Array:
        make = lambda: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)  # noqa: E731
        return jax.jit(make, out_shardings=NamedSharding(mesh, spec))()

    arrays = (
        draw(0, specs[0], b, 1, h_q, 576),
        draw(1, specs[1], b * width, PAGE_SIZE, 1, 576),
        jax.device_put(table, NamedSharding(mesh, specs[2])),
        jax.device_put(np.full(b, length, np.int32), NamedSharding(mesh, specs[3])),
    )

    def calls(q: jax.Array, *rest: jax.Array) -> jax.Array:
        for _ in range(CALLS):
            out, _ = mla_jax.flash_mla_with_kvcache(q, *rest, 512)
            q = q.at[..., :512].add(1e-3 * out)
        return q

    if axis == "data":
        calls = jax.shard_map(calls, mesh=mesh, in_specs=specs, out_specs=specs[0])
    run = jax.jit(calls).lower(*arrays).compile()
    taken = seconds(lambda: run(*arrays)) / CALLS
    print(
        f"op    {axis!s:8} b {b:4} h {h_q:4} length {length:6}: {1e6 * taken:8.1f} us", flush=True
    )


def step(axis: str | None, b: int, prompt: int) -> None:
    """Times decode steps, 64 at a time."""
    sizes = {"hidden_size": 7168, "intermediate_size": 18432, "num_attention_heads": 128}
    sizes |= {"q_lora_rank": 1536, "vocab_size": 32768, "num_hidden_layers": 4}
    if SMALL:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
        sizes |= {"q_lora_rank": 24, "vocab_size": 128, "num_hidden_layers": 2}
    config = mla_jax.DeepseekConfig(
        model_type="deepseek_v3", first_k_dense_replace=99, n_routed_experts=None,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        max_position_embeddings=8192, **sizes,
    )  # fmt: skip
    make = functools.partial(mla_jax.DeepseekForCausalLM, config)
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = nnx.jit(lambda: make(**dtypes, rngs=nnx.Rngs(0)))()
    mesh = None
    if axis is not None:
        shape = (2, 1) if axis == "data" else (1, 2)
        names = ("data", "tensor" if axis == "data" else axis)
        mesh = Mesh(np.array(jax.devices()[:2]).reshape(shape), names)
        mla_jax.shard(model, mesh)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (b, prompt)).tolist()
    steps, taken = 64, []
    start = time.perf_counter()
    for _ in mla_jax.stream(
        model, prompts, max_new_tokens=5 * steps + 1, every=steps, mesh=mesh, eos_token_id=()
    ):
        taken.append((time.perf_counter() - start) / steps)
        start = time.perf_counter()
    # The first is prefill, the second compiles.
    taken = statistics.median(taken[2:])
    print(f"step  {axis!s:8} b {b:4} prompt {prompt:5}: {1e3 * taken:8.3f} ms", flush=True)


if __name__ == "__main__":
    print(jax.__version__, jax.devices())
    for b, h_q, length in [(4, 8, 128)] if SMALL else [(128, 128, 4096), (2, 128, 65536)]:
        for axis in LAYOUTS:
            op(axis, b, h_q, length)
    for axis in LAYOUTS:
        step(axis, *((2, 20) if SMALL else (32, 512)))
