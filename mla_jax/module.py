# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The Multi-head Latent Attention module: one set of parameters, three ways to compute it.

Letters: `b` sequences, `t` tokens, `h` heads, `c` channels of the latent (512 in DeepSeek-V3), `d`
of a query or key (128 + 64), `n` of their part without position (128), `v` of a value (128).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from mla_jax import layer as one_call
from mla_jax.cache import PagedKVCache
from mla_jax.decode import Implementation, check_implementation, flash_mla_of_parts
from mla_jax.linear import dot_general
from mla_jax.partitioning import TENSOR, cut
from mla_jax.rope import RopeConfig, apply_rope, rope_tables, softmax_scale
from mla_jax.xla import attend_pages, capacity, visible_tokens

# W_UK and W_UV of a layer.
Absorbed = tuple[jax.Array, jax.Array]

_LATENT_NORM_EPS = 1e-6  # of both latent norms in every DeepSeek model, whatever rms_norm_eps says


class MultiHeadLatentAttention(nnx.Module):
    """Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Keys and values of all heads are linear functions of one latent per token, and the cache holds
    only that latent and one rotated key: `kv_lora_rank + qk_rope_head_dim` channels a token.

    - `__call__` expands keys and values for every head; differentiable: training, plain prefill.
    - `prefill` does so chunk by chunk over a paged cache: many new tokens after a cached prefix.
    - `decode` absorbs `kv_b_proj` into query and output and attends to the latents themselves with
      `flash_mla_with_kvcache`: few new tokens after a long prefix.

    All three agree. Submodules are named as in DeepSeek's checkpoints; `kv_b_proj` is stored once
    and viewed as W_UK and W_UV where it is absorbed. Kernels that belong to heads carry sharding
    metadata for mesh axis `tensor` (`mla_jax.shard`).

    Args:
        hidden_size: width of the residual stream.
        num_heads: query heads.
        q_lora_rank: width of the queries' latent; None projects queries directly (V2-Lite).
        kv_lora_rank: width of the cached latent.
        qk_nope_head_dim: channels of a query and key without position.
        qk_rope_head_dim: channels with rotary position, even.
        v_head_dim: channels of a value.
        rope: the rotary embedding; it also sets the softmax scale.
        attention_bias: biases in `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj`.
        dtype: of the computation; None follows inputs and parameters.
        param_dtype: of the parameters.
        kernel_init: initializer of all projections.
        rngs: random streams for the parameters.

    Raises:
        ValueError: a size is not positive, or qk_rope_head_dim is odd.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_lora_rank: int | None = 1536,
        kv_lora_rank: int = 512,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        rope: RopeConfig = RopeConfig(),  # noqa: B008 (frozen)
        attention_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008
        rngs: nnx.Rngs,
    ):
        sizes = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "q_lora_rank": 1 if q_lora_rank is None else q_lora_rank,
            "kv_lora_rank": kv_lora_rank,
            "qk_nope_head_dim": qk_nope_head_dim,
            "qk_rope_head_dim": qk_rope_head_dim,
            "v_head_dim": v_head_dim,
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: got {size!r}, expected a positive int")
        if qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim: got {qk_rope_head_dim}, expected an even number")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.rope = rope
        self.softmax_scale = softmax_scale(rope, qk_nope_head_dim + qk_rope_head_dim)

        def linear(
            d_in: int, d_out: int, use_bias: bool = False, by: tuple[str | None, ...] = ()
        ) -> nnx.Linear:
            return nnx.Linear(
                d_in,
                d_out,
                use_bias=use_bias,
                kernel_metadata=cut(*by) if by else {},
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                dot_general=dot_general,
                rngs=rngs,
            )

        def norm(features: int) -> nnx.RMSNorm:
            return nnx.RMSNorm(
                features,
                epsilon=_LATENT_NORM_EPS,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        d_q = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = linear(hidden_size, d_q, by=(None, TENSOR))
        else:
            self.q_a_proj = linear(hidden_size, q_lora_rank, attention_bias)
            self.q_a_layernorm = norm(q_lora_rank)
            self.q_b_proj = linear(q_lora_rank, d_q, by=(None, TENSOR))
        self.q_lora_rank = q_lora_rank
        self.kv_a_proj_with_mqa = linear(hidden_size, self.d_cache, attention_bias)
        self.kv_a_layernorm = norm(kv_lora_rank)
        self.kv_b_proj = linear(
            kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), by=(None, TENSOR)
        )
        self.o_proj = linear(num_heads * v_head_dim, hidden_size, attention_bias, by=(TENSOR, None))

    @property
    def d_cache(self) -> int:
        """Channels cached per token: the latent and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def __call__(
        self, x: jax.Array, positions: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """Attends causally among the tokens of `x`, with keys and values expanded for every head.

        Args:
            x: `[b, t, hidden_size]`.
            positions: `[b, t]` int; None counts from 0.
            mask: bool, broadcastable to `[b, h, t, t]`, True where query (third axis) may see key
                (last axis); combined with the causal rule. None allows all.

        Returns:
            `[b, t, hidden_size]`. A query that may see nothing gets 0 before `o_proj`.
        """
        self._check_input(x)
        t = x.shape[1]
        if positions is None:
            positions = jnp.arange(t)[None]
        if (
            positions.ndim != 2
            or positions.shape[0] not in (1, x.shape[0])
            or positions.shape[1] != t
        ):
            raise ValueError(
                f"positions: got {list(positions.shape)}, expected [b={x.shape[0]}, t={t}]"
            )
        q = jnp.concatenate(self._queries(x, positions), axis=-1)
        k, v = self._expand(self._latents(x, positions))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        allowed = jnp.tri(t, dtype=bool)
        allowed = allowed if mask is None else allowed & mask
        # The lowest finite score, not -inf: a row that sees nothing must not become 0 / 0.
        scores = jnp.where(allowed, scores * self.softmax_scale, jnp.finfo(scores.dtype).min)
        weights = jnp.where(allowed, jax.nn.softmax(scores, axis=-1), 0).astype(v.dtype)
        return self._project(jnp.einsum("bhqk,bkhv->bqhv", weights, v))

    def decode(
        self,
        x: jax.Array,
        cache: PagedKVCache,
        layer: int | jax.Array,
        *,
        norm: nnx.RMSNorm | None = None,
        absorbed: Absorbed | None = None,
        schedule: tuple[jax.Array, jax.Array] | None = None,
        implementation: Implementation = None,
    ) -> tuple[jax.Array, PagedKVCache]:
        """Appends the new tokens to the cache and attends to all of it in the latent space.

        `q k^T = q_nope W_UK^T c^T + q_pe k_pe^T`, so W_UK goes to the query and W_UV to the output,
        and every head reads the same latents.

        On a Hopper GPU all of it is one custom call for one token of one sequence, where
        implementation "ffi" comes first, the process has one device, `layer` is a Python number,
        queries have no latent of their own, nothing has a bias, and parameters, x and cache are all
        bfloat16 or all float16 and of DeepSeek's widths. It keeps float32 between its steps, and
        its gradients are those of the other form.

        Args:
            x: `[max_seqs, t, hidden_size]`; slot i's new tokens are the last `cache.num_new[i]` of
                the t columns, what stands before them is padding.
            cache: after `cache.reserve` for these tokens.
            layer: index of this layer in the cache.
            norm: the layer's own norm before it; given one, the result is `x + attention(norm(x))`,
                the residual sum included.
            absorbed: what `absorb` gave, for the steps of a loop; None does it anew.
            schedule: `get_mla_metadata(cache.seqlens, t * num_heads, 1)`, to share it among layers;
                None schedules inside the op.
            implementation: as for `flash_mla_with_kvcache`.

        Returns:
            `[max_seqs, t, hidden_size]`, meaningless in padding columns, and the cache.
        """
        self._check_input(x)
        names = check_implementation(implementation)
        own = type(self) is MultiHeadLatentAttention
        if own and names[0] == "ffi" and one_call.takes(self, norm, x, cache, layer, absorbed):
            plain = MultiHeadLatentAttention._decode
            return one_call.decode(plain, self, norm, x, cache, layer, absorbed, schedule, names)
        return self._decode(norm, x, cache, layer, absorbed, schedule, names)

    def absorb(self) -> Absorbed:
        """Takes `kv_b_proj` apart into W_UK `[h, c, n]` and W_UV `[h, c, v]`, for `decode`.

        XLA copies both for its products by heads. Inside a step that is done in each of them; done
        once before a loop of steps, it costs as much memory as `kv_b_proj` itself.
        """
        kernel = self.kv_b_proj.kernel[...].reshape(self.kv_lora_rank, self.num_heads, -1)
        kernel = kernel.swapaxes(0, 1)
        return kernel[..., : self.qk_nope_head_dim], kernel[..., self.qk_nope_head_dim :]

    def prefill(
        self, x: jax.Array, cache: PagedKVCache, layer: int | jax.Array
    ) -> tuple[jax.Array, PagedKVCache]:
        """Appends the new tokens and attends to the whole cache with expanded keys and values.

        Expanded attention costs `2 h (d + v)` operations for a query and a key, 640 h for
        DeepSeek-V3, absorbed attention 2176 h; expanding the cache again costs the same for any
        number of new tokens, so this pays for many. Only one chunk of the cache is expanded at a
        time.

        Args:
            x: `[max_seqs, t, hidden_size]`, padded as for `decode`.
            cache: after `cache.reserve` for these tokens.
            layer: index of this layer in the cache.

        Returns:
            `[max_seqs, t, hidden_size]`, meaningless in padding columns, and the cache.
        """
        q_nope, q_pe, cache = self._append(x, cache, layer, "xla")
        q = jnp.concatenate([q_nope, q_pe], axis=-1).astype(cache.dtype).swapaxes(1, 2)
        table = cache.layer_table(layer)
        visible = visible_tokens(cache.seqlens, x.shape[1], True, capacity(cache.pages, table))
        out, _ = attend_pages(
            q,
            cache.pages,
            table,
            visible,
            lambda cached: self._expand(cached[:, :, 0]),
            scale=self.softmax_scale,
        )
        return self._project(out.swapaxes(1, 2).astype(q_nope.dtype)), cache

    def _check_input(self, x: jax.Array) -> None:
        if x.ndim != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"x: got {list(x.shape)}, expected [b, t, hidden_size={self.hidden_size}]"
            )

    def _queries(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Projects to queries without and with position, `[b, t, h, n]` and `[b, t, h, rope]`."""
        if self.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(*x.shape[:2], self.num_heads, -1)
        q_nope, q_pe = jnp.split(q, [self.qk_nope_head_dim], axis=-1)
        cos, sin = rope_tables(self.rope, positions, self.qk_rope_head_dim)
        cos, sin = cos[..., None, :], sin[..., None, :]  # the same for all heads
        return q_nope, apply_rope(q_pe, cos, sin, interleaved=self.rope.interleaved)

    def _latents(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Projects to what the cache holds, `[b, t, c + rope]`: normalised latent, rotated key."""
        latent, k_pe = jnp.split(self.kv_a_proj_with_mqa(x), [self.kv_lora_rank], axis=-1)
        cos, sin = rope_tables(self.rope, positions, self.qk_rope_head_dim)
        k_pe = apply_rope(k_pe, cos, sin, interleaved=self.rope.interleaved)
        return jnp.concatenate([self.kv_a_layernorm(latent), k_pe], axis=-1)

    def _expand(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Expands `[b, t, c + rope]` to keys `[b, t, h, d]` and values `[b, t, h, v]`."""
        latent, k_pe = jnp.split(latents, [self.kv_lora_rank], axis=-1)
        kv = self.kv_b_proj(latent).reshape(*latent.shape[:2], self.num_heads, -1)
        k_nope, v = jnp.split(kv, [self.qk_nope_head_dim], axis=-1)
        k_pe = jnp.broadcast_to(
            k_pe[:, :, None].astype(k_nope.dtype), (*k_nope.shape[:3], self.qk_rope_head_dim)
        )
        return jnp.concatenate([k_nope, k_pe], axis=-1), v

    def _decode(
        self,
        norm: nnx.RMSNorm | None,
        x: jax.Array,
        cache: PagedKVCache,
        layer: int | jax.Array,
        absorbed: Absorbed | None,
        schedule: tuple[jax.Array, jax.Array] | None,
        names: tuple[str, ...],
    ) -> tuple[jax.Array, PagedKVCache]:
        """Is `decode`, step by step."""
        q_nope, q_pe, cache = self._append(x if norm is None else norm(x), cache, layer, names)
        w_uk, w_uv = (x.astype(q_nope.dtype) for x in absorbed or self.absorb())
        # The product by heads that lies as the op's kernel takes it: heads, sequences, channels.
        q_latent = jax.lax.dot_general(q_nope, w_uk, (((3,), (2,)), ((2,), (0,))))
        q_latent = jnp.moveaxis(q_latent, 0, 2)
        metadata, num_splits = schedule or (None, None)
        out, _ = flash_mla_of_parts(
            [part.astype(cache.dtype) for part in (q_latent, q_pe)],
            cache.pages,
            cache.layer_table(layer),
            cache.seqlens,
            self.kv_lora_rank,
            metadata,
            num_splits,
            softmax_scale=self.softmax_scale,
            causal=True,
            implementation=names,
        )
        out = jnp.einsum("bthc,hcv->bthv", out.astype(q_nope.dtype), w_uv)
        out = self._project(out)
        return out if norm is None else x + out, cache

    def _append(
        self,
        x: jax.Array,
        cache: PagedKVCache,
        layer: int | jax.Array,
        implementation: Implementation,
    ) -> tuple[jax.Array, jax.Array, PagedKVCache]:
        """Projects the new tokens, stores their latents and returns their queries."""
        self._check_input(x)
        if cache.d_k != self.d_cache:
            raise ValueError(
                f"cache: got d_k {cache.d_k}, "
                f"expected kv_lora_rank + qk_rope_head_dim = {self.d_cache}"
            )
        if x.shape[0] != cache.max_seqs:
            raise ValueError(
                f"x: got {x.shape[0]} sequences, expected the cache's max_seqs {cache.max_seqs}"
            )
        positions = cache.positions(x.shape[1])
        norm = self.kv_a_layernorm
        scale = norm.scale
        assert scale is not None  # nnx.RMSNorm has one unless told otherwise
        cache = cache.append_projected(
            layer,
            self.kv_a_proj_with_mqa(x),
            scale[...],
            *rope_tables(self.rope, positions, self.qk_rope_head_dim),
            epsilon=norm.epsilon,
            interleaved=self.rope.interleaved,
            implementation=implementation,
        )
        return *self._queries(x, positions), cache

    def _project(self, out: jax.Array) -> jax.Array:
        return self.o_proj(out.reshape(*out.shape[:2], self.num_heads * self.v_head_dim))
