"""Elementwise functions of one array in a normal form, in which all spellings of one function are the same.

A form is a polynomial: a sum of products of powers of x and of transcendental functions of forms. Sigmoids become hyperbolic tangents, erfc
becomes erf, odd functions lose the sign of their argument: x σ(x), x / (1 + exp(-x)) and x (1 + tanh(x / 2)) / 2 are one form. Numbers stand
apart from the structure, so that they can be compared within the rounding of a dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from layers.core import compat
from layers.rewriting.constants import number_of
from layers.rewriting.graph import Value, widens
from layers.rewriting.primitives import BINARY, UNARY
from layers.rewriting.reading import read

LARGEST, DEEPEST = 64, 40
"""The terms of a polynomial, and the operations on the way, that are followed."""


class Term(NamedTuple):
    """Something that is raised to powers: its structure, and the numbers in it."""

    structure: str
    numbers: tuple[float, ...] = ()


Product = tuple[tuple[Term, int], ...]
Form = dict[Product, float]
X: Form = {((Term("x"), 1),): 1.0}


class Unknown(ValueError):
    """A value is no elementwise function of the array, or one that is too long."""


def form_of(v: Value, x: Value, nodes: set[Any]) -> Form | None:
    """The function of `x` that `v` is, and adds its operations to `nodes`; None where it is none."""
    inner: set[Any] = set()
    try:
        form = _form(v, {id(x): X}, v.size, inner, 0)
    except Unknown:
        return None
    nodes |= inner
    return form


def signature(form: Form) -> Term:
    """The whole form as its structure and its numbers, both in a fixed order."""
    terms = sorted((_structure(p), c, _numbers(p)) for p, c in form.items())
    return Term("+".join(t[0] for t in terms), tuple(n for _, c, numbers in terms for n in (c, *numbers)))


def _structure(p: Product) -> str:
    return "*".join(f"{t.structure}^{e}" for t, e in p)


def _numbers(p: Product) -> tuple[float, ...]:
    return tuple(n for t, _ in p for n in t.numbers)


def _form(v: Value, known: dict[int, Form], size: int, nodes: set[Any], depth: int) -> Form:
    if id(v) in known:
        return known[id(v)]
    if (number := number_of(v)) is not None:
        return {(): float(number)} if number else {}
    n = v.node
    if (
        n is None
        or depth > DEEPEST
        or v.size != size
        or (n.name not in RULES and n.name not in UNARY | BINARY | {"custom_jvp_call"} and not widens(n))
    ):
        raise Unknown
    args = [_form(a, known, size, nodes, depth + 1) for a in n.inputs]
    nodes.add(n)
    if n.name == "custom_jvp_call":
        inner = n.params["call_jaxpr"]
        g = read(compat.open_jaxpr(inner), getattr(inner, "consts", ()))
        out = _form(g.outputs[0], {id(a): f for a, f in zip(g.inputs, args, strict=True)}, size, set(), depth + 1)
    elif widens(n):
        out = args[0]
    elif n.name == "integer_pow":
        out = _power(args[0], n.params["y"])
    else:
        out = RULES.get(n.name, lambda *a: _call(n.name, *a))(*args)
    if len(out) > LARGEST:
        raise Unknown
    known[id(v)] = out
    return out


def _sum(a: Form, b: Form) -> Form:
    out = dict(a)
    for p, c in b.items():
        out[p] = out.get(p, 0.0) + c
    return {p: c for p, c in out.items() if c}


def _scaled(a: Form, factor: float) -> Form:
    return {p: c * factor for p, c in a.items()}


def _product(a: Form, b: Form) -> Form:
    if len(a) * len(b) > LARGEST:
        raise Unknown
    out: Form = {}
    for p, c in a.items():
        for q, d in b.items():
            powers: dict[Term, int] = dict(p)
            for t, e in q:
                powers[t] = powers.get(t, 0) + e
            key = tuple(sorted((t, e) for t, e in powers.items() if e))
            out[key] = out.get(key, 0.0) + c * d
    return out


def _power(a: Form, exponent: int) -> Form:
    if exponent < 0:
        return _power(_reciprocal(a), -exponent)
    out: Form = {(): 1.0}
    for _ in range(exponent):
        out = _product(out, a)
    return out


def _reciprocal(a: Form) -> Form:
    """1 / a: of one product; and of c + c exp(u), which is (1 - tanh(u / 2)) / 2c."""
    if len(a) == 1:
        ((p, c),) = a.items()
        return {tuple((t, -e) for t, e in p): 1 / c}
    exponential = next((p for p in a if len(p) == 1 and p[0][0].structure.startswith("exp(") and p[0][1] == 1), None)
    if len(a) == 2 and () in a and exponential is not None and a[()] == a[exponential]:
        return _scaled(_sum({(): 1.0}, _scaled(_odd("tanh", _scaled(_EXPONENTS[exponential[0][0]], 0.5)), -1.0)), 0.5 / a[()])
    raise Unknown


_EXPONENTS: dict[Term, Form] = {}
"""The argument of each exponential that a form holds."""


def _call(name: str, *args: Form) -> Form:
    """Any other operation, by its name."""
    parts = [signature(a) for a in args]
    term = Term(f"{name}({','.join(p.structure for p in parts)})", tuple(x for p in parts for x in p.numbers))
    return {((term, 1),): 1.0}


def _exp(a: Form) -> Form:
    out = _call("exp", a)
    ((key, _),) = next(iter(out))
    _EXPONENTS[key] = a
    return out


def _odd(name: str, a: Form) -> Form:
    """An odd function: of an argument whose first number is positive."""
    if not a:
        return {}
    numbers = signature(a).numbers
    return _scaled(_call(name, _scaled(a, -1.0)), -1.0) if numbers[0] < 0 else _call(name, a)


def _sigmoid(a: Form) -> Form:
    return _scaled(_sum({(): 1.0}, _odd("tanh", _scaled(a, 0.5))), 0.5)


def _erfc(a: Form) -> Form:
    return _sum({(): 1.0}, _scaled(_odd("erf", a), -1.0))


def _max(a: Form, b: Form) -> Form:
    for one, two in ((a, b), (b, a)):
        if not one:
            return _call("positive_part", two)
    return _call("max", a, b)


def _select(condition: Form, off: Form, on: Form) -> Form:
    positive = [_call("gt", on, {}), _call("ge", on, {})]
    return _call("positive_part", on) if not off and condition in positive else _call("select_n", condition, off, on)


RULES: dict[str, Callable[..., Form]] = {
    "add": _sum,
    "add_any": _sum,
    "sub": lambda a, b: _sum(a, _scaled(b, -1.0)),
    "neg": lambda a: _scaled(a, -1.0),
    "mul": _product,
    "div": lambda a, b: _product(a, _reciprocal(b)),
    "square": lambda a: _power(a, 2),
    "exp": _exp,
    "tanh": lambda a: _odd("tanh", a),
    "erf": lambda a: _odd("erf", a),
    "erfc": _erfc,
    "logistic": _sigmoid,
    "max": _max,
    "select_n": _select,
}
