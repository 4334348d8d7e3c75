"""From what a backward rule returns to one cotangent for each array: counted, summed to shape, cast, placed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from layers.core import compat
from layers.core.context import is_array

NOT_AN_ARRAY = object()
"""Stands, in the structure of an argument, for a leaf that is no array."""


@dataclass(frozen=True)
class Argument:
    """One argument of `apply`.

    Attributes:
        name: the parameter of `forward` that it is bound to.
        tree: its value with each array replaced by its place among the arrays of the call, anything else by `NOT_AN_ARRAY`.
        places: the places that occur in `tree`.
        required: whether a gradient (or None) has to be returned for it; False for keyword-only arguments.
    """

    name: str
    tree: Any
    places: tuple[int, ...]
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
        if not argument.places:
            raise TypeError(f"{name}.backward returned a gradient for argument '{argument.name}', which is no array: return None there")
        if any(wanted[i] for i in argument.places):
            _assign(name, argument.name, argument.tree, grad, avals, wanted, out)
    return out


def _one_for_each(name: str, grads: Any, arguments: Sequence[Argument], wanted: Sequence[bool]) -> list[Any]:
    grads = list(grads) if isinstance(grads, (tuple, list)) else [grads]
    while len(grads) > len(arguments) and grads[-1] is None:
        grads.pop()
    missing = arguments[len(grads) :]
    if len(grads) > len(arguments) or any(a.required or any(wanted[i] for i in a.places) for a in missing):
        raise ValueError(
            f"{name}.backward returned {len(grads)} gradient(s), but forward was given {len(arguments)} argument(s) "
            f"({', '.join(a.name for a in arguments)}): return one for each, None where there is no gradient"
        )
    return grads + [None] * len(missing)


def _assign(name: str, where: str, tree: Any, grad: Any, avals: Sequence[Any], wanted: Sequence[bool], out: list[Any]) -> None:
    if grad is None:
        return
    if tree is not NOT_AN_ARRAY and compat.children(grad) is None:
        tree = _only_leaf(tree)
    if isinstance(tree, int):
        if wanted[tree]:
            out[tree] = settle(name, where, grad, avals[tree])
        return
    ours, theirs = compat.children(tree), compat.children(grad)
    if ours is None or theirs is None or len(ours[0]) != len(theirs[0]) or (isinstance(tree, dict) and ours[1] != theirs[1]):
        raise ValueError(
            f"{name}.backward returned {jax.tree.structure(grad)} as the gradient of argument '{where}', "
            f"which is {jax.tree.structure(tree)}: return the same structure, with None where there is no gradient"
        )
    keys = ours[1] if isinstance(tree, dict) else range(len(ours[0]))
    for key, sub, g in zip(keys, ours[0], theirs[0], strict=True):
        _assign(name, f"{where}[{key!r}]", sub, g, avals, wanted, out)


def _only_leaf(tree: Any) -> Any:
    """The leaf of a structure that has one, such as a `Param` around an array; else the structure."""
    leaves = jax.tree.leaves(tree)
    return leaves[0] if len(leaves) == 1 else tree


def settle(name: str, where: str, grad: Any, aval: Any) -> jax.Array:
    """One gradient as the cotangent of a value of type `aval`: summed to its shape, cast to its dtype, placed as it is.

    Raises:
        TypeError: for what is no array, and for a complex gradient of a real argument; ValueError: for a shape that does not sum to it.
    """
    if not (is_array(grad) or isinstance(grad, (int, float, complex))):
        raise TypeError(f"{name}.backward returned a {type(grad).__name__} as the gradient of argument '{where}': return an array or None")
    grad = jnp.asarray(grad)
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
