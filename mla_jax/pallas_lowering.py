# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Pallas' kernels in a program that is lowered for several platforms at once.

JAX lowers each branch of `platform_dependent` for all of a program's platforms, and Pallas refuses
to be lowered for more than one. So the kernels are wrapped in a primitive that is lowered for CUDA
alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

_call = Primitive("mla_jax_on_cuda")
_call.multiple_results = True


def on_cuda(
    function: Callable[..., Any], shapes: Sequence[jax.ShapeDtypeStruct], *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """Calls a function in the branch for CUDA of a program that may be for others, too.

    Args:
        function: takes the arrays.
        shapes: those of its results. On another platform these are zeros, which no one reads.
        arrays: its arguments.
    """
    return tuple(_call.bind(*arrays, function=function, shapes=tuple(shapes)))


@_call.def_abstract_eval
def _results(*_: Any, function: Any, shapes: Sequence[jax.ShapeDtypeStruct]) -> list[Any]:
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in shapes]


def _zeros(*_: Any, function: Any, shapes: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    return [jnp.zeros(x.shape, x.dtype) for x in shapes]


def _lower_on_cuda(
    context: mlir.LoweringRuleContext, *arrays: Any, function: Callable[..., Any], shapes: Any
) -> Any:
    module = context.module_context
    if len(module.platforms) > 1:
        context = context.replace(module_context=module.replace(platforms=("cuda",)))
    return mlir.lower_fun(function, multiple_results=True)(context, *arrays)


mlir.register_lowering(_call, mlir.lower_fun(_zeros, multiple_results=True))
mlir.register_lowering(_call, _lower_on_cuda, platform="cuda")
