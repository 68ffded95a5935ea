# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Which GPUs the Hopper kernels are for, whatever they are written in."""

from collections.abc import Sequence

import jax


def local_gpus() -> Sequence[jax.Device]:
    """Returns the NVIDIA GPUs of this process; none where there is no such platform."""
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


def unsuitable(devices: Sequence[jax.Device], kernels: str) -> str | None:
    """Names a device that cannot run what `kernels` says, such as "the kernels are", or None."""
    for device in devices:
        if device.compute_capability != "9.0":
            return (
                f"{device.device_kind} has compute capability {device.compute_capability}, "
                f"{kernels} for 9.0 (Hopper: H100, H200, GH200)"
            )
    return None
