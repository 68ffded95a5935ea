# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What the kernels of implementation "pallas" are compiled for."""

from dataclasses import dataclass
from typing import Any

from mla_jax.schedule import TILE


@dataclass(frozen=True)
class Config:
    """What a decode kernel is compiled for, beside the shapes of its operands.

    Attributes:
        d_k: width of queries and keys.
        d_v: width of the values.
        page_size: tokens per page.
        heads_per_kv: query heads that share a KV head.
        s_q: queries per sequence.
        causal: whether query j sees the first `length - s_q + j + 1` tokens only.
        scale: factor of the scores.
        weights_registers: registers of a thread of the weights warpgroups.
        output_registers: of the output warpgroups.
        interpret: Pallas' parameters of interpretation, or None to compile.
    """

    d_k: int
    d_v: int
    page_size: int
    heads_per_kv: int
    s_q: int
    causal: bool
    scale: float
    weights_registers: int = 96
    output_registers: int = 160
    interpret: Any = None

    def __post_init__(self) -> None:
        if self.page_size not in (8, 16, 32, 64, 128):
            raise ValueError(f"page_size: got {self.page_size}, expected a power of two in 8..128")
        if self.d_v not in (256, 512) or self.rope not in (0, 64):
            raise ValueError(
                f"d_k, d_v: got {self.d_k}, {self.d_v}, expected d_v 256 or 512, d_k - d_v 0 or 64"
            )
        if self.weights_registers % 8 or self.output_registers % 8:
            raise ValueError("registers: expected multiples of 8")
        if self.weights_registers + self.output_registers > 256:
            raise ValueError(
                f"registers: got {self.weights_registers} + {self.output_registers}, expected at "
                "most 256: four warpgroups share 65536"
            )

    @property
    def rope(self) -> int:
        """Columns of a key that are no value."""
        return self.d_k - self.d_v

    @property
    def half(self) -> int:
        """Columns of the output that a warpgroup accumulates."""
        return self.d_v // 2

    @property
    def piece(self) -> int:
        """Columns of an accumulator, as float32 as large as its half of a block."""
        return self.d_v // 4

    @property
    def rows(self) -> int:
        """Query rows that share a KV head, padded to the 8 rows of a shared memory tile."""
        return -(-self.s_q * self.heads_per_kv // 8) * 8

    @property
    def tile_rows(self) -> int:
        """Rows of a tile that are copied; the others of its 64 hold anything."""
        return min(self.rows, TILE)

    @property
    def tiles(self) -> int:
        """Tiles of 64 rows."""
        return -(-self.rows // TILE)

    @property
    def lse_rows(self) -> int:
        """Rows of a log sum: whole tiles, as a copy past the end of a vector writes the next."""
        return self.tiles * self.tile_rows
