"""What linear layers whose products are of 8-bit numbers share: what they ask of their arguments, and their module."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax

from layers.core import checks

_DEFAULTS: dict[str, Any] = {"precision": None, "dot_general": lax.dot_general, "preferred_element_type": None}


def check_linear(who: str, x: Any, kernel: Any, bias: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """x, kernel and bias as arrays that fit."""
    x = checks.array(who, "x", x)
    kernel = checks.array(who, "kernel", kernel)
    bias = checks.array(who, "bias", bias, optional=True)
    if kernel.ndim != 2 or x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(f"{who}: kernel has shape {kernel.shape}, but must be (in_features, out_features) with the last axis of x (x: {x.shape})")
    checks.shape(who, "bias", bias, kernel.shape[1:], "(out_features,)", kernel=kernel)
    return x, kernel, bias


def like_linear(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor `(self, *args, own=..., **options)` that shows the arguments of `nnx.Linear` and its own."""
    flax, own = (list(inspect.signature(fn).parameters.values()) for fn in (nnx.Linear.__init__, init))
    own = [p for p in own if p.kind is p.KEYWORD_ONLY]
    setattr(init, "__signature__", inspect.Signature([*flax, *own]))  # noqa: B010
    return init


_OF_NO_USE = "is of no use, the products are of 8-bit numbers"


class NarrowLinear(nnx.Linear):
    """`flax.nnx.Linear` with its parameters, whose products are of other numbers."""

    def _check_and_make(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        who = type(self).__name__
        given = checks.arguments(who, nnx.Linear.__init__, (self, *args), options)
        given.pop("self")
        for what in ("in_features", "out_features"):
            given[what] = checks.integer(who, what, given[what], "[1, 2147483647]")
        given["use_bias"] = checks.flag(who, "use_bias", given["use_bias"])
        checks.dtype(who, "dtype", given["dtype"])
        checks.dtype(who, "param_dtype", given["param_dtype"], optional=False)
        for what, default in _DEFAULTS.items():
            if given.get(what, default) is not default:
                raise ValueError(f"{who}: {what} {_OF_NO_USE}; leave it out, or use Linear")
        nnx.Linear.__init__(self, **given)

    def _operands(self, inputs: Any, out_sharding: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """x, kernel and bias in the dtype of the layer."""
        who = type(self).__name__
        if out_sharding is not None:
            raise ValueError(f"{who}: out_sharding is not served; use jax.sharding.reshard on the output")
        inputs = checks.array(who, "inputs", inputs)
        if inputs.ndim < 1 or inputs.shape[-1] != self.in_features:
            raise ValueError(f"{who}: inputs has shape {inputs.shape}, but its last axis must be in_features = {self.in_features}")
        bias = None if self.bias is None else self.bias[...]
        return self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)

    @staticmethod
    def own_options(layer: nnx.Linear) -> str:
        """Which option of a Flax layer could not be followed; empty where all can."""
        return next((f"its {what} {_OF_NO_USE}" for what, default in _DEFAULTS.items() if getattr(layer, what, default) is not default), "")
