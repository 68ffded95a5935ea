# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Two processes of jax.distributed on this machine generate what one device does.

Of CPUs each has two devices, of GPUs one: NCCL joins them.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from meshes import on_gpu
from test_sharding import OPTIONS, PROMPTS, make

from mla_jax import generate

# Both axes go across: of devices 0 and 1 of the first process and 2 and 3 of the second, or each.
_SCRIPT = """
import json
import sys
import jax
import numpy as np

address, process = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, num_processes=2, process_id=process, initialization_timeout=60)
from test_sharding import OPTIONS, PROMPTS, make
from mla_jax import generate

assert jax.process_count() == 2
places = [[[0, 2], [3, 1]]] if jax.local_device_count() == 2 else [[[0], [1]], [[0, 1]]]
tokens = []
for place in places:
    devices = np.array(jax.devices())[np.array(place)]
    mesh = jax.sharding.Mesh(devices, ("data", "tensor"))
    tokens.append(generate(make(mesh), PROMPTS, mesh=mesh, **OPTIONS))
print(json.dumps(tokens))
"""


@pytest.mark.skipif(on_gpu() and jax.device_count() < 2, reason="processes would share the GPU")
def test_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
    environment = os.environ | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    if not on_gpu():
        environment["XLA_FLAGS"] = flags
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, address, str(i)],
            cwd=Path(__file__).parent,
            env=environment | ({"CUDA_VISIBLE_DEVICES": str(i)} if on_gpu() else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        results = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    expected = generate(make(), PROMPTS, **OPTIONS)
    for process, (out, err) in zip(processes, results, strict=True):
        assert process.returncode == 0, err[-3000:]
        for tokens in json.loads(out.splitlines()[-1]):
            assert tokens == expected
