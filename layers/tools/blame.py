"""Finds where a training step first became infinite or NaN.

The outputs of layers are looked at in the order of the forward pass, then the loss, then gradients in the order of the backward pass.
Each call of a module notes whether what it returns is finite. To see the gradients, zeros are added to what goes into a call and what comes out,
and the loss is differentiated with respect to these zeros as well: their gradients are those of the layer's input and output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass
class _Tape:
    """What a forward pass notes.

    Attributes:
        zeros: what is added, by name; None in a first pass, which finds their shapes.
        begun: the path of each call, by its name, in the order in which calls begin.
        ended: names in the order in which calls end, and `finite`, whether what each returned is.
        shapes: of the zeros.
    """

    zeros: dict[str, Any] | None
    begun: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    finite: list[jax.Array] = field(default_factory=list)
    shapes: dict[str, jax.ShapeDtypeStruct] = field(default_factory=dict)
    _calls: Counter[tuple[Any, ...]] = field(default_factory=Counter)

    def begin(self, path: tuple[Any, ...], kind: str) -> str:
        self._calls[path] += 1
        count = f" in its call {self._calls[path]}" if self._calls[path] > 1 else ""
        name = (".".join(map(str, path)) or kind) + count
        self.begun[name] = path
        return name

    def end(self, name: str, out: Any) -> None:
        self.ended.append(name)
        self.finite.append(all_finite(out))

    def add(self, place: str, value: Any) -> Any:
        """`value` with zeros added where it is an array that has a gradient."""
        if not isinstance(value, jax.Array) or not jnp.issubdtype(value.dtype, jnp.inexact):
            return value
        self.shapes[place] = jax.ShapeDtypeStruct(value.shape, value.dtype)
        return value if self.zeros is None else value + self.zeros[place]


def all_finite(*trees: Any) -> jax.Array:
    """Whether every number in the trees is finite."""
    return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(trees) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)], bool).all()


def first_not_finite(graph: Any, params: Any, rest: Any, loss: Callable[[Any], jax.Array]) -> str:
    """Says what is the first in a step that is not finite: an output of a layer, the loss, or a gradient; "" where all is.

    Args:
        graph, params, rest: the split nnx model.
        loss: `model -> scalar`, of the batch of that step.
    """
    last = _Tape(None)

    def run(params: Any, zeros: Any) -> tuple[jax.Array, list[jax.Array]]:
        nonlocal last
        model, last = nnx.merge(graph, params, rest), _Tape(zeros)
        with _taped(model, last):
            return loss(model), last.finite

    jax.eval_shape(run, params, None)
    zeros = {place: jnp.zeros(s.shape, s.dtype) for place, s in last.shapes.items()}
    (value, finite), (of_params, of_zeros) = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(params, zeros)
    found = [(f"the output of {name}", ok) for name, ok in zip(last.ended, finite, strict=True)]
    found += [("the loss", all_finite(value)), *_gradients(last, of_params, of_zeros)]
    return next((what for what, ok in found if not ok), "")


def _gradients(tape: _Tape, of_params: Any, of_zeros: dict[str, Any]) -> Iterator[tuple[str, jax.Array]]:
    """Each gradient and whether it is finite, as the backward pass comes to it: the parameters of no module that was called come last."""
    left = {path: nnx.pure(value) for path, value in nnx.to_flat_state(of_params)}
    for name, path in reversed(tape.begun.items()):
        own = [p for p in left if p[:-1] == path]
        parts = {
            f"output of {name}": of_zeros,
            **{".".join(map(str, p)): {".".join(map(str, p)): left.pop(p)} for p in own},
            f"input of {name}": of_zeros,
        }
        yield from ((f"the gradient of the {part}", all_finite(of[part])) for part, of in parts.items() if part in of)
    yield from ((f"the gradient of the {'.'.join(map(str, p))}", all_finite(value)) for p, value in left.items())


@contextmanager
def _taped(model: nnx.Module, tape: _Tape) -> Iterator[None]:
    """Has every call of a module in `model` noted while the block runs."""
    modules = list(nnx.iter_modules(model))
    paths = {id(m): path for path, m in modules}
    originals = {c: vars(c)["__call__"] for c in {type(m) for _, m in modules} if "__call__" in vars(c)}

    def taped(original: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in paths:
                return original(self, *args, **kwargs)
            name = tape.begin(paths[id(self)], type(self).__name__)
            out = original(self, *[tape.add(f"input of {name}", a) if i == 0 else a for i, a in enumerate(args)], **kwargs)
            tape.end(name, out)
            return tape.add(f"output of {name}", out)

        return __call__

    try:
        for c, original in originals.items():
            c.__call__ = taped(original)
        yield
    finally:
        for c, original in originals.items():
            c.__call__ = original
