"""The contract that every layer of the catalogue passes, and that a `Function` of one's own can be held to in one line."""

from __future__ import annotations

import functools
import html
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.check.gradcheck import gradcheck, has_gradient
from layers.check.second import RAYS, Second, beside, direction_at, nan_on_rays, second_derivative
from layers.core import checks
from layers.function import engine
from layers.function.function import Function


@dataclass(frozen=True)
class Row:
    """One clause: "passed", "failed" or "skipped", and the figure or the reason."""

    clause: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """What `check` found; prints as a table, shows as HTML in a notebook."""

    name: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(r.outcome != "failed" for r in self.rows)

    def __bool__(self) -> bool:
        return self.passed

    def raise_if_failed(self) -> None:
        """Raises AssertionError with the clauses that failed."""
        failed = [f"{r.clause}: {r.detail}" for r in self.rows if r.outcome == "failed"]
        if failed:
            raise AssertionError(f"{self.name} breaks its contract:\n" + "\n".join(failed))

    def __str__(self) -> str:
        width = max(len(r.clause) for r in self.rows)
        lines = [f"{self.name}: {'passed' if self.passed else 'FAILED'}"]
        return "\n".join(lines + [f"  {r.clause:{width}}  {r.outcome:7}  {r.detail.splitlines()[0] if r.detail else ''}".rstrip() for r in self.rows])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{html.escape(r.clause)}</td><td>{r.outcome}</td><td><pre>{html.escape(r.detail)}</pre></td></tr>" for r in self.rows
        )
        verdict = "passed" if self.passed else "FAILED"
        return f"<p><b>{html.escape(self.name)}</b>: {verdict}</p><table>{cells}</table>"


class _Skip(Exception):
    """A clause that does not apply."""


class _Subject:
    """A layer as a function of its floating-point arrays, a loss of it, and the gradient of that.

    What stands beside the layer is computed in NumPy: outside `jax.jit` JAX compiles each operation for each shape, which takes long.
    """

    def __init__(self, fn: Any, args: tuple[Any, ...]):
        self.cls = fn if isinstance(fn, type) and issubclass(fn, Function) else None
        self.fn: Callable[..., Any] = fn if self.cls is None else self.cls.apply
        self.args = args
        leaves, tree = jax.tree.flatten(args)
        self.indices = [i for i, x in enumerate(leaves) if has_gradient(x)]
        self.differentiated = [jnp.asarray(leaves[i]) for i in self.indices]

        def call(fn: Callable[..., Any], *moved: Any) -> list[Any]:
            now = list(leaves)
            for i, x in zip(self.indices, moved, strict=True):
                now[i] = x
            return [y for y in jax.tree.leaves(fn(*tree.unflatten(now))) if has_gradient(y)]

        self.call = call

    def outputs(self, *moved: Any) -> list[Any]:
        return self.call(self.fn, *moved)

    def loss(self, *moved: Any) -> Any:
        return sum((jnp.sum(jnp.real(y * _weights(y))) for y in self.outputs(*moved)), jnp.zeros(()))

    def gradient(self, *moved: Any) -> tuple[Any, ...]:
        """That of `loss`, whose gradient in each output is its weights."""
        outputs, pull = jax.vjp(self.outputs, *moved)
        return pull([jnp.asarray(_weights(y)) for y in outputs])

    @functools.cached_property
    def expected(self) -> tuple[Any, ...]:
        """The gradient at the arguments, without any transformation."""
        return self.gradient(*self.differentiated)

    @functools.cached_property
    def compiled(self) -> Callable[..., tuple[Any, ...]]:
        """`gradient`, compiled; the clause "jit" compares it with `expected`."""
        return jax.jit(self.gradient)

    @functools.cached_property
    def second(self) -> Second:
        """The outputs, the gradient and its derivative along a direction, in one program; for float64."""
        return second_derivative(self.outputs, _weights)

    @property
    def wide(self) -> list[np.ndarray]:
        """The arguments in float64, where that is enabled."""
        return [np.asarray(_wide(x)) for x in self.differentiated]

    @functools.cached_property
    def batched(self) -> Callable[..., tuple[Any, ...]]:
        """`gradient` of each of a batch, compiled."""
        return jax.jit(jax.vmap(self.gradient))

    @functools.cached_property
    def pairs(self) -> tuple[list[Any], list[Any]]:
        """A batch of two of each argument, and the gradient of each, stacked."""
        batch = [_array(np.stack([x, _half(x)])) for x in self.differentiated]
        halves = self.compiled(*[_half(x) for x in self.differentiated])
        return batch, [np.stack(pair) for pair in zip(self.compiled(*self.differentiated), halves, strict=True)]


def check(fn: Any, *args: Any) -> Report:
    """Holds a layer to the contract: right gradient, every transformation, dtypes, sharding, no leak, memory.

    Args:
        fn: a `Function` class, or any JAX function.
        *args: its arguments; for a class that has an `example` or `examples`, none are needed. Small arrays: whole Jacobians are computed.
            `examples(key, dtype)` is a dict of more arguments by name: options that change the rule, and edges such as an empty array, 1e4 or inf.

    Returns:
        A report with a row for each clause; `report.passed`, `report.raise_if_failed()`.

    Raises:
        TypeError: where arguments are missing, or none of them is a floating-point array.
    """
    fn = checks.function("check", "fn", fn)
    name, given = getattr(fn, "__name__", type(fn).__name__), bool(args)
    if not given and hasattr(fn, "example"):
        args = fn.example(jax.random.key(0), jnp.float32)
    elif not given and hasattr(fn, "examples"):
        args = next(iter(_examples(fn).values()))
    elif not given:
        raise TypeError(f"check: {name} has no `example`, so give its arguments: check({name}, *args)")
    subject = _Subject(fn, args)
    if not subject.differentiated:
        raise TypeError(f"check: no argument of {name} is a floating-point array")
    rows = [_run("no NaN", _no_nan, subject)]
    for title, clause in _CLAUSES.items():
        rows.append(_run(title, clause, subject) if rows[0].outcome == "passed" else Row(title, "skipped", "there is a NaN"))
    if not given and hasattr(fn, "examples"):
        rows += [_run(f"example: {title}", _holds_there, _Subject(fn, at)) for title, at in _examples(fn).items()]
    return Report(name, tuple(rows))


def _examples(fn: Any) -> dict[str, tuple[Any, ...]]:
    return fn.examples(jax.random.key(0), jnp.float32)


def _run(title: str, clause: Callable[[_Subject], str | None], subject: _Subject) -> Row:
    try:
        return Row(title, "passed", clause(subject) or "")
    except _Skip as reason:
        return Row(title, "skipped", str(reason))
    except Exception as error:
        return Row(title, "failed", f"{type(error).__name__}: {error}")


def _weights(y: Any) -> Any:
    return np.cos(np.arange(np.size(y), dtype=np.float32)).reshape(np.shape(y)).astype(y.dtype)


def _array(x: Any, dtype: Any = None) -> jax.Array:
    return jnp.asarray(np.asarray(x).astype(dtype or x.dtype))


def _half(x: Any) -> jax.Array:
    return _array(np.asarray(x) / 2, x.dtype)


def _wide(x: Any) -> jax.Array:
    return _array(x, np.complex128 if jnp.iscomplexobj(x) else np.float64)


def _same(actual: Sequence[Any], expected: Sequence[Any], *, tolerance: float = 2e-4) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a, e = np.asarray(a), np.asarray(e)
        scale = max(1.0, float(np.max(np.abs(e), initial=0)))
        assert a.shape == e.shape, f"array {i} has shape {a.shape}, not {e.shape}"
        worst = float(np.max(np.abs(a - e), initial=0))
        assert worst <= tolerance * scale, f"array {i} differs by {worst:.3g}"


def _no_nan(s: _Subject) -> None:
    _no_nan_in(s.expected)


def _no_nan_in(gradients: Sequence[Any]) -> None:
    for i, g in enumerate(map(np.asarray, gradients)):
        assert not np.isnan(g).any(), f"the gradient of array {i} is NaN at {tuple(map(int, np.argwhere(np.isnan(g))[0]))}"


def _holds_there(s: _Subject) -> str | None:
    """The clauses for one of `examples`: at an edge there is no NaN, elsewhere the derivatives are right too."""
    if not s.differentiated:
        return "no floating-point array"
    _no_nan_in(s.compiled(*s.differentiated))
    if not all(x.size and np.isfinite(np.asarray(x)).all() for x in s.differentiated):
        return "no NaN"
    said = _gradient_is_right(s)
    try:
        return f"{said}, and {_second_derivative(s)}"
    except _Skip:
        return said


def _gradient_is_right(s: _Subject) -> str:
    surrogate = getattr(s.cls, "surrogate", None)
    if surrogate is None:
        with jax.enable_x64(True):
            gradcheck(jax.jit(s.outputs), tuple(_wide(x) for x in s.differentiated))  # without jit each operation is compiled by itself
        return "as finite differences"

    def pulled(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(*moved: Any) -> Any:
            outputs, pull = jax.vjp(lambda *x: s.call(fn, *x), *moved)
            return pull([_weights(y) for y in outputs])

        return jax.jit(run)

    _same(pulled(s.fn)(*s.differentiated), pulled(surrogate)(*s.differentiated))
    return "that of its surrogate"


def _second_derivative(s: _Subject) -> str:
    _needs_forward_mode()
    try:
        with jax.enable_x64(True):
            found, expected = beside(s.second, s.wide)
    except RuntimeError as error:
        if "@once_differentiable" in str(error):
            raise _Skip("differentiable once") from None
        raise
    surrogate = getattr(s.cls, "surrogate", None)
    try:
        _same(found, expected)
        return "as differences of the gradient"
    except AssertionError as error:
        if surrogate is None:
            raise AssertionError(f"{error} from differences of the gradient: backward hides how it depends on the arguments?") from None
    with jax.enable_x64(True):
        of_surrogate = second_derivative(lambda *moved: s.call(surrogate, *moved), _weights)
        _same(found, of_surrogate(s.wide, [direction_at(x) for x in s.wide])[2])
    return "that of its surrogate"


def _far_out(s: _Subject) -> str:
    _needs_forward_mode()
    rays = getattr(s.cls, "rays", RAYS)
    if not rays or (s.cls is not None and hasattr(s.cls.backward, "once_differentiable")):
        raise _Skip("no rays" if not rays else "differentiable once")
    with jax.enable_x64(True):
        fault = nan_on_rays(s.second, s.wide, rays)
    assert fault is None, fault
    return f"no NaN at {', '.join(f'{r:g}' for r in rays)} times the example"


def _needs_forward_mode() -> None:
    if engine.current() != "linear":
        raise _Skip(f"the engine '{engine.current()}' has no forward mode")


def _linear(s: _Subject) -> None:
    """Gradients of both signs and of several sizes; the clause "gradient" compares them with the Jacobian."""
    pull = jax.jit(lambda *cotangents: jax.vjp(s.outputs, *s.differentiated)[1](list(cotangents)))
    weights = [_weights(y) for y in jax.eval_shape(s.outputs, *s.differentiated)]
    others = [np.roll(np.ravel(w), 1).reshape(w.shape)[::-1] if w.ndim else w for w in weights]
    once, other = pull(*weights), pull(*others)
    for factor in (-1, 1024, -1 / 1024):
        _same([np.asarray(g) / factor for g in pull(*[(factor * w).astype(w.dtype) for w in weights])], once)
    _same(pull(*[a + b for a, b in zip(weights, others, strict=True)]), [np.asarray(a) + np.asarray(b) for a, b in zip(once, other, strict=True)])


def _jit(s: _Subject) -> None:
    _same(s.compiled(*s.differentiated), s.expected)
    _same(jax.grad(jax.jit(s.loss), tuple(range(len(s.differentiated))))(*s.differentiated), s.expected)


def _remat(s: _Subject) -> None:
    for policy in (None, jax.checkpoint_policies.dots_saveable):
        again = jax.grad(jax.checkpoint(s.loss, policy=policy), tuple(range(len(s.differentiated))))
        _same(jax.jit(again)(*s.differentiated), s.expected)


def _scan(s: _Subject) -> None:
    def twice(*moved: Any) -> Any:
        return jax.lax.scan(lambda total, _: (total + s.loss(*moved), None), jnp.zeros(()), None, length=2)[0]

    _same(jax.jit(jax.grad(twice, tuple(range(len(s.differentiated)))))(*s.differentiated), [2 * np.asarray(g) for g in s.expected])


def _vmap(s: _Subject) -> None:
    batch, expected = s.pairs
    _same(s.batched(*batch), expected)
    first = [batch[0], *s.differentiated[1:]]
    axes = (0, *[None] * (len(first) - 1))
    whole = jax.grad(lambda *x: jax.vmap(s.loss, axes)(*x).sum(), tuple(range(len(first))))
    one, two = (jax.tree.map(np.asarray, s.compiled(x, *s.differentiated[1:])) for x in (s.differentiated[0], _half(s.differentiated[0])))
    _same(jax.jit(whole)(*first), [np.stack([one[0], two[0]]), *[a + b for a, b in zip(one[1:], two[1:], strict=True)]])


def _forward_mode(s: _Subject) -> None:
    if s.cls is not None:
        _needs_forward_mode()
    if s.cls is not None and s.cls._has_jvp() and hasattr(s.cls, "surrogate"):
        raise _Skip("its tangent is by design not its gradient")
    tangents = [_array(np.cos(3 * np.asarray(x)), x.dtype) for x in s.differentiated]
    slope = jax.jit(lambda x, t: jax.jvp(s.loss, x, t)[1])(s.differentiated, tangents)
    inner = sum(np.sum(np.real(np.asarray(g) * np.asarray(t))) for g, t in zip(s.expected, tangents, strict=True))
    _same([slope], [inner], tolerance=2e-3)


def _partial(s: _Subject) -> None:
    each = jax.jit(lambda *moved: [jax.grad(s.loss, i)(*moved) for i in range(len(moved))])
    _same(each(*s.differentiated), s.expected)


def _dtypes(s: _Subject) -> str:
    worst = {}
    for dtype in (jnp.bfloat16, jnp.float16):
        moved = [x if jnp.iscomplexobj(x) else _array(x, dtype) for x in s.differentiated]
        given = s.compiled(*moved)
        for x, g in zip(moved, given, strict=True):
            assert g.dtype == x.dtype, f"an argument of {x.dtype} gets a gradient of {g.dtype}"
            assert np.isfinite(np.asarray(g, np.complex64)).all(), f"the gradient in {dtype.__name__} is not finite"
        if not hasattr(s.cls, "surrogate"):
            worst[dtype.__name__] = _error_in(s, moved, given)
            assert worst[dtype.__name__] <= HALF_PRECISION_EPS * float(jnp.finfo(dtype).eps), (
                f"the gradient in {dtype.__name__} has a relative error of {worst[dtype.__name__]:.3g} against float64"
            )
    return ", ".join(f"{name}: error {error:.2g}" for name, error in worst.items()) or "bfloat16, float16"


HALF_PRECISION_EPS = 16
"""How many roundings of half precision the gradient may be away from that in float64: the sum over a small example's operations."""


def _error_in(s: _Subject, moved: Sequence[Any], given: Sequence[Any]) -> float:
    """The largest relative error (Euclidean norm) of gradients of rounded arguments, beside float64 at the same arguments."""
    with jax.enable_x64(True):
        exact = [np.asarray(e) for e in s.compiled(*map(_wide, moved))]
    errors = [np.linalg.norm(np.ravel(np.asarray(g, e.dtype) - e)) / max(np.linalg.norm(np.ravel(e)), 1.0) for g, e in zip(given, exact, strict=True)]
    return float(max(errors, default=0.0))


def _sharding(s: _Subject) -> str:
    devices = jax.devices()
    if len(devices) < 2:
        raise _Skip("one device")
    mesh = jax.sharding.Mesh(np.array(devices[:2]), ("d",))
    spec = jax.sharding.PartitionSpec("d")
    batch, expected = s.pairs
    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in batch]
    _same(s.batched(*placed), expected)

    def on_each(*moved: Any) -> Any:
        return [g[None] for g in jax.grad(s.loss, tuple(range(len(moved))))(*[x[0] for x in moved])]

    mapped = jax.shard_map(on_each, mesh=mesh, in_specs=spec, out_specs=spec)
    _same(jax.jit(mapped)(*placed), expected)

    replicated = jax.sharding.PartitionSpec()
    shared = jax.shard_map(
        lambda scale, *moved: scale * s.loss(*moved)[None], mesh=mesh, in_specs=(spec, *[replicated] * len(s.differentiated)), out_specs=spec
    )
    total = jax.grad(lambda *x: shared(jnp.array([1.0, 2.0]), *x).sum(), tuple(range(len(s.differentiated))))
    _same(jax.jit(total)(*s.differentiated), [3 * np.asarray(g) for g in s.expected])
    return "jit, shard_map"


def _no_leak(s: _Subject) -> None:
    with jax.checking_leaks():
        jax.eval_shape(lambda *moved: s.gradient(*moved), *s.differentiated)  # a function of its own, so that it is traced here


def _memory(s: _Subject) -> str:
    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(s.outputs, *x)[1], *s.differentiated))
    total = sum(x.size * x.dtype.itemsize for x in kept)
    return f"{total} bytes for arguments of {sum(x.nbytes for x in s.differentiated)}"


_CLAUSES: dict[str, Callable[[_Subject], str | None]] = {
    "gradient": _gradient_is_right,
    "second derivative": _second_derivative,
    "far out": _far_out,
    "linear in the gradient": _linear,
    "jit": _jit,
    "vmap": _vmap,
    "scan": _scan,
    "remat": _remat,
    "forward mode": _forward_mode,
    "each argument alone": _partial,
    "dtypes": _dtypes,
    "sharding": _sharding,
    "no leak": _no_leak,
    "memory kept": _memory,
}


def catalogue() -> list[type[Function]]:
    """Every `Function` of the library that has an `example`, by name."""
    import layers

    found = {}
    for module in pkgutil.walk_packages(layers.__path__, "layers."):
        if module.name.split(".")[1] in ("core", "function", "kernels", "check", "tools", "linen", "swap", "__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Function) and "example" in vars(value):
                found[value.__name__] = value
    return [found[name] for name in sorted(found)]
