"""Enters the functions that operations hold, scans, loops, branches, rematerialised, jitted and mapped ones, and rewrites them too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.core import eval_jaxpr

from layers.core import compat
from layers.rewriting.constants import array_of
from layers.rewriting.evaluation import Program
from layers.rewriting.graph import Node, Value
from layers.rewriting.primitives import INLINED, REMAT

Enter = Callable[[Any, Sequence[Any], Mapping[int, Any], str, Sequence[int]], Program | None]
"""Rewrites a jaxpr, with its constants, what is known of its inputs, where it is and which inputs a loop carries; None where nothing matched."""


def enter(n: Node, rewritten: Enter) -> Callable[..., Sequence[Any]] | None:
    """How to run a node that holds functions, rewritten; None to leave it."""
    if n.name in REMAT:
        return _remat(n, rewritten)
    rule = {"scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map}.get(n.name, _jit if n.name in INLINED else None)
    return None if rule is None else rule(n, rewritten)


def _known(values: Sequence[Value]) -> dict[int, Any]:
    """Those of the values that are known, by place."""
    return {i: x for i, v in enumerate(values) if (x := array_of(v)) is not None}


def _closed(jaxpr: Any, rewritten: Enter, known: Mapping[int, Any], place: str, carried: Sequence[int] = ()) -> Program | None:
    return rewritten(compat.open_jaxpr(jaxpr), getattr(jaxpr, "consts", ()), known, place, carried)


def _plain(jaxpr: Any) -> Callable[..., Sequence[Any]]:
    return lambda *args: eval_jaxpr(compat.open_jaxpr(jaxpr), jaxpr.consts, *args)


def _scan(n: Node, rewritten: Enter) -> Callable[..., Sequence[Any]] | None:
    p = n.params
    consts, carried = compat.scan_counts(n.eqn)
    body = _closed(p["jaxpr"], rewritten, _known(n.inputs[:consts]), f"scan of {p['length']}", range(consts, consts + carried))
    if body is None:
        return None

    def run(*args: Any) -> Sequence[Any]:
        fixed, carry, xs = args[:consts], args[consts : consts + carried], args[consts + carried :]

        def step(carry: Any, x: Any) -> tuple[Any, Any]:
            outs = body(*fixed, *carry, *x)
            return tuple(outs[:carried]), tuple(outs[carried:])

        carry, ys = jax.lax.scan(step, tuple(carry), tuple(xs), length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
        return *carry, *ys

    return run


def _while(n: Node, rewritten: Enter) -> Callable[..., Sequence[Any]] | None:
    p = n.params
    of_cond, of_body = p["cond_nconsts"], p["body_nconsts"]
    body = _closed(p["body_jaxpr"], rewritten, _known(n.inputs[of_cond : of_cond + of_body]), "while")
    if body is None:
        return None
    cond = _plain(p["cond_jaxpr"])

    def run(*args: Any) -> Sequence[Any]:
        tested, fixed, carry = args[:of_cond], args[of_cond : of_cond + of_body], args[of_cond + of_body :]
        return jax.lax.while_loop(lambda c: cond(*tested, *c)[0], lambda c: tuple(body(*fixed, *c)), tuple(carry))

    return run


def _cond(n: Node, rewritten: Enter) -> Callable[..., Sequence[Any]] | None:
    known = _known(n.inputs[1:])
    branches = [(_closed(b, rewritten, known, "cond"), _plain(b)) for b in n.params["branches"]]
    if not any(new for new, _ in branches):
        return None
    choices = [lambda *args, run=new or plain: tuple(run(*args)) for new, plain in branches]
    return lambda index, *args: jax.lax.switch(index, choices, *args)


def _remat(n: Node, rewritten: Enter) -> Callable[..., Sequence[Any]] | None:
    body = _closed(n.params["jaxpr"], rewritten, _known(n.inputs), "remat")
    if body is None:
        return None
    run = lambda *args: tuple(body(*args))
    return jax.checkpoint(run, prevent_cse=n.params["prevent_cse"], policy=n.params["policy"])


def _jit(n: Node, rewritten: Enter) -> Callable[..., Sequence[Any]] | None:
    """A jitted call with shardings or donation of its own, which stay."""
    inner = n.params["jaxpr"]
    body = _closed(inner, rewritten, _known(n.inputs), "jit")
    if body is None:
        return None

    def run(*args: Any) -> Sequence[Any]:
        new = jax.make_jaxpr(lambda *a: tuple(body(*a)))(*(v.aval for v in body.graph.inputs))
        with n.eqn.ctx.manager:
            return n.eqn.primitive.bind(*args, **{**n.params, "jaxpr": new})

    return run


def _shard_map(n: Node, rewritten: Enter) -> Callable[..., Sequence[Any]] | None:
    """What each device does; values known outside are whole there, and so not known inside."""
    p = n.params
    body = _closed(p["jaxpr"], rewritten, {}, "shard_map")
    if body is None:
        return None
    options = {name: p[name] for name in ("mesh", "in_specs", "out_specs", "check_vma")}
    return jax.shard_map(lambda *args: tuple(body(*args)), axis_names=frozenset(p["newly_manual_axes"]), **options)
