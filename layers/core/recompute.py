"""Keeps what `backward` recomputes from being merged by XLA with the forward pass.

Where forward and backward are compiled together, common-subexpression elimination finds that a recomputed value stands there already, and
keeps it alive: the memory that the rule saves is lost. A barrier on what the recomputation starts from, tied to the incoming gradient,
stops this for elementwise operations; a matrix product needs a loop around it as well (`core/blocks.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jax import lax

_transposing = False


def is_transposing() -> bool:
    """Whether a backward rule is being traced in order to transpose it."""
    return _transposing


def barrier(residuals: Any, cotangents: Any) -> tuple[Any, Any]:
    """Both pytrees unchanged, but not available to XLA before `cotangents` is.

    To be called first in a `backward` that recomputes: `(x, w), dy = barrier((x, w), dy)`.
    """
    return (residuals, cotangents) if _transposing else lax.optimization_barrier((residuals, cotangents))


@contextlib.contextmanager
def no_barriers() -> Iterator[None]:
    """Traces a backward rule in order to transpose it: there residuals must not depend on the gradient."""
    global _transposing
    before, _transposing = _transposing, True
    try:
        yield
    finally:
        _transposing = before
