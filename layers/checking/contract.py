"""The contract that every layer of the catalogue passes, and that a `Function` of one's own can be held to in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.checking import clauses
from layers.checking.catalogue import catalogue as catalogue
from layers.checking.derivatives import far_out, gradient_is_right, no_nan, second_derivative_is_right
from layers.checking.examples import holds_there, subjects
from layers.checking.report import Report as Report
from layers.checking.report import Row as Row
from layers.checking.report import run_clause
from layers.checking.subject import Subject
from layers.core import checks


def check(fn: Any, *args: Any) -> Report:
    """Checks a layer: is its gradient right, under each transformation of JAX, in each dtype, sharded, also the second one and far out.

    Args:
        fn: a `Function` class, or any JAX function.
        *args: its arguments; for a class that has an `example` or `examples`, none are needed. Small arrays: whole Jacobians are computed.
            `examples(key, dtype)` is a dict of more arguments by name: options that change the rule, and edges such as an empty array, 1e4 or inf.

    Returns:
        A report with a row for each clause; `report.passed`, `report.raise_if_failed()`.

    Raises:
        TypeError: where arguments are missing, or none of them is a floating-point array.
    """
    fn = checks.function("check", "fn", fn)
    name, given = getattr(fn, "__name__", type(fn).__name__), bool(args)
    if not given and hasattr(fn, "example"):
        args = fn.example(jax.random.key(0), jnp.float32)
    elif not given and hasattr(fn, "examples"):
        args = next(iter(_examples(fn).values()))
    elif not given:
        raise TypeError(f"check: {name} has no `example`, so give its arguments: check({name}, *args)")
    subject = Subject(fn, args)
    if not subject.differentiated:
        raise TypeError(f"check: no argument of {name} is a floating-point array")
    rows = [run_clause("no NaN", no_nan, subject)]
    for title, clause in _CLAUSES.items():
        rows.append(run_clause(title, clause, subject) if rows[0].outcome == "passed" else Row(title, "skipped", "there is a NaN"))
    if not given and hasattr(fn, "examples"):
        rows += [run_clause(f"example: {title}", holds_there, s) for title, s in subjects(fn, subject, _examples(fn)).items()]
    return Report(name, tuple(rows))


def _examples(fn: Any) -> dict[str, tuple[Any, ...]]:
    return fn.examples(jax.random.key(0), jnp.float32)


_CLAUSES: dict[str, Callable[[Subject], str | None]] = {
    "gradient": gradient_is_right,
    "second derivative": second_derivative_is_right,
    "far out": far_out,
    "linear in the gradient": clauses.linear,
    "jit": clauses.jit,
    "vmap": clauses.vmap,
    "scan": clauses.scan,
    "remat": clauses.remat,
    "forward mode": clauses.forward_mode,
    "each argument alone": clauses.partial,
    "dtypes": clauses.dtypes,
    "sharding": clauses.sharding,
    "no leak": clauses.no_leak,
    "memory kept": clauses.memory,
}
