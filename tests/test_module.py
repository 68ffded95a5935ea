# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""MultiHeadLatentAttention: against float64 NumPy, and its three paths against each other."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_jax import MultiHeadLatentAttention, PagedKVCache, RopeConfig, YarnScaling

SIZES = {
    "hidden_size": 20,
    "num_heads": 3,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
YARN = YarnScaling(40, 32, mscale=1.0, mscale_all_dim=0.8)
VARIANTS = {
    "default": {},
    "no_q_lora": {"q_lora_rank": None},
    "bias": {"attention_bias": True},
    "yarn": {"rope": RopeConfig(10000.0, YARN)},
    "half_split": {"rope": RopeConfig(500.0, YARN, interleaved=False)},
}


def _make(dtype=jnp.float32, **changes):
    module = MultiHeadLatentAttention(
        **(SIZES | changes), dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    # Norm weights and biases start as 1 and 0: random ones, so that ignoring them shows.
    rng = np.random.default_rng(0)
    state = nnx.state(module)
    state = jax.tree.map(
        lambda x: x if x.ndim > 1 else x + 0.3 * rng.standard_normal(x.shape).astype(x.dtype), state
    )
    nnx.update(module, state)
    return module


def _x(b, t, seed=1):
    return np.random.default_rng(seed).standard_normal((b, t, SIZES["hidden_size"])).astype("f4")


class Definition:
    """Multi-head Latent Attention in float64 NumPy, one head and one query at a time."""

    def __init__(self, module):
        self.m = module
        state = nnx.to_flat_state(nnx.state(module, nnx.Param))
        self.p = {".".join(path): np.asarray(value[...], np.float64) for path, value in state}

    def linear(self, name, x):
        return x @ self.p[f"{name}.kernel"] + self.p.get(f"{name}.bias", 0.0)

    def norm(self, name, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self.p[f"{name}.scale"]

    def yarn_mscale(self, weight):
        return 0.1 * weight * np.log(self.m.rope.scaling.factor) + 1

    def rotate(self, x, position):
        dim, rope = x.shape[-1], self.m.rope
        pair = np.arange(dim // 2)
        angle = rope.theta ** (-2.0 * pair / dim)
        factor = 1.0
        if rope.scaling is not None:
            s = rope.scaling
            turns = s.original_max_position_embeddings * angle / (2 * np.pi)
            edge = [
                np.log(s.original_max_position_embeddings / (2 * np.pi * beta))
                / np.log(rope.theta) * dim / 2
                for beta in (s.beta_fast, s.beta_slow)
            ]  # fmt: skip
            low, high = max(np.floor(edge[0]), 0), min(np.ceil(edge[1]), dim - 1)
            assert (np.diff(turns) < 0).all()
            slow = np.clip((pair - low) / (high - low), 0, 1)
            angle = (1 - slow) * angle + slow * angle / s.factor
            factor = self.yarn_mscale(s.mscale) / self.yarn_mscale(s.mscale_all_dim)
        turn = factor * np.exp(1j * angle * position)
        if rope.interleaved:
            z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
            return np.stack([z.real, z.imag], -1).reshape(x.shape)
        z = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    def __call__(self, x, positions=None, mask=None):
        m, x = self.m, np.asarray(x, np.float64)
        b, t, _ = x.shape
        h, n, v = m.num_heads, m.qk_nope_head_dim, m.v_head_dim
        positions = np.tile(np.arange(t), (b, 1)) if positions is None else positions
        scale = (n + m.qk_rope_head_dim) ** -0.5
        if m.rope.scaling is not None:
            scale *= self.yarn_mscale(m.rope.scaling.mscale_all_dim) ** 2
        if m.q_lora_rank is None:
            q = self.linear("q_proj", x)
        else:
            q = self.linear("q_b_proj", self.norm("q_a_layernorm", self.linear("q_a_proj", x)))
        q = q.reshape(b, t, h, -1)
        kv = self.linear("kv_a_proj_with_mqa", x)
        latent = self.norm("kv_a_layernorm", kv[..., : m.kv_lora_rank])
        expanded = self.linear("kv_b_proj", latent).reshape(b, t, h, n + v)
        out = np.zeros((b, t, h, v))
        for i in range(b):
            k_pe = np.stack(
                [self.rotate(kv[i, j, m.kv_lora_rank :], positions[i, j]) for j in range(t)]
            )
            for j in range(t):
                seen = [k for k in range(j + 1) if mask is None or mask[i, j, k]]
                if not seen:
                    continue
                for head in range(h):
                    q_pe = self.rotate(q[i, j, head, n:], positions[i, j])
                    scores = expanded[i, seen, head, :n] @ q[i, j, head, :n] + k_pe[seen] @ q_pe
                    weights = np.exp(scale * scores - (scale * scores).max())
                    out[i, j, head] = weights @ expanded[i, seen, head, n:] / weights.sum()
        return self.linear("o_proj", out.reshape(b, t, h * v))


@pytest.mark.parametrize("variant", VARIANTS)
def test_naive_path_is_the_definition(variant):
    module = _make(**VARIANTS[variant])
    x = _x(2, 7)
    positions = np.array([[0, 1, 2, 3, 4, 5, 6], [3, 9, 10, 40, 41, 99, 100]])
    counted = np.tile(np.arange(7), (2, 1))
    forward = nnx.jit(lambda m, *args: m(*args))
    for args in ((x,), (x, counted), (x, positions)):
        np.testing.assert_allclose(forward(module, *args), Definition(module)(*args), atol=2e-5)


def test_mask_hides_keys_and_gives_zero_where_nothing_is_seen():
    module = _make()
    x = _x(2, 6)
    mask = np.random.default_rng(3).random((2, 6, 6)) < 0.5
    mask[1, 4] = False

    @nnx.jit
    def run(module, x):
        return module(x, mask=jnp.asarray(mask[:, None]))

    out = run(module, x)
    np.testing.assert_allclose(out, Definition(module)(x, mask=mask), atol=2e-5)
    np.testing.assert_array_equal(out[1, 4], 0)

    grad = nnx.jit(nnx.grad(lambda m, x: m(x, mask=jnp.asarray(mask[:, None])).sum(), argnums=1))
    assert np.isfinite(grad(module, x)).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_agree_with_float64_differences(variant):
    module = _make(**VARIANTS[variant])
    rng = np.random.default_rng(5)
    x = _x(2, 5)
    target = rng.standard_normal(x.shape)

    def loss(module, x):
        return (module(x) * target).sum()

    grads, grad_x = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(module, x)
    grads = dict(nnx.to_flat_state(grads))
    definition = Definition(module)
    step = 1e-5

    def central(move):
        """Differentiates the float64 definition along a direction that `move` goes."""
        values = []
        for sign in (1, -1):
            move(sign * step)
            values.append((definition(x64) * target).sum())
            move(-sign * step)
        return (values[0] - values[1]) / (2 * step)

    x64 = x.astype(np.float64)
    for path, value in grads.items():
        name = ".".join(path)
        direction = rng.standard_normal(value.shape)

        def move(e, name=name, direction=direction):
            definition.p[name] += e * direction

        expected = central(move)
        np.testing.assert_allclose((value[...] * direction).sum(), expected, rtol=2e-4, atol=2e-4)
    direction = rng.standard_normal(x.shape)

    def move_x(e):
        x64[...] += e * direction

    np.testing.assert_allclose((grad_x * direction).sum(), central(move_x), rtol=2e-4, atol=2e-4)


def _cache(module, b, tokens, page_size, dtype):
    pages_each = -(-tokens // page_size)
    cache = PagedKVCache.create(
        num_layers=2,
        num_pages=b * pages_each + 1,
        max_seqs=b,
        max_pages_per_seq=pages_each,
        page_size=page_size,
        d_k=module.d_cache,
        dtype=dtype,
    )
    return dataclasses.replace(cache, pages=jnp.full_like(cache.pages, jnp.nan))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("page_size", [4, 16])
def test_three_paths_agree(variant, page_size):
    """Ragged prompts in chunks of 3 by one path, then tokens one and two at a time by the other."""
    module = _make(**VARIANTS[variant])
    lengths, total, layer = np.array([11, 4, 0, 7]), 15, 1
    x = _x(4, total)
    naive = np.asarray(module(x))
    cached = {
        name: nnx.jit(lambda m, x, cache, name=name: getattr(m, name)(x, cache, layer))
        for name in ("prefill", "decode")
    }
    for first, then in (("prefill", "decode"), ("decode", "prefill")):
        cache = _cache(module, 4, total, page_size, jnp.float32)
        done = np.zeros(4, int)
        for chunk, path, goal in ((3, first, lengths), (1, then, lengths + 2), (2, then, total)):
            while (done < goal).any():
                new = np.minimum(goal - done, chunk)
                columns = np.full((4, chunk, x.shape[-1]), 9.0, np.float32)  # padding
                for i in range(4):
                    columns[i, chunk - new[i] :] = x[i, done[i] : done[i] + new[i]]
                cache, _ = cache.reserve(new)
                out, cache = cached[path](module, columns, cache)
                for i in range(4):
                    np.testing.assert_allclose(
                        out[i, chunk - new[i] :], naive[i, done[i] : done[i] + new[i]], atol=2e-5
                    )
                done += new


def test_paths_agree_in_bfloat16():
    module = _make(dtype=jnp.bfloat16)
    x = _x(2, 9).astype(jnp.bfloat16)
    naive = np.asarray(module(x), np.float32)
    for path in ("prefill", "decode"):
        cache = _cache(module, 2, 9, 4, jnp.bfloat16)
        cache, _ = cache.reserve(np.full(2, 9))
        out, _ = nnx.jit(lambda m, x, c, path=path: getattr(m, path)(x, c, 0))(module, x, cache)
        error = np.linalg.norm(np.asarray(out, np.float32) - naive)
        assert error < 1e-2 * np.linalg.norm(naive)


def test_parameters_are_named_and_sized_as_in_the_checkpoint():
    """kv_b_proj is there once: absorbing it adds no second copy."""
    module = _make(attention_bias=True)
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    shapes = {".".join(path): value.shape for path, value in state}
    assert shapes == {
        "q_a_proj.kernel": (20, 12),
        "q_a_proj.bias": (12,),
        "q_a_layernorm.scale": (12,),
        "q_b_proj.kernel": (12, 3 * (6 + 8)),
        "kv_a_proj_with_mqa.kernel": (20, 16 + 8),
        "kv_a_proj_with_mqa.bias": (24,),
        "kv_a_layernorm.scale": (16,),
        "kv_b_proj.kernel": (16, 3 * (6 + 10)),
        "o_proj.kernel": (3 * 10, 20),
        "o_proj.bias": (20,),
    }


def test_decode_never_expands_keys_or_values():
    module = _make()
    cache = _cache(module, 2, 64, 16, jnp.float32)
    decode = functools.partial(module.decode, layer=0, implementation="xla")
    jaxpr = jax.make_jaxpr(lambda x, c: decode(x, c)[0])(jnp.zeros((2, 1, 20)), cache)
    per_head = {(2, n, 3, d) for n in (16, 32, 48, 64) for d in (6, 10, 14, 16)}
    shapes = {
        var.aval.shape
        for eqn in _equations(jaxpr.jaxpr)
        for var in eqn.outvars
        if hasattr(var.aval, "shape")
    }
    assert (2, 64, 1, 24) in shapes  # the walk does reach into the loop over pages
    assert not shapes & per_head


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr") or hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_linen_model_uses_it_through_the_bridge():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            attention = nnx.bridge.to_linen(MultiHeadLatentAttention, **SIZES, name="attention")
            return x + attention(nn.LayerNorm()(x))

    x = jnp.asarray(_x(2, 5))
    variables = Block().init(jax.random.key(0), x)
    out = Block().apply(variables, x)
    module = MultiHeadLatentAttention(**SIZES, rngs=nnx.Rngs(1))
    params = variables["params"]
    state = nnx.to_flat_state(nnx.state(module))
    for path, value in state:
        leaf = params["attention"]
        for key in path:
            leaf = leaf[key]
        value[...] = jax.tree.leaves(leaf)[0]
    nnx.update(module, nnx.from_flat_state(state))
    normed = nn.LayerNorm().apply({"params": params["LayerNorm_0"]}, x)
    np.testing.assert_allclose(out, x + module(normed), atol=1e-5)


def test_refusals():
    for name in SIZES:
        with pytest.raises(ValueError, match=f"{name}: got 0, expected a positive int"):
            _make(**{name: 0})
    with pytest.raises(ValueError, match="qk_rope_head_dim: got 7, expected an even number"):
        _make(qk_rope_head_dim=7)
    module = _make()
    with pytest.raises(ValueError, match=r"x: got \[2, 5, 19\], expected \[b, t, hidden_size=20\]"):
        module(jnp.zeros((2, 5, 19)))
    with pytest.raises(ValueError, match=r"positions: got \[2, 4\], expected \[b=2, t=5\]"):
        module(jnp.zeros((2, 5, 20)), jnp.zeros((2, 4), jnp.int32))
    cache = _cache(module, 2, 8, 4, jnp.float32)
    with pytest.raises(ValueError, match="x: got 3 sequences, expected the cache's max_seqs 2"):
        module.decode(jnp.zeros((3, 1, 20)), cache, 0)
    with pytest.raises(ValueError, match="cache: got d_k 24, expected .* = 40"):
        _make(kv_lora_rank=32).prefill(jnp.zeros((2, 1, 20)), cache, 0)
    with pytest.raises(ValueError, match="theta: got 0, expected a number above 1"):
        RopeConfig(theta=0)
    with pytest.raises(ValueError, match="factor: got -1, expected a positive number"):
        YarnScaling(-1, 4096)
    with pytest.raises(ValueError, match="original_max_position_embeddings: got 0"):
        YarnScaling(40, 0)
