"""`ctx`: what a `Function` remembers from its forward to its backward rule."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from layers.core.trees import is_array, is_number


class Context:
    """The first argument of `forward`, `setup_context`, `backward` and `jvp`: `torch`'s `ctx`.

    Any attribute may be set; arrays in it become residuals of the backward pass, all else stays as it is.

    Attributes:
        needs_input_grad: a tuple of bools, one an argument of `apply`: whether it is being differentiated.
    """

    needs_input_grad: tuple[bool, ...]

    def __init__(self, name: str, needs_input_grad: tuple[bool, ...]):
        self.__dict__["_engine"] = _Engine(name)
        self.__dict__["needs_input_grad"] = needs_input_grad

    def __setattr__(self, key: str, value: Any) -> None:
        if isinstance(getattr(type(self), key, None), property):
            raise AttributeError(f"{self._engine.name}: ctx.{key} is not writable; choose another attribute name")
        self.__dict__[key] = value

    def __getattr__(self, key: str) -> Any:
        raise AttributeError(f"{self.__dict__['_engine'].name}: ctx has no attribute '{key}': set it in forward, ctx.{key} = ...")

    def save_for_backward(self, *tensors: Any) -> None:
        """Keeps arrays, numbers, pytrees of them or `None` for `backward`. To be called once.

        Raises:
            TypeError: for anything that is not an array; such a value is kept as an attribute, `ctx.name = value`.
            RuntimeError: at a second call.
        """
        self._engine.saved = self._engine.keep("save_for_backward", self._engine.saved, tensors)

    def save_for_forward(self, *tensors: Any) -> None:
        """Keeps arrays for `jvp`, which otherwise sees those of `save_for_backward`."""
        self._engine.saved_for_jvp = self._engine.keep("save_for_forward", self._engine.saved_for_jvp, tensors)

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What `save_for_backward` kept, in its order."""
        engine = self._engine
        if not engine.readable:
            raise RuntimeError(f"{engine.name}: ctx.saved_tensors is for backward and jvp; in forward use the arrays themselves")
        if engine.in_jvp and engine.saved_for_jvp is not None:
            return engine.saved_for_jvp
        return engine.saved or ()

    @property
    def saved_variables(self) -> tuple[Any, ...]:
        warnings.warn("'saved_variables' is deprecated; use 'saved_tensors'", DeprecationWarning, stacklevel=2)
        return self.saved_tensors

    @property
    def requires_grad(self) -> bool:
        """Whether any argument is being differentiated."""
        return any(self.needs_input_grad)

    def mark_non_differentiable(self, *outputs: Any) -> None:
        """No gradient goes through these outputs of `forward` (the very objects that it returns)."""
        for i, x in enumerate(outputs):
            if not is_array(x):
                raise TypeError(
                    f"{self._engine.name}: mark_non_differentiable takes arrays that forward returns, but argument {i} is of type {type(x).__name__}"
                )
        self._engine.non_differentiable = outputs

    def set_materialize_grads(self, value: bool) -> None:
        """With `False`, the gradient of an output that nothing uses arrives in `backward` as `None`, not as zeros."""
        self._engine.materialize = bool(value)

    def mark_dirty(self, *_: Any) -> None:
        raise RuntimeError(
            f"{self._engine.name}: ctx.mark_dirty has no meaning in JAX, where arrays never change in place. "
            "Return the new value from forward, and use what apply returns in place of the input."
        )


class _Engine:
    """What `apply` reads back from a context."""

    def __init__(self, name: str):
        self.name = name
        self.saved: tuple[Any, ...] | None = None
        self.saved_for_jvp: tuple[Any, ...] | None = None
        self.non_differentiable: tuple[Any, ...] = ()
        self.materialize = True
        self.readable = False
        self.in_jvp = False
        self.flags: tuple[bool, ...] = ()

    def keep(self, method: str, before: tuple[Any, ...] | None, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        if before is not None:
            raise RuntimeError(f"{self.name}: ctx.{method} is called twice; pass everything to one call")
        for i, x in enumerate(tensors):
            for leaf in jax.tree.leaves(x):
                if not (is_array(leaf) or is_number(leaf)):
                    raise TypeError(
                        f"{self.name}: {method} can only save arrays, but argument {i} is of type {type(leaf).__name__}; "
                        "keep it as an attribute instead, ctx.name = value"
                    )
        return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), tensors)


def state_of(ctx: Context) -> tuple[Any, ...]:
    """Everything that a context keeps, as a pytree."""
    attributes = {k: v for k, v in ctx.__dict__.items() if k not in ("_engine", "needs_input_grad")}
    return (ctx._engine.saved, ctx._engine.saved_for_jvp, attributes)


def restore(name: str, needs: tuple[bool, ...], materialize: bool, state: tuple[Any, ...], *, in_jvp: bool = False) -> Context:
    """The context as `backward` or `jvp` sees it."""
    ctx = Context(name, needs)
    engine = ctx._engine
    engine.saved, engine.saved_for_jvp, attributes = state
    engine.materialize, engine.readable, engine.in_jvp = materialize, True, in_jvp
    ctx.__dict__.update(attributes)
    return ctx
