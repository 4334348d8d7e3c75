"""`Function`: a layer whose gradient is written by hand, after `torch.autograd.Function`.

A call of `apply` becomes one operation of JAX that holds both rules, by one of two engines (`engine_linear.py`, `engine_custom_vjp.py`). So a rule
written once serves `grad`, `vmap`, `scan`, `remat` and `shard_map`, and by the first also `jvp` and `hessian`, and no transformation can go past it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.core import checks, compat
from layers.core.trees import is_array
from layers.function import engine, engine_custom_vjp, engine_linear
from layers.function.arguments import take_apart
from layers.function.batching import VmapInfo
from layers.function.call import Call
from layers.function.closures import traced_names
from layers.function.context import Context, restore, state_of
from layers.function.record import make_record
from layers.function.tangent import refuse_second_derivative
from layers.function.tape import GradFn as GradFn

_ENGINES = {"linear": engine_linear.apply, "custom_vjp": engine_custom_vjp.apply}


class Function:
    """A differentiable function given by `forward` and `backward`.

    Subclass it, write both as static methods, and call `apply`:

    - `forward(ctx, *args)` computes the output and keeps on `ctx` what `backward` needs; or `forward(*args)` computes it and
      `setup_context(ctx, inputs, output)` keeps.
    - `backward(ctx, *grad_outputs)` gets one gradient for each output and returns one for each argument, or `None`.
    - `jvp(ctx, *tangents)`, if written, is forward mode; without it forward mode is derived from `backward`, by transposing it. Write one where that
      cannot be: where `backward` clips or compares its gradient, or calls what JAX does not transpose, such as a kernel or NumPy.
    - `vmap(info, in_dims, *args) -> (output, out_dims)`, if written, is how `forward` is batched (needs `setup_context`).

    Arrays (JAX's, NumPy's, traced ones) in the arguments are differentiated, also inside pytrees; anything else goes through untouched.
    Complex gradients follow JAX's convention, `jax.grad`, not the conjugate one of PyTorch.

    `ctx.needs_input_grad` has one flag for each argument of `apply`: whether a gradient with respect to it is being computed. Where it is False
    nothing need be saved for that gradient, and `backward` may return None. A `backward` that recomputes what `forward` had calls `barrier` first
    (`layers/core/recompute.py`): otherwise XLA finds that both compute the same, and keeps the value of `forward` in memory until `backward`.

    For `layers.check`, which holds a class to its contract, static methods say where:

    - `example(key, dtype)` returns the arguments of a small call, a tuple, whose axes differ in length and whose values have no symmetry.
    - `examples(key, dtype)` returns more of them by name, a dict: options that change the rule, and edges (no rows, 1e4, inf where it means
      something).
    - `surrogate(*args)` is the function in plain JAX whose gradient `backward` is meant to be, where that is on purpose not the derivative of
      `forward` (straight-through, reversed, clipped). It takes the arguments of `example` and returns the outputs that have a gradient.
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
        outputs, fill = _ENGINES[engine.current()](call, arrays)
        return fill(outputs)

    @classmethod
    def vjp(cls, *args: Any, **kwargs: Any) -> tuple[Any, GradFn]:
        """Calls `forward` and returns the output with its tape: PyTorch's `y` and `y.grad_fn`.

        Every floating-point or complex array among the arguments counts as needing its gradient.

        Returns:
            `(output, grad_fn)`; `grad_fn.apply(*grad_outputs)` runs `backward`.
        """
        _refuse_traced_closures(cls)
        call, arrays = Call.bind(cls, args, kwargs)
        differentiated = tuple(jnp.issubdtype(x.dtype, np.inexact) and i not in call.hoisted for i, x in enumerate(arrays))
        record, outputs, residuals = make_record(call, arrays, differentiated)
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


def _refuse_traced_closures(cls: type[Function]) -> None:
    for method in ("forward", "setup_context", "backward", "jvp"):
        names = traced_names(getattr(cls, method))
        if names:
            raise TypeError(
                f"{cls.__name__}.{method} closes over a traced array ({', '.join(names)}), which has no gradient there and may leak: "
                "pass it to apply as an argument"
            )


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
    """Marks a block or function that uses forward mode: `with layers.forward_mode():` or `@layers.forward_mode()`.

    By the engine "linear" (`layers.engine`) `jax.jvp`, `jax.jacfwd`, `jax.hessian`, `jax.linearize` go through every `Function` at all times, inside
    the block and out, compiled in one and called in the other. The block switches nothing; it is there to be read.
    """

    def __enter__(self) -> forward_mode:
        return self

    def __exit__(self, *_: object) -> None:
        return None
