"""A codebook that is the moving average of the vectors that choose its codes.

With n_k vectors of sum m_k nearest to code k,

    N_k <- decay N_k + (1 - decay) n_k,   M_k <- decay M_k + (1 - decay) m_k,   e_k = M_k / Ñ_k,   Ñ_k = (N_k + epsilon) ΣN / (ΣN + K epsilon)

A batch may be padded, and lie over the devices of a mapped axis.

Reference: van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning", 2017, appendix A.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from layers.core.numerics import safe_reciprocal
from layers.quantization.codebook import code_sums, without_padding


@dataclass(frozen=True)
class MovingAverage:
    """How a codebook moves.

    Attributes:
        decay, epsilon: as in the formula.
        dead_below: a code with N_k below it becomes a vector of the batch; 0 leaves dead codes.
        axis_name: a mapped axis over which the sums go too, or None.
    """

    decay: float
    epsilon: float
    dead_below: float
    axis_name: str | None

    def step(
        self, size: jax.Array, total: jax.Array, rows: jax.Array, indices: jax.Array, key: jax.Array | None, *, masked: bool
    ) -> tuple[jax.Array, jax.Array]:
        """N and M after a batch; as they were where all of it is padding.

        Args:
            size, total: N and M.
            rows: (rows, features).
            indices: (rows,), of their codes, -1 for padding.
            key: for dead codes.
            masked: whether there may be padding.
        """
        real = indices >= 0 if masked else None
        rows = without_padding(rows, indices) if masked else rows
        blend = lambda old, new: self.decay * old + (1 - self.decay) * self._everywhere(new).astype(old.dtype)
        new_size = blend(size, code_sums((indices >= 0).astype(jnp.float32), indices, len(size)))
        new_total = blend(total, code_sums(rows, indices, len(size)))
        if key is not None:
            dead, fresh = new_size < self.dead_below, self.fresh
            drawn = draw_rows(key, rows, len(size), real, self.axis_name).astype(total.dtype)
            new_size, new_total = jnp.where(dead, fresh, new_size), jnp.where(dead[:, None], fresh * drawn, new_total)
        if real is None:
            return new_size, new_total
        some = self._everywhere(real.sum()) > 0
        return jnp.where(some, new_size, size), jnp.where(some, new_total, total)

    @property
    def fresh(self) -> float:
        """N of a new code: it stays alive while it is chosen."""
        return max(1.0, self.dead_below)

    def codes(self, size: jax.Array, total: jax.Array) -> jax.Array:
        """The codebook."""
        smooth = (size + self.epsilon) * size.sum() * safe_reciprocal(size.sum() + len(size) * self.epsilon)
        return total * safe_reciprocal(smooth)[:, None]

    def _everywhere(self, a: jax.Array) -> jax.Array:
        return a if self.axis_name is None else lax.psum(a, self.axis_name)


def draw_rows(key: jax.Array, rows: jax.Array, count: int, real: jax.Array | None, axis_name: str | None) -> jax.Array:
    """`count` rows, each drawn from all that are real, of all devices along the axis: (count, features).

    The k-th real row is drawn for the number k, so padding does not change what is drawn.

    Args:
        key: the same along `axis_name`.
        rows: (rows, features).
        real: (rows,), False for padding; None where there is none.
        axis_name: a mapped axis, or None.
    """
    here = jnp.asarray(len(rows)) if real is None else real.sum()
    counts = here[None] if axis_name is None else lax.all_gather(here, axis_name)
    start = jnp.zeros((), counts.dtype) if axis_name is None else (jnp.cumsum(counts) - counts)[lax.axis_index(axis_name)]
    places = jax.random.randint(key, (count,), 0, jnp.maximum(counts.sum(), 1)) - start
    at = jnp.clip(places, 0, jnp.maximum(here - 1, 0))
    drawn = rows[at if real is None else jnp.searchsorted(jnp.cumsum(real), at + 1)]
    if axis_name is None:
        return drawn
    return lax.psum(jnp.where(((places >= 0) & (places < here))[:, None], drawn, 0), axis_name)
