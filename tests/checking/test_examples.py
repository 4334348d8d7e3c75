"""The examples of each layer take every option of it, both ways, and go to an edge; read from signatures and options, not from a list."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.checking.catalogue import catalogue

ELSEWHERE = {
    "rounding": "rounds the gradient, which is then that of no function",
    "key": "of a rounded gradient",
    "generator": "the bits of a key by another of JAX's generators",
    "rate": "an array, which is refused a gradient",
    "throw": "whether a solve that fails raises",
    "objective": "of `argmin` alone",
    "implementation": "kernels of accelerators",
    "axis_name": "statistics over devices",
    "groups": "statistics over devices",
    "fixed": "which of the layers it is",
    "dtypes": "what `forward` itself finds",
    "headroom": "of integers, until they overflow",
    "max_steps": "of a solve that ends before",
}
"""Options that the contract cannot hold a layer to, by name, with the reason; each has tests of its own."""


def calls(layer):
    """The arguments of each example, by name."""
    signature = inspect.signature(layer.forward)
    skip = 0 if layer._is_split() else 1
    signature = signature.replace(parameters=list(signature.parameters.values())[skip:])
    given = [layer.example(jax.random.key(0), jnp.float32), *layer.examples(jax.random.key(0), jnp.float32).values()]
    for args in given:
        bound = signature.bind(*args)
        bound.apply_defaults()
        yield bound.arguments


def is_options(value):
    return dataclasses.is_dataclass(value) or hasattr(value, "_fields")


def fields(name, value):
    """An argument, or each field of it where it holds options: its name and value."""
    if not is_options(value):
        return [(name, value)]
    names = value._fields if hasattr(value, "_fields") else [f.name for f in dataclasses.fields(value)]
    return [(name, "options"), *(pair for n in names for pair in fields(n, getattr(value, n)))]


def defaults(value):
    """The fields of options that have a default, by name."""
    if hasattr(value, "_fields"):
        return dict(value._field_defaults)
    return {f.name: f.default for f in dataclasses.fields(value) if f.default is not dataclasses.MISSING} if is_options(value) else {}


def optional(layer):
    """The defaults of what may be left out: in `forward`, in the options of its example, and what its rules ask to be None."""
    found = {n: p.default for n, p in inspect.signature(layer.forward).parameters.items() if p.default is not inspect.Parameter.empty}
    for value in next(calls(layer)).values():
        found |= defaults(value)
    return found | dict.fromkeys(re.findall(r"\b(\w+) is (?:not )?None", inspect.getsource(layer)))


def kind(value):
    """What tells one way from another: whether it is an array, or the value itself."""
    return "array" if isinstance(value, (jax.Array, np.ndarray)) else repr(value)


def taken(layer):
    """The ways in which each argument and option is given; those of options that are left out are their defaults."""
    found = {}
    for values in zip(*[call.items() for call in calls(layer)], strict=True):
        left_out = next((defaults(v) for _, v in values if is_options(v)), {}) if any(v is None for _, v in values) else {}
        for name, given in [*left_out.items(), *(pair for argument in values for pair in fields(*argument))]:
            found.setdefault(name, set()).add(kind(given))
    return found


@pytest.mark.parametrize("layer", catalogue(), ids=lambda c: c.__name__)
def test_examples_take_each_option_both_ways(layer):
    found, may_be_absent = taken(layer), optional(layer)
    for name, ways in found.items():
        if name in ELSEWHERE:
            continue
        flag = ways <= {"True", "False"}
        if flag or (name in may_be_absent and may_be_absent[name] is None):
            assert len(ways) > 1, f"{name} is {ways.pop()} in all examples of {layer.__name__}"
        elif name in may_be_absent:
            assert ways - {repr(may_be_absent[name])}, f"{name} has its default in all examples of {layer.__name__}"


def at_an_edge(args):
    arrays = [np.asarray(x) for x in jax.tree.leaves(args) if isinstance(x, jax.Array) and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return any(not x.size or not np.isfinite(x).all() or (np.abs(x) >= 1e3).any() or not x.any() for x in arrays)


@pytest.mark.parametrize("layer", catalogue(), ids=lambda c: c.__name__)
def test_examples_go_to_an_edge(layer):
    assert any(map(at_an_edge, layer.examples(jax.random.key(0), jnp.float32).values()))
