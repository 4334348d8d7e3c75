"""Whether a kernel works on this machine: it may be missing, or not load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.attention_call import AttentionCall


def failure_of_attention(forward: Callable[..., Any]) -> str | None:
    """Why a small causal call of a kernel of attention does not compile for JAX's default device; None where it does."""
    x = jax.ShapeDtypeStruct((1, 128, 1, 128), jnp.bfloat16)
    call = AttentionCall(x.shape, x.shape, x.shape, "bfloat16", low=0)
    return failure_of(lambda x: forward(call, x, x, x, None, None, None), x)


def failure_of(kernel: Callable[..., Any], *args: jax.ShapeDtypeStruct) -> str | None:
    """Why a small call of a kernel does not compile for JAX's default device; None where it does."""
    try:
        jax.jit(kernel).lower(*args).compile()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None
