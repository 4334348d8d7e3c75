"""Puts the layers of this library into an existing Flax nnx model, in place of Flax's own.

A twin takes over everything that the Flax layer holds, its parameters, states and rngs as the very same objects, and only
computes differently. So optimisers, checkpoints and shared parameters go on as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

from layers.affine.linear import Linear
from layers.attention.multi_head_attention import MultiHeadAttention
from layers.checking.audit import WAYS
from layers.core import checks
from layers.embeddings.embed import Embed
from layers.norms.batch_norm import BatchNorm
from layers.norms.group_norm import GroupNorm
from layers.norms.layer_norm import LayerNorm
from layers.norms.rms_norm import RMSNorm
from layers.quantization.fp8_linear import Fp8Linear
from layers.recurrent.rnn import RNN
from layers.regularization.dropout import Dropout

TWINS: dict[type[nnx.Module], type[nnx.Module]] = {
    nnx.BatchNorm: BatchNorm,
    nnx.Dropout: Dropout,
    nnx.Embed: Embed,
    nnx.GroupNorm: GroupNorm,
    nnx.LayerNorm: LayerNorm,
    nnx.Linear: Linear,
    nnx.MultiHeadAttention: MultiHeadAttention,
    nnx.RMSNorm: RMSNorm,
    nnx.RNN: RNN,
}
"""The layers of Flax that have a twin: a subclass, which computes differently and holds the same."""

Choice = Iterable[type] | Callable[[str, nnx.Module], bool] | None


@dataclass(frozen=True)
class Swapped:
    """One layer that was looked at: its path, its class, and either the twin that it became or why it was left."""

    path: str
    layer: str
    twin: str = ""
    left_because: str = ""


@dataclass
class SwapReport:
    """What `swap` replaced in a model, and what it left, with the reason; prints as a table.

    Attributes:
        model: the root of the model; another object than was given only where the root is itself such a layer.
        rows: one entry for each layer of Flax in the model, and for each of a subclass of one that has a twin. What a swapped layer is made of is
            part of it, and has an entry only where it is swapped as well.
    """

    model: Any
    rows: list[Swapped] = field(default_factory=list)

    @property
    def swapped(self) -> list[Swapped]:
        return [r for r in self.rows if r.twin]

    @property
    def left(self) -> list[Swapped]:
        return [r for r in self.rows if not r.twin]

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)} of {len(self.rows)} Flax layers"]
        lines += [f"  {r.path or '(root)'}: {r.layer} -> {r.twin or f'left, {r.left_because}'}" for r in self.rows]
        lines.append("  what the model computes by its own code is for layers.rewrite: layers.advise(loss, model, ...) says what that would keep")
        return "\n".join(lines)

    __repr__ = __str__


def swap(model: Any, *, only: Choice = None, skip: Choice = None, fp8: bool = False) -> SwapReport:
    """Replaces every Flax layer of `model` that has a twin here, in place; parameters, rngs and dtypes are shared, not copied.

    Values stay, but for the masks of dropout: those of `Dropout` are not Flax's for the same key unless `generator = "threefry"` is set on
    the layer.

    Args:
        model: an nnx module.
        only: classes of Flax layers, or `(path, layer) -> bool`: nothing else is replaced.
        skip: the same, for what is to be left.
        fp8: makes every `Linear` whose sizes allow it an `Fp8Linear`, whose products are of 8-bit numbers; values do not stay then.

    Returns:
        A report of what was swapped and what was left and why; its `.model` is the root.

    Raises:
        TypeError: where `model` is no nnx module, or `only` or `skip` is neither classes nor a function.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"swap: model is a {type(model).__name__}, but must be an nnx module (for Linen, use the classes of layers.linen)")
    report, chooser = SwapReport(model), _Chooser(_read("only", only), _read("skip", skip), checks.flag("swap", "fp8", fp8))
    report.model = _Walk(chooser, report.rows).replace(model, "")
    return report


def _swapped_apart(fn: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], Any] | None:
    """The function and its arguments with the layers of nnx modules swapped, in modules of their own; None where there are none to swap."""
    is_module = lambda x: isinstance(x, nnx.Module)
    leaves, tree = jax.tree.flatten((fn, args), is_leaf=is_module)
    reports = {i: swap(nnx.merge(*nnx.split(x))) for i, x in enumerate(leaves) if is_module(x)}
    if not any(r.swapped for r in reports.values()):
        return None
    return *tree.unflatten([reports[i].model if i in reports else x for i, x in enumerate(leaves)]), lambda f: f


WAYS["layers.swap(model)"] = _swapped_apart


def _read(name: str, choice: Any) -> Any:
    """A function, None, or classes as a tuple: what gives them one by one is used up by reading it."""
    if choice is None or (callable(choice) and not isinstance(choice, (type, nnx.Module))):
        return choice
    classes = tuple(choice) if isinstance(choice, Iterable) and not isinstance(choice, type) else (choice,)
    for x in classes:
        if not isinstance(x, type):
            what = f"a layer, {type(x).__name__}" if isinstance(x, nnx.Module) else repr(x)
            raise TypeError(f"swap: {name} holds {what}, but must be classes of layers, or a function of (path, layer) -> bool")
    return classes


@dataclass(frozen=True)
class _Chooser:
    only: Choice
    skip: Choice
    fp8: bool

    def twin_of(self, layer: nnx.Module) -> type[nnx.Module]:
        return Fp8Linear if self._narrows(layer) else TWINS[type(layer)]

    def _narrows(self, layer: nnx.Module) -> bool:
        return self.fp8 and type(layer) in (nnx.Linear, Linear) and not Fp8Linear.swap_obstacle(layer)

    def reason_to_leave(self, path: str, layer: nnx.Module) -> str:
        if base := _base_of_subclass(layer):
            return f"a subclass of {base.__name__} may compute something else"
        if type(layer) not in TWINS and not self._narrows(layer):
            return f"no twin for {type(layer).__name__}"
        if self.only is not None and not _matches(self.only, path, layer):
            return "not among `only`"
        if self.skip is not None and _matches(self.skip, path, layer):
            return "among `skip`"
        twin = self.twin_of(layer)
        obstacle = _OBSTACLES.get(type(layer)) if twin is TWINS.get(type(layer)) else None
        return (obstacle or getattr(twin, "swap_obstacle", lambda _: ""))(layer)


def _own_product(linear: Any) -> str:
    """Why Flax's code would still serve a Linear."""
    usual = {"dot_general": jax.lax.dot_general, "precision": None, "preferred_element_type": None}
    own = [name for name, value in usual.items() if getattr(linear, name, value) is not value]
    return f"its {own[0]} is its own, and Flax's code serves that" if own else ""


def _own_attention(attention: Any) -> str:
    """Why Flax's code, or the user's, would still serve an attention."""
    if attention.attention_fn is not nnx.dot_product_attention:
        return "its attention_fn is its own"
    exact = attention.precision is not None and attention.dropout_rate > 0
    return "Flax's code serves a precision together with dropout" if exact else ""


_OBSTACLES: dict[type[nnx.Module], Callable[[Any], str]] = {nnx.Linear: _own_product, nnx.MultiHeadAttention: _own_attention}


def _matches(choice: Any, path: str, layer: nnx.Module) -> bool:
    return isinstance(layer, choice) if isinstance(choice, tuple) else bool(choice(path, layer))


def _base_of_subclass(layer: nnx.Module) -> type[nnx.Module] | None:
    """The layer of Flax with a twin that a user's class derives from; None for Flax's own classes and those of this library."""
    if type(layer).__module__.startswith(("flax.", "layers.")) or isinstance(layer, tuple(TWINS.values())):
        return None
    return next((c for c in type(layer).__mro__ if c in TWINS), None)


@dataclass
class _Walk:
    """One way through a model: the rows of its report, and what has been met, so that an object met twice is replaced by one object."""

    chooser: _Chooser
    rows: list[Swapped]
    seen: dict[int, Any] = field(default_factory=dict)

    def replace(self, value: Any, path: str, inside: bool = False) -> Any:
        """`value` with the layers in it replaced; `inside` a layer that is replaced itself, nothing is listed as left."""
        if id(value) in self.seen:
            return self.seen[id(value)]
        if isinstance(value, (list, nnx.List)):
            self.seen[id(value)] = value
            for i, x in enumerate(value):
                if (new := self.replace(x, _join(path, i), inside)) is not x:
                    value[i] = new
        elif isinstance(value, dict):
            self.seen[id(value)] = value
            for key, x in value.items():
                value[key] = self.replace(x, _join(path, key), inside)
        elif isinstance(value, tuple):
            new = [self.replace(x, _join(path, i), inside) for i, x in enumerate(value)]
            changed = any(a is not b for a, b in zip(new, value, strict=True))
            return (type(value)(*new) if hasattr(value, "_fields") else tuple(new)) if changed else value
        elif isinstance(value, nnx.Module):
            return self.replace_module(value, path, inside)
        return value

    def replace_module(self, module: nnx.Module, path: str, inside: bool) -> nnx.Module:
        self.seen[id(module)] = module
        reason = self.chooser.reason_to_leave(path, module)
        if not reason:
            twin = self.chooser.twin_of(module)
            self.rows.append(Swapped(path, type(module).__name__, f"layers.{twin.__name__}"))
            self.seen[id(module)] = make_twin(module, twin)
        elif not inside and (type(module).__module__.startswith("flax.") or _base_of_subclass(module)):
            self.rows.append(Swapped(path, type(module).__name__, left_because=reason))
        new = self.seen[id(module)]
        inside = inside or isinstance(new, tuple(TWINS.values()))
        if not isinstance(new, RNN):  # which reads the parameters of its cell and never calls it
            for name, x in list(vars(new).items()):
                if not name.startswith("_pytree__") and (replaced := self.replace(x, _join(path, name), inside)) is not x:
                    setattr(new, name, replaced)
        return new


def make_twin(module: nnx.Module, kind: type[nnx.Module] | None = None) -> nnx.Module:
    """The twin of a Flax layer, holding all that it holds; of a `kind` of one's own where given."""
    twin = object.__new__(kind or TWINS[type(module)])
    for name, value in vars(module).items():
        object.__setattr__(twin, name, value)
    return twin


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)
