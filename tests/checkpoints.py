# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The reference checkpoints of tests/data, and what Hugging Face computed from them."""

import lzma
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mla_jax import DeepseekForCausalLM

DATA = Path(__file__).parent / "data"
NAMES = (
    "true_dims",
    "v2_grouped",
    "v2lite",
    "v3_fp8",
    "v3_norope_moonlight",
    "v3_quirks",
    "v3_yarn_sharded",
)


@dataclass(frozen=True)
class Reference:
    """A checkpoint loaded in float32, with Hugging Face's outputs."""

    model: DeepseekForCausalLM
    oracle: dict[str, np.ndarray]

    @property
    def prompts(self) -> list[list[int]]:
        return self._lists("prompt")

    @property
    def greedy(self) -> list[list[int]]:
        return self._lists("greedy")

    def _lists(self, kind: str) -> list[list[int]]:
        count = sum(name.startswith("prompt_") for name in self.oracle)
        return [self.oracle[f"{kind}_{i}"].tolist() for i in range(count)]


def unpack(name: str, folder: Path) -> Path:
    """Copies a checkpoint to `folder` with its weights decompressed."""
    copy = Path(shutil.copytree(DATA / name, folder / name))
    for packed in copy.glob("*.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    return copy


def load(name: str, folder: Path) -> Reference:
    """Loads a checkpoint in float32; `folder` is for temporary files."""
    with np.load(DATA / name / "oracle.npz") as oracle:
        arrays = dict(oracle)
    model = DeepseekForCausalLM.from_pretrained(unpack(name, folder), param_dtype=jnp.float32)
    return Reference(model, arrays)
