# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Arguments without numbers: shapes and dtypes, to lower a program or call a handler by."""

import jax
import jax.numpy as jnp

# Lengths, queries and heads of calls in which many tiles go through the same blocks, in two parts
# that are so long that the CUDA kernel's tiles keep in step.
IN_STEP = [([26000, 3, 900], 33, 128), ([26000, 5], 24, 120)]


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape):
    return shaped(*shape, dtype=jnp.int32)


def floats(*shape):
    return shaped(*shape, dtype=jnp.float32)
