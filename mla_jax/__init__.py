# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""FlashMLA for JAX: Multi-head Latent Attention over a paged KV cache."""

from mla_jax.decode import Explanation as Explanation
from mla_jax.decode import explain as explain
from mla_jax.decode import flash_mla_with_kvcache as flash_mla_with_kvcache
from mla_jax.schedule import get_mla_metadata as get_mla_metadata
