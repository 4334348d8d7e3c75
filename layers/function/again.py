"""The derivative of a gradient whose rules hold what JAX cannot differentiate, such as a call of NumPy.

JAX differentiates the bodies of `forward` and `backward`. Where it cannot differentiate that of `forward`, but backward needs arguments and outputs
only, the derivative of an argument is known, and that of an output is the `Function` itself, applied once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Recorded = tuple[Any, list[Any], list[Any]]

_CURE = "Put what JAX cannot differentiate, such as a call of NumPy, in a Function of its own with a backward of its own"


def recorded(name: str, primals: Sequence[Any], record: Callable[[Sequence[Any]], Recorded], apply_again: Callable[[], Sequence[Any]]) -> Recorded:
    """`record(primals)`, also where its `forward` cannot be differentiated but is, from outside.

    Args:
        name: the class, for messages.
        primals: the arrays of the call.
        record: runs `forward`: a record, the arrays of the output and the residuals.
        apply_again: the outputs of the same call, differentiable by its rule.

    Raises:
        TypeError: where backward needs more of such a `forward` than its arguments and outputs.
    """
    try:
        return record(primals)
    except Exception as error:
        plain = _cut_off(primals)
        made, outputs, residuals = _without_derivative(error, lambda: record(plain), primals, plain)
        known = {id(p): x for p, x in zip(plain, primals, strict=True)} | {id(y): z for y, z in zip(outputs, apply_again(), strict=True)}
        if any(id(r) not in known and jnp.issubdtype(r.dtype, np.inexact) for r in residuals):
            raise TypeError(
                f"{name}.forward cannot be differentiated, which a second derivative needs for what it saves beside arguments and outputs "
                f"({type(error).__name__}). {_CURE}, and call that in {name}.forward; or save arguments and outputs only"
            ) from error
        return made, [known[id(y)] for y in outputs], [known.get(id(r), r) for r in residuals]


def explained(name: str, error: Exception, backward: Callable[[Any], Any], arrays: Any) -> Exception:
    """What to raise for an error of `backward(arrays)`: one that names the Function and the cure where it comes of its differentiation."""
    leaves, tree = jax.tree.flatten(arrays)
    plain = _cut_off(leaves)
    try:
        _without_derivative(error, lambda: backward(tree.unflatten(plain)), leaves, plain)
    except Exception:
        return error
    return TypeError(
        f"{name}.backward cannot be differentiated, which a second derivative needs ({type(error).__name__}). {_CURE}, "
        f"and call that in {name}.backward"
    )


def _cut_off(arrays: Sequence[Any]) -> list[Any]:
    return [jax.lax.stop_gradient(x) if jnp.issubdtype(x.dtype, np.inexact) else x for x in arrays]


def _without_derivative(error: Exception, run: Callable[[], Any], given: Sequence[Any], plain: Sequence[Any]) -> Any:
    """The result of `run`, which takes no derivative; raises the error where there was none, or it is not the cause."""
    if all(p is x for p, x in zip(plain, given, strict=True)):
        raise error
    try:
        return run()
    except Exception:
        raise error from None
