"""Vector quantisation: each vector replaced by the nearest one of a codebook.

    i = argmin_k |x - e_k|²,   n = the number of entries of x that are no padding
Forward   q = e_i,   codebook loss = commitment loss = Σ |x - q|² / n
Backward  dx = J dy + 2 dcommitment (x - q) / n,    J by the estimator: the identity (straight through), or the rotation that takes x to q
          de_k = Σ_{i = k} 2 dcodebook_loss (q - x) / n

The codebook loss moves codes to the vectors that chose them, the commitment loss vectors to their codes; the codebook gets no gradient from q.
Padding, which a mask leaves out, has i = -1 and q = 0, and is in no sum.
Saved     x, the codebook and the indices; q is recomputed from the last two.

Reference: van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning", 2017; the rotation is that of Fifty et al.,
"Restructuring Vector Quantization with the Rotation Trick", 2024 (`codebook.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
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
from layers.quantization.moving_codebook import MovingAverage

_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
"""That of `nnx.Embed`."""


class QuantizationLosses(NamedTuple):
    """The two losses of a vector quantiser, mean squared distances of equal value; an entry for each codebook where there are several.

    Attributes:
        codebook: moves the codes.
        commitment: moves the vectors.
    """

    codebook: jax.Array
    commitment: jax.Array


class VectorQuantizeFunction(Function):
    @staticmethod
    def forward(ctx, x, codebook, gradient, mask=None):
        ctx.set_materialize_grads(False)
        indices = nearest_but_padding(x, codebook, mask)
        ctx.save_for_backward(x, codebook, indices)
        ctx.gradient, ctx.masked = gradient, mask is not None
        x, q = _pairs(x, codebook, indices, ctx.masked)
        loss = mean_square(_difference(x, q), indices)
        return shows_nan(x, q), indices, loss, loss

    @staticmethod
    def backward(ctx, dy, _, dcodebook_loss, dcommitment):
        (x, codebook, indices), (dy, dcodebook_loss, dcommitment) = barrier(ctx.saved_tensors, (dy, dcodebook_loss, dcommitment))
        x, q = _pairs(x, codebook, indices, ctx.masked)
        scale = 2 / entries(x, indices)
        distance = lax.stop_gradient(q)
        dx = dcodebook = None
        if ctx.needs_input_grad[0]:
            dx = jnp.zeros_like(x) if dy is None else pull_back(ctx.gradient, x, q, without_padding(dy, indices) if ctx.masked else dy)
            if dcommitment is not None:
                dx = dx + scale * dcommitment * _difference(x, distance)
        if ctx.needs_input_grad[1] and dcodebook_loss is not None:
            dq = scale * dcodebook_loss * _difference(q, lax.stop_gradient(x))
            dcodebook = code_sums(dq, indices, codebook.shape[0])
        return dx, dcodebook, None, None

    @staticmethod
    def surrogate(x, codebook, gradient, mask=None):
        hold = lax.stop_gradient
        kept = (jnp.ones(len(x), bool) if mask is None else mask)[:, None]
        q = codebook[jnp.argmin(jnp.square(x[:, None] - codebook).sum(-1), -1)]
        if gradient == "straight_through":
            y = x
        else:
            length, size = jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.linalg.norm(q, axis=-1, keepdims=True)
            u, v = hold(x / length), hold(q / size)
            r = (u + v) / jnp.linalg.norm(u + v, axis=-1, keepdims=True)
            y = hold(size / length) * (x - 2 * r * (r * x).sum(-1, keepdims=True) + 2 * v * (u * x).sum(-1, keepdims=True))
        losses = [jnp.where(kept, d**2, 0).sum() / jnp.maximum(kept.sum() * x.shape[1], 1) for d in (hold(x) - q, x - hold(q))]
        return jnp.where(kept, y, 0), *losses

    @staticmethod
    def example(key, dtype):
        first, second = jax.random.split(key)
        return jax.random.normal(first, (7, 3), dtype), jax.random.normal(second, (5, 3), dtype), "rotation"

    @staticmethod
    def examples(key, dtype):
        x, codebook, _ = VectorQuantizeFunction.example(key, dtype)
        mask = jnp.arange(7) % 3 > 0
        return {
            "straight through": (x, codebook, "straight_through"),
            "far out": (1e4 * x, codebook, "straight_through"),
            "padding": (x, codebook, "rotation", mask),
            "padding of NaN": (x.at[0].set(jnp.nan), codebook, "rotation", mask),
            "nothing but padding": (x, codebook, "rotation", mask & False),
            "no vectors": (x[:0], codebook, "straight_through"),
        }


def _pairs(x: jax.Array, codebook: jax.Array, indices: jax.Array, masked: bool) -> tuple[jax.Array, jax.Array]:
    """The vectors and their codes, 0 for padding."""
    q = codes_at(codebook, indices)
    return (without_padding(x, indices), without_padding(q, indices)) if masked else (x, q)


def _difference(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = wide(jnp.promote_types(a.dtype, b.dtype))
    return a.astype(dtype) - b.astype(dtype)


def vector_quantize(
    x: Float[Array, "*batch features"],
    codebook: Float[Array, "codes features"],
    *,
    mask: Bool[Array, "*batch"] | None = None,
    gradient: str = "straight_through",
) -> tuple[Float[Array, "*batch features"], Int[Array, "*batch"], QuantizationLosses]:
    """Replaces each vector by the nearest one of the codebook, the first of several.

    Distances are of float32 or wider, for blocks of vectors; backward keeps the indices beyond the arguments.

    Args:
        x: vectors.
        codebook: the codes.
        mask: True for vectors, False for padding, which may hold anything, NaN too: it comes back as 0 with the index -1, has no part in the
            losses, and gets the gradient 0. NaN in other vectors comes back.
        gradient: how the gradient of the quantised vectors comes back to `x`: "straight_through", as it is; or "rotation", turned and
            scaled as the vector is to its code. The codebook gets no gradient from them.

    Returns:
        The quantised vectors, of the shape and dtype of `x`; the indices of the codes, int32; and the losses, scalars of float32 or
        wider: `losses.codebook`, whose gradient moves the codes, and `losses.commitment`, whose gradient moves `x`. The usual loss is
        `losses.codebook + 0.25 * losses.commitment`. Without vectors both are 0.

    Raises:
        ValueError: where the shapes do not fit, the codebook is empty, or `gradient` is unknown.
        TypeError: where `x` or `codebook` is not of a floating-point dtype.

    Reference: van den Oord et al., "Neural Discrete Representation Learning", 2017; Fifty et al., "Restructuring Vector Quantization
    with the Rotation Trick", 2024.
    """
    return _quantize("vector_quantize", x, codebook, mask, gradient)


def _quantize(who: str, x: Any, codebook: Any, mask: Any, gradient: str) -> tuple[jax.Array, jax.Array, QuantizationLosses]:
    x = checks.array(who, "x", x)
    codebook = check_codebook(who, codebook, x)
    checks.choice(who, "gradient", gradient, GRADIENTS)
    mask = mask_rows(who, mask, x)
    y, indices, *losses = VectorQuantizeFunction.apply(as_rows(x), codebook, gradient, mask)
    return y.reshape(x.shape), indices.reshape(x.shape[:-1]), QuantizationLosses(*losses)


class VectorQuantizer(nnx.Module):
    """A codebook of vectors, learned by gradient or as a moving average, and `vector_quantize` with it.

    In the call, `x` is (*batch, features); it returns the quantised vectors, the indices, and a loss to be added to the objective:
    `codebook loss + commitment_weight * commitment loss`, without the first where the codebook is a moving average. A `mask` of the call,
    (*batch,), False for padding, is that of `vector_quantize`; padding does not move the codebook.

    With `ema=True` each call that is not deterministic moves the codebook, by the formula of `moving_codebook.py`, and a code that has been chosen
    less than `threshold_ema_dead_code` times in the mean becomes a vector of `x`, drawn from the stream `codebook` of `rngs`.

    Args:
        num_embeddings: the number of codes.
        features: the length of a vector.
        commitment_weight: multiplies the commitment loss.
        gradient: as in `vector_quantize`.
        ema: the codebook is a moving average, not a parameter.
        decay, epsilon: of the moving average; epsilon keeps an unused code finite (Laplace smoothing).
        threshold_ema_dead_code: 0 leaves dead codes.
        deterministic: leaves the codebook as it is; set by `model.eval()` and `model.train()`.
        param_dtype: of the codebook.
        embedding_init: its initialiser.
        axis_name: a mapped axis (`jax.vmap`, `shard_map`) over which the moving average goes too, so that all along it keep the same codebook; the
            stream `codebook` must be the same along it.
        rngs: the streams `params`, and `codebook` for dead codes.

    Reference: van den Oord et al., "Neural Discrete Representation Learning", 2017, section 3 and appendix A.1; the names are those of
    `nnx.Embed`, Haiku's `VectorQuantizerEMA` and `vector-quantize-pytorch`.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        commitment_weight: float = 0.25,
        gradient: str = "straight_through",
        ema: bool = False,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        threshold_ema_dead_code: float = 0.0,
        deterministic: bool = False,
        param_dtype: Any = jnp.float32,
        embedding_init: Callable[..., jax.Array] = _INIT,
        axis_name: str | None = None,
        rngs: nnx.Rngs,
    ):
        who = "VectorQuantizer"
        num_embeddings = checks.integer(who, "num_embeddings", num_embeddings, "[1, 2147483647]")
        features = checks.integer(who, "features", features, "[1, 2147483647]")
        commitment_weight = checks.number(who, "commitment_weight", commitment_weight, "[0, inf)")
        checks.choice(who, "gradient", gradient, GRADIENTS)
        ema, deterministic = checks.flag(who, "ema", ema), checks.flag(who, "deterministic", deterministic)
        decay = checks.number(who, "decay", decay, "[0, 1]")
        epsilon = checks.number(who, "epsilon", epsilon, "[0, inf)")
        threshold_ema_dead_code = checks.number(who, "threshold_ema_dead_code", threshold_ema_dead_code, "[0, inf)")
        param_dtype = checks.dtype(who, "param_dtype", param_dtype, optional=False)
        checks.function(who, "embedding_init", embedding_init)
        if axis_name is not None and not isinstance(axis_name, (str, tuple)):
            raise TypeError(f"{who}: axis_name is {checks.shown(axis_name)}, but must be the name of a mapped axis or None")
        if threshold_ema_dead_code and not ema:
            raise ValueError(f"VectorQuantizer: threshold_ema_dead_code is {threshold_ema_dead_code}, which needs ema=True")
        embedding = embedding_init(rngs.params(), (num_embeddings, features), param_dtype)
        fresh = MovingAverage(decay, epsilon, threshold_ema_dead_code, axis_name).fresh
        self.embedding = nnx.BatchStat(embedding) if ema else nnx.Param(embedding)
        self.cluster_size = nnx.BatchStat(jnp.full(num_embeddings, fresh, wide(param_dtype))) if ema else nnx.data(None)
        self.embedding_sum = nnx.BatchStat(fresh * embedding.astype(wide(param_dtype))) if ema else nnx.data(None)
        self.rngs = rngs["codebook"].fork() if threshold_ema_dead_code else nnx.data(None)
        self.num_embeddings, self.features, self.param_dtype = num_embeddings, features, param_dtype
        self.commitment_weight, self.gradient, self.deterministic = commitment_weight, gradient, deterministic
        self.axis_name = axis_name
        self.ema, self.decay, self.epsilon, self.threshold_ema_dead_code = ema, decay, epsilon, threshold_ema_dead_code

    def __call__(
        self, x: Float[Array, "*batch features"], *, mask: Bool[Array, "*batch"] | None = None, deterministic: bool | None = None
    ) -> tuple[Float[Array, "*batch features"], Int[Array, "*batch"], Float[Array, ""]]:
        x = checks.array("VectorQuantizer", "x", x)
        checks.flag("VectorQuantizer", "deterministic", deterministic, optional=True)
        y, indices, losses = _quantize("VectorQuantizer", x, self.embedding[...], mask, self.gradient)
        if not self.ema:
            return y, indices, losses.codebook + self.commitment_weight * losses.commitment
        if not (self.deterministic if deterministic is None else deterministic) and indices.size:
            self._move(lax.stop_gradient(x).reshape(-1, self.features), indices.reshape(-1), masked=mask is not None)
        return y, indices, self.commitment_weight * losses.commitment

    def _move(self, rows: jax.Array, indices: jax.Array, *, masked: bool) -> None:
        """One step of the moving average; none where all is padding."""
        assert self.cluster_size is not None and self.embedding_sum is not None
        key = None if self.rngs is None else self.rngs()
        size, total = self._average.step(self.cluster_size[...], self.embedding_sum[...], rows, indices, key, masked=masked)
        self.cluster_size[...], self.embedding_sum[...] = size, total
        self.embedding[...] = self._average.codes(size, total).astype(self.param_dtype)

    @property
    def _average(self) -> MovingAverage:
        return MovingAverage(self.decay, self.epsilon, self.threshold_ema_dead_code, self.axis_name)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Used by `nnx.view`."""
        if deterministic is not None:
            self.deterministic = deterministic
