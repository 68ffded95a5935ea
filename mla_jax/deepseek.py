# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The DeepSeek V2 and V3 language models, built on `MultiHeadLatentAttention`."""

from collections.abc import Callable
from os import PathLike

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from mla_jax import checkpoint
from mla_jax.cache import PagedKVCache
from mla_jax.config import DeepseekConfig
from mla_jax.decode import Implementation
from mla_jax.linear import dot_general
from mla_jax.module import Absorbed, MultiHeadLatentAttention
from mla_jax.moe import Mlp, MoE
from mla_jax.partitioning import TENSOR, cut
from mla_jax.schedule import get_mla_metadata


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream."""

    def __init__(
        self,
        config: DeepseekConfig,
        layer: int,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        def linear(d_in: int, d_out: int, by: tuple[str | None, str | None]) -> nnx.Linear:
            return nnx.Linear(
                d_in,
                d_out,
                use_bias=config.mlp_bias and not config.is_v3,
                kernel_metadata=cut(*by),
                bias_metadata=cut(by[1]),
                dtype=dtype,
                param_dtype=param_dtype,
                dot_general=dot_general,
                rngs=rngs,
            )

        self.input_layernorm = _norm(config, dtype, param_dtype, rngs)
        self.self_attn = MultiHeadLatentAttention(
            config.hidden_size,
            config.num_attention_heads,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            rope=config.rope,
            attention_bias=config.attention_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.post_attention_layernorm = _norm(config, dtype, param_dtype, rngs)
        self.mlp: Mlp | MoE
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, linear=linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        else:
            self.mlp = Mlp(config.hidden_size, config.intermediate_size, linear=linear)

    def __call__(self, x: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
        """Maps `[b, t, hidden_size]` to the same shape.

        `attend(self_attn, norm, x)` gives `x + self_attn(norm(x))`, by one of attention's paths.
        """
        x = attend(self.self_attn, self.input_layernorm, x)
        return x + self.mlp(self.post_attention_layernorm(x))


class DeepseekModel(nnx.Module):
    """The stack of layers between token embedding and final norm."""

    def __init__(
        self,
        config: DeepseekConfig,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.layers = nnx.List(
            DecoderLayer(config, layer, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = _norm(config, dtype, param_dtype, rngs)


class DeepseekForCausalLM(nnx.Module):
    """A DeepSeek V2 (Lite and full) or V3 / R1 language model.

    Args:
        config: the architecture.
        dtype: of the computation; None follows the parameters.
        param_dtype: of the parameters.
        rngs: random streams for the parameters.
    """

    def __init__(
        self,
        config: DeepseekConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        self.model = DeepseekModel(config, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                kernel_metadata=cut(None, TENSOR),
                dtype=self.dtype,
                param_dtype=param_dtype,
                dot_general=dot_general,
                rngs=rngs,
            )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "DeepseekForCausalLM":
        """Loads a Hugging Face checkpoint folder: config.json and one or many *.safetensors.

        Tensors are read through memory maps, converted one at a time, and never held twice. FP8
        weights with block scales are dequantised; layers beyond num_hidden_layers (multi-token
        prediction) are left out.

        Args:
            folder: the checkpoint.
            dtype: of the computation; None: as param_dtype.
            param_dtype: of the parameters; None: as config.json says, bfloat16 for FP8 checkpoints.
                The routers' correction biases stay float32.
            progress: called with (bytes read, bytes to read) after each parameter.

        Raises:
            FileNotFoundError: the folder, its config.json or its weights are missing.
            ValueError: config.json or tensors are wrong; one message names every missing,
                unexpected and mis-shaped tensor.
            NotImplementedError: the model has something this library does not.
        """
        config = cls.read_config(folder)
        if param_dtype is None:
            param_dtype = "bfloat16" if config.weight_block_size else config.torch_dtype
        model = nnx.eval_shape(
            lambda: cls(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        )
        return checkpoint.load(
            model,
            folder,
            ignore=lambda name: _is_beyond_layers(name, config.num_hidden_layers),
            tied={"lm_head.weight"} if config.tie_word_embeddings else set(),
            weight_block_size=config.weight_block_size,
            progress=progress,
        )

    @staticmethod
    def read_config(folder: str | PathLike[str]) -> DeepseekConfig:
        """Reads a checkpoint folder's config.json."""
        return DeepseekConfig.from_dict(checkpoint.read_json(folder, "config.json"))

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Writes config.json and model.safetensors as Hugging Face names and shapes them."""
        dtype = str(self.model.embed_tokens.embedding.dtype)
        checkpoint.save(self, folder, {**self.config.to_dict(), "torch_dtype": dtype})

    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Computes the logits of every next token, with no cache.

        Args:
            tokens: `[b, t]` int.
            positions: `[b, t]` int; None counts from 0.

        Returns:
            `[b, t, vocab_size]` float32.
        """
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, lambda attention, norm, x: x + attention(norm(x), positions))
        return self._logits(self.model.norm(x))

    def step(
        self,
        tokens: jax.Array,
        cache: PagedKVCache,
        *,
        prefill: bool = False,
        absorbed: list[Absorbed] | None = None,
        implementation: Implementation = None,
    ) -> tuple[jax.Array, PagedKVCache]:
        """Runs new tokens through the model over the cache.

        Args:
            tokens: `[max_seqs, t]` int; slot i's new tokens are the last `cache.num_new[i]`
                columns.
            cache: after `cache.reserve` for these tokens.
            prefill: expand keys and values (for many new tokens) instead of absorbing them.
            absorbed: what `absorb` gave, for the steps of a loop.
            implementation: of decode, as for `flash_mla_with_kvcache`.

        Returns:
            The logits that follow the last column, `[max_seqs, vocab_size]` float32 (meaningless
            for slots with no new token), and the cache.
        """
        x = self.model.embed_tokens(tokens)
        t = tokens.shape[1]
        schedule = None
        if not prefill:  # lengths are the same in all layers: one schedule serves them
            schedule = get_mla_metadata(cache.seqlens, t * self.config.num_attention_heads, 1)

        for index, layer in enumerate(self.model.layers):

            def attend(
                attention: MultiHeadLatentAttention,
                norm: nnx.RMSNorm,
                x: jax.Array,
                index: int = index,
            ) -> jax.Array:
                nonlocal cache
                if prefill:
                    out, cache = attention.prefill(norm(x), cache, index)
                    return x + out
                x, cache = attention.decode(
                    x,
                    cache,
                    index,
                    norm=norm,
                    absorbed=None if absorbed is None else absorbed[index],
                    schedule=schedule,
                    implementation=implementation,
                )
                return x

            x = layer(x, attend)
        return self._logits(self.model.norm(x[:, -1])), cache

    def absorb(self) -> list[Absorbed]:
        """Prepares every layer's absorbed projections, for a loop of steps."""
        return [layer.self_attn.absorb() for layer in self.model.layers]

    def _logits(self, x: jax.Array) -> jax.Array:
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.attend(x).astype(jnp.float32)
        return self.lm_head(x).astype(jnp.float32)


def _norm(
    config: DeepseekConfig, dtype: Dtype | None, param_dtype: Dtype, rngs: nnx.Rngs
) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.rms_norm_eps,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def _is_beyond_layers(name: str, num_layers: int) -> bool:
    parts = name.split(".")
    return parts[:2] == ["model", "layers"] and parts[2].isdecimal() and int(parts[2]) >= num_layers
