"""Normalisation and its gradient written out in NumPy, element by element of the formula."""

import numpy as np


def normalize(x, axes, epsilon, centered=True):
    x = np.asarray(x, np.float64)
    mean = x.mean(axes, keepdims=True) if centered else 0.0
    var = ((x - mean) ** 2).mean(axes, keepdims=True)
    return (x - mean) / np.sqrt(var + epsilon)


def jacobian_product(x, g, axes, epsilon, centered=True):
    """Σ_j g_j dx̂_j/dx_i, from the full Jacobian of one set of statistics at a time."""
    x, g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    axes = tuple(a % x.ndim for a in axes)
    kept = tuple(a for a in range(x.ndim) if a not in axes)
    order = kept + axes
    shape = [x.shape[a] for a in order]
    n = int(np.prod([x.shape[a] for a in axes]))
    xs, gs = (a.transpose(order).reshape(-1, n) for a in (x, g))
    out = np.zeros_like(xs)
    for row, (xr, gr) in enumerate(zip(xs, gs, strict=True)):
        project = np.eye(n) - centered / n
        centred = project @ xr
        rstd = 1 / np.sqrt((centred**2).mean() + epsilon)
        out[row] = gr @ (rstd * project - rstd**3 * np.outer(centred, centred) / n)
    return out.reshape(shape).transpose(np.argsort(order))
