"""One call of `Function.apply`: its arguments bound to `forward`, their arrays apart."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from layers.core.trees import is_array
from layers.function.arguments import ArrayPlace, CallablePlace, Template, take_apart
from layers.function.batching import forward_with_vmap
from layers.function.context import Context
from layers.function.cotangents import Argument
from layers.function.structure import Skeleton


@functools.lru_cache(maxsize=512)
def _parameters(fn: Callable[..., Any], skip: int) -> tuple[inspect.Signature, list[str] | None]:
    """The signature of `fn` without `ctx`, and the names of its parameters if all are positional."""
    parameters = list(inspect.signature(fn).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        skip = 0
    signature = inspect.Signature(parameters[skip:])
    positional = all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    return signature, list(signature.parameters) if positional else None


class Call:
    """The arguments of one `apply` without their arrays, which are kept apart: a call outlives the trace that made them.

    Attributes:
        arguments: one entry an argument, for the gradients.
        hoisted: the indices of arrays that were taken from the closure of a function, and the name of the argument that this is.
        constants: NumPy's arrays of booleans and integers, as arrays of JAX that are not traced.
    """

    @staticmethod
    def bind(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, list[Any]]:
        """A call, and every array in its arguments, in order."""
        arrays: list[Any] = []
        return Call(function, args, kwargs, arrays), arrays

    def __init__(self, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arrays: list[Any]):
        self.cls = cls
        self.name: str = cls.__name__
        self.arguments: list[Argument] = []
        self.templates: list[Template] = []
        self.hoisted: dict[int, str] = {}
        self.constants: list[Any] = []
        split = cls._is_split()
        positional, keywords, names = _bind(cls, *_parameters(cls.forward, 0 if split else 1), args, kwargs, fill=split)
        self.positional_count = len(positional)
        self.keywords = tuple(keywords)
        for i, (name, value) in enumerate(zip(names, (*positional, *keywords.values()), strict=True)):
            self._add(name, value, arrays, required=i < len(positional))

    def _add(self, name: str, value: Any, arrays: list[Any], *, required: bool) -> None:
        if hasattr(value, "__jax_array__") and not is_array(value):
            value = value.__jax_array__()
        if isinstance(value, jax.Array):
            self.templates.append(Template(_LEAF, (ArrayPlace(len(arrays)),)))
            self.arguments.append(Argument(name, Skeleton(_LEAF, (len(arrays),)), (len(arrays),), required))
            arrays.append(value)
            return
        template = take_apart(self.name, f"argument '{name}'", value, arrays, self.constants)
        indices = tuple(x.start for x in template.leaves if isinstance(x, ArrayPlace))
        for x in template.leaves:
            if isinstance(x, CallablePlace):
                self.hoisted |= dict.fromkeys(range(x.start, x.stop), name)
        self.templates.append(template)
        self.arguments.append(Argument(name, template.skeleton(), indices, required))

    def values(self, arrays: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of `forward` with these arrays in them."""
        values = [t.fill(arrays) for t in self.templates]
        return values[: self.positional_count], dict(zip(self.keywords, values[self.positional_count :], strict=True))

    def needs(self, differentiated: Sequence[bool]) -> tuple[bool, ...]:
        """`needs_input_grad`, from which of the arrays are being differentiated."""
        return tuple(any(differentiated[i] for i in a.indices) for a in self.arguments)

    def run(self, arrays: Sequence[Any], differentiated: Sequence[bool]) -> tuple[Context, Any]:
        """Runs `forward` (and `setup_context`); returns its context and its output."""
        for place, name in self.hoisted.items():
            if differentiated[place]:
                raise TypeError(
                    f"{self.name}: argument '{name}' is a function that closes over an array which is being differentiated, and backward "
                    "cannot return a gradient for it. Pass that array to apply as an argument of its own."
                )
        ctx = Context(self.name, self.needs(differentiated))
        ctx._engine.flags = tuple(isinstance(x, ArrayPlace) and differentiated[x.start] for t in self.templates for x in t.leaves)
        args, kwargs = self.values(arrays)
        with jax.named_scope(self.name):
            if not self.cls._is_split():
                return ctx, self.cls.forward(ctx, *args, **kwargs)
            output = forward_with_vmap(self.cls, args, kwargs) if self.cls._has_vmap() else self.cls.forward(*args, **kwargs)
            self.cls.setup_context(ctx, (*args, *kwargs.values()), output)
            return ctx, output

    def outputs(self, arrays: Sequence[Any]) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
        """Runs `forward` where nothing is differentiated; returns the arrays of its output, and what makes the output of them."""
        outputs: list[Any] = []
        template = take_apart(self.name, "an output", self.run(arrays, (False,) * len(arrays))[1], outputs)
        return outputs, template.fill


_LEAF = jax.tree.structure(0)


def _where_is_ctx(cls: Any) -> str:
    """What may be wrong with `forward` where arguments do not fit it."""
    first = next(iter(inspect.signature(cls.forward).parameters), "ctx")
    if cls._is_split() or first == "ctx":
        return ""
    return f" after its first parameter, '{first}', which is the context: is `ctx` missing, forward(ctx, {first}, ...)?"


def _bind(
    cls: Any, signature: inspect.Signature, positional: list[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, fill: bool
) -> tuple[list[Any], dict[str, Any], list[str]]:
    """Positional values, keyword-only values and the names of both, as `forward` will get them."""
    name = cls.__name__
    if positional is not None and not kwargs and len(args) == len(positional):
        return list(args), {}, positional
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}.apply: {error}; forward takes {signature}{_where_is_ctx(cls)}") from None
    by_name = [k for k in kwargs if k in signature.parameters and signature.parameters[k].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if fill or len(bound.args) < len(args) + len(by_name):
        bound.apply_defaults()
    names: list[str] = []
    for key, parameter in signature.parameters.items():
        if key not in bound.arguments:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{key}[{i}]" for i in range(len(bound.arguments[key]))]
        elif parameter.kind is parameter.VAR_KEYWORD:
            names += list(bound.arguments[key])
        else:
            names.append(key)
    return list(bound.args), bound.kwargs, names
