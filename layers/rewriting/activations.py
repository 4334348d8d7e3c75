"""Activations by name: an elementwise function is compared with those that this library has, in their normal forms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.activations.geglu import geglu
from layers.activations.gelu import gelu
from layers.activations.mish import mish
from layers.activations.relu_squared import relu_squared
from layers.activations.silu import silu
from layers.activations.softplus import softplus
from layers.activations.swiglu import swiglu
from layers.core import compat
from layers.rewriting.forms import X, form_of, signature
from layers.rewriting.graph import Node, Value, is_float, widens
from layers.rewriting.match import Match, interior
from layers.rewriting.primitives import BINARY, UNARY
from layers.rewriting.reading import read

SPELLINGS: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "gelu": (jax.nn.gelu,),
    "gelu_exact": (lambda x: jax.nn.gelu(x, approximate=False),),
    "relu": (jax.nn.relu,),
    "silu": (jax.nn.silu,),
    "relu_squared": (lambda x: jnp.square(jax.nn.relu(x)),),
    "mish": (jax.nn.mish, lambda x: x * jnp.tanh(jnp.log(1 + jnp.exp(x))), lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x)))),
    "softplus": (jax.nn.softplus, lambda x: jnp.log(1 + jnp.exp(x)), lambda x: jnp.log1p(jnp.exp(x))),
    "tanh": (jnp.tanh,),
}
"""Functions that stand for one activation: several where the normal forms differ."""

ALONE: dict[str, Callable[[Any], Any]] = {
    "gelu": gelu,
    "gelu_exact": functools.partial(gelu, approximate=False),
    "silu": silu,
    "relu_squared": relu_squared,
    "mish": mish,
    "softplus": softplus,
}
"""Those that keep less than what autodiff keeps of their spellings."""
GATED: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "silu": ("swiglu", swiglu),
    "gelu": ("geglu", geglu),
    "gelu_exact": ("geglu", functools.partial(geglu, approximate=False)),
}
FARTHEST = 40
"""The operations that are looked back for the argument of an activation."""


@functools.cache
def _table() -> dict[str, list[tuple[tuple[float, ...], str]]]:
    table: dict[str, list[tuple[tuple[float, ...], str]]] = {}
    for name, functions in SPELLINGS.items():
        for fn in functions:
            traced = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((3,), jnp.float32))
            graph = read(compat.open_jaxpr(traced), traced.consts)
            form = form_of(graph.outputs[0], graph.inputs[0], set())
            assert form is not None, f"{name} has no normal form"
            s = signature(form)
            table.setdefault(s.structure, []).append((s.numbers, name))
    return table


def activation_of(v: Value, x: Value, nodes: set[Node]) -> str | None:
    """The name of the activation of `x` that `v` is, or None."""
    inner: set[Node] = set()
    form = form_of(v, x, inner)
    if form is None or form == X:
        return None
    found, narrowest = signature(form), min((o.dtype for n in inner for o in n.outputs if is_float(o)), key=lambda d: d.itemsize, default=v.dtype)
    tolerance = max(4 * float(jnp.finfo(narrowest).eps), 2e-6)
    for numbers, name in _table().get(found.structure, ()):
        if all(math.isclose(a, b, rel_tol=tolerance) for a, b in zip(found.numbers, numbers, strict=True)):
            nodes |= inner
            return name
    return None


def arguments_of(v: Value) -> list[Value]:
    """The values that `v` may be an elementwise function of, nearest first."""
    seen: list[Value] = [v]
    for x in seen:
        n = x.node
        if n is not None and len(seen) < FARTHEST and (n.name in UNARY | BINARY | {"custom_jvp_call"} or widens(n)):
            seen += [a for a in n.inputs if a not in seen and a.size == v.size]
    return seen[1:]


STARTS = frozenset({"tanh", "logistic", "erf", "erfc", "exp", "log1p", "custom_jvp_call"})
"""Of these an activation that is worth a rule has one."""


def find_activation(n: Node) -> list[Match]:
    """The largest activation, gated or not, that the operation `n` is in the middle of."""
    if n.name not in STARTS:
        return []
    found: list[Match] = []
    v = n.out
    for _ in range(12):
        for x in arguments_of(v):
            nodes: set[Node] = set()
            name = activation_of(v, x, nodes)
            if name in ALONE:
                found += [_match(name, ALONE[name], nodes, [x], v), *_gated(name, nodes, x, v)]
        u = v.only_user or next((u for u in v.users if u.out.size == v.size), None)
        if u is None or u.out.size != v.size or not (u.name in UNARY | BINARY or widens(u)):
            break
        v = u.out
    return found[::-1]


def _gated(name: str, nodes: set[Node], gate: Value, v: Value) -> list[Match]:
    """f(gate) * up, where that is all that reads f(gate)."""
    u = v.only_user
    if name not in GATED or u is None or u.name != "mul" or u.inputs[0] is u.inputs[1]:
        return []
    up = u.other(v)
    if up.shape != gate.shape or not up.differentiated or up is gate:
        return []
    return [_match(*GATED[name], nodes | {u}, [gate, up], u.out)]


def _match(name: str, fn: Callable[..., Any], nodes: set[Node], inputs: list[Value], out: Value) -> Match:
    def run(*args: Any) -> list[Any]:
        dtype = functools.reduce(jnp.promote_types, (a.dtype for a in args))
        return [fn(*(a.astype(dtype) for a in args)).astype(out.dtype)]

    return Match(name, interior(nodes, [out]), inputs, [out], run)
