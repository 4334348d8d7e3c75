"""From what a backward rule returns to one cotangent for each array: counted, summed to shape, cast, placed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from layers.core import compat
from layers.core.trees import is_array
from layers.function.structure import Skeleton

NOT_AN_ARRAY = object()
"""Stands, in the structure of an argument, for a leaf that is no array and no number."""

CONSTANT = object()
"""Stands, in the structure of an argument, for a leaf without a cotangent whose gradient may be returned, and is dropped: a number, a NumPy mask."""


@dataclass(frozen=True)
class Argument:
    """One argument of `apply`.

    Attributes:
        name: the parameter of `forward` that it is bound to.
        tree: its structure, marked with the place of each array among those of the call, anything else with `CONSTANT` or `NOT_AN_ARRAY`.
        indices: the indices of arrays that occur there.
        required: whether a gradient (or None) has to be returned for it; False for keyword-only arguments.
    """

    name: str
    tree: Skeleton
    indices: tuple[int, ...]
    required: bool = True


def assign(name: str, grads: Any, arguments: Sequence[Argument], avals: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """The cotangent of each array of a call, None for zero, from what `backward` returned.

    Args:
        name: the class, for messages.
        grads: what `backward` returned.
        arguments: the arguments of the call.
        avals: the type of each array of the call.
        wanted: for each array whether its cotangent is wanted; a gradient that is not is dropped unseen.

    Raises:
        ValueError: for a wrong number of gradients, a structure or a shape that does not fit.
        TypeError: for a gradient that is no array, or one for an argument that is none.
    """
    out: list[Any] = [None] * len(avals)
    for argument, grad in zip(arguments, _one_for_each(name, grads, arguments, wanted), strict=True):
        if grad is None:
            continue
        if all(mark is NOT_AN_ARRAY for mark in argument.tree.marks):
            raise TypeError(f"{name}.backward returned a gradient for argument '{argument.name}', which is no array: return None there")
        if not argument.indices or any(wanted[i] for i in argument.indices):
            _assign(name, argument.name, argument.tree, grad, avals, wanted, out)
    return out


def _one_for_each(name: str, grads: Any, arguments: Sequence[Argument], wanted: Sequence[bool]) -> list[Any]:
    if len(arguments) == 1 and arguments[0].tree.is_made_like(grads):
        return [grads]
    grads = list(grads) if isinstance(grads, (tuple, list)) else [grads]
    while len(grads) > len(arguments) and grads[-1] is None:
        grads.pop()
    missing = arguments[len(grads) :]
    if len(grads) > len(arguments) or any(a.required or any(wanted[i] for i in a.indices) for a in missing):
        raise ValueError(
            f"{name}.backward returned {len(grads)} gradient(s), but forward was given {len(arguments)} argument(s) "
            f"({', '.join(a.name for a in arguments)}): return one for each, None where there is no gradient"
        )
    return grads + [None] * len(missing)


def _assign(name: str, where: str, tree: Skeleton, grad: Any, avals: Sequence[Any], wanted: Sequence[bool], out: list[Any]) -> None:
    if grad is None:
        return
    if len(tree.marks) == 1 and compat.children(grad) is None:  # also the one leaf of a node, such as the array in a `Param`
        _assign_leaf(name, where, tree.marks[0], grad, avals, wanted, out)
        return
    parts = tree.parts_beside(grad)
    if tree.is_leaf:
        _assign_leaf(name, where, tree.marks[0], grad, avals, wanted, out)
    elif parts is None:
        raise ValueError(
            f"{name}.backward returned {jax.tree.structure(grad)} as the gradient of argument '{where}', "
            f"which is {tree}: return the same structure, with None where there is no gradient"
        )
    else:
        for key, (part, g) in zip(tree.keys(), parts, strict=True):
            _assign(name, f"{where}[{key!r}]", part, g, avals, wanted, out)


def _assign_leaf(name: str, where: str, mark: Any, grad: Any, avals: Sequence[Any], wanted: Sequence[bool], out: list[Any]) -> None:
    if isinstance(mark, int):
        if wanted[mark]:
            out[mark] = settle(name, where, grad, avals[mark])
    elif mark is CONSTANT:
        _as_array(name, where, grad)
    else:
        raise TypeError(f"{name}.backward returned a gradient for '{where}', which is no array: return None there")


def settle(name: str, where: str, grad: Any, aval: Any) -> jax.Array:
    """One gradient as the cotangent of a value of type `aval`: summed to its shape, cast to its dtype, placed as it is.

    Raises:
        TypeError: for what is no array, and for a complex gradient of a real argument; ValueError: for a shape that does not sum to it.
    """
    grad = _as_array(name, where, grad)
    if jnp.iscomplexobj(grad) and not jnp.issubdtype(aval.dtype, jnp.complexfloating):
        raise TypeError(
            f"{name}.backward returned a {grad.dtype} gradient for argument '{where}' of dtype {aval.dtype}: "
            "the gradient of a real argument is real; take its real part"
        )
    if grad.shape != aval.shape:
        grad = _sum_to(name, where, grad, aval.shape)
    if grad.dtype != aval.dtype:
        grad = grad.astype(aval.dtype)
    return compat.match_placement(grad, aval)


def _as_array(name: str, where: str, grad: Any) -> jax.Array:
    if not (is_array(grad) or isinstance(grad, (int, float, complex))):
        raise TypeError(f"{name}.backward returned a {type(grad).__name__} as the gradient of argument '{where}': return an array or None")
    return jnp.asarray(grad)


def _sum_to(name: str, where: str, grad: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    lead = grad.ndim - len(shape)
    if lead < 0 or any(n not in (1, m) for m, n in zip(grad.shape[lead:], shape, strict=True)):
        raise ValueError(
            f"{name}.backward returned a gradient of shape {grad.shape} for argument '{where}' of shape {shape}: "
            "it must have that shape, or one that sums to it over broadcast axes"
        )
    stretched = tuple(i for i, (m, n) in enumerate(zip(grad.shape[lead:], shape, strict=True)) if m != n)
    grad = grad.sum(tuple(range(lead))) if lead else grad
    return grad.sum(stretched, keepdims=True) if stretched else grad
