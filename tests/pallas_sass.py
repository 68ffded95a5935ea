# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Compiles implementation "pallas" for an H100 on a machine without one, and reads ptxas' report.

Run: python tests/pallas_sass.py (needs jax's CUDA plugin, e.g. `pip install "jax[cuda12]"`)

Fails where registers are spilled (a few bytes outside the loops are tolerated) or the tensor cores'
products are made to wait for each other (C7510, C7512). Not part of the test suite: the plugin is
large.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    DUMP = tempfile.TemporaryDirectory()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
    os.environ["MOSAIC_GPU_DUMP_TO"] = DUMP.name
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from mla_jax import pallas

SPILL_LIMIT = 32  # bytes of a thread
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TEMPLATES = {
    # s_q, h_q, h_kv, d_k, d_v, page_size, dtype, causal
    "576": (1, 128, 1, 576, 512, 64, jnp.bfloat16, False),
    "576 causal": (2, 128, 1, 576, 512, 64, jnp.bfloat16, True),
    "576 float16, pages of 16": (1, 16, 1, 576, 512, 16, jnp.float16, False),
    "512, pages of 128": (1, 64, 2, 512, 512, 128, jnp.bfloat16, False),
    "256 + 64, pages of 8": (3, 8, 1, 320, 256, 8, jnp.bfloat16, True),
}


def report(template: tuple) -> dict[str, str]:
    """Compiles the three kernels; returns what ptxas says of each."""
    s_q, h_q, h_kv, d_k, d_v, page_size, dtype, causal = template
    device = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET, topology="1x1x1"
    ).devices[0]

    def shape(*dims, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=SingleDeviceSharding(device))

    def call(*arrays):
        options = {"causal": causal, "batch_invariant": False, "num_sms": 132}
        return pallas.decode(*arrays, head_dim_v=d_v, softmax_scale=0.1, **options)

    arrays = (
        shape(2, s_q, h_q, d_k, dtype=dtype),
        shape(20, page_size, h_kv, d_k, dtype=dtype),
        shape(2, 8),
        shape(2),
    )
    for path in Path(DUMP.name).iterdir():
        path.unlink()
    jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",)).compile()
    return {path.name: path.read_text() for path in Path(DUMP.name).glob("*.ptxas")}


def main() -> int:
    """Prints a line a kernel; returns 1 if one is wrong."""
    wrong = False
    for name, template in TEMPLATES.items():
        reports = report(template)
        assert len(reports) == 3, reports
        for kernel, text in sorted(reports.items()):
            registers = re.search(r"Used (\d+) registers", text)
            spilled = max(map(int, re.findall(r"(\d+) bytes spill", text)), default=0)
            serialised = re.search("C751[02]", text) is not None
            wrong |= spilled > SPILL_LIMIT or serialised
            print(
                f"{name}: {kernel}: {registers and registers[1]} registers at launch, "
                f"{spilled} bytes spilled{', products serialised' if serialised else ''}"
            )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
