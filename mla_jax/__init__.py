# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""FlashMLA for JAX: Multi-head Latent Attention over a paged KV cache."""

from mla_jax import ffi as _ffi
from mla_jax.cache import PagedKVCache as PagedKVCache
from mla_jax.cache import PagePoolFullError as PagePoolFullError
from mla_jax.config import DeepseekConfig as DeepseekConfig
from mla_jax.decode import Explanation as Explanation
from mla_jax.decode import explain as explain
from mla_jax.decode import flash_mla_with_kvcache as flash_mla_with_kvcache
from mla_jax.deepseek import DeepseekForCausalLM as DeepseekForCausalLM
from mla_jax.generate import generate as generate
from mla_jax.generate import step_options as step_options
from mla_jax.generate import stream as stream
from mla_jax.merge import merge_attention_states as merge_attention_states
from mla_jax.module import MultiHeadLatentAttention as MultiHeadLatentAttention
from mla_jax.ragged import ragged_mla_with_kvcache as ragged_mla_with_kvcache
from mla_jax.rope import RopeConfig as RopeConfig
from mla_jax.rope import YarnScaling as YarnScaling
from mla_jax.schedule import get_mla_metadata as get_mla_metadata
from mla_jax.sharding import context_parallel_decode as context_parallel_decode
from mla_jax.sharding import shard as shard

__version__ = "0.1.0"

_ffi.register()
