# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers of DeepSeek V2 and V3: dense, and mixtures of experts.

Letters: `n` tokens, `e` experts, `k` experts chosen for a token.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype

from mla_jax.config import DeepseekConfig
from mla_jax.linear import dot_general
from mla_jax.partitioning import TENSOR, cut

# Enough rows for a matrix product's full rate, few enough for what all experts make of them.
_TOKENS_AT_A_TIME = 512
# Of the sums by which a few tokens are multiplied.
_PARTS = 4


class Mlp(nnx.Module):
    """A gated feed-forward layer: `down(silu(gate(x)) * up(x))`."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, linear: Callable[..., nnx.Linear]
    ):
        self.gate_proj = linear(hidden_size, intermediate_size, by=(None, TENSOR))
        self.up_proj = linear(hidden_size, intermediate_size, by=(None, TENSOR))
        self.down_proj = linear(intermediate_size, hidden_size, by=(TENSOR, None))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., hidden_size]` to the same shape."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nnx.Module):
    """Chooses experts for each token, as DeepSeek-V2 (section 2.2) or V3 (section 2.1.2) does.

    V2 scores by softmax and may keep to the groups with the best expert. V3 scores by sigmoid, adds
    a bias that balances load when choosing, but not when weighting, and keeps to the groups whose
    two best experts score highest together. Scores are float32 whatever the model's dtype.
    """

    def __init__(self, config: DeepseekConfig, *, param_dtype: Dtype, rngs: nnx.Rngs):
        e = config.n_routed_experts
        init = nnx.initializers.lecun_normal()
        self.config = config
        self.kernel = nnx.Param(init(rngs.params(), (config.hidden_size, e), param_dtype))
        if config.is_v3:
            self.e_score_correction_bias = nnx.Param(jnp.zeros((e,), jnp.float32))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps tokens `[n, hidden_size]` to experts `[n, k]` and float32 weights `[n, k]`."""
        config = self.config
        logits = self._logits(x)
        if config.is_v3:
            scores = jax.nn.sigmoid(logits)
            choice = scores + self.e_score_correction_bias[...]
            group_score, lost = lambda g: jax.lax.top_k(g, min(2, g.shape[-1]))[0].sum(-1), -jnp.inf
        else:
            scores = choice = jax.nn.softmax(logits, axis=-1)
            group_score, lost = lambda g: g.max(-1), 0.0

        if config.n_group > 1 and config.topk_method != "greedy":
            groups = choice.reshape(-1, config.n_group, choice.shape[-1] // config.n_group)
            _, kept = jax.lax.top_k(group_score(groups), config.topk_group)
            keep = jax.nn.one_hot(kept, config.n_group, dtype=bool).any(axis=-2)
            choice = jnp.where(keep[..., None], groups, lost).reshape(choice.shape)
        _, experts = jax.lax.top_k(choice, config.num_experts_per_tok)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if config.is_v3 and config.norm_topk_prob:
            weights /= weights.sum(-1, keepdims=True) + 1e-20
        return experts, weights * config.routed_scaling_factor

    def _logits(self, x: jax.Array) -> jax.Array:
        """Multiplies as if in float32: experts would flip with less."""
        kernel, dims = self.kernel[...], (((1,), (0,)), ((), ()))
        if x.dtype == kernel.dtype and x.dtype.itemsize == 2:
            # Products of 16-bit numbers are exact in float32, by tensor cores too.
            return dot_general(x, kernel, dims, preferred_element_type=jnp.float32)
        # GPUs round float32 products unless told not to.
        x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
        return jax.lax.dot_general(x, kernel, dims, precision=jax.lax.Precision.HIGHEST)


class Experts(nnx.Module):
    """The routed experts: gated feed-forward layers stacked along a first axis `e`."""

    def __init__(
        self, config: DeepseekConfig, *, dtype: Dtype | None, param_dtype: Dtype, rngs: nnx.Rngs
    ):
        e, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.dtype = dtype
        # Every device has a slice of every expert, so that all are equally busy.
        wide, narrow = cut(None, None, TENSOR), cut(None, TENSOR, None)
        self.gate_proj = nnx.Param(init(rngs.params(), (e, d, f), param_dtype), **wide)
        self.up_proj = nnx.Param(init(rngs.params(), (e, d, f), param_dtype), **wide)
        self.down_proj = nnx.Param(init(rngs.params(), (e, f, d), param_dtype), **narrow)

    def __call__(self, x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        """Computes each token's weighted sum over its experts.

        A few tokens read the weights of their own experts. More tokens together choose most
        experts, whose weights must then be read once: up to some hundred tokens that takes longer
        than all products, so every expert takes every token, in plain matrix products, and its
        share in a token may be 0. (`jax.lax.ragged_dot` does the same outside TPUs, but with each
        of the `n * k` sorted rows.) Still more tokens are taken in turns.

        Args:
            x: `[n, hidden_size]`.
            experts: `[n, k]` int, the experts of each token, all different.
            weights: `[n, k]` float32.

        Returns:
            `[n, hidden_size]` in x's dtype.
        """
        n = x.shape[0]
        if 2 * experts.size <= self.gate_proj.shape[0]:
            return self._chosen(x, experts, weights)
        turns = -(-n // _TOKENS_AT_A_TIME)
        if turns <= 1:
            return self._all(x, experts, weights)

        def cut(rows: jax.Array) -> jax.Array:
            # A turn takes every turns-th token, so that each device of a mesh has its part in it.
            rows = jnp.pad(rows, ((0, -n % turns), (0, 0)))
            return rows.reshape(-1, turns, rows.shape[1]).swapaxes(0, 1)

        # Recomputed for gradients: what all experts make of all tokens would not fit.
        turn = jax.checkpoint(lambda rows: self._all(*rows))
        out = jax.lax.map(turn, (cut(x), cut(experts), cut(weights)))
        return out.swapaxes(0, 1).reshape(-1, x.shape[1])[:n]

    def _all(self, x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        """Every expert takes every token; those that were not chosen have no share in the sum."""
        x, gate, up, down = self._promote(x)
        e = gate.shape[0]
        share = (jax.nn.one_hot(experts, e, axis=0) * weights).sum(-1)[..., None]  # [e, n, 1]
        rows = jnp.broadcast_to(x, (e, *x.shape))
        hidden = jax.nn.silu(jnp.einsum("end,edf->enf", rows, gate))
        hidden *= jnp.einsum("end,edf->enf", rows, up)
        # Where, not times 0: what an expert makes of a token that is not its own may be infinite.
        hidden = jnp.where(share > 0, hidden * share, 0).astype(x.dtype)
        return jnp.einsum("enf,efd->nd", hidden, down)

    def _chosen(self, x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        """Each token's own experts, whose weights XLA reads as it multiplies: no copy is made."""
        x, gate, up, down = self._promote(x)
        n, k = experts.shape
        ids = experts.reshape(-1)

        def product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
            """Multiplies row i with expert `ids[i]`: `[n * k, d_in]` to `[n * k, d_out]` float32.

            XLA makes sums of it, over parts of d_in: one part alone keeps too little of a GPU busy
            (169 us on an H100 for one token of DeepSeek-V2-Lite; 2, 4, 8, 16 parts 58, 55, 58, 67).
            """
            parts = math.gcd(_PARTS, rows.shape[1])
            cut = (n * k, parts, rows.shape[1] // parts)
            weight = kernel[ids].reshape(*cut, -1).astype(jnp.float32)
            sums = (rows.reshape(*cut, 1).astype(jnp.float32) * weight).sum(2)
            return jax.lax.optimization_barrier(sums).sum(1)  # or XLA makes one sum of both

        rows = jnp.repeat(x, k, axis=0)
        hidden = jax.nn.silu(product(rows, gate)) * product(rows, up) * weights.reshape(-1, 1)
        out = product(hidden.astype(x.dtype), down)
        return out.reshape(n, k, -1).sum(1).astype(x.dtype)

    def _promote(self, x: jax.Array) -> tuple[jax.Array, ...]:
        kernels = (self.gate_proj[...], self.up_proj[...], self.down_proj[...])
        return promote_dtype((x, *kernels), dtype=self.dtype)


class MoE(nnx.Module):
    """A mixture-of-experts layer: routed experts plus shared experts that every token takes."""

    def __init__(
        self,
        config: DeepseekConfig,
        *,
        linear: Callable[..., nnx.Linear],
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.gate = Router(config, param_dtype=param_dtype, rngs=rngs)
        self.experts = Experts(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = Mlp(config.hidden_size, width, linear=linear)
        self.has_shared = bool(config.n_shared_experts)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, t, hidden_size]` to the same shape."""
        tokens = x.reshape(-1, x.shape[-1])
        out = self.experts(tokens, *self.gate(tokens)).reshape(x.shape)
        return out + self.shared_experts(x) if self.has_shared else out
