# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Arguments without numbers: shapes and dtypes, to lower a program or call a handler by."""

import jax
import jax.numpy as jnp


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape):
    return shaped(*shape, dtype=jnp.int32)


def floats(*shape):
    return shaped(*shape, dtype=jnp.float32)
