"""`gradcheck`: a gradient against finite differences, after `torch.autograd.gradcheck`.

For every output f and input x the Jacobian J is computed twice, entry by entry: numerically, J[:, i] = (f(x + eps e_i) - f(x - eps e_i)) / 2 eps, and
from the backward rule, J[j, :] = vjp(e_j). Complex values are taken as pairs of real ones on both sides: f as (Re f, Im f), x as (Re x, Im x),
for which JAX's convention gives the cotangent of x as the conjugate of the gradient of the pair.

Reference: the numerical and analytical Jacobians of `torch.autograd.gradcheck`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.check.hints import likely_mistake
from layers.core.function import Function

Fn = Callable[..., Any]


class GradcheckError(RuntimeError):
    """A gradient that is not the derivative, or a rule that breaks a promise."""


class _Problem:
    """`fn` as a function of its floating-point arrays alone, as lists of flat real vectors."""

    def __init__(self, fn: Any, args: tuple[Any, ...], argnums: Sequence[int] | None):
        self.fn: Fn = fn.apply if isinstance(fn, type) and issubclass(fn, Function) else fn
        self.leaves, self.tree = jax.tree.flatten(args)
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(args)]
        of_argument = [i for i, a in enumerate(args) for _ in jax.tree.leaves(a)]
        self.places = [i for i, x in enumerate(self.leaves) if _is_inexact(x) and (argnums is None or of_argument[i] in argnums)]
        if not self.places:
            raise ValueError("gradcheck: no argument is a floating-point or complex array, so there is nothing to check")
        narrow = [paths[i] for i in self.places if jnp.finfo(self.leaves[i].dtype).bits < 64]
        if narrow:
            warnings.warn(f"gradcheck: args{', args'.join(narrow)} are not float64; they are checked as float64 copies", UserWarning, stacklevel=4)
        self.names = [f"args{paths[i]}" for i in self.places]
        self.inputs = [_widened(self.leaves[i]) for i in self.places]

    def outputs(self, *inputs: Any) -> list[Any]:
        now = [_widened(x) if _is_inexact(x) else x for x in self.leaves]
        for i, x in zip(self.places, inputs, strict=True):
            now[i] = x
        out = jax.tree.leaves(self.fn(*self.tree.unflatten(now)))
        return [y for y in out if isinstance(y, (jax.Array, np.ndarray)) and jnp.issubdtype(y.dtype, np.inexact)]


def gradcheck(
    fn: Any,
    args: Any,
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    check_undefined_grad: bool = True,
    check_grad_dtypes: bool = False,
    check_batched_grad: bool = False,
    check_forward_ad: bool = False,
    check_backward_ad: bool = True,
    fast_mode: bool = False,
    argnums: Sequence[int] | None = None,
) -> bool:
    """Compares the gradient of `fn` at `args` with finite differences, in float64.

    Args:
        fn: a JAX function, or a `Function` class. Its results are arrays or pytrees of arrays.
        args: the arguments, a tuple; arrays may lie in pytrees, and anything that is no floating-point or complex array goes through. float32
            arrays are checked as float64 copies, with a warning.
        eps: the step of the finite differences.
        atol, rtol: an entry is right where |analytical - numerical| <= atol + rtol |numerical|.
        raise_exception: raises, or returns False.
        nondet_tol: how far two runs of the backward pass may differ.
        check_undefined_grad: the gradients for a zero gradient of one output, or of all, must be right as well.
        check_grad_dtypes: a gradient has the dtype of its input.
        check_batched_grad: the backward pass under `vmap` gives what it gives for each.
        check_forward_ad, check_backward_ad: which modes are compared with finite differences.
        fast_mode: a few random projections of the Jacobian in place of all entries: faster, and blind to some single wrong entries.
        argnums: the arguments to differentiate, all by default.

    Returns:
        True; or False where it fails and `raise_exception` is not set.

    Raises:
        GradcheckError: it says which input and output, the worst entry, both values and the likely mistake.
        ValueError: where there is nothing to check.
    """
    args = args if isinstance(args, tuple) else (args,)
    if not (check_forward_ad or check_backward_ad):
        raise ValueError("gradcheck: at least one of check_forward_ad and check_backward_ad must be set")
    with jax.enable_x64(True):
        problem = _Problem(fn, args, argnums)
        try:
            _check(problem, locals())
        except GradcheckError:
            if raise_exception:
                raise
            return False
    return True


def gradgradcheck(fn: Any, args: Any, grad_outputs: Any = None, **options: Any) -> bool:
    """`gradcheck` of the gradient of `fn`, in its arguments and in the gradients of its outputs.

    Args:
        fn, args: as for `gradcheck`.
        grad_outputs: gradients of the floating-point outputs, a list; random ones by default.
        **options: those of `gradcheck`.

    Returns:
        True, or False where it fails and `raise_exception=False`.

    Raises:
        GradcheckError, ValueError: as `gradcheck`.
    """
    args = args if isinstance(args, tuple) else (args,)
    with jax.enable_x64(True):
        problem = _Problem(fn, args, options.pop("argnums", None))
        shapes = jax.eval_shape(problem.outputs, *problem.inputs)
        grads = [_draw(i, y.shape, y.dtype) for i, y in enumerate(shapes)] if grad_outputs is None else list(grad_outputs)

        def gradient(inputs: list[Any], cotangents: list[Any]) -> Any:
            return jax.vjp(problem.outputs, *inputs)[1](cotangents)

        return gradcheck(gradient, (problem.inputs, grads), **options)


def _check(p: _Problem, o: dict[str, Any]) -> None:
    outputs = p.outputs(*p.inputs)
    again = p.outputs(*p.inputs)
    if any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(outputs, again, strict=True)):
        raise GradcheckError("the function gives other values each time it is called with the same arguments")
    if not outputs:
        return
    pull = jax.vjp(p.outputs, *p.inputs)[1]
    if o["check_backward_ad"]:
        _check_promises(p, outputs, pull, o)
    directions = _directions(p, outputs) if o["fast_mode"] else None
    for j, x in enumerate(p.inputs):
        numerical = _numerical(p, j, o["eps"], directions)
        for mode, wanted in (("backward", o["check_backward_ad"]), ("forward", o["check_forward_ad"])):
            if not wanted:
                continue
            analytical = _analytical(p, j, outputs, pull, directions) if mode == "backward" else _forward(p, j, directions)
            for i in range(len(outputs)):
                _compare(p, mode, i, j, x, outputs[i], analytical[i], numerical[i], o)


def _check_promises(p: _Problem, outputs: list[Any], pull: Fn, o: dict[str, Any]) -> None:
    """What holds for any derivative: linear, repeatable, of the input's shape and dtype."""
    cotangents = [_draw(i, y.shape, y.dtype) for i, y in enumerate(outputs)]
    first, second = pull(cotangents), pull(cotangents)
    for name, x, a, b in zip(p.names, p.inputs, first, second, strict=True):
        if not np.all(np.isfinite(a)):
            raise GradcheckError(f"the gradient of {name} is not finite at {_where(~np.isfinite(np.asarray(a)))}")
        if a.size and np.max(np.abs(a - b)) > o["nondet_tol"]:
            raise GradcheckError(f"backward is not repeatable: two runs differ by {np.max(np.abs(a - b)):.3g} in {name}, more than nondet_tol")
        if o["check_grad_dtypes"] and (a.dtype != x.dtype or a.shape != x.shape):
            raise GradcheckError(f"the gradient of {name} is {a.dtype}{a.shape}, but the input is {x.dtype}{x.shape}")
    for name, g in zip(p.names, pull([jnp.zeros_like(y) for y in outputs]), strict=True):
        if np.any(np.asarray(g) != 0):
            raise GradcheckError(f"backward is not multiplied by the gradient of the output: {name} gets a gradient for zero gradients")
    for name, a, b in zip(p.names, first, pull([2 * c for c in cotangents]), strict=True):
        if not np.allclose(2 * a, b, rtol=1e-6, atol=1e-9):
            raise GradcheckError(f"backward is not linear in the gradient of the output: twice that gives not twice the gradient of {name}")
    if o["check_undefined_grad"]:
        _check_each_output_alone(p, cotangents, first)
    if o["check_batched_grad"]:
        stacked = [jnp.stack([c, -2 * c]) for c in cotangents]
        for name, a, b in zip(p.names, first, jax.vmap(pull)(stacked), strict=True):
            if not np.allclose(jnp.stack([a, -2 * a]), b, rtol=1e-6, atol=1e-9):
                raise GradcheckError(f"backward under vmap gives another gradient of {name}")


def _check_each_output_alone(p: _Problem, cotangents: list[Any], whole: Sequence[Any]) -> None:
    """The gradients with all outputs but one unused, which reach backward as absent, sum to those with all."""
    parts = []
    for i, c in enumerate(cotangents):
        parts.append(jax.vjp(lambda *x, i=i: p.outputs(*x)[i], *p.inputs)[1](c))
    for name, total, *part in zip(p.names, whole, *parts, strict=True):
        if not np.allclose(total, sum(part), rtol=1e-6, atol=1e-9):
            raise GradcheckError(f"backward does not handle an output without gradient: the gradient of {name} is not the sum over the outputs")


def _compare(p: _Problem, mode: str, i: int, j: int, x: Any, y: Any, analytical: Any, numerical: Any, o: dict[str, Any]) -> None:
    analytical, numerical = np.asarray(analytical), np.asarray(numerical)
    bad = ~(np.abs(analytical - numerical) <= o["atol"] + o["rtol"] * np.abs(numerical))
    if not bad.any():
        return
    excess = np.where(bad, np.nan_to_num(np.abs(analytical - numerical), nan=np.inf), -1)
    row, column = np.unravel_index(np.argmax(excess), bad.shape)
    if o["fast_mode"]:
        raise GradcheckError(
            f"the {mode} derivative of output {i} with respect to {p.names[j]} is wrong: along random direction {column} it is "
            f"{analytical[row, column]:.8g}, but finite differences give {numerical[row, column]:.8g} (fast_mode=False names the entry)"
        )
    raise GradcheckError(
        f"the {mode} derivative of output {i} with respect to {p.names[j]} is wrong in {bad.sum()} of {bad.size} entries\n"
        f"  worst: d output{_entry(row, y)} / d {p.names[j]}{_entry(column, x)}\n"
        f"  analytical: {analytical[row, column]:.8g}\n  numerical:  {numerical[row, column]:.8g}\n"
        f"  likely: {likely_mistake(analytical, numerical, np.shape(x), np.shape(y))}"
    )


def _entry(flat: Any, like: Any) -> str:
    size = max(np.size(like), 1)
    part = "" if not jnp.iscomplexobj(like) else " (real part)" if flat < size else " (imaginary part)"
    return f"[{', '.join(str(int(k)) for k in np.unravel_index(int(flat) % size, np.shape(like)))}]{part}" if np.ndim(like) else part


def _where(mask: np.ndarray) -> str:
    return str(tuple(int(k) for k in np.argwhere(mask)[0]))


def _is_inexact(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic)) and jnp.issubdtype(x.dtype, np.inexact)


def _widened(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64)


def _draw(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), seed), shape, dtype)


def _as_pair(x: Any) -> jax.Array:
    """A flat real vector: the entries, or real then imaginary parts."""
    x = jnp.ravel(x)
    return jnp.concatenate([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def _from_pair(v: Any, like: Any) -> jax.Array:
    n = max(np.size(like), 0)
    return (v[:n] + 1j * v[n:] if jnp.iscomplexobj(like) else v).reshape(np.shape(like)).astype(like.dtype)


def _width(x: Any) -> int:
    return np.size(x) * (2 if jnp.iscomplexobj(x) else 1)


def _directions(p: _Problem, outputs: list[Any]) -> dict[str, list[Any]]:
    count = 8
    right = [_draw(100 + j, (count, _width(x)), jnp.float64) for j, x in enumerate(p.inputs)]
    left = [_draw(200 + i, (1, _width(y)), jnp.float64) for i, y in enumerate(outputs)]
    return {"left": left, "right": right}


def _basis(p: _Problem, j: int, directions: Any) -> jax.Array:
    return jnp.eye(_width(p.inputs[j])) if directions is None else directions["right"][j]


def _projected(jacobian: Any, i: int, directions: Any) -> Any:
    return jacobian if directions is None else directions["left"][i] @ jacobian


def _with(p: _Problem, j: int, x: Any) -> list[Any]:
    return [x if k == j else v for k, v in enumerate(p.inputs)]


def _numerical(p: _Problem, j: int, eps: float, directions: Any) -> list[Any]:
    """For each output a matrix with one column for each direction."""

    def column(v: Any) -> list[Any]:
        step = _from_pair(eps * v, p.inputs[j])
        after, before = p.outputs(*_with(p, j, p.inputs[j] + step)), p.outputs(*_with(p, j, p.inputs[j] - step))
        return [(_as_pair(a) - _as_pair(b)) / (2 * eps) for a, b in zip(after, before, strict=True)]

    columns = _for_each(column, _basis(p, j, directions))
    return [_projected(c.T, i, directions) for i, c in enumerate(columns)]


def _forward(p: _Problem, j: int, directions: Any) -> list[Any]:
    def column(v: Any) -> list[Any]:
        tangent = _from_pair(v, p.inputs[j])
        return [_as_pair(t) for t in jax.jvp(lambda x: p.outputs(*_with(p, j, x)), (p.inputs[j],), (tangent,))[1]]

    columns = _for_each(column, _basis(p, j, directions))
    return [_projected(c.T, i, directions) for i, c in enumerate(columns)]


def _analytical(p: _Problem, j: int, outputs: list[Any], pull: Fn, directions: Any) -> list[Any]:
    rows = []
    for i, y in enumerate(outputs):

        def row(v: Any, i: int = i, y: Any = y) -> Any:
            cotangents = [_from_pair(v, y).conj() if k == i else jnp.zeros_like(o) for k, o in enumerate(outputs)]
            return _as_pair(jnp.conj(pull(cotangents)[j]))

        left = jnp.eye(_width(y)) if directions is None else directions["left"][i]
        jacobian = _for_each(row, left)
        rows.append(jacobian if directions is None else jacobian @ directions["right"][j].T)
    return rows


def _for_each(fn: Fn, vectors: Any) -> Any:
    """`fn` of every row, stacked; without `vmap` where `fn` cannot be batched."""
    if not len(vectors):
        return jax.tree.map(lambda s: jnp.zeros((0, *s.shape), s.dtype), jax.eval_shape(fn, jax.ShapeDtypeStruct(vectors.shape[1:], vectors.dtype)))
    try:
        return jax.vmap(fn)(vectors)
    except Exception:
        results = [fn(v) for v in vectors]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *results)
