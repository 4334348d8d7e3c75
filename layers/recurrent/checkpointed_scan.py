"""`jax.lax.scan` and a bounded while loop that keep few of their states for backward.

The steps are cut into segments, and only the carry at the start of each segment is kept. Backward takes the segments from the last to the
first: it runs the segment again from its carry, this time as autodiff does, and pulls the cotangents of its end and of its outputs back
through it. A segment may be cut into segments of its own: with sizes (n_1, ..., n_L) of product n, backward holds n_1 + ... + n_{L-1}
carries and what autodiff keeps of n_L steps, and every step is computed L times.

Saved: the carries at the starts of the outermost segments; the xs and what f closes over are arguments.

Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; Griewank and Walther, "Algorithm 799: Revolve", 2000.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jax.export import is_symbolic_dim
from jax.sharding import AxisType
from jaxtyping import PyTree

from layers.core import checks, compat
from layers.core.trees import is_inexact
from layers.recurrent.kept_carries import Step, keep_each

STEPS = "[0, 2147483647]"
"""How many steps there may be: XLA counts those of a loop in 32 bits."""


def checkpointed_scan(
    f: Step,
    init: PyTree,
    xs: PyTree = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
    *,
    budget: int | None = None,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan` whose backward pass holds about 2 √n steps at once, not n: it computes the others again.

    Args:
        f: `(carry, x) -> (carry, y)`. It may close over arrays, also over those of modules; they get their gradient.
        init: the first carry, any pytree; integers and keys pass through.
        xs: a pytree of arrays with the steps along axis 0, or None.
        length: the number of steps, where `xs` is None. Where it is symbolic (`jax.export`) this is `jax.lax.scan`.
        reverse: from the last step to the first.
        unroll: steps in one iteration of the innermost loop, as in `jax.lax.scan`.
        _split_transpose: taken because `jax.lax.scan` takes it, and used only where there is nothing to cut: backward is one loop over segments.
        budget: how many steps backward may hold at once, carries that are kept and steps that are being differentiated together; None for
            about 2 √n. With n or more it is `jax.lax.scan`; with fewer than 2 √n segments are cut again, and L cuts need about L n^(1/L) and
            compute every step L times.

    Returns:
        `(carry, ys)`, those of `jax.lax.scan`, of the same dtypes; a Python number in `init` is weakly typed, as there.

    Raises:
        ValueError: where `budget` is too small for any way to cut n steps, `length` is negative, or no number of steps is given.
        TypeError, ValueError: where `f`, `init` and `xs` do not fit, as `jax.lax.scan`.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    who = "checkpointed_scan"
    checks.function(who, "f", f)
    _check_leaves(who, init=init, xs=xs)
    reverse = checks.flag(who, "reverse", reverse)
    length = int(length) if isinstance(length, float) and length.is_integer() else length  # as `jax.lax.scan` takes it
    length, budget = checks.integer(who, "length", length, STEPS, optional=True), checks.integer(who, "budget", budget, "[1, inf)", optional=True)
    if not isinstance(unroll, bool):
        unroll = checks.integer(who, "unroll", unroll, "[1, inf)")
    shape = next(map(jnp.shape, jax.tree.leaves(xs)), (length,))
    steps = shape[0] if shape else None
    if steps is None:
        raise ValueError(f"{who}: xs has no axis of steps and length is not given, but there must be one of them")
    if is_symbolic_dim(steps):
        return lax.scan(f, init, xs, length, reverse, unroll, _split_transpose)
    with _named(who, "f, init and xs"):
        carry, ys = jax.eval_shape(partial(lax.scan, f, length=length, reverse=reverse), init, xs)
    sizes = segment_sizes(who, steps, budget)
    if not steps or not jax.tree.leaves((carry, ys)):
        return lax.scan(f, init, xs, length, reverse, unroll, _split_transpose)
    return _Cut(f, reverse, unroll)(_as_types(init, carry), jax.tree.map(jnp.asarray, xs), steps, sizes)


def checkpointed_while(
    cond_fun: Callable[[Any], Any], body_fun: Callable[[Any], Any], init_val: PyTree, *, max_steps: int, budget: int | None = None
) -> PyTree:
    """`jax.lax.while_loop` of at most `max_steps` steps, which reverse mode goes through, with about 2 √max_steps steps in memory.

    Steps and segments after the end are skipped. Under `jax.vmap` nothing is skipped, since elements end at different steps: each runs
    `max_steps` steps, and keeps its state from its end on.

    Args:
        cond_fun: `state -> bool`, whether there is another step.
        body_fun: `state -> state`. Both may close over arrays; those get their gradient.
        init_val: the first state, any pytree.
        max_steps: the loop ends after so many steps, also where `cond_fun` still holds: look at `cond_fun(result)` to see it.
        budget: as in `checkpointed_scan`, of `max_steps` steps.

    Returns:
        The last state.

    Raises:
        ValueError: where `max_steps` is negative, or `budget` is too small.
        TypeError: as `jax.lax.while_loop`.
    """
    who = "checkpointed_while"
    checks.function(who, "cond_fun", cond_fun)
    checks.function(who, "body_fun", body_fun)
    _check_leaves(who, init_val=init_val)
    max_steps, budget = checks.integer(who, "max_steps", max_steps, STEPS), checks.integer(who, "budget", budget, "[1, inf)", optional=True)
    with _named(who, "cond_fun, body_fun and init_val"):
        state = _as_types(init_val, jax.eval_shape(partial(lax.while_loop, cond_fun, body_fun), init_val))
    sizes = segment_sizes(who, max_steps, budget)
    if not max_steps or not jax.tree.leaves(state):
        return state

    def step(state: Any, _: None) -> tuple[Any, None]:
        going_on = cond_fun(state)
        return lax.cond(going_on, partial(_while_going_on, body_fun), lambda _, s: s, going_on, state), None

    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        state = compat.vary_like(state, lambda s: step(s, None)[0], jax.eval_shape(step, state, None))
    return _Cut(step, guard=cond_fun)(state, None, max_steps, sizes)[0]


def _while_going_on(body_fun: Callable[[Any], Any], going_on: Any, state: Any) -> Any:
    """`body_fun(state)`, all of whose gradients are 0 where `going_on` is not set.

    Under `jax.vmap` it is computed for elements that have ended as well, from a state for which it need not be defined: what comes back from there
    may be 0 times infinity. So whatever it depends on is held where it has ended; but for what devices share that end apart, which the jaxpr holds
    to be shared.
    """
    closed, shapes = jax.make_jaxpr(body_fun, return_shape=True)(state)
    apart = compat.varying_axes(jax.typeof(going_on))
    held = lambda x: is_inexact(x) and compat.varying_axes(jax.typeof(x)) >= apart
    hold = lambda x: jnp.where(going_on, x, lax.stop_gradient(x)) if held(x) else x
    outs = eval_jaxpr(closed.jaxpr, [hold(c) for c in closed.consts], *map(hold, jax.tree.leaves(state)))
    return jax.tree.unflatten(jax.tree.structure(shapes), outs)


@contextlib.contextmanager
def _named(who: str, what: str) -> Iterator[None]:
    """Says whose the errors are that JAX has for functions and values that do not fit."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):  # JAX's own, about a traced value
            raise
        raise type(error)(f"{who}: {what} do not fit: {error}") from error


def _check_leaves(who: str, **trees: Any) -> None:
    """Raises TypeError unless pytrees are of arrays, keys and numbers."""
    for what, tree in trees.items():
        for leaf in jax.tree.leaves(tree):
            if not hasattr(leaf, "dtype") or not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
                checks.array(who, what, leaf, "any")


def segment_sizes(name: str, steps: int, budget: int | None) -> tuple[int, ...]:
    """How often each level of segments is repeated, the outermost first: as few levels as `budget` allows, two without one."""
    if budget is None:
        return _two_levels(steps)
    levels = 1
    while sum(sizes := _balanced(steps, levels)) > budget:
        if max(sizes) <= 2:
            raise ValueError(f"{name}: budget is {budget}, but {steps} steps need at least {sum(sizes)}: give more, or None for about 2 √n")
        levels += 1
    return sizes


def _balanced(steps: int, levels: int) -> tuple[int, ...]:
    """About equal sizes whose product is at least `steps`, and `steps` itself where a near divisor allows it."""
    if levels == 1 or steps <= 1:
        return (steps,)
    segment = math.ceil(steps ** ((levels - 1) / levels) - 1e-9)
    count = -(-steps // segment)
    count = next((n for n in range(count, 2 * count) if steps % n == 0), count)
    return (count, *_balanced(-(-steps // count), levels - 1))


def _two_levels(steps: int) -> tuple[int, ...]:
    """Segments of the least memory, if autodiff keeps twice the carry of each step; of equal length where that costs little more."""
    cost = {k: -(-steps // k) + 2 * k for k in range(1, math.isqrt(steps) + 1)}
    if not cost:
        return (steps,)
    least = min(cost.values())
    even = [k for k, c in cost.items() if steps % k == 0 and c <= 1.1 * least]
    segment = min(even or cost, key=cost.__getitem__)
    return (-(-steps // segment), segment)


def _as_types(values: Any, types: Any) -> Any:
    """`values` as arrays of these dtypes, weakly typed where the types are."""
    return jax.tree.map(_as_type, values, types)


def _as_type(x: Any, t: Any) -> Any:
    if jax.dtypes.issubdtype(t.dtype, jax.dtypes.prng_key):
        return x
    array = jnp.asarray(x)
    return array if t.weak_type and array.dtype == t.dtype else jnp.asarray(x, t.dtype)


@dataclass(frozen=True)
class _Cut:
    """A scan in segments.

    Attributes:
        f: one step.
        reverse: from the last step to the first.
        unroll: of the innermost loop.
        guard: of a carry, whether anything is left to do; segments after that are skipped, and have no outputs.
    """

    f: Step
    reverse: bool = False
    unroll: int | bool = 1
    guard: Callable[[Any], Any] | None = None

    def __call__(self, carry: Any, xs: Any, steps: int, sizes: tuple[int, ...]) -> tuple[Any, Any]:
        """The last carry and the outputs of `steps` steps, cut into segments of these sizes."""
        if len(sizes) == 1:
            return lax.scan(self.f, carry, xs, steps, self.reverse, self.unroll)
        segment = -(-steps // sizes[0])
        full, rest = divmod(steps, segment)
        whole = jax.tree.map(lambda x: x[: full * segment].reshape(full, segment, *x.shape[1:]), xs)
        parts = [(segment, full, whole)]
        if rest:
            parts.append((rest, 1, jax.tree.map(lambda x: x[None, full * segment :], xs)))
        outs: list[Any] = []
        for length, count, rows in reversed(parts) if self.reverse else parts:
            carry, ys = keep_each(partial(self._segment, steps=length, sizes=sizes[1:]), carry, rows, count, reverse=self.reverse)
            outs.append(jax.tree.map(lambda y, n=length * count: y.reshape(n, *y.shape[2:]), ys))
        if self.reverse:
            outs.reverse()
        return carry, outs[0] if len(outs) == 1 else jax.tree.map(lambda *ys: jnp.concatenate(ys), *outs)

    def _segment(self, carry: Any, xs: Any, *, steps: int, sizes: tuple[int, ...]) -> tuple[Any, Any]:
        if self.guard is None:
            return self(carry, xs, steps, sizes)
        return lax.cond(self.guard(carry), lambda c: self(c, xs, steps, sizes)[0], lambda c: c, carry), None
