"""What one run of `forward` leaves behind: the record that `backward` and forward mode work from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxpr_as_fun

from layers.core import compat
from layers.core.recompute import no_barriers
from layers.core.trees import is_array
from layers.function.again import explained
from layers.function.arguments import Template, take_apart
from layers.function.call import Call
from layers.function.context import Context, restore, state_of
from layers.function.cotangents import assign
from layers.function.linearity import why_not_linear


@dataclass(frozen=True, eq=False)
class Record:
    """What the gradient of one call is computed from, its arrays apart.

    `pull` runs `backward`: from gradients of the outputs to gradients of the arrays. `push` is forward mode: from tangents of the arrays to tangents
    of the outputs.

    Attributes:
        call: the call.
        avals: the abstract values of its arrays: shape, dtype, sharding.
        differentiated: for each of them whether it is being differentiated.
        output: the output of `forward`, with its arrays taken out, to be filled in again.
        output_avals: the abstract values of these.
        differentiable: for each of these whether a gradient goes through it.
        state: what the context keeps, with its arrays, the residuals, taken out.
        materialize: whether a gradient that is absent reaches `backward` as zeros, not None.
        shared: for each of the outputs the manual mesh axes (`shard_map`) along which the devices compute the same from what they share, while other
            arrays of the call differ there: its gradient enters on one device only, or the sum over the devices would count it on each.
    """

    call: Call
    avals: tuple[Any, ...]
    differentiated: tuple[bool, ...]
    output: Template
    output_avals: tuple[Any, ...]
    differentiable: tuple[bool, ...]
    state: Template
    materialize: bool
    shared: tuple[tuple[str, ...], ...]

    def context(self, residuals: Sequence[Any], *, in_jvp: bool = False) -> Context:
        needs = self.call.needs(self.differentiated)
        return restore(self.call.name, needs, self.materialize, self.state.fill(residuals), in_jvp=in_jvp)

    def grads(self, residuals: Sequence[Any], cotangents: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
        """Runs `backward`. `cotangents`: one for each array of the output, or None. Returns one for each array of the call."""
        cls, name = self.call.cls, self.call.name
        if not cls._has_backward():
            raise NotImplementedError(f"{name} has no backward rule: write `backward(ctx, *grad_outputs)` as a static method")
        given = [self._entering(*x) for x in zip(cotangents, self.output_avals, self.shared, strict=True)]
        by_output = self._tops_of(given)
        with jax.named_scope(f"{name}.backward"):
            try:
                grads = self._run_backward((residuals, by_output))
            except Exception as error:
                better = error if self.once else explained(name, error, self._run_backward, (residuals, by_output))
                if better is error:
                    raise
                raise better from error
            return assign(name, grads, self.call.arguments, self.avals, wanted)

    def _run_backward(self, arrays: tuple[Sequence[Any], list[Any]]) -> Any:
        cls, ctx = self.call.cls, self.context(arrays[0])
        return cls.backward(ctx, arrays[1]) if cls.boxed_grads_call else cls.backward(ctx, *arrays[1])

    @property
    def once(self) -> bool:
        """Whether `backward` refuses to be differentiated."""
        return hasattr(self.call.cls.backward, "once_differentiable")

    def _entering(self, cotangent: Any, aval: Any, shared: tuple[str, ...]) -> Any:
        if cotangent is not None:
            return compat.on_first_device(cotangent, shared)
        return compat.zeros(aval) if self.materialize and not compat.is_key(aval) else None

    def pull(self, residuals: Sequence[Any], cotangents: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
        """Runs `backward`, the transpose of `push`.

        Args:
            residuals: the arrays of `state`.
            cotangents: one array, or None for zero, for each differentiable output.
            wanted: for each array that is being differentiated whether its gradient is needed.

        Returns:
            The gradient, or None for zero, of each array that is being differentiated.
        """
        given = iter(cotangents)
        full = [next(given) if d else None for d in self.differentiable]
        indices = [i for i, m in enumerate(self.differentiated) if m]
        chosen = dict(zip(indices, wanted, strict=True))
        grads = self.grads(residuals, full, [chosen.get(i, False) for i in range(len(self.avals))])
        return [grads[i] for i in indices]

    def push(self, residuals: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        """Forward mode: by the class's `jvp`, else by transposing `backward`.

        Args:
            residuals: the arrays of `state`.
            tangents: one array for each array that is being differentiated.

        Returns:
            One array for each differentiable output.
        """
        if self.call.cls._has_jvp():
            return self._push_by_jvp(residuals, tangents)
        wanted = (True,) * len(tangents)

        def pull(*cotangents: Any) -> list[Any]:
            grads = self.pull(residuals, cotangents, wanted)
            return [compat.zeros(jax.typeof(t)) if g is None else g for g, t in zip(grads, tangents, strict=True)]

        likes = [compat.zeros(compat.tangent_type(a)) for a, d in zip(self.output_avals, self.differentiable, strict=True) if d]
        try:
            with no_barriers():
                traced = jax.make_jaxpr(pull)(*likes)
                fault = why_not_linear(traced)
                if fault is None:
                    return list(jax.linear_transpose(jaxpr_as_fun(traced), *likes)(list(tangents)))
                raise ValueError(fault)
        except Exception as error:
            raise TypeError(
                f"{self.call.name} has no jvp rule, and forward mode cannot be derived from its backward: that is not linear in its gradient, "
                f"or uses an operation that JAX cannot transpose. Write `jvp(ctx, *tangents)` as a static method. ({type(error).__name__}: {error})"
            ) from error

    def _push_by_jvp(self, residuals: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        name = self.call.name
        ctx = self.context(residuals, in_jvp=True)
        given = iter(tangents)
        absent = [compat.zeros(a) if self.materialize and jnp.issubdtype(a.dtype, np.inexact) else None for a in self.avals]
        by_array = [next(given) if m else zero for m, zero in zip(self.differentiated, absent, strict=True)]
        by_argument = [t.fill_with_gaps(by_array, self.avals) for t in self.call.templates]
        with jax.named_scope(f"{name}.jvp"):
            outs = self.call.cls.jvp(ctx, *by_argument)
        tops = self._tops()
        outs = list(outs) if isinstance(outs, (tuple, list)) and self._returns_several() else [outs]
        if len(outs) != len(tops):
            raise ValueError(f"{name}.jvp returned {len(outs)} tangent(s), but forward has {len(tops)} output(s): return one for each")
        return _settle_tangents(name, tops, outs, self.output_avals, self.differentiable)

    def cotangents(self, grad_outputs: Sequence[Any]) -> list[Any]:
        """The gradients of the outputs, one for each array of the output."""
        name = self.call.name
        tops = self._tops()
        if len(grad_outputs) != len(tops):
            raise ValueError(f"{name}: forward returned {len(tops)} output(s), but {len(grad_outputs)} gradient(s) were given")
        flat: list[Any] = [None] * len(self.output_avals)
        for where, (top, grad) in enumerate(zip(tops, grad_outputs, strict=True)):
            leaves = top.skeleton().leaves_beside(grad)
            if leaves is None:
                raise ValueError(f"{name}: the gradient of output {where} must have its structure")
            for i, leaf in zip(top.skeleton().marks, leaves, strict=True):
                if leaf is None or not isinstance(i, int) or not self.differentiable[i]:
                    continue
                leaf = _as_dual(f"{name}: the gradient of output {where}", leaf, self.output_avals[i])
                if leaf.shape != self.output_avals[i].shape:
                    raise ValueError(f"{name}: output {where} has shape {self.output_avals[i].shape}, but its gradient has shape {leaf.shape}")
                flat[i] = leaf
        return flat

    def _returns_several(self) -> bool:
        kind = self.output.skeleton().kind
        return kind is not None and issubclass(kind, tuple)

    def _tops(self) -> list[Template]:
        """One template for each output of `forward`."""
        return self.output.children() if self._returns_several() else [self.output]

    def _tops_of(self, arrays: Sequence[Any]) -> list[Any]:
        """One entry for each output of `forward`, None for what is no array."""
        return [top.fill_with_gaps(arrays, self.output_avals) for top in self._tops()]


def _settle_tangents(name: str, tops: Sequence[Template], outs: Sequence[Any], avals: Sequence[Any], differentiable: Sequence[bool]) -> list[Any]:
    settled: list[Any] = [None] * len(avals)
    for where, (top, tangent) in enumerate(zip(tops, outs, strict=True)):
        leaves = top.skeleton().leaves_beside(tangent)
        if leaves is None:
            raise ValueError(
                f"{name}.jvp returned {jax.tree.structure(tangent)} as the tangent of output {where}: return the structure of that output"
            )
        for i, leaf in zip(top.skeleton().marks, leaves, strict=True):
            if leaf is None or not isinstance(i, int) or not differentiable[i]:
                continue
            leaf = _as_dual(f"{name}.jvp: the tangent of output {where}", leaf, avals[i])
            if leaf.shape != avals[i].shape:
                raise ValueError(f"{name}.jvp returned a tangent of shape {leaf.shape} for output {where} of shape {avals[i].shape}")
            settled[i] = compat.match_placement(leaf, avals[i])
    return [compat.zeros(a) if t is None else t for t, a, d in zip(settled, avals, differentiable, strict=True) if d]


def _as_dual(what: str, given: Any, aval: Any) -> jax.Array:
    """What is given for a value of type `aval` as an array of its dtype.

    Raises:
        TypeError: for what is no array, and for complex numbers for real ones.
    """
    if not (is_array(given) or isinstance(given, (int, float, complex))):
        raise TypeError(f"{what} is a {type(given).__name__}, but must be an array or None")
    given = jnp.asarray(given)
    if jnp.iscomplexobj(given) and not jnp.issubdtype(aval.dtype, jnp.complexfloating):
        raise TypeError(f"{what} is of dtype {given.dtype}, but that of a real output ({aval.dtype}) is real: take its real part")
    return given.astype(aval.dtype)


def make_record(call: Call, arrays: Sequence[Any], differentiated: Sequence[bool]) -> tuple[Record, list[Any], list[Any]]:
    """Runs `forward` and takes apart what it leaves. Returns the record, the arrays of the output and the residuals."""
    ctx, output = call.run(arrays, differentiated)
    engine = ctx._engine
    outputs: list[Any] = []
    output_template = take_apart(call.name, "an output", output, outputs)
    if not all(any(m is x for x in jax.tree.leaves(output)) for m in engine.non_differentiable):
        raise ValueError(
            f"{call.name}: mark_non_differentiable was given an array that forward does not return: mark the very object that it returns"
        )
    marked = [any(x is m for m in engine.non_differentiable) for x in outputs]
    residuals: list[Any] = []
    state = take_apart(call.name, "an attribute of ctx", state_of(ctx), residuals, call.constants)
    _name_residuals(call.name, arrays, outputs, residuals)
    avals = tuple(jax.typeof(x) for x in outputs)
    record = Record(
        call=call,
        avals=tuple(jax.typeof(x) for x in arrays),
        differentiated=tuple(differentiated),
        output=output_template,
        output_avals=avals,
        differentiable=tuple(jnp.issubdtype(a.dtype, np.inexact) and not m for a, m in zip(avals, marked, strict=True)),
        state=state,
        materialize=engine.materialize,
        shared=_shared_axes(call, arrays, avals),
    )
    return record, outputs, residuals


def _shared_axes(call: Call, arrays: Sequence[Any], output_avals: Sequence[Any]) -> tuple[tuple[str, ...], ...]:
    """For each output the mesh axes over which arrays of the call vary, but not those that it depends on."""
    axes = [compat.varying_axes(jax.typeof(x)) for x in arrays]
    missing = [frozenset().union(*axes) - compat.varying_axes(a) for a in output_avals]
    if not any(missing):
        return ((),) * len(output_avals)

    by_axis = {name: compat.depends_on(lambda *xs: call.outputs(xs)[0], arrays, [name in a for a in axes]) for name in frozenset().union(*missing)}
    return tuple(tuple(sorted(name for name in m if not by_axis[name][i])) for i, m in enumerate(missing))


def _name_residuals(name: str, arrays: Sequence[Any], outputs: list[Any], residuals: list[Any]) -> None:
    """Names what is saved beyond the inputs `Name.saved0`, `Name.saved1`, ..., for the policies of `jax.checkpoint`."""
    inputs = {id(x) for x in arrays}
    named: dict[int, Any] = {}
    for i, x in enumerate(residuals):
        if isinstance(x, compat.Tracer) and id(x) not in inputs and not compat.is_key(x):
            if id(x) not in named:
                named[id(x)] = checkpoint_name(x, f"{name}.saved{i}")
            residuals[i] = named[id(x)]
    outputs[:] = [named.get(id(x), x) for x in outputs]
