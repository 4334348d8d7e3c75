"""`gradcheck`: a gradient against finite differences, after `torch.autograd.gradcheck`.

For every output f and input x the Jacobian J is computed twice, entry by entry: numerically, J[:, i] = (f(x + eps e_i) - f(x - eps e_i)) / 2 eps, and
from the backward rule, J[j, :] = vjp(e_j). Complex values are taken as pairs of real ones on both sides: f as (Re f, Im f), x as (Re x, Im x),
for which JAX's convention gives the cotangent of x as the conjugate of the gradient of the pair.

What stands beside the function is computed in NumPy: outside `jax.jit` JAX compiles each operation for each shape, which takes long.

Reference: the numerical and analytical Jacobians of `torch.autograd.gradcheck`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.checking.hints import likely_mistake, likely_second_mistake
from layers.checking.jacobians import DIRECTIONS, by_backward, by_differences, by_forward_mode, draw_directions
from layers.checking.problem import Fn, Problem, draw, has_gradient, real_size
from layers.checking.problem import GradcheckError as GradcheckError
from layers.checking.promises import check_against, check_promises, random_rows
from layers.core import checks


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
        problem = Problem(fn, args, argnums)
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
        problem = Problem(fn, args, options.pop("argnums", None))
        _require_result(jax.eval_shape(problem.results, *problem.inputs))
        shapes = jax.eval_shape(problem.outputs, *problem.inputs)
        grads = [draw(i, y.shape, y.dtype) for i, y in enumerate(shapes)] if grad_outputs is None else _given(grad_outputs, shapes)

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


def _check(p: Problem, o: dict[str, Any]) -> None:
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
        check_promises(p, outputs, pull, o)
    directions = draw_directions(p, outputs) if o["fast_mode"] else None
    numerical = by_differences(p, outputs, o["eps"], directions)
    if o["check_backward_ad"]:
        more = random_rows(outputs) if directions is None else None
        jacobian, given = by_backward(p, outputs, pull, directions, more)
        compare_all(p, "backward", outputs, jacobian, numerical, o)
        if more is not None:
            check_against(p, jacobian, more, given, o)
    if o["check_forward_ad"]:
        compare_all(p, "forward", outputs, by_forward_mode(p, outputs, directions), numerical, o)


def compare_all(p: Problem, mode: str, outputs: list[Any], analytical: np.ndarray, numerical: np.ndarray, o: dict[str, Any]) -> None:
    """Compares two whole Jacobians, of all outputs by all inputs, block by block."""
    rows = np.cumsum([0, *([1] * len(outputs) if o["fast_mode"] else map(real_size, outputs))])
    columns = np.cumsum([0, *([DIRECTIONS] * len(p.inputs) if o["fast_mode"] else map(real_size, p.inputs))])
    for j, x in enumerate(p.inputs):
        for i, y in enumerate(outputs):
            block = (slice(rows[i], rows[i + 1]), slice(columns[j], columns[j + 1]))
            _compare(p, mode, i, j, x, y, analytical[block], numerical[block], o)


def _compare(p: Problem, mode: str, i: int, j: int, x: Any, y: Any, analytical: Any, numerical: Any, o: dict[str, Any]) -> None:
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
