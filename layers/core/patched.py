"""Whether another library has taken over JAX's product of matrices, as those do that quantise a model or adapt it while it runs (qwix).

They mean the products of a model's own layers, and add parameters to them. A twin of a Flax layer leaves its products to Flax's code then: in a
rule of its own the new parameters would have no gradient.
"""

from __future__ import annotations

from jax import lax

_PRODUCT = lax.dot_general
_CODE = lax.dot_general.__code__


def products_are_patched() -> bool:
    """Whether `jax.lax.dot_general` is another function now than JAX's, by its name or by its code."""
    return lax.dot_general is not _PRODUCT or lax.dot_general.__code__ is not _CODE
