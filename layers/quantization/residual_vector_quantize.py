"""Residual vector quantisation: codebook after codebook, each on what the ones before have left.

    r_0 = x,   i_j = the nearest code of codebook j to r_j,   r_{j+1} = r_j - q_j,   q_j = codebook_j[i_j],   n = the number of entries of x
Forward   y = Σ_j q_j,   codebook loss j = commitment loss j = Σ |r_{j+1}|² / n
Backward  dx = J dy + Σ_j 2 dcommitment_j r_{j+1} / n,    J by the estimator: the identity (straight through), or the rotation that takes x to y
          dcodebook_j[k] = -Σ_{i_j = k} 2 dcodebook_loss_j r_{j+1} / n

In the losses of codebook j the codes of the ones before are constants. The estimator acts once, on the sum: estimators one after the other would
return J dy for each codebook, that is dy times their number.
Saved     x, the codebooks and the indices; every q and r is recomputed.

Reference: Zeghidour et al., "SoundStream: An End-to-End Neural Audio Codec", 2021, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from layers.core import checks
from layers.core.numerics import wide
from layers.core.recompute import barrier
from layers.core.rows import as_rows
from layers.function.function import Function
from layers.quantization.codebook import (
    GRADIENTS,
    check_codebook,
    code_sums,
    codes_at,
    entries,
    mask_rows,
    mean_square,
    nearest_but_padding,
    pull_back,
    shows_nan,
    without_padding,
)
from layers.quantization.vector_quantize import QuantizationLosses


class ResidualVectorQuantizeFunction(Function):
    @staticmethod
    def forward(ctx, x, codebooks, gradient, mask=None):
        ctx.set_materialize_grads(False)
        ctx.gradient, ctx.masked = gradient, mask is not None
        rest, indices, losses = x.astype(wide(x.dtype)), [], []
        for codebook in codebooks:
            indices.append(nearest_but_padding(rest, codebook, mask))
            rest = _kept(rest - codes_at(codebook, indices[-1]).astype(rest.dtype), indices[-1], ctx.masked)
            losses.append(mean_square(rest, indices[-1]))
        chosen = jnp.stack(indices, -1)
        ctx.save_for_backward(x, codebooks, chosen)
        total = _kept(_total(codebooks, chosen, rest.dtype), indices[-1], ctx.masked)
        return _kept(shows_nan(x, total), indices[-1], ctx.masked), chosen, jnp.stack(losses), jnp.stack(losses)

    @staticmethod
    def backward(ctx, dy, _, dcodebook_losses, dcommitments):
        (x, codebooks, indices), (dy, dcodebook_losses, dcommitments) = barrier(ctx.saved_tensors, (dy, dcodebook_losses, dcommitments))
        kept = lambda a: _kept(a, indices[:, 0], ctx.masked)
        dtype, scale, x = wide(x.dtype), 2 / entries(x, indices[:, 0]), kept(x)
        dx = jnp.zeros(x.shape, dtype)
        if dy is not None and ctx.needs_input_grad[0]:
            dx = pull_back(ctx.gradient, x, kept(_total(codebooks, indices, dtype)), kept(dy)).astype(dtype)
        hold, dcodebooks, before = lax.stop_gradient, [], x.astype(dtype)
        for j, codebook in enumerate(codebooks):
            q = kept(codes_at(codebook, indices[:, j]).astype(dtype))
            if dcodebook_losses is not None:
                dcodebooks.append(code_sums(scale * dcodebook_losses[j] * (q - hold(before)), indices[:, j], codebook.shape[0]))
            before = before - hold(q)
            if dcommitments is not None:
                dx = dx + scale * dcommitments[j] * before
        return dx, tuple(dcodebooks) or None, None, None

    @staticmethod
    def surrogate(x, codebooks, gradient, mask=None):
        hold, rest, losses = lax.stop_gradient, x, []
        kept = (jnp.ones(len(x), bool) if mask is None else mask)[:, None]
        mean = lambda d: jnp.where(kept, d**2, 0).sum() / jnp.maximum(kept.sum() * x.shape[1], 1)
        for codebook in codebooks:
            q = codebook[jnp.argmin(jnp.square(rest[:, None] - codebook).sum(-1), -1)]
            losses.append((mean(hold(rest) - q), mean(rest - hold(q))))
            rest = rest - hold(q)
        return jnp.where(kept, x, 0), jnp.stack([a for a, _ in losses]), jnp.stack([b for _, b in losses])

    @staticmethod
    def example(key, dtype):
        keys = jax.random.split(key, 3)
        x, *codebooks = (jax.random.normal(k, s, dtype) for k, s in zip(keys, ((7, 3), (5, 3), (4, 3)), strict=True))
        return x, tuple(codebooks), "straight_through"

    @staticmethod
    def examples(key, dtype):
        x, codebooks, _ = ResidualVectorQuantizeFunction.example(key, dtype)
        mask = jnp.arange(7) % 3 > 0
        return {
            "far out": (1e4 * x, codebooks, "straight_through"),
            "padding": (x, codebooks, "straight_through", mask),
            "padding of NaN": (x.at[0].set(jnp.nan), codebooks, "rotation", mask),
            "nothing but padding": (x, codebooks, "straight_through", mask & False),
            "no vectors": (x[:0], codebooks, "straight_through"),
        }


def _kept(a: jax.Array, indices: jax.Array, masked: bool) -> jax.Array:
    return without_padding(a, indices) if masked else a


def _total(codebooks: Sequence[jax.Array], indices: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The sum of the chosen codes."""
    return sum((codes_at(c, indices[:, j]).astype(dtype) for j, c in enumerate(codebooks)), jnp.zeros((), dtype))


def residual_vector_quantize(
    x: Float[Array, "*batch features"],
    codebooks: Sequence[Float[Array, "codes features"]] | Float[Array, "quantizers codes features"],
    *,
    mask: Bool[Array, "*batch"] | None = None,
    gradient: str = "straight_through",
) -> tuple[Float[Array, "*batch features"], Int[Array, "*batch quantizers"], QuantizationLosses]:
    """Quantises each vector by a sum of codes, one of each codebook, each the nearest to what the ones before have left.

    Args:
        x: vectors.
        codebooks: one or more, in their order; they may differ in the number of codes. A stacked array where they do not.
        mask: True for vectors, False for padding, as in `vector_quantize`.
        gradient: how the gradient of the sum comes back to `x`, as in `vector_quantize`.

    Returns:
        The quantised vectors, of the shape and dtype of `x`; the index of the code in each codebook, int32; and the losses, with an entry for
        each codebook: `losses.codebook`, whose gradient moves the codes, and `losses.commitment`, whose gradient moves `x`.

    Raises:
        ValueError: where there is no codebook, the shapes do not fit, a codebook is empty, or `gradient` is unknown.
        TypeError: where `x` or a codebook is not of a floating-point dtype.

    Reference: Zeghidour et al., "SoundStream: An End-to-End Neural Audio Codec", 2021, algorithm 1.
    """
    who = "residual_vector_quantize"
    x = checks.array(who, "x", x)
    if not isinstance(codebooks, (tuple, list)):
        codebooks = checks.array(who, "codebooks", codebooks, ndim=3)
    books = tuple(check_codebook(who, c, x) for c in codebooks)
    if not books:
        raise ValueError(f"{who}: codebooks is empty, but there must be at least one codebook, (codes, features)")
    checks.choice(who, "gradient", gradient, GRADIENTS)
    mask = mask_rows(who, mask, x)
    y, indices, *losses = ResidualVectorQuantizeFunction.apply(as_rows(x), books, gradient, mask)
    return y.reshape(x.shape), indices.reshape(*x.shape[:-1], len(books)), QuantizationLosses(*losses)
