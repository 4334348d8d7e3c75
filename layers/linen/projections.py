"""Flax's Linen layers that hold a matrix, with the backward pass of this library's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from layers.affine.linear import Linear as _Linear
from layers.embeddings.embed import Embed as _Embed
from layers.linen.twin import twin


class Dense(linen.Dense):
    """`flax.linen.Dense`: the same arguments, parameters and values, by `layers.linear`."""

    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        kernel = self.param("kernel", self.kernel_init, (jnp.shape(inputs)[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        product = self.dot_general_cls() if self.dot_general_cls is not None else self.dot_general or jax.lax.dot_general
        layer = twin(_Linear, self, kernel=kernel, bias=bias, dot_general=product, preferred_element_type=None)
        return layer(jnp.asarray(inputs))


class Embed(linen.Embed):
    """`flax.linen.Embed`: the same arguments, parameters and values, with `attend`; backward keeps the indices only."""

    def __call__(self, inputs: Any) -> Any:
        return twin(_Embed, self, embedding=jnp.asarray(self.embedding))(inputs)
