"""What a backward rule promises whatever its derivative: linear in the gradient of the output, repeatable, of the input's shape and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.checking.problem import Fn, GradcheckError, Problem, draw, real_size

FACTORS = (-1, 1000, -0.001)
"""What a gradient is multiplied by, to see whether its own gradient is."""


def check_promises(p: Problem, outputs: list[Any], pull: Fn, o: dict[str, Any]) -> None:
    """What holds for any derivative: linear, repeatable, of the input's shape and dtype."""
    cotangents = [draw(i, y.shape, y.dtype) for i, y in enumerate(outputs)]
    first, second = pulled(pull, cotangents), pulled(pull, cotangents)
    for name, x, a, b in zip(p.names, p.inputs, first, second, strict=True):
        if not np.all(np.isfinite(a)):
            raise GradcheckError(f"the gradient of {name} is not finite at {_where(~np.isfinite(np.asarray(a)))}")
        if a.size and np.max(np.abs(a - b)) > o["nondet_tol"]:
            raise GradcheckError(f"backward is not repeatable: two runs differ by {np.max(np.abs(a - b)):.3g} in {name}, more than nondet_tol")
        if o["check_grad_dtypes"] and (a.dtype != x.dtype or a.shape != x.shape):
            raise GradcheckError(f"the gradient of {name} is {a.dtype}{a.shape}, but the input is {x.dtype}{x.shape}")
    for name, g in zip(p.names, pulled(pull, [np.zeros(y.shape, y.dtype) for y in outputs]), strict=True):
        if np.any(g != 0):
            raise GradcheckError(f"backward is not multiplied by the gradient of the output: {name} gets a gradient for zero gradients")
    _check_linear(p, pull, cotangents, first, o)
    if o["check_undefined_grad"] and len(outputs) > 1:
        _check_each_output_alone(p, cotangents, first)
    if o["check_batched_grad"]:
        stacked = [np.stack([c, -2 * c]) for c in cotangents]
        for name, a, b in zip(p.names, first, pulled(jax.vmap(pull), stacked), strict=True):
            if not np.allclose(np.stack([a, -2 * a]), b, rtol=1e-6, atol=1e-9):
                raise GradcheckError(f"backward under vmap gives another gradient of {name}")


def pulled(pull: Fn, cotangents: Sequence[Any]) -> list[np.ndarray]:
    return [np.asarray(g) for g in pull(list(map(jnp.asarray, cotangents)))]


def _check_linear(p: Problem, pull: Fn, cotangents: list[Any], first: Sequence[Any], o: dict[str, Any]) -> None:
    """Gradients of either sign and of several sizes, and the sum of two, in float64."""
    others = [draw(50 + i, c.shape, c.dtype) for i, c in enumerate(cotangents)]
    cases = [(f"{factor:g} times that gives not {factor:g} times", factor, [factor * a for a in first]) for factor in (2, *FACTORS)]
    given = [pulled(pull, [c * c.dtype.type(factor) for c in cotangents]) for _, factor, _ in cases]
    cases.append(("the sum of two gives not the sum of", 1, [a + b for a, b in zip(first, pulled(pull, others), strict=True)]))
    given.append(pulled(pull, [a + b for a, b in zip(cotangents, others, strict=True)]))
    for (what, size, expected), grads in zip(cases, given, strict=True):
        for name, a, b in zip(p.names, expected, grads, strict=True):
            if not _near(b, a, abs(size), o):
                raise GradcheckError(f"backward is not linear in the gradient of the output: {what} the gradient of {name}")


def _near(a: Any, b: Any, size: float, o: dict[str, Any]) -> bool:
    """Whether two gradients agree within the tolerances, where the gradient of the output is about `size`."""
    scale = np.max(np.abs(b), initial=0)
    return bool((np.abs(a - b) <= size * o["atol"] + o["rtol"] * scale).all())


def random_rows(outputs: list[Any]) -> np.ndarray:
    """Random gradients of the outputs, of both signs and of several sizes."""
    width = sum(map(real_size, outputs))
    return np.stack([factor * draw(60 + k, (width,), np.float64) for k, factor in enumerate((1, *FACTORS))])


def check_against(p: Problem, jacobian: np.ndarray, rows: np.ndarray, given: np.ndarray, o: dict[str, Any]) -> None:
    """The gradients that are given for random ones, against the product with the Jacobian, whose rows are gradients of single entries."""
    ends = np.cumsum(list(map(real_size, p.inputs)))[:-1]
    for factor, row, grads in zip((1, *FACTORS), rows, given, strict=True):
        for name, a, b in zip(p.names, np.split(grads, ends), np.split(row @ jacobian, ends), strict=True):
            if not _near(a, b, abs(factor), o):
                worst = np.max(np.abs(a - b))
                raise GradcheckError(
                    "backward is not linear in the gradient of the output: for random gradients "
                    f"of size {abs(factor):g} that of {name} is not their product with the Jacobian: they differ by {worst:.3g}"
                )


def _check_each_output_alone(p: Problem, cotangents: list[Any], whole: Sequence[Any]) -> None:
    """The gradients with all outputs but one unused, which reach backward as absent, sum to those with all."""
    parts = []
    for i, c in enumerate(cotangents):
        parts.append(pulled(jax.vjp(lambda *x, i=i: [p.outputs(*x)[i]], *p.inputs)[1], [c]))
    for name, total, *part in zip(p.names, whole, *parts, strict=True):
        if not np.allclose(total, sum(part), rtol=1e-6, atol=1e-9):
            raise GradcheckError(f"backward does not handle an output without gradient: the gradient of {name} is not the sum over the outputs")


def _where(mask: np.ndarray) -> str:
    return str(tuple(int(k) for k in np.argwhere(mask)[0]))
