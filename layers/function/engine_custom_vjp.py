"""The engine of `jax.custom_vjp`: one of them a call, whose forward rule is `forward` and whose backward rule is `backward`.

It uses JAX's public names alone, and has what `jax.custom_vjp` has: reverse mode to any order, forward mode over it, no forward mode of its own.

The residuals of a traced call must be the same whatever is differentiated, because JAX keeps their structure once a call. So every array that could
be differentiated counts as being so, and `needs_input_grad` says that.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from layers.core import compat
from layers.core.trees import is_array
from layers.function.again import recorded
from layers.function.call import Call
from layers.function.record import make_record
from layers.function.tape import GradFn

Outputs = tuple[list[Any], Callable[[list[Any]], Any]]


_GENERIC = "generic_batching" in inspect.signature(jax.custom_vjp.defvjp).parameters
"""Whether JAX's coming implementation, which `jax_custom_vjp3` switches on, counts the gradient of an output that a batch shares once."""


def apply(call: Call, arrays: Sequence[Any]) -> Outputs:
    """The arrays of the output, differentiable by the rule, and what makes the output of them.

    Raises:
        TypeError: where forward mode goes through it. Inside `jit`, `scan` or `checkpoint`, and from what `linearize` returns, it is JAX's own error,
            which names no function: JAX stages both modes by the same rules, and finds only when it compiles that a tangent was not transposed.
            The operation that it then refuses is its own, and no public name reaches it.
    """
    filled: list[Callable[[list[Any]], Any]] = []
    ran: list[str] = []
    generic = _GENERIC and getattr(jax.config, "jax_custom_vjp3", False)

    def primal(*arrays: Any) -> list[Any]:
        outputs, fill = call.outputs(arrays)
        filled[:] = [fill]
        ran.append("primal")
        return outputs

    def forward(*flagged: Any) -> tuple[list[Any], GradFn]:
        values = [f.value if is_array(f.value) else jnp.asarray(f.value) for f in flagged]  # a number that is differentiated arrives as such
        differentiated = tuple(
            f.perturbed if i in call.hoisted else jnp.issubdtype(x.dtype, np.inexact) for i, (f, x) in enumerate(zip(flagged, values, strict=True))
        )
        record, outputs, residuals = recorded(call.name, values, lambda xs: make_record(call, xs, differentiated), lambda: apply(call, values)[0])
        filled[:] = [record.output.fill]
        ran.append("forward")
        if len(values) > 1 and not generic and compat.may_be_batched(values):
            outputs = _depending_on(values, outputs)
        return outputs, GradFn(record, residuals)

    def backward(tape: GradFn, cotangents: list[Any]) -> tuple[Any, ...]:
        absent = [isinstance(c, SymbolicZero) or c.dtype == jax.dtypes.float0 for c in cotangents]
        return tuple(tape.pull([None if a else c for a, c in zip(absent, cotangents, strict=True)]))

    primal.__name__ = primal.__qualname__ = call.name
    for rule in (primal, forward):
        rule.__signature__ = _ANY_ARRAYS  # type: ignore[attr-defined]  # JAX asks for it at each call, and to work it out takes long
    f = jax.custom_vjp(primal)
    f.defvjp(forward, backward, symbolic_zeros=True, **({"generic_batching": True} if generic else {}))
    try:
        return f(*arrays), filled[0]
    except TypeError as error:
        refused = ran == ["forward"] or (generic and ran == ["primal", "forward"])
        if not refused:
            raise
        raise TypeError(
            f"{call.name}: forward mode (jax.jvp, jax.jacfwd, jax.linearize) does not go through a Function under the engine 'custom_vjp'; "
            "use reverse mode, or layers.engine('linear')"
        ) from error


def _depending_on(arrays: Sequence[jax.Array], outputs: Sequence[jax.Array]) -> list[jax.Array]:
    """The outputs, each of which `vmap` takes to depend on all of the arrays, and XLA does not.

    So they are batched where one of the arrays is. JAX counts the gradient of an output that the batch shares once an element, or refuses it.
    """
    numbers = [jax.random.key_data(x) if compat.is_key(x) else x for x in arrays]
    differ = [lax.ne(x, x).any() if x.ndim else lax.ne(x, x) for x in numbers]
    axes = [compat.varying_axes(jax.typeof(d)) for d in differ]

    def depending(y: jax.Array) -> jax.Array:
        if not jnp.issubdtype(y.dtype, np.inexact):
            return y
        own = compat.varying_axes(jax.typeof(y))
        here = [d if a <= own else lax.psum(d.astype(np.int32), tuple(sorted(a - own))) > 0 for d, a in zip(differ, axes, strict=True)]
        return lax.select_n(functools.reduce(lax.bitwise_or, here) & False, y, y)

    return list(map(depending, outputs))


_ANY_ARRAYS = inspect.Signature([inspect.Parameter("arrays", inspect.Parameter.VAR_POSITIONAL)])
