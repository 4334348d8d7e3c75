"""Vector quantisation: each vector replaced by the nearest one of a codebook.

    i = argmin_k |x - e_k|²,   n = the number of entries of x
Forward   q = e_i,   codebook loss = commitment loss = Σ |x - q|² / n
Backward  dx = J dy + 2 dcommitment (x - q) / n,    J by the estimator: the identity (straight through), or the rotation that takes x to q
          de_k = Σ_{i = k} 2 dcodebook_loss (q - x) / n

The codebook loss moves codes to the vectors that chose them, the commitment loss vectors to their codes; the codebook gets no gradient from q.
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
from jaxtyping import Array, Float, Int

from layers.core.function import Function
from layers.core.numerics import safe_reciprocal, wide
from layers.core.recompute import barrier
from layers.core.rows import as_rows
from layers.quantization.codebook import check_vectors, code_sums, codes_at, entries, mean_square, nearest, pull_back

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
    def forward(ctx, x, codebook, gradient):
        ctx.set_materialize_grads(False)
        indices = nearest(x, codebook)
        ctx.save_for_backward(x, codebook, indices)
        ctx.gradient = gradient
        q = codes_at(codebook, indices)
        loss = mean_square(_difference(x, q))
        return q.astype(x.dtype), indices, loss, loss

    @staticmethod
    def backward(ctx, dy, _, dcodebook_loss, dcommitment):
        (x, codebook, indices), (dy, dcodebook_loss, dcommitment) = barrier(ctx.saved_tensors, (dy, dcodebook_loss, dcommitment))
        q = codes_at(codebook, indices)
        distance = lax.stop_gradient(q)
        dx = dcodebook = None
        if ctx.needs_input_grad[0]:
            dx = jnp.zeros_like(x) if dy is None else pull_back(ctx.gradient, x, q, dy)
            if dcommitment is not None:
                dx = dx + 2 / entries(x) * dcommitment * _difference(x, distance)
        if ctx.needs_input_grad[1] and dcodebook_loss is not None:
            dq = 2 / entries(x) * dcodebook_loss * _difference(q, lax.stop_gradient(x))
            dcodebook = code_sums(dq, indices, codebook.shape[0])
        return dx, dcodebook, None

    @staticmethod
    def surrogate(x, codebook, gradient):
        hold = lax.stop_gradient
        q = codebook[jnp.argmin(jnp.square(x[:, None] - codebook).sum(-1), -1)]
        if gradient == "straight_through":
            y = x
        else:
            length, size = jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.linalg.norm(q, axis=-1, keepdims=True)
            u, v = hold(x / length), hold(q / size)
            r = (u + v) / jnp.linalg.norm(u + v, axis=-1, keepdims=True)
            y = hold(size / length) * (x - 2 * r * (r * x).sum(-1, keepdims=True) + 2 * v * (u * x).sum(-1, keepdims=True))
        return y, jnp.mean((hold(x) - q) ** 2), jnp.mean((x - hold(q)) ** 2)

    @staticmethod
    def example(key, dtype):
        first, second = jax.random.split(key)
        return jax.random.normal(first, (7, 3), dtype), jax.random.normal(second, (5, 3), dtype), "rotation"


def _difference(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = wide(jnp.promote_types(a.dtype, b.dtype))
    return a.astype(dtype) - b.astype(dtype)


def vector_quantize(
    x: Float[Array, "*batch features"], codebook: Float[Array, "codes features"], *, gradient: str = "straight_through"
) -> tuple[Float[Array, "*batch features"], Int[Array, "*batch"], QuantizationLosses]:
    """Replaces each vector by the nearest one of the codebook, the first of several.

    Distances are of float32 or wider, for blocks of vectors; backward keeps the indices beyond the arguments.

    Args:
        x: vectors.
        codebook: the codes.
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
    x, codebook = jnp.asarray(x), jnp.asarray(codebook)
    check_vectors("vector_quantize", x, codebook, gradient)
    rows = as_rows(x)
    y, indices, *losses = VectorQuantizeFunction.apply(rows, codebook, gradient)
    return y.reshape(x.shape), indices.reshape(x.shape[:-1]), QuantizationLosses(*losses)


class VectorQuantizer(nnx.Module):
    """A codebook of vectors, learned by gradient or as a moving average, and `vector_quantize` with it.

    In the call, `x` is (*batch, features); it returns the quantised vectors, the indices, and a loss to be added to the objective:
    `codebook loss + commitment_weight * commitment loss`, without the first where the codebook is a moving average.

    With `ema=True` each call that is not deterministic moves the codebook: with n_k vectors of sum m_k nearest to code k,

        N_k <- decay N_k + (1 - decay) n_k,   M_k <- decay M_k + (1 - decay) m_k,   e_k = M_k / Ñ_k,   Ñ_k = (N_k + epsilon) ΣN / (ΣN + K epsilon)

    and a code with N_k below `threshold_ema_dead_code` becomes a vector of `x`, drawn from the stream `codebook` of `rngs`.

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
        if not 0 <= decay <= 1:
            raise ValueError(f"VectorQuantizer: decay is {decay}, but must lie in [0, 1]")
        if threshold_ema_dead_code and not ema:
            raise ValueError(f"VectorQuantizer: threshold_ema_dead_code is {threshold_ema_dead_code}, which needs ema=True")
        embedding = embedding_init(rngs.params(), (num_embeddings, features), param_dtype)
        fresh = max(1.0, threshold_ema_dead_code)
        self.embedding = nnx.BatchStat(embedding) if ema else nnx.Param(embedding)
        self.cluster_size = nnx.BatchStat(jnp.full(num_embeddings, fresh, wide(param_dtype))) if ema else nnx.data(None)
        self.embedding_sum = nnx.BatchStat(fresh * embedding.astype(wide(param_dtype))) if ema else nnx.data(None)
        self.rngs = rngs["codebook"].fork() if threshold_ema_dead_code else nnx.data(None)
        self.num_embeddings, self.features, self.param_dtype = num_embeddings, features, param_dtype
        self.commitment_weight, self.gradient, self.deterministic = commitment_weight, gradient, deterministic
        self.axis_name = axis_name
        self.ema, self.decay, self.epsilon, self.threshold_ema_dead_code = ema, decay, epsilon, threshold_ema_dead_code

    def __call__(
        self, x: Float[Array, "*batch features"], *, deterministic: bool | None = None
    ) -> tuple[Float[Array, "*batch features"], Int[Array, "*batch"], Float[Array, ""]]:
        y, indices, losses = vector_quantize(x, self.embedding[...], gradient=self.gradient)
        if not self.ema:
            return y, indices, losses.codebook + self.commitment_weight * losses.commitment
        if not (self.deterministic if deterministic is None else deterministic) and indices.size:
            self._move(lax.stop_gradient(x).reshape(-1, self.features), indices.reshape(-1))
        return y, indices, self.commitment_weight * losses.commitment

    def _move(self, rows: jax.Array, indices: jax.Array) -> None:
        """One step of the moving average."""
        assert self.cluster_size is not None and self.embedding_sum is not None
        everywhere = (lambda a: a) if self.axis_name is None else lambda a: lax.psum(a, self.axis_name)
        blend = lambda old, new: self.decay * old + (1 - self.decay) * everywhere(new).astype(old.dtype)
        size = blend(self.cluster_size[...], code_sums(jnp.ones(indices.shape), indices, self.num_embeddings))
        total = blend(self.embedding_sum[...], code_sums(rows, indices, self.num_embeddings))
        if self.rngs is not None:
            dead = size < self.threshold_ema_dead_code
            drawn = self._draw(rows).astype(total.dtype)
            fresh = max(1.0, self.threshold_ema_dead_code)  # as at the start, so that it stays alive while it is chosen
            size, total = jnp.where(dead, fresh, size), jnp.where(dead[:, None], fresh * drawn, total)
        smooth = (size + self.epsilon) * size.sum() * safe_reciprocal(size.sum() + self.num_embeddings * self.epsilon)
        self.cluster_size[...], self.embedding_sum[...] = size, total
        self.embedding[...] = (total * safe_reciprocal(smooth)[:, None]).astype(self.param_dtype)

    def _draw(self, rows: jax.Array) -> jax.Array:
        """A vector for each code, drawn from all along `axis_name`."""
        assert self.rngs is not None
        shards = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        places = jax.random.randint(self.rngs(), (self.num_embeddings,), 0, shards * len(rows))
        drawn = rows[places % len(rows)]
        if self.axis_name is None:
            return drawn
        here = places // len(rows) == lax.axis_index(self.axis_name)
        return lax.psum(jnp.where(here[:, None], drawn, 0), self.axis_name)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Used by `nnx.view`."""
        if deterministic is not None:
            self.deterministic = deterministic
