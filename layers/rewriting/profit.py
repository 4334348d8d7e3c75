"""Whether a match pays: what autodiff keeps of its inside, less what the rule that takes its place keeps.

What autodiff keeps of an operation follows from its derivative: a product keeps each factor where the other one moves, exp and tanh keep what
they give, a logarithm what it is given, a selection its condition. Values that are read or made by the match are alive either way.
"""

from __future__ import annotations

from collections.abc import Iterator

from layers.rewriting.graph import Node, Value
from layers.rewriting.match import Match

OF_OUTPUT = frozenset({"exp", "exp2", "expm1", "tanh", "logistic", "sqrt", "rsqrt", "cbrt", "erf_inv", "tan", "asin", "acos"})
OF_INPUT = frozenset(
    "log log1p sin cos square integer_pow erf erfc abs sign sinh cosh atan asinh acosh atanh custom_jvp_call".split()  # noqa: SIM905
)
PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
RULES = frozenset("custom_vjp_call remat2 checkpoint remat function_tangent".split())  # noqa: SIM905
"""These may keep all that they are given."""
CHOICES = frozenset({"max", "min", "clamp", "reduce_max", "reduce_min"})
"""These keep where their result comes from."""


def freed(m: Match) -> int:
    """The bytes that autodiff keeps of the inside of a match, and nothing else needs."""
    border = {id(v) for v in (*m.inputs, *m.outputs)}
    outside = {id(v) for n in m.nodes for v in n.inputs if v.node not in m.nodes}
    kept = {id(v): v.bytes for n in m.nodes for v in saved_by(n) if id(v) not in border | outside}
    return sum(kept.values()) + sum(n.out.size for n in m.nodes if n.name in CHOICES and any(v.differentiated for v in n.inputs))


def saved_by(n: Node) -> Iterator[Value]:
    """The values that the derivative of an operation reads."""
    if n.name in OF_OUTPUT and n.inputs[0].differentiated:
        yield n.out
    elif n.name in OF_INPUT or n.name in RULES:
        yield from (v for v in n.inputs if v.differentiated)
    elif n.name == "mul" or n.name in PRODUCTS:
        yield from (a for a, b in zip(n.inputs, n.inputs[::-1], strict=True) if b.differentiated and a.const is None)
    elif n.name in ("div", "pow", "atan2"):
        yield from (v for v in n.inputs if v.const is None and any(x.differentiated for x in n.inputs))
    elif n.name == "select_n" and any(v.differentiated for v in n.inputs[1:]):
        yield n.inputs[0]
    elif n.name == "gather" and n.inputs[0].differentiated:
        yield n.inputs[1]


def pays(m: Match) -> bool:
    """Whether a match frees more than it keeps."""
    m.saving = freed(m) - m.keeps
    return m.saving > 0
