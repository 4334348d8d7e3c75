"""`Function`: a layer whose gradient is written by hand, after `torch.autograd.Function`.

A call of `apply` becomes one `jax.custom_jvp`, whose tangent is a linear operation with a transpose of its own
(`core/tangent.py`): transposed, by reverse mode, it runs `backward`; evaluated, by forward mode, it runs the class's `jvp`, or else
the transpose of `backward`, which is the same linear map read the other way. So a rule written once serves `grad`, `jvp`,
`hessian`, `vmap`, `scan`, `remat` and `shard_map`, and no transformation can go past it.

What `forward` saves are operands of that operation. Their number and kind may depend on `needs_input_grad` freely: each
differentiation of a call site has its own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.core import checks, compat
from layers.core.again import recorded
from layers.core.arguments import take_apart
from layers.core.batching import VmapInfo
from layers.core.call import Call
from layers.core.closures import traced_names
from layers.core.context import Context, is_array, restore, state_of
from layers.core.record import Record, make_record
from layers.core.tangent import TangentMap, refuse_second_derivative


class Function:
    """A differentiable function given by `forward` and `backward`.

    Subclass it, write both as static methods, and call `apply`:

    - `forward(ctx, *args)` computes the output and keeps on `ctx` what `backward` needs; or `forward(*args)` computes it and
      `setup_context(ctx, inputs, output)` keeps.
    - `backward(ctx, *grad_outputs)` gets one gradient for each output and returns one for each argument, or `None`.
    - `jvp(ctx, *tangents)`, if written, is forward mode; without it forward mode is derived from `backward`.
    - `vmap(info, in_dims, *args) -> (output, out_dims)`, if written, is how `forward` is batched (needs `setup_context`).

    Arrays (JAX's, NumPy's, traced ones) in the arguments are differentiated, also inside pytrees; anything else goes through untouched.
    Complex gradients follow JAX's convention, `jax.grad`, not the conjugate one of PyTorch.
    """

    generate_vmap_rule = False
    boxed_grads_call = False

    def __init__(self, *_: Any, **__: Any):
        raise TypeError(f"{type(self).__name__} is not instantiated: its methods are static; call {type(self).__name__}.apply(...)")

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "vjp" in own:
            if "backward" in own:
                raise TypeError(f"{cls.__name__}: 'vjp' is another name for 'backward'; write one of them")
            cls.backward = own["vjp"]
            del cls.vjp
        for method in ("forward", "backward", "setup_context", "jvp", "vmap"):
            if method in own and callable(own[method]) and not isinstance(own[method], (staticmethod, classmethod)):
                raise TypeError(f"{cls.__name__}.{method} must be a static method: put @staticmethod above it")
        if "vmap" in own and cls.generate_vmap_rule:
            raise TypeError(f"{cls.__name__} has both generate_vmap_rule=True and a vmap method; keep one")
        if cls._has_vmap() and not cls._is_split():
            raise TypeError(f"{cls.__name__}.vmap needs the split form: forward(*args) and setup_context(ctx, inputs, output)")

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Any:
        """Computes the output. To be written."""
        raise NotImplementedError("write `forward(ctx, *args)` as a static method of your Function")

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps on `ctx` what `backward` needs, where `forward` takes no `ctx`."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx: Context, *grad_outputs: Any) -> Any:
        """One gradient an argument, from one an output. To be written."""
        raise NotImplementedError("write `backward(ctx, *grad_outputs)` as a static method of your Function")

    @staticmethod
    def jvp(ctx: Context, *tangents: Any) -> Any:
        """One tangent an output, from one an argument."""
        raise NotImplementedError

    @staticmethod
    def vmap(info: VmapInfo, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """The output of `forward` for a batch of arguments, and its batch axes."""
        raise NotImplementedError

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Calls `forward`, differentiable by `backward`.

        Args:
            *args, **kwargs: the arguments of `forward`, after `ctx`.

        Returns:
            What `forward` returns.

        Raises:
            TypeError: where `forward` or `backward` closes over a traced array, or an argument hides one.
        """
        _refuse_traced_closures(cls)
        call, arrays = Call.bind(cls, args, kwargs)
        if not any(isinstance(x, compat.Tracer) for x in arrays):
            return call.run(arrays, (False,) * len(arrays))[1]
        outputs, fill = cls._apply(call, arrays)
        return fill(outputs)

    @classmethod
    def _apply(cls, call: Call, arrays: Sequence[Any]) -> tuple[list[Any], Callable[[list[Any]], Any]]:
        """The arrays of the output, differentiable by the rule, and what makes the output of them."""
        filled: list[Callable[[list[Any]], Any]] = []

        def primal(*arrays: Any) -> list[Any]:
            outputs: list[Any] = []
            template = take_apart(call.name, "an output", call.run(arrays, (False,) * len(arrays))[1], outputs)
            filled[:] = [template.fill]
            return outputs

        def linearize(primals: Sequence[Any], moving: tuple[bool, ...]) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
            primals = tuple(x if is_array(x) else jnp.asarray(x) for x in primals)  # a number that is differentiated arrives as such
            record, outputs, residuals = recorded(call.name, primals, lambda xs: make_record(call, xs, moving), lambda: cls._apply(call, primals)[0])
            filled[:] = [record.output.fill]
            return outputs, functools.partial(_tangents, record, residuals)

        def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
            outputs, push = linearize(primals, tuple(not isinstance(t, compat.SymbolicZero) for t in tangents))
            return outputs, push([t for t in tangents if not isinstance(t, compat.SymbolicZero)])

        outputs = compat.linearized(arrays, linearize)
        if outputs is not None:
            return outputs, filled[0]
        primal.__name__ = primal.__qualname__ = call.name
        primal.__signature__ = _ANY_ARRAYS  # type: ignore[attr-defined]  # JAX asks for it at each call, and to work it out takes long
        rule.__signature__ = _PRIMALS_AND_TANGENTS  # type: ignore[attr-defined]
        f = jax.custom_jvp(primal)
        f.defjvp(rule, symbolic_zeros=True)
        outputs = f(*arrays)
        return outputs, filled[0]

    @classmethod
    def vjp(cls, *args: Any, **kwargs: Any) -> tuple[Any, GradFn]:
        """Calls `forward` and returns the output with its tape: PyTorch's `y` and `y.grad_fn`.

        Every floating-point or complex array among the arguments counts as needing its gradient.

        Returns:
            `(output, grad_fn)`; `grad_fn.apply(*grad_outputs)` runs `backward`.
        """
        _refuse_traced_closures(cls)
        call, arrays = Call.bind(cls, args, kwargs)
        moving = tuple(jnp.issubdtype(x.dtype, np.inexact) and i not in call.hoisted for i, x in enumerate(arrays))
        record, outputs, residuals = make_record(call, arrays, moving)
        return record.output.fill(outputs), GradFn(record, residuals)

    @classmethod
    def _is_split(cls) -> bool:
        return cls.setup_context is not Function.setup_context

    @classmethod
    def _has_backward(cls) -> bool:
        return cls.backward is not Function.backward

    @classmethod
    def _has_jvp(cls) -> bool:
        return cls.jvp is not Function.jvp

    @classmethod
    def _has_vmap(cls) -> bool:
        return cls.vmap is not Function.vmap


_ANY_ARRAYS = inspect.Signature([inspect.Parameter("arrays", inspect.Parameter.VAR_POSITIONAL)])
_PRIMALS_AND_TANGENTS = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("primals", "tangents")])


def _tangents(record: Record, residuals: list[Any], moving: list[Any]) -> list[Any]:
    """The tangent of every array that `forward` returns, by the linear operation that `backward` transposes."""
    avals = [compat.tangent_type(a) for a in record.output_avals]
    if not moving or not any(record.differentiable):
        return [compat.SymbolicZero(a) for a in avals]
    tangent_map = TangentMap(
        name=record.call.name,
        residual_count=len(residuals),
        out_avals=tuple(a for a, d in zip(avals, record.differentiable, strict=True) if d),
        push=record.push,
        pull=record.pull,
        once=not record.call.cls._has_jvp() and record.once,
    )
    given = iter(tangent_map(residuals, moving))
    return [next(given) if d else compat.SymbolicZero(a) for a, d in zip(avals, record.differentiable, strict=True)]


def _refuse_traced_closures(cls: type[Function]) -> None:
    for method in ("forward", "setup_context", "backward", "jvp"):
        names = traced_names(getattr(cls, method))
        if names:
            raise TypeError(
                f"{cls.__name__}.{method} closes over a traced array ({', '.join(names)}), which has no gradient there and may leak: "
                "pass it to apply as an argument"
            )


@jax.tree_util.register_pytree_node_class
class GradFn:
    """The tape of one call of `Function.vjp`: PyTorch's `y.grad_fn`. A pytree of the arrays that were saved."""

    def __init__(self, record: Record, residuals: list[Any]):
        self._record, self._residuals = record, residuals

    def apply(self, *grad_outputs: Any) -> tuple[Any, ...]:
        """Runs `backward`.

        Args:
            *grad_outputs: one gradient for each output of `forward`, of its shape and structure; `None` for zero.

        Returns:
            A tuple with one gradient for each argument, `None` where there is none.

        Raises:
            ValueError: for a wrong number of gradients or a shape that is not the output's.
        """
        record = self._record
        cotangents = record.cotangents(grad_outputs)
        wanted = record.moving
        grads = record.grads(self._residuals, cotangents, wanted)
        arguments = zip(record.call.arguments, record.call.templates, strict=True)
        return tuple(t.fill_with_gaps(grads, record.avals) if any(grads[i] is not None for i in a.places) else None for a, t in arguments)

    __call__ = apply

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What `forward` saved for `backward`."""
        return self._record.context(self._residuals).saved_tensors

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        """One flag for each argument."""
        return self._record.call.needs(self._record.moving)

    def name(self) -> str:
        """The name of the node, `<class>Backward`."""
        return f"{self._record.call.name}Backward"

    def __repr__(self) -> str:
        return f"<{self.name()}>"

    def tree_flatten(self) -> tuple[tuple[list[Any]], Record]:
        return (self._residuals,), self._record

    @classmethod
    def tree_unflatten(cls, record: Record, children: tuple[list[Any]]) -> GradFn:
        return cls(record, children[0])


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a `backward` whose own operations are not to be differentiated: doing so is an error.

    Write it under `@staticmethod`, as in PyTorch.
    """

    backward = checks.function("once_differentiable", "backward", backward)

    @functools.wraps(backward)
    def wrapper(ctx: Context, *grad_outputs: Any) -> Any:
        name, needs, materialize = ctx._engine.name, ctx.needs_input_grad, ctx._engine.materialize  # the rest of ctx holds arrays
        arrays: list[Any] = []
        known = [x for x in jax.tree.leaves((state_of(ctx), grad_outputs)) if is_array(x) and not isinstance(x, compat.Tracer)]
        template = take_apart(name, "an attribute of ctx", (state_of(ctx), grad_outputs), arrays, known)
        filled: list[Callable[[list[Any]], Any]] = []

        def run(*arrays: Any) -> list[Any]:
            state, gs = template.fill(arrays)
            grads = backward(restore(name, needs, materialize, state), *gs)
            out: list[Any] = []
            filled[:] = [take_apart(name, "a gradient", grads, out).fill]
            return out

        def refuse(*_: Any) -> Any:
            refuse_second_derivative(name)

        once = jax.custom_jvp(run)
        once.defjvp(refuse)
        outs = once(*arrays)
        return filled[0](outs)

    wrapper.once_differentiable = True  # type: ignore[attr-defined]
    return wrapper


class forward_mode(contextlib.ContextDecorator):
    """A block or function that uses forward mode: `with layers.forward_mode():` or `@layers.forward_mode()`.

    `jax.jvp`, `jax.jacfwd`, `jax.hessian`, `jax.linearize` go through every `Function` at all times, inside the block and out, compiled
    in one and called in the other. The block switches nothing; it is there to be read.
    """

    def __enter__(self) -> forward_mode:
        return self

    def __exit__(self, *_: object) -> None:
        return None
