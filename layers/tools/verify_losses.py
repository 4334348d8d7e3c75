"""Calls of the cross entropy of logits on which its kernels are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import layers
from layers.kernels.cross_entropy import KERNELS, CrossEntropyCall
from layers.kernels.place import here
from layers.tools.verify_kernels import Trial

LAYER = "softmax_cross_entropy"
ROWS, VOCABS = 4096, (32000, 512)


def trials() -> Iterator[Trial]:
    """One for each kernel, dtype and length of rows that the kernel does not refuse here."""
    for name, kernel in KERNELS.items():
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
            for vocab in VOCABS:
                call = CrossEntropyCall((ROWS, vocab), jnp.dtype(dtype).name)
                if kernel.refuse(call, here()) is None:
                    yield Trial(LAYER, name, call, (jax.ShapeDtypeStruct(call.logits, dtype),), _loss)


def _loss(implementation: str) -> Callable[..., Any]:
    def loss(logits: jax.Array) -> jax.Array:
        labels = jnp.arange(logits.shape[0]) * 7 % logits.shape[1]
        return layers.softmax_cross_entropy(logits, labels, reduction="none", implementation=implementation)

    return loss
