"""MLIR's contexts: JAX makes one for each program, a fourth of the time that a small one takes, and keeps it with the program, a megabyte."""

import functools

from jax._src.interpreters import mlir
from jaxlib.mlir import ir

_fresh = mlir.make_ir_context
_shared = functools.cache(_fresh)


def share() -> None:
    """From now on programs share a context, but for one that is lowered while another is: what it makes would go into the other."""
    mlir.make_ir_context = lambda: _fresh() if _lowering() else _shared()


def renew() -> None:
    """The next program gets a new context, and so do those after it: the old one goes with the last of its programs."""
    _shared.cache_clear()


def _lowering() -> bool:
    try:
        return ir.Context.current is not None
    except ValueError:  # how it says that there is none
        return False
