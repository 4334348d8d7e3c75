"""Which way a call would be computed, by XLA or by a kernel, and the reason against each other one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from layers.checking.tables import html_table, text_table
from layers.core import checks
from layers.core.trees import is_array, replaced
from layers.kernels.dispatch import XLA, Decision, recording
from layers.kernels.place import here


class Implementations:
    """Which way each call of a function goes; prints as a table, shows as HTML in a notebook.

    Attributes:
        decisions: one for each call of a layer that can be computed in several ways, in the order in which they are traced: its `layer`, what is
            known of the `call`, what is `chosen`, and the reason `against` each other way by name.
    """

    def __init__(self, title: str, decisions: Sequence[Decision]):
        self.title, self.decisions, self._place = title, tuple(decisions), str(here())

    @property
    def chosen(self) -> str:
        """What computes it: the one way of all calls, or the several, with commas; "xla" where there is nothing to choose."""
        return ", ".join(dict.fromkeys(d.chosen for d in self.decisions)) or XLA

    def __str__(self) -> str:
        return text_table(f"implementations of {self.title}", self._summary(), _HEAD, self._cells())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(f"implementations of {self.title}", self._summary(), _HEAD, self._cells())

    def _summary(self) -> str:
        return f"compiled for {self._place}" + ("" if self.decisions else "; there is one way only, XLA")

    def _cells(self) -> list[tuple[str, ...]]:
        rows = []
        for d in self.decisions:
            rows.append((d.layer, f"{d.call.dtype}, {d.call.shape_class}", d.chosen, "runs"))
            rows += [("", "", name, reason) for name, reason in d.against.items()]
        return rows


_HEAD = ("layer", "call", "implementation", "")


def implementations(layer: str | Callable[..., Any], *args: Any, **options: Any) -> Implementations:
    """Says which implementation would compute a call of a layer, and why each other one would not.

    Args:
        layer: the name of a public function of this library, or a function or model whose calls of such are listed.
        *args, **options: its arguments, or for arrays what has their shapes and dtypes; nothing is computed.

    Returns:
        The decisions: print them, or read `.chosen`.

    Raises:
        ValueError: where `layer` names no function of this library; and what the call raises.
        TypeError: where `layer` is neither a name nor a function.
    """
    title, fn = _resolved(layer)
    leaves, tree = jax.tree.flatten((args, options))
    indices = [i for i, x in enumerate(leaves) if is_array(x) or isinstance(x, jax.ShapeDtypeStruct)]

    def call(*arrays: Any) -> Any:
        given, named = tree.unflatten(replaced(leaves, indices, arrays))
        return [x for x in jax.tree.leaves(fn(*given, **named)) if is_array(x)]

    with recording() as recorder:
        jax.eval_shape(call, *[leaves[i] for i in indices])
    return Implementations(title, recorder.decisions)


def _resolved(layer: Any) -> tuple[str, Callable[..., Any]]:
    if not isinstance(layer, str):
        fn = checks.function("implementations", "layer", layer)
        return getattr(fn, "__name__", type(fn).__name__), fn
    import layers

    fn = getattr(layers, layer, None) if layer.isidentifier() and not layer.startswith("_") else None
    if not callable(fn) or isinstance(fn, type):
        raise ValueError(f"implementations: layer is {layer!r}, but must be the name of a public function, such as 'dot_product_attention'")
    return layer, fn
