# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers of DeepSeek V2 and V3: dense, and mixtures of experts.

Letters: `n` tokens, `e` experts, `k` experts chosen for a token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype

from mla_jax.config import DeepseekConfig
from mla_jax.partitioning import TENSOR, cut


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
        # At full precision: GPUs round float32 products unless told not to, and experts would flip.
        logits = jnp.matmul(
            x.astype(jnp.float32),
            self.kernel[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
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

        Args:
            x: `[n, hidden_size]`.
            experts: `[n, k]` int, the experts of each token.
            weights: `[n, k]` float32.

        Returns:
            `[n, hidden_size]` in x's dtype.
        """
        n, k = experts.shape
        num_experts = self.gate_proj.shape[0]
        # Sorted by expert, the tokens of each are consecutive rows: a grouped matrix product.
        order = jnp.argsort(experts.reshape(-1), stable=True)
        sizes = jnp.bincount(experts.reshape(-1), length=num_experts).astype(jnp.int32)
        rows = x[order // k]

        def product(rows: jax.Array, kernel: nnx.Param) -> jax.Array:
            return jax.lax.ragged_dot(*promote_dtype((rows, kernel[...]), dtype=self.dtype), sizes)

        hidden = jax.nn.silu(product(rows, self.gate_proj)) * product(rows, self.up_proj)
        out = product(hidden, self.down_proj)
        out = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(n, k, -1)
        return jnp.einsum("nkd,nk->nd", out.astype(jnp.float32), weights).astype(x.dtype)


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
