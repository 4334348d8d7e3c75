"""What the backward pass of a JAX function keeps alive: array by array, with bytes, layer and source line.

`jax.vjp` is traced, not run: its result holds every array that the backward pass reads, the residuals. Each is followed to the operation
that made it. The figures are exact where forward and backward are compiled apart; inside one `jit`, XLA may fuse a recomputation
and keep less, so there they are an upper bound.
"""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.check.producers import clean_scope, find_producer
from layers.check.scopes import module_scopes
from layers.core import compat

_LIBRARY = tuple(os.sep + os.path.join(*parts) + os.sep for parts in (("layers", "core"), ("layers", "check"), ("flax",), ("equinox",)))


@dataclass(frozen=True)
class Residual:
    """One array that the backward pass keeps.

    Attributes:
        kind: "argument" (alive anyway), "constant", or "extra".
        bytes: its size.
        shape, dtype: its type.
        layer: nnx module path or named scope that made it; for an argument its path in the arguments.
        operation: the JAX primitive that computes it.
        source: `file:line (function)`.
        name: its `checkpoint_name`.
        repeats: lengths of the loops that stacked it.
        used: whether the backward pass reads it.
    """

    kind: str
    bytes: int
    shape: tuple[int, ...]
    dtype: str
    layer: str = ""
    operation: str = ""
    source: str = ""
    name: str = ""
    repeats: tuple[int, ...] = ()
    used: bool = True


class Residuals:
    """The audit of one function; prints as a table, shows as HTML in a notebook."""

    def __init__(self, rows: Sequence[Residual], title: str, again: Callable[[Callable[..., Any]], Residuals]):
        self.rows = sorted(rows, key=lambda r: -r.bytes)
        self.title = title
        self._again = again

    @property
    def extra(self) -> int:
        """Bytes kept beyond arguments and constants."""
        return sum(r.bytes for r in self.rows if r.kind == "extra")

    @property
    def total(self) -> int:
        """Bytes kept in all."""
        return sum(r.bytes for r in self.rows)

    def by_layer(self, depth: int | None = None) -> dict[str, int]:
        """Extra bytes of each layer, largest first; `depth` cuts the paths."""
        count: Counter[str] = Counter()
        for r in self.rows:
            if r.kind == "extra":
                count["/".join(r.layer.split("/")[:depth]) or "(no layer)"] += r.bytes
        return dict(count.most_common())

    def compare(self, other: Callable[..., Any] | Residuals, *args: Any) -> Comparison:
        """Sets this audit beside another: that of another function, or one already made.

        Args:
            other: a function or an nnx module, which takes the place of the one audited here; or an audit.
            *args: its arguments; without them it gets those of this audit, differentiated by the same ones.
        """
        if isinstance(other, Residuals):
            return Comparison(self, other)
        return Comparison(self, residuals(other, *args) if args else self._again(other))

    def __str__(self) -> str:
        return _text(self.title, self._summary(), _HEAD, self._cells())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return _html(self.title, self._summary(), _HEAD, self._cells())

    def _summary(self) -> str:
        kinds: Counter[str] = Counter(dict.fromkeys(("extra", "argument", "constant"), 0))
        for r in self.rows:
            kinds[r.kind] += r.bytes
        unused = sum(r.bytes for r in self.rows if not r.used)
        text = ", ".join(f"{k} {_size(v)}" for k, v in kinds.items())
        return text + (f"; never read by the backward pass: {_size(unused)}" if unused else "")

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                _size(r.bytes),
                r.kind,
                f"{r.dtype}[{','.join(map(str, r.shape))}]" + "".join(f" x{n}" for n in r.repeats),
                r.layer,
                r.name or r.operation + ("" if r.used else " (unused)"),
                r.source,
            )
            for r in self.rows
        ]

    def plot(self, ax: Any = None, *, depth: int | None = None) -> Any:
        """A bar for each layer's extra bytes in MiB, with matplotlib. Returns the axes."""
        return _bars(ax, {self.title: self.by_layer(depth)})


class Comparison:
    """Two audits side by side."""

    def __init__(self, first: Residuals, second: Residuals):
        self.first, self.second = first, second

    @property
    def ratio(self) -> float:
        """Extra bytes of the second as a share of the first's."""
        return self.second.extra / self.first.extra if self.first.extra else float("inf" if self.second.extra else 1)

    def _cells(self) -> list[tuple[str, ...]]:
        a, b = self.first.by_layer(), self.second.by_layer()
        return [(layer, _size(a.get(layer, 0)), _size(b.get(layer, 0))) for layer in sorted({*a, *b}, key=lambda n: -max(a.get(n, 0), b.get(n, 0)))]

    def _parts(self) -> tuple[str, str, tuple[str, ...], list[tuple[str, ...]]]:
        title = f"{self.first.title} and {self.second.title}"
        summary = f"extra {_size(self.first.extra)} and {_size(self.second.extra)}, {self.ratio:.3g} of the first"
        return title, summary, ("layer", self.first.title, self.second.title), self._cells()

    def __str__(self) -> str:
        return _text(*self._parts())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return _html(*self._parts())

    def plot(self, ax: Any = None) -> Any:
        """Two bars for each layer, in MiB."""
        return _bars(ax, {f"1: {self.first.title}": self.first.by_layer(), f"2: {self.second.title}": self.second.by_layer()})


def residuals(fn: Callable[..., Any], *args: Any, wrt: int | Sequence[int] | None = None) -> Residuals:
    """Says what the backward pass of `fn(*args)` keeps alive.

    Args:
        fn: any differentiable JAX function, or an nnx module, whose parameters then count as its first argument.
        *args: its arguments: arrays, pytrees, nnx modules (whose paths name the layers), or `jax.ShapeDtypeStruct`s. Nothing is computed.
        wrt: the arguments to differentiate by their place, negative ones from the end; all by default.

    Returns:
        The audit: `.rows`, `.extra` and `.total` (bytes), `.by_layer()`, `.compare(other_fn)`, `.plot()`.

    Raises:
        TypeError: where no argument can be differentiated.
        ValueError: where `wrt` names an argument that there is not.
    """
    title = getattr(fn, "__name__", type(fn).__name__)
    given, first = args, int(isinstance(fn, nnx.Module))
    if isinstance(fn, nnx.Module):
        fn, args = (lambda module, *a: module(*a)), (fn, *args)
    leaves, tree = jax.tree.flatten(args)
    chosen = _places(wrt, len(args))
    of_argument = [i for i, a in enumerate(args) for _ in jax.tree.leaves(a)]
    moving = [i for i, x in enumerate(leaves) if of_argument[i] in chosen and jnp.issubdtype(jnp.result_type(x), np.inexact)]
    if not moving:
        raise TypeError(f"residuals: no argument of {title} can be differentiated: at least one must hold floating-point arrays (see wrt)")
    with module_scopes(args) as note:

        def run(*flat: Any) -> Any:
            def of_moving(*moved: Any) -> Any:
                now = list(flat)
                for i, x in zip(moving, moved, strict=True):
                    now[i] = x
                values = tree.unflatten(now)
                note(values)
                return fn(*values)

            return jax.vjp(of_moving, *[flat[i] for i in moving])

        traced, (out, vjp) = jax.make_jaxpr(run, return_shape=True)(*leaves)
    jaxpr = compat.open_jaxpr(traced)
    kept = jaxpr.outvars[len(jaxpr.outvars) - len(jax.tree.leaves(vjp)) :]
    backward = compat.open_jaxpr(jax.make_jaxpr(lambda pull, ct: pull(ct))(vjp, _cotangent(out)))
    used = compat.used_inputs(backward)[: len(kept)]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(args)]

    def again(other: Callable[..., Any]) -> Residuals:
        shift = int(isinstance(other, nnx.Module)) - first
        return residuals(other, *given, wrt=None if wrt is None else [i + shift for i in chosen if i + shift >= 0])

    return Residuals(_rows(jaxpr, kept, used, names), title, again)


def _places(wrt: Any, count: int) -> list[int]:
    """The places of the arguments to differentiate, counted from the front."""
    places = list(range(count) if wrt is None else (wrt,) if isinstance(wrt, (int, np.integer)) else wrt)
    for i in places:
        if not -count <= i < count:
            raise ValueError(f"residuals: wrt names argument {i}, but there are {count}: it must lie from {-count} to {count - 1}")
    return [int(i) % count for i in places]


def _cotangent(out: Any) -> Any:
    return jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, np.inexact) else np.zeros(a.shape, jax.dtypes.float0), out)


def _rows(jaxpr: Any, kept: Sequence[Any], used: Sequence[bool], names: Sequence[str]) -> list[Residual]:
    rows: dict[int, Residual] = {}
    for variable, is_used in zip(kept, used, strict=True):
        if not hasattr(variable.aval, "shape"):
            continue
        before = rows.get(id(variable))
        if before is None or (is_used and not before.used):
            rows[id(variable)] = _row(jaxpr, variable, bool(is_used), names)
    return list(rows.values())


def _row(jaxpr: Any, variable: Any, used: bool, names: Sequence[str]) -> Residual:
    aval = variable.aval
    itemsize = 8 if compat.is_key(aval) else np.dtype(aval.dtype).itemsize
    size = int(np.prod(aval.shape, dtype=np.int64)) * itemsize
    shape, dtype = tuple(aval.shape), str(aval.dtype)
    if hasattr(variable, "val"):
        return Residual("constant", size, shape, dtype, used=used)
    made = find_producer(jaxpr, variable)
    if made.eqn is None:
        place = next((i for i, v in enumerate(jaxpr.invars) if v is made.variable), None)
        if place is None:
            return Residual("constant", size, shape, dtype, used=used)
        return Residual("argument", size, shape, dtype, layer=f"args{names[place]}", used=used)
    return Residual(
        "extra",
        size,
        shape,
        dtype,
        layer=clean_scope(made.scope),
        operation=made.eqn.primitive.name,
        source=_source(made.eqn),
        name=made.name,
        repeats=tuple(made.repeats),
        used=used,
    )


def _source(eqn: Any) -> str:
    frames = compat.source_frames(eqn)
    own = [f for f in frames if not any(part in f[0] for part in _LIBRARY)] or frames
    return f"{os.path.basename(own[0][0])}:{own[0][1]} ({own[0][2]})" if own else ""


_HEAD = ("size", "kind", "array", "layer", "made by", "source")


def _size(n: int) -> str:
    value = float(n)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def _text(title: str, summary: str, head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    try:
        return _rich_text(title, summary, head, cells)
    except ImportError:
        widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *cells)]
        return "\n".join([f"{title}: {summary}", *lines])


def _rich_text(title: str, summary: str, head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=summary)
    for column in head:
        table.add_column(column, overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table, markup=False)
    return captured.get()


def _html(title: str, summary: str, head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    def row(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values) + "</tr>"

    body = "".join(row("td", c) for c in cells)
    return f"<p><b>{html.escape(title)}</b>: {html.escape(summary)}</p><table><thead>{row('th', head)}</thead><tbody>{body}</tbody></table>"


def _bars(ax: Any, series: dict[str, dict[str, int]]) -> Any:
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(layout="constrained")[1]
    layers = list(dict.fromkeys(layer for s in series.values() for layer in s))
    height = 0.8 / len(series)
    for i, (label, sizes) in enumerate(series.items()):
        ax.barh([j + i * height for j in range(len(layers))], [sizes.get(n, 0) / 2**20 for n in layers], height=height, label=label)
    ax.set_yticks([j + height * (len(series) - 1) / 2 for j in range(len(layers))], layers)
    ax.invert_yaxis()
    ax.set_xlabel("kept for the backward pass, MiB")
    ax.legend()
    return ax
