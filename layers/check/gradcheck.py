"""`gradcheck`: a gradient against finite differences, after `torch.autograd.gradcheck`.

For every output f and input x the Jacobian J is computed twice, entry by entry: numerically, J[:, i] = (f(x + eps e_i) - f(x - eps e_i)) / 2 eps, and
from the backward rule, J[j, :] = vjp(e_j). Complex values are taken as pairs of real ones on both sides: f as (Re f, Im f), x as (Re x, Im x),
for which JAX's convention gives the cotangent of x as the conjugate of the gradient of the pair.

What stands beside the function is computed in NumPy: outside `jax.jit` JAX compiles each operation for each shape, which takes long.

Reference: the numerical and analytical Jacobians of `torch.autograd.gradcheck`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.check.hints import likely_mistake, likely_second_mistake
from layers.core import checks
from layers.core.trees import is_array, is_inexact
from layers.function.function import Function

Fn = Callable[..., Any]

DIRECTIONS = 8
"""Random directions for each input in fast mode."""


class GradcheckError(RuntimeError):
    """A gradient that is not the derivative, or a rule that breaks a promise."""


class _Problem:
    """`fn` as a function of its floating-point arrays alone, as lists of flat real vectors."""

    def __init__(self, fn: Any, args: tuple[Any, ...], argnums: Any):
        fn = checks.function("gradcheck", "fn", fn)
        self.fn: Fn = fn.apply if isinstance(fn, type) and issubclass(fn, Function) else fn
        self.leaves, self.tree = jax.tree.flatten(args)
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(args)]
        of_argument = [i for i, a in enumerate(args) for _ in jax.tree.leaves(a)]
        chosen = checks.indices("gradcheck", "argnums", argnums, len(args))
        self.indices = [i for i, x in enumerate(self.leaves) if has_gradient(x) and of_argument[i] in chosen]
        if not self.indices:
            raise ValueError("gradcheck: no argument is a floating-point or complex array, so there is nothing to check")
        narrow = [paths[i] for i in self.indices if jnp.finfo(self.leaves[i].dtype).bits < 64]
        if narrow:
            warnings.warn(f"gradcheck: args{', args'.join(narrow)} are not float64; they are checked as float64 copies", UserWarning, stacklevel=4)
        self.names = [f"args{paths[i]}" for i in self.indices]
        self.inputs = [_widened(self.leaves[i]) for i in self.indices]

    def outputs(self, *inputs: Any) -> list[Any]:
        return [y for y in self.results(*inputs) if has_gradient(y)]

    def results(self, *inputs: Any) -> list[Any]:
        now = [_widened(x) if has_gradient(x) else x for x in self.leaves]
        for i, x in zip(self.indices, inputs, strict=True):
            now[i] = x
        return jax.tree.leaves(self.fn(*self.tree.unflatten(now)))


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
    argnums: int | Sequence[int] | None = None,
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
        argnums: the arguments to differentiate by their place, negative ones from the end; all by default.

    Returns:
        True; or False where it fails and `raise_exception` is not set.

    Raises:
        GradcheckError: it says which input and output, the worst entry, both values and the likely mistake.
        ValueError: where there is nothing to check, or an option is out of its range; TypeError: for an option of another type.
    """
    options = _checked({name: value for name, value in locals().items() if name not in ("fn", "args", "argnums")})
    args = args if isinstance(args, tuple) else (args,)
    if not (options["check_forward_ad"] or options["check_backward_ad"]):
        raise ValueError("gradcheck: at least one of check_forward_ad and check_backward_ad must be set")
    with jax.enable_x64(True):
        problem = _Problem(fn, args, argnums)
        try:
            _check(problem, options)
        except GradcheckError:
            if options["raise_exception"]:
                raise
            return False
    return True


_RANGES = {"eps": "(0, inf)", "atol": "[0, inf]", "rtol": "[0, inf]", "nondet_tol": "[0, inf]"}
"""The options that are numbers; the others are flags."""


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: checks.number("gradcheck", name, value, _RANGES[name]) if name in _RANGES else checks.flag("gradcheck", name, value)
        for name, value in options.items()
    }


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
        _require_result(jax.eval_shape(problem.results, *problem.inputs))
        shapes = jax.eval_shape(problem.outputs, *problem.inputs)
        grads = [_draw(i, y.shape, y.dtype) for i, y in enumerate(shapes)] if grad_outputs is None else _given(grad_outputs, shapes)

        return gradcheck(_Gradient(problem.outputs), (problem.inputs, grads), **options)


class _Gradient:
    """The gradient of a function, in its inputs and the gradients of its outputs."""

    def __init__(self, outputs: Fn):
        self.outputs = outputs

    def __call__(self, inputs: list[Any], cotangents: list[Any]) -> Any:
        return jax.vjp(self.outputs, *inputs)[1](cotangents)


def _given(grad_outputs: Any, shapes: Sequence[Any]) -> list[Any]:
    """The gradients that are given for the outputs, as arrays."""
    grads = list(grad_outputs) if isinstance(grad_outputs, (list, tuple)) else [grad_outputs]
    if len(grads) != len(shapes):
        raise ValueError(f"gradgradcheck: grad_outputs holds {len(grads)}, but must be one for each of the {len(shapes)} floating-point outputs")
    grads = [checks.array("gradgradcheck", "grad_outputs", g, "inexact") for g in grads]
    for g, y in zip(grads, shapes, strict=True):
        checks.shape("gradgradcheck", "grad_outputs", g, y.shape, "the shapes of the outputs")
    return [g.astype(y.dtype) for g, y in zip(grads, shapes, strict=True)]


def _require_result(results: Sequence[Any]) -> None:
    if not any(np.size(y) for y in results):
        what = "an empty array" if results else "no array: does it `return` its result?"
        raise ValueError(f"gradcheck: there is nothing to check, since fn returns {what}")


def _check(p: _Problem, o: dict[str, Any]) -> None:
    results = p.results(*p.inputs)
    _require_result(results)
    outputs = [y for y in results if has_gradient(y)]
    again = p.outputs(*p.inputs)
    if any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(outputs, again, strict=True)):
        raise GradcheckError("the function gives other values each time it is called with the same arguments")
    if not outputs:
        return
    pull = jax.vjp(p.outputs, *p.inputs)[1]
    if o["check_backward_ad"]:
        _check_promises(p, outputs, pull, o)
    directions = _directions(p, outputs) if o["fast_mode"] else None
    numerical = _numerical(p, outputs, o["eps"], directions)
    if o["check_backward_ad"]:
        more = _random_rows(outputs) if directions is None else None
        jacobian, given = _analytical(p, outputs, pull, directions, more)
        _compare_all(p, "backward", outputs, jacobian, numerical, o)
        if more is not None:
            _check_against(p, jacobian, more, given, o)
    if o["check_forward_ad"]:
        _compare_all(p, "forward", outputs, _forward(p, outputs, directions), numerical, o)


def _check_promises(p: _Problem, outputs: list[Any], pull: Fn, o: dict[str, Any]) -> None:
    """What holds for any derivative: linear, repeatable, of the input's shape and dtype."""
    cotangents = [_draw(i, y.shape, y.dtype) for i, y in enumerate(outputs)]
    first, second = _pulled(pull, cotangents), _pulled(pull, cotangents)
    for name, x, a, b in zip(p.names, p.inputs, first, second, strict=True):
        if not np.all(np.isfinite(a)):
            raise GradcheckError(f"the gradient of {name} is not finite at {_where(~np.isfinite(np.asarray(a)))}")
        if a.size and np.max(np.abs(a - b)) > o["nondet_tol"]:
            raise GradcheckError(f"backward is not repeatable: two runs differ by {np.max(np.abs(a - b)):.3g} in {name}, more than nondet_tol")
        if o["check_grad_dtypes"] and (a.dtype != x.dtype or a.shape != x.shape):
            raise GradcheckError(f"the gradient of {name} is {a.dtype}{a.shape}, but the input is {x.dtype}{x.shape}")
    for name, g in zip(p.names, _pulled(pull, [np.zeros(y.shape, y.dtype) for y in outputs]), strict=True):
        if np.any(g != 0):
            raise GradcheckError(f"backward is not multiplied by the gradient of the output: {name} gets a gradient for zero gradients")
    _check_linear(p, pull, cotangents, first, o)
    if o["check_undefined_grad"] and len(outputs) > 1:
        _check_each_output_alone(p, cotangents, first)
    if o["check_batched_grad"]:
        stacked = [np.stack([c, -2 * c]) for c in cotangents]
        for name, a, b in zip(p.names, first, _pulled(jax.vmap(pull), stacked), strict=True):
            if not np.allclose(np.stack([a, -2 * a]), b, rtol=1e-6, atol=1e-9):
                raise GradcheckError(f"backward under vmap gives another gradient of {name}")


def _pulled(pull: Fn, cotangents: Sequence[Any]) -> list[np.ndarray]:
    return [np.asarray(g) for g in pull(list(map(jnp.asarray, cotangents)))]


def _check_linear(p: _Problem, pull: Fn, cotangents: list[Any], first: Sequence[Any], o: dict[str, Any]) -> None:
    """Gradients of either sign and of several sizes, and the sum of two, in float64."""
    others = [_draw(50 + i, c.shape, c.dtype) for i, c in enumerate(cotangents)]
    cases = [(f"{factor:g} times that gives not {factor:g} times", factor, [factor * a for a in first]) for factor in (2, *FACTORS)]
    given = [_pulled(pull, [c * c.dtype.type(factor) for c in cotangents]) for _, factor, _ in cases]
    cases.append(("the sum of two gives not the sum of", 1, [a + b for a, b in zip(first, _pulled(pull, others), strict=True)]))
    given.append(_pulled(pull, [a + b for a, b in zip(cotangents, others, strict=True)]))
    for (what, size, expected), grads in zip(cases, given, strict=True):
        for name, a, b in zip(p.names, expected, grads, strict=True):
            if not _near(b, a, abs(size), o):
                raise GradcheckError(f"backward is not linear in the gradient of the output: {what} the gradient of {name}")


FACTORS = (-1, 1000, -0.001)
"""What a gradient is multiplied by, to see whether its own gradient is."""


def _near(a: Any, b: Any, size: float, o: dict[str, Any]) -> bool:
    """Whether two gradients agree within the tolerances, where the gradient of the output is about `size`."""
    scale = np.max(np.abs(b), initial=0)
    return bool((np.abs(a - b) <= size * o["atol"] + o["rtol"] * scale).all())


def _random_rows(outputs: list[Any]) -> np.ndarray:
    """Random gradients of the outputs, of both signs and of several sizes."""
    width = sum(map(_width, outputs))
    return np.stack([factor * _draw(60 + k, (width,), np.float64) for k, factor in enumerate((1, *FACTORS))])


def _check_against(p: _Problem, jacobian: np.ndarray, rows: np.ndarray, given: np.ndarray, o: dict[str, Any]) -> None:
    """The gradients that are given for random ones, against the product with the Jacobian, whose rows are gradients of single entries."""
    ends = np.cumsum(list(map(_width, p.inputs)))[:-1]
    for factor, row, grads in zip((1, *FACTORS), rows, given, strict=True):
        for name, a, b in zip(p.names, np.split(grads, ends), np.split(row @ jacobian, ends), strict=True):
            if not _near(a, b, abs(factor), o):
                worst = np.max(np.abs(a - b))
                raise GradcheckError(
                    "backward is not linear in the gradient of the output: for random gradients "
                    f"of size {abs(factor):g} that of {name} is not their product with the Jacobian: they differ by {worst:.3g}"
                )


def _check_each_output_alone(p: _Problem, cotangents: list[Any], whole: Sequence[Any]) -> None:
    """The gradients with all outputs but one unused, which reach backward as absent, sum to those with all."""
    parts = []
    for i, c in enumerate(cotangents):
        parts.append(_pulled(jax.vjp(lambda *x, i=i: [p.outputs(*x)[i]], *p.inputs)[1], [c]))
    for name, total, *part in zip(p.names, whole, *parts, strict=True):
        if not np.allclose(total, sum(part), rtol=1e-6, atol=1e-9):
            raise GradcheckError(f"backward does not handle an output without gradient: the gradient of {name} is not the sum over the outputs")


def _compare_all(p: _Problem, mode: str, outputs: list[Any], analytical: np.ndarray, numerical: np.ndarray, o: dict[str, Any]) -> None:
    """Compares two whole Jacobians, of all outputs by all inputs, block by block."""
    rows = np.cumsum([0, *([1] * len(outputs) if o["fast_mode"] else map(_width, outputs))])
    columns = np.cumsum([0, *([DIRECTIONS] * len(p.inputs) if o["fast_mode"] else map(_width, p.inputs))])
    for j, x in enumerate(p.inputs):
        for i, y in enumerate(outputs):
            block = (slice(rows[i], rows[i + 1]), slice(columns[j], columns[j + 1]))
            _compare(p, mode, i, j, x, y, analytical[block], numerical[block], o)


def _compare(p: _Problem, mode: str, i: int, j: int, x: Any, y: Any, analytical: Any, numerical: Any, o: dict[str, Any]) -> None:
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
    likely = likely_second_mistake if isinstance(p.fn, _Gradient) else likely_mistake
    raise GradcheckError(
        f"the {mode} derivative of output {i} with respect to {p.names[j]} is wrong in {bad.sum()} of {bad.size} entries\n"
        f"  worst: d output{_entry(row, y)} / d {p.names[j]}{_entry(column, x)}\n"
        f"  analytical: {analytical[row, column]:.8g}\n  numerical:  {numerical[row, column]:.8g}\n"
        f"  likely: {likely(analytical, numerical, np.shape(x), np.shape(y))}"
    )


def _entry(flat: Any, like: Any) -> str:
    size = max(np.size(like), 1)
    part = "" if not jnp.iscomplexobj(like) else " (real part)" if flat < size else " (imaginary part)"
    return f"[{', '.join(str(int(k)) for k in np.unravel_index(int(flat) % size, np.shape(like)))}]{part}" if np.ndim(like) else part


def _where(mask: np.ndarray) -> str:
    return str(tuple(int(k) for k in np.argwhere(mask)[0]))


def has_gradient(x: Any) -> bool:
    """Whether a leaf is an array of a floating-point or complex dtype."""
    return is_array(x) and is_inexact(x)


def _widened(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64)


def _draw(seed: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    parts = np.random.default_rng(seed).standard_normal((2, *shape))
    return (parts[0] + 1j * parts[1] if jnp.issubdtype(dtype, jnp.complexfloating) else parts[0]).astype(dtype)


def _as_pair(x: Any) -> jax.Array:
    """A flat real vector: the entries, or real then imaginary parts."""
    x = jnp.ravel(x)
    return jnp.concatenate([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def _from_pair(v: Any, like: Any) -> jax.Array:
    n = max(np.size(like), 0)
    return (v[:n] + 1j * v[n:] if jnp.iscomplexobj(like) else v).reshape(np.shape(like)).astype(like.dtype)


def _width(x: Any) -> int:
    return np.size(x) * (2 if jnp.iscomplexobj(x) else 1)


def _vector(xs: Sequence[Any]) -> jax.Array:
    """Arrays as one flat real vector."""
    return jnp.concatenate([_as_pair(x) for x in xs])


def _arrays(v: Any, likes: Sequence[Any]) -> list[jax.Array]:
    """The arrays that `_vector` makes this vector of."""
    ends = np.cumsum([_width(x) for x in likes])[:-1]
    return [_from_pair(part, x) for part, x in zip(jnp.split(v, ends), likes, strict=True)]


def _directions(p: _Problem, outputs: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Random projections: one row for each output, `DIRECTIONS` rows for each input, zero elsewhere."""
    right = [_draw(100 + j, (DIRECTIONS, _width(x)), np.float64) for j, x in enumerate(p.inputs)]
    left = [_draw(200 + i, (1, _width(y)), np.float64) for i, y in enumerate(outputs)]
    return _block_diagonal(left), _block_diagonal(right)


def _block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    whole = np.zeros((sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks)))
    row = column = 0
    for b in blocks:
        whole[row : row + b.shape[0], column : column + b.shape[1]] = b
        row, column = row + b.shape[0], column + b.shape[1]
    return whole


def _numerical(p: _Problem, outputs: list[Any], eps: float, directions: Any) -> np.ndarray:
    """The Jacobian, a row for each entry of the outputs and a column for each of the inputs; or its projections."""

    def column(v: Any) -> Any:
        steps = _arrays(eps * v, p.inputs)
        after = p.outputs(*[x + s for x, s in zip(p.inputs, steps, strict=True)])
        before = p.outputs(*[x - s for x, s in zip(p.inputs, steps, strict=True)])
        return (_vector(after) - _vector(before)) / (2 * eps)

    return _by_columns(p, column, outputs, directions)


def _forward(p: _Problem, outputs: list[Any], directions: Any) -> np.ndarray:
    def column(v: Any) -> Any:
        return _vector(jax.jvp(p.outputs, p.inputs, _arrays(v, p.inputs))[1])

    return _by_columns(p, column, outputs, directions)


def _by_columns(p: _Problem, column: Fn, outputs: list[Any], directions: Any) -> np.ndarray:
    if directions is None:
        return _for_each(column, np.eye(sum(map(_width, p.inputs))), sum(map(_width, outputs))).T
    left, right = directions
    return left @ _for_each(column, right, left.shape[1]).T


def _row(p: _Problem, outputs: list[Any], pull: Fn) -> Fn:
    """The product of a vector and the Jacobian, from the backward rule."""
    return lambda v: _vector([jnp.conj(g) for g in pull([c.conj() for c in _arrays(v, outputs)])])


def _analytical(p: _Problem, outputs: list[Any], pull: Fn, directions: Any, more: Any) -> tuple[np.ndarray, np.ndarray]:
    """The Jacobian from the backward rule, or its projections; and what the rule gives for more rows, in the same program."""
    row, width = _row(p, outputs, pull), sum(map(_width, p.inputs))
    if directions is None:
        whole = sum(map(_width, outputs))
        rows = _for_each(row, np.concatenate([np.eye(whole), more]), width)
        return rows[:whole], rows[whole:]
    left, right = directions
    return _for_each(row, left, width) @ right.T, np.zeros((0, width))


def _for_each(fn: Fn, vectors: np.ndarray, width: int) -> np.ndarray:
    """`fn` of every row, stacked: compiled, and without `vmap` where `fn` cannot be batched."""
    if not len(vectors):
        return np.zeros((0, width))
    try:
        return np.asarray(jax.jit(jax.vmap(fn))(jnp.asarray(vectors)))
    except Exception:
        return np.stack([np.asarray(fn(jnp.asarray(v))) for v in vectors])
