"""Good calls, mutated: what a user may give by mistake for each argument, and what is made of the outcome.

`good_calls.py` in each family's tests holds `CALLS`: for each public function, by its name, one call or several, each a function without arguments
that returns the arguments by name; for a module a pair of such functions, the constructor's arguments and those of its call.
"""

from __future__ import annotations

import collections
import inspect
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.core.trees import replaced

SECONDS = 20
"""After this time a call counts as hanging."""


@dataclass(frozen=True)
class Mutation:
    """One wrong or unusual value for an argument.

    Attributes:
        label: what it is.
        value: the value.
        outcome: "error" where only a clear error will do; "same" where the result, if there is one, is that of `twin` in its place;
            "any" where a result is one that is finite.
        twin: the value that means the same.
        traced: whether the value is passed through `jax.jit`.
    """

    label: str
    value: Any
    outcome: str = "any"
    twin: Any = None
    traced: bool = False


@dataclass
class Findings:
    """How many mutated calls ended well, and the others with what was seen."""

    well: int = 0
    unclear: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    hanging: list[str] = field(default_factory=list)


def mutations_of(value: Any, optional: bool) -> Iterator[Mutation]:
    """Mutations of one argument, by the kind of its good value; `rngs` are Flax's own affair."""
    if isinstance(value, nnx.Rngs):
        return
    if not optional:
        yield Mutation("None", None, "error")
    yield from _by_kind(value)


def _by_kind(value: Any) -> Iterator[Mutation]:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        yield from (Mutation(str(v), v, "error") for v in ("abc", 1.5, [], {}))
        yield Mutation("a batch of keys", jax.random.split(jax.random.key(0)), "error")
        yield Mutation("floats", jnp.ones(2), "error")
    elif isinstance(value, jax.Array):
        yield from _of_array(value)
    elif isinstance(value, bool):
        yield from (Mutation(repr(v), v, "error") for v in ("False", "no", 2, 0.5, [], {}, np.ones(2)))
        yield Mutation("NumPy's", np.bool_(value), "same", value)
        yield Mutation("traced", value, "same", value, traced=True)
    elif isinstance(value, int):
        yield from (Mutation(repr(v), v, "error") for v in ("3", value + 0.5, float("nan"), True, [value], {}, 1j, np.ones(2, np.int32)))
        yield from (Mutation(repr(v), v) for v in (-5, 0, 10**30))
        yield Mutation("NumPy's", np.int64(value), "same", value)
        yield Mutation("JAX's", jnp.int32(value), "same", value)
        yield Mutation("traced", value, "same", value, traced=True)
    elif isinstance(value, float):
        yield from (Mutation(repr(v), v, "error") for v in ("1e-6", float("nan"), True, [value], {}, 1j, np.ones(2)))
        yield from (Mutation(repr(v), v) for v in (-1.0, 0, 2, float("inf"), -float("inf"), 10**30))
        yield Mutation("NumPy's", np.float32(value), "same", value)
        yield Mutation("JAX's", jnp.float32(value), "same", value)
        yield Mutation("traced", value, "same", value, traced=True)
    elif isinstance(value, str):
        yield from (Mutation(repr(v), v, "error") for v in ("zzz", "", 3, 1.5, [], {}, np.ones(2)))
    elif isinstance(value, (type, np.dtype)):  # a dtype
        yield from (Mutation(repr(v), v, "error") for v in ("abc", 3, jnp.int32, bool, object()))
    elif callable(value):
        yield from (Mutation(repr(v), v, "error") for v in ("zzz", 3, 1.5, [], {}))


def _of_array(x: jax.Array) -> Iterator[Mutation]:
    yield from (Mutation(type(v).__name__, v, "error") for v in ("abc", {}, {1.0}, object(), ["a"], b"x"))
    yield Mutation("NumPy's", np.asarray(x), "same", x)
    yield Mutation("a list", np.asarray(x).tolist(), "same", x)
    yield Mutation("traced", x, "same", x, traced=True)
    if jnp.issubdtype(x.dtype, jnp.floating):
        yield Mutation("complex", x * (1 + 0.5j), "complex")
        whole = jnp.round(x)
        yield Mutation("integers", whole.astype(jnp.int32), "same", whole)
        yield Mutation("bool", whole != 0, "same", (whole != 0).astype(x.dtype))
        yield Mutation("bfloat16", x.astype(jnp.bfloat16), "any")
    elif jnp.issubdtype(x.dtype, jnp.integer):
        yield Mutation("floats", x + 0.5, "any")
        yield Mutation("int8", x.astype(jnp.int8), "same", x)
        yield Mutation("complex", x * 1j, "error")
    yield Mutation("one axis more", x[None])
    yield Mutation("a scalar", jnp.asarray(1, x.dtype))
    if x.ndim:
        yield Mutation("one axis less", x[0])
        yield Mutation("longer", jnp.concatenate([x, x[..., -1:]], -1))
        yield Mutation("shorter", x[..., :-1])
        yield Mutation("more rows", jnp.concatenate([x, x[-1:]]))
        yield Mutation("empty", x[:0])
    if x.ndim > 1 and x.shape[-1] != x.shape[-2]:
        yield Mutation("transposed", jnp.swapaxes(x, -1, -2))


class Hanging(Exception):
    pass


def _stop(*_: Any) -> None:
    raise Hanging


Run = Callable[[dict[str, Any]], Any]


def good_runs(target: Callable[..., Any], calls: Any) -> Iterator[tuple[Run, inspect.Signature, dict[str, Any]]]:
    """For each good call: what runs it with arguments by name, the signature of these, and good arguments."""
    for call in calls if isinstance(calls, list) else [calls]:
        if isinstance(call, tuple):
            build, use = call

            def construct(arguments: dict[str, Any], use: Any = use) -> Any:
                return _call(_call(target, arguments), use())

            def use_it(arguments: dict[str, Any], build: Any = build) -> Any:
                return _call(_call(target, build()), arguments)

            yield construct, signature_of(target), build()
            yield use_it, inspect.signature(target.__call__), use()
        else:
            yield lambda arguments: _call(target, arguments), signature_of(target), call()


def signature_of(fn: Any) -> inspect.Signature:
    """The arguments of a function, of a class's constructor or of an object's call."""
    if not isinstance(fn, type):
        return inspect.signature(fn)
    signature = inspect.signature(fn.__init__)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _call(fn: Any, arguments: dict[str, Any]) -> Any:
    signature = signature_of(fn)
    names = [n for n in signature.parameters if n in arguments]
    others = {n: arguments[n] for n in arguments if n not in names}
    takes_others = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    assert takes_others or not others, f"{sorted(others)} are no arguments of {fn}"
    fresh = {n: nnx.Rngs(0) if isinstance(arguments[n], nnx.Rngs) else arguments[n] for n in names}  # made in the trace that draws from them
    bound = inspect.BoundArguments(signature, collections.OrderedDict(fresh))
    return fn(*bound.args, **bound.kwargs, **others)


def mutate(name: str, target: Callable[..., Any], calls: Any, *, values: bool) -> Findings:
    """Mutates each argument of each good call.

    Args:
        name: what errors have to begin with.
        target: the public function or module class.
        calls: its good calls.
        values: whether results are computed and compared, else only traced, forward and backward.
    """
    findings = Findings()
    before = signal.signal(signal.SIGALRM, _stop)
    try:
        for run, signature, good in good_runs(target, calls):
            traced(run, good)  # a good call is good
            for what, value in good.items():
                for mutation in mutations_of(value, optional=_takes_none(signature.parameters.get(what))):
                    if mutation.label in ("a list", "bool") and _takes_trees(target, what):
                        mutation = replace(mutation, outcome="any")  # a tree of numbers is no array, and bools go through
                    _judge(findings, name, run, good, what, mutation, values)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return findings


def _takes_none(parameter: inspect.Parameter | None) -> bool:
    if parameter is None:
        return False
    return parameter.default is None or str(parameter.annotation).endswith("| None") or parameter.kind is inspect.Parameter.VAR_POSITIONAL


def _takes_trees(target: Callable[..., Any], what: str) -> bool:
    """Whether a docstring says of an argument that it may be a pytree."""
    return re.search(rf"^ +{what}: an array or pytree", inspect.getdoc(target) or "", re.M) is not None


def _judge(findings: Findings, name: str, run: Run, good: dict[str, Any], what: str, m: Mutation, values: bool) -> None:
    where = f"{name}({what}={m.label})"
    signal.alarm(SECONDS)
    try:
        outputs = traced(run, {**good, what: m.value}, through_jit=what if m.traced else None)
        if values and m.outcome != "error":
            outputs = computed(run, {**good, what: m.value}, through_jit=what if m.traced else None)
            expected = computed(run, {**good, what: m.twin}, still=None if _is_data(m.value) else what) if m.outcome == "same" else None
        else:
            expected = None
    except Hanging:
        findings.hanging.append(where)
    except Exception as error:
        if is_clear(error, name, what, good):
            findings.well += 1
        else:
            findings.unclear.append(f"{where}: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")
    else:
        fault = _fault(outputs, expected, m)
        if fault is None:
            findings.well += 1
        else:
            findings.silent.append(f"{where}: {fault}")
    finally:
        signal.alarm(0)


def is_clear(error: Exception, name: str, what: str, good: dict[str, Any]) -> bool:
    """Whether an error says whose it is and names the argument, or another one with which it does not fit."""
    message = str(error)
    named = any(re.search(rf"\b{re.escape(n)}\b", message) for n in (what, *good))
    return isinstance(error, (TypeError, ValueError)) and re.match(rf"{re.escape(name)}\b", message) is not None and named


def _fault(outputs: list[Any], expected: list[Any] | None, m: Mutation) -> str | None:
    """What is wrong with a result that was given, or None."""
    if m.outcome == "error":
        return "taken without a word"
    if m.outcome == "complex" and not any(jnp.issubdtype(y.dtype, jnp.complexfloating) for y in outputs):
        return "the imaginary part is lost"
    arrays = [np.asarray(y, np.complex128) for y in outputs if isinstance(y, jax.Array) and jnp.issubdtype(y.dtype, np.number)]
    if not all(np.isfinite(y).all() for y in arrays):
        return "not finite"
    if expected is not None:
        theirs = [np.asarray(y, np.complex128) for y in expected if isinstance(y, jax.Array) and jnp.issubdtype(y.dtype, np.number)]
        if [a.shape for a in arrays] != [e.shape for e in theirs]:
            return f"shapes {[a.shape for a in arrays]}, but {[e.shape for e in theirs]} for the value that means the same"
        if not all(np.allclose(a, e, rtol=1e-3, atol=1e-5) for a, e in zip(arrays, theirs, strict=True)):
            return "another result than for the value that means the same"
    return None


def _is_data(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray)) and value.ndim > 0 and jnp.issubdtype(value.dtype, np.inexact)


def _with_gradient(run: Run, arguments: dict[str, Any], through_jit: str | None, still: str | None) -> tuple[Callable[..., list[Any]], list[Any]]:
    """The arrays of a call's result and of its gradient, as a function of its arrays and of the value that is passed through `jax.jit`.

    There is no gradient for the argument `still`: none for a list of numbers, and so none for the array that means the same.
    """
    names = [k for k, v in arguments.items() if k == through_jit or (_is_data(v) and k != still)]

    def call(*given: Any) -> list[Any]:
        now = {**arguments, **dict(zip(names, given, strict=True))}
        return [y for y in jax.tree.leaves(run(now)) if isinstance(y, jax.Array)]

    def whole(*given: Any) -> list[Any]:
        differentiated = [i for i, n in enumerate(names) if _is_data(arguments[n])]
        if not differentiated:
            return call(*given)

        outputs, pull = jax.vjp(lambda *moved: call(*replaced(given, differentiated, moved)), *[given[i] for i in differentiated])
        return [*outputs, *pull([jnp.ones_like(y) if jnp.issubdtype(y.dtype, np.inexact) else np.zeros(y.shape, jax.dtypes.float0) for y in outputs])]

    return whole, [arguments[n] for n in names]


def traced(run: Run, arguments: dict[str, Any], *, through_jit: str | None = None) -> list[Any]:
    """The types of result and gradient, of a call that is only traced."""
    whole, given = _with_gradient(run, arguments, through_jit, None)
    return jax.eval_shape(whole, *given)


def computed(run: Run, arguments: dict[str, Any], *, through_jit: str | None = None, still: str | None = None) -> list[Any]:
    """Result and gradient."""
    whole, given = _with_gradient(run, arguments, through_jit, still)
    return jax.jit(whole)(*given)
