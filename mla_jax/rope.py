# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, plain and YaRN, and the softmax scale that goes with it."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (Peng et al. 2023, arXiv:2309.00071), as DeepSeek configures it.

    Attributes:
        factor: ratio of the extended context to the original.
        original_max_position_embeddings: tokens of context before the extension.
        beta_fast: rotations over the original context from which frequencies stay as they are.
        beta_slow: rotations below which frequencies are divided by `factor`.
        mscale: weight of the attention factor of cos and sin; 0 where unset.
        mscale_all_dim: weight of the factor that goes into the softmax scale; 0 where unset.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a positive number")


@dataclass(frozen=True)
class RopeConfig:
    """Which rotary embedding a model uses.

    Attributes:
        theta: base of the frequencies.
        scaling: YaRN's parameters, or None for plain RoPE.
        interleaved: channel pairs are (0, 1), (2, 3)...; False pairs channel i with i + dim / 2.
    """

    theta: float = 10000.0
    scaling: YarnScaling | None = None
    interleaved: bool = True

    def __post_init__(self) -> None:
        if not self.theta > 1:
            raise ValueError(f"theta: got {self.theta!r}, expected a number above 1")


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def inverse_frequencies(config: RopeConfig, dim: int) -> np.ndarray:
    """Computes the angle per position of each channel pair, `[dim / 2]` float64.

    YaRN keeps the pairs that turn at least `beta_fast` times over the original context, divides
    those that turn at most `beta_slow` times by `factor`, and ramps between.
    """
    inv_freq = config.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    yarn = config.scaling
    if yarn is None:
        return inv_freq

    def pair_turning(rotations: float) -> float:
        context = yarn.original_max_position_embeddings
        return dim * math.log(context / (2 * math.pi * rotations)) / (2 * math.log(config.theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    width = high - low or 0.001
    ramp = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    return inv_freq * (1 - ramp) + inv_freq / yarn.factor * ramp


def rope_tables(config: RopeConfig, positions: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """Computes cos and sin of each position's angles.

    Args:
        config: the embedding.
        positions: integers of any shape; negative ones are padding and give finite values.
        dim: rotated channels, even.

    Returns:
        cos and sin, each `positions.shape + [dim / 2]` float32. YaRN's attention factor multiplies
        both (it is 1 where `mscale == mscale_all_dim`, as in DeepSeek-V2-Lite and V3).
    """
    yarn = config.scaling
    factor = 1.0
    if yarn is not None and yarn.mscale and yarn.mscale_all_dim:
        factor = _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    elif yarn is not None:
        factor = _mscale(yarn.factor, 1.0)
    inv_freq = inverse_frequencies(config, dim).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool) -> jax.Array:
    """Rotates channel pairs of `x` in float32; the channels keep their order.

    Args:
        x: `[..., dim]`.
        cos: broadcastable to `[..., dim / 2]`.
        sin: like cos.
        interleaved: whether pairs are neighbours, or halves of the channels.

    Returns:
        `[..., dim]` in x's dtype.
    """
    pairs = x.astype(jnp.float32)
    if interleaved:
        x0, x1 = pairs[..., 0::2], pairs[..., 1::2]
    else:
        x0, x1 = jnp.split(pairs, 2, axis=-1)
    rotated = (x0 * cos - x1 * sin, x1 * cos + x0 * sin)
    if interleaved:
        return jnp.stack(rotated, axis=-1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def softmax_scale(config: RopeConfig, qk_head_dim: int) -> float:
    """Computes the factor of the scores: `qk_head_dim ** -0.5`, times YaRN's `mscale ** 2`.

    DeepSeek folds the attention factor of all channels into the scale: with
    `m = 0.1 * mscale_all_dim * ln(factor) + 1`, the scale grows by `m ** 2` (1.59 for V2-Lite, 1.87
    for V3). `qk_head_dim` is `qk_nope_head_dim + qk_rope_head_dim`, also for absorbed attention,
    whose keys are wider.
    """
    scale = qk_head_dim**-0.5
    yarn = config.scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= _mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale
