"""What the modules share: linear maps by name, options, dropout between the maps, and the call that gives all of it to a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import nnx

from layers.perceptrons import arguments, drops
from layers.perceptrons.arguments import Options


class Perceptron(nnx.Module):
    """Linear maps to a hidden layer and one from it.

    Attributes:
        maps: the names of the maps, that from the hidden layer last.
        compute: `(who, x, *kernels, *biases, options)` to the output.
    """

    maps: ClassVar[tuple[str, ...]]
    compute: ClassVar[Callable[..., jax.Array]]
    up: nnx.Linear
    down: nnx.Linear

    def __init__(self, sizes: tuple[Any, Any, Any], parameters: dict[str, Any], options: dict[str, Any], dropout: tuple[Any, Any], rngs: nnx.Rngs):
        """
        Args:
            sizes: features of the input, of the hidden layer, and of the output or None.
            parameters: options of `flax.nnx.Linear`.
            options: those of the function that are kept: activation, save and block_size.
            dropout: rate and `deterministic`.
            rngs: where random numbers come from.
        """
        who = type(self).__name__
        in_features, hidden_features, out_features = arguments.module(who, *sizes, **parameters, **options)
        for name in self.maps[:-1]:
            setattr(self, name, nnx.Linear(in_features, hidden_features, **parameters, rngs=rngs))
        setattr(self, self.maps[-1], nnx.Linear(hidden_features, out_features, **parameters, rngs=rngs))
        self.dropout = drops.module(who, *dropout, rngs)
        self.activation, self.save = options["activation"], options["save"]
        self.block_size, self.dtype = options["block_size"], parameters["dtype"]

    def __call__(
        self,
        x: Any,
        norm_scale: Any = None,
        epsilon: float = 1e-6,
        scale_offset: float = 0.0,
        *,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> jax.Array:
        """`norm_scale`, `epsilon` and `scale_offset` as of `mlp`: with those of an `RMSNorm`, what the module gives of its output.

        deterministic, rngs: as of `flax.nnx.Dropout`.
        """
        who, maps = type(self).__name__, [getattr(self, name) for name in self.maps]
        kernels, biases = [m.kernel[...] for m in maps], [None if m.bias is None else m.bias[...] for m in maps]
        dropped = drops.rate_and_key(who, self.dropout, deterministic, rngs)
        options = Options(self.activation, self.save, self.dtype, self.block_size, norm_scale, epsilon, scale_offset, *dropped)
        return self.compute(who, x, *kernels, *biases, options)
