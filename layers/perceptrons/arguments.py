"""What the perceptrons ask of their arguments, and the options that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from layers.core import checks
from layers.core.elementwise import Activation, read_activation
from layers.core.numerics import is_known, with_offset
from layers.perceptrons.blocks import Hidden, Plan

SAVE = ("inputs", "preactivations")


class Options(NamedTuple):
    """Those of `mlp`, as they are given."""

    activation: Any
    save: Any
    dtype: Any
    block_size: Any
    norm_scale: Any
    epsilon: Any
    scale_offset: Any
    dropout_rate: Any
    dropout_key: Any


def plan(who: str, x: jax.Array, options: Options, hidden: Callable[[Activation], Hidden]) -> tuple[Any, Plan]:
    """The scale of the norm, where there is one, and how all is computed, `hidden` of the activation between the products."""
    scale, norm = _norm(who, x, options.norm_scale, options.epsilon, options.scale_offset)
    dropping = _dropping(who, options.dropout_rate, options.dropout_key)
    f = read_activation(who, options.activation)
    return scale, Plan(hidden(f), **_computation(who, options.save, options.block_size, options.dtype), **norm, **dropping)


def _computation(who: str, save: Any, block_size: Any, dtype: Any) -> dict[str, Any]:
    """What a plan holds of these."""
    keep = checks.choice(who, "save", save, SAVE) == "preactivations"
    block = checks.integer(who, "block_size", block_size, "[1, inf)", optional=True)
    return {"keep": keep, "block": block, "dtype": checks.dtype(who, "dtype", dtype)}


def _norm(who: str, x: jax.Array, scale: Any, epsilon: Any, scale_offset: Any) -> tuple[Any, dict[str, Any]]:
    """The scale of the norm, where there is one, and what a plan holds of it."""
    scale = checks.array(who, "norm_scale", scale, optional=True)
    checks.shape(who, "norm_scale", scale, x.shape[-1:], "(in_features,)", x=x)
    epsilon = checks.number(who, "epsilon", epsilon, "[0, inf)", traced=True)
    offset = checks.number(who, "scale_offset", scale_offset, traced=True)
    if scale is None and not is_known(offset, 0):
        raise ValueError(f"{who}: scale_offset is {offset}, but there is no norm_scale to add it to")
    scale, offset = with_offset(scale, offset)
    return scale, {"epsilon": epsilon, "scale_offset": offset}


def _dropping(who: str, rate: Any, key: Any) -> dict[str, Any]:
    """What a plan holds of these."""
    rate = checks.number(who, "dropout_rate", rate, "[0, 1]", traced=True)
    key = checks.key(who, "dropout_key", key, optional=True)
    if is_known(rate, 0):
        return {}
    if key is None:
        raise ValueError(f"{who}: dropout_rate is above 0, so give dropout_key, a key of jax.random")
    return {"rate": rate, "words": jax.random.key_data(key)}


def rows(who: str, x: Any) -> jax.Array:
    x = checks.array(who, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{who}: x is a scalar, but must have a last axis of features: x[None]")
    return x


def kernels(who: str, x: jax.Array, down_kernel: Any, fused: bool = False, **ups: Any) -> tuple[jax.Array, ...]:
    """The kernels to the hidden layer, and that from it; a fused one makes twice as many features."""
    down = checks.array(who, "down_kernel", down_kernel, ndim=2)
    hidden = len(down) * (2 if fused else 1)
    found = {what: checks.array(who, what, value) for what, value in ups.items()}
    for what, kernel in found.items():
        hint = f": transpose it, {what}.T" if kernel.shape == (hidden, x.shape[-1]) else ""
        size = "2 * hidden_features" if fused else "hidden_features"
        checks.shape(who, what, kernel, (x.shape[-1], hidden), f"(in_features, {size})", hint=hint, x=x, down_kernel=down)
    return *found.values(), down


def biases(who: str, sizes: dict[str, int], **given: Any) -> list[Any]:
    """Each None, or of its size."""
    found = {what: checks.array(who, what, value, optional=True) for what, value in given.items()}
    for what, bias in found.items():
        checks.shape(who, what, bias, (sizes[what],), "(out_features,)" if what == "down_bias" else "(hidden_features,)")
    return list(found.values())


def module(who: str, in_features: Any, hidden_features: Any, out_features: Any, **others: Any) -> tuple[int, int, int]:
    """The sizes of a perceptron; its other options are only looked at."""
    size = "[1, 2147483647]"
    ins, hidden = (checks.integer(who, k, v, size) for k, v in {"in_features": in_features, "hidden_features": hidden_features}.items())
    out = checks.integer(who, "out_features", out_features, size, optional=True)
    read_activation(who, others["activation"])
    _computation(who, others["save"], others["block_size"], others["dtype"])
    checks.flag(who, "use_bias", others["use_bias"])
    checks.dtype(who, "param_dtype", others["param_dtype"], optional=False)
    for what in ("kernel_init", "bias_init"):
        checks.function(who, what, others[what])
    return ins, hidden, ins if out is None else out
