"""What the machine wants: small blocks for the caches of a CPU, few large ones for an accelerator, which starts a kernel for each step of a loop.

What a program is compiled for is not known while it is traced. JAX's default device is taken for it; on another one the program is as right,
only with blocks of the wrong size.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax

T = TypeVar("T")

UNLIMITED = 1 << 62
"""Bytes of a block that takes all there is."""


def on_accelerator() -> bool:
    """Whether JAX's default device is something else than a CPU."""
    config: Any = jax.config
    device = config.jax_default_device
    platform = jax.default_backend() if device is None else getattr(device, "platform", device)
    return platform != "cpu"


def choose(on_cpu: T, otherwise: T) -> T:
    """The first on a CPU, the second on an accelerator."""
    return otherwise if on_accelerator() else on_cpu
