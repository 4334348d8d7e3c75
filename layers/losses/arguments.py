"""What the losses ask of their arguments, and the shapes they come in: one row after another inside, any batch axes outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layers.core import checks
from layers.core.rows import as_rows
from layers.losses.targets import REDUCTIONS, Labels

OPTIONS: dict[str, Callable[[str, str, Any], Any]] = {
    "ignore_index": checks.integer,
    "label_smoothing": partial(checks.number, within="[0, 1]", traced=True),
    "z_loss": partial(checks.number, within="[0, inf)", traced=True),
    "logit_soft_cap": partial(checks.number, within="(0, inf)", traced=True, optional=True),
    "temperature": partial(checks.number, within="(0, inf)", traced=True),
    "beta": partial(checks.number, within="[0, 1]"),
    "reduction": partial(checks.choice, options=REDUCTIONS),
    "return_logsumexp": checks.flag,
    "return_accuracy": checks.flag,
    "return_entropy": checks.flag,
    "return_rank": checks.flag,
    "block_size": partial(checks.integer, within="[1, inf)", optional=True),
}


OPTION = "a number among the options, such as temperature or label_smoothing,"


def read_options(who: str, **options: Any) -> dict[str, Any]:
    """Options that several losses have, checked."""
    return {what: OPTIONS[what](who, what, value) for what, value in options.items()}


def check_head(who: str, x: Any, kernel: Any, bias: Any, names: tuple[str, str, str] = ("x", "kernel", "bias")) -> tuple[Any, Any, Any]:
    """The arrays of a linear head, checked; `names` are theirs in errors."""
    x, kernel = checks.array(who, names[0], x), checks.array(who, names[1], kernel, ndim=2)
    bias = checks.array(who, names[2], bias, optional=True)
    if kernel.shape[1] == 0:
        raise ValueError(f"{who}: {names[1]} has shape {kernel.shape}, but must be (features, vocab), with at least one class")
    if x.ndim == 0 or x.shape[-1] != kernel.shape[0]:
        hint = f": transpose it, {names[1]}.T" if x.ndim and x.shape[-1] == kernel.shape[1] else ""
        raise ValueError(f"{who}: {names[0]} has shape {x.shape}, but {names[1]} (features, vocab) has shape {kernel.shape}{hint}")
    checks.shape(who, names[2], bias, kernel.shape[1:], "(vocab,)", **{names[1]: kernel})
    return x, kernel, bias


def check_constant_head(
    who: str, x: Any, kernel: Any, bias: Any, names: tuple[str, str, str], batch: tuple[int, ...], like: str, vocab: int
) -> tuple[Any, Any, Any]:
    """The arrays of another model's head as constants, checked: of rows that lie as those of `like`, and of the same vocabulary."""
    x, kernel, bias = lax.stop_gradient(check_head(who, x, kernel, bias, names))
    features = names[1].replace("kernel", "features")
    checks.shape(who, names[0], x, (*batch, x.shape[-1]), f"(*batch, time, {features}), as {like},")
    if kernel.shape[1] != vocab:
        raise ValueError(f"{who}: {names[1]} has shape {kernel.shape}, but kernel (features, {vocab}): both need the same vocab")
    return x, kernel, bias


def check_labels(who: str, labels: Any, class_weights: Any, where: Any, batch: tuple[int, ...], vocab: int) -> Labels:
    """Labels, and weights of classes and of rows, checked, as rows; the weights as constants."""
    labels = checks.array(who, "labels", labels, "real")
    if jnp.issubdtype(labels.dtype, jnp.integer):
        labels = check_ids(who, "labels", labels, batch)
    else:
        checks.shape(who, "labels", labels, (*batch, vocab), "distributions (*batch, vocab), or classes (*batch) of integers,")
    class_weights = checks.array(who, "class_weights", class_weights, "real", optional=True)
    checks.shape(who, "class_weights", class_weights, (vocab,), "(vocab,)")
    return Labels(as_rows(labels, batch), lax.stop_gradient(class_weights), check_where(who, where, batch))


def check_ids(who: str, what: str, ids: Any, batch: tuple[int, ...]) -> jax.Array:
    """Classes of the rows, checked."""
    ids = checks.array(who, what, ids, "integer")
    checks.shape(who, what, ids, batch, "(*batch)")
    return ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids  # a narrow dtype holds neither vocab nor ignore_index


def check_where(who: str, where: Any, batch: tuple[int, ...], what: str = "where", axes: str = "(*batch)") -> jax.Array | None:
    """How much each row counts, checked, one number a row; a constant."""
    if where is None:
        return None
    where = checks.array(who, what, where, "mask")
    try:
        return as_rows(lax.stop_gradient(jnp.broadcast_to(where, batch)), batch)
    except ValueError:
        raise ValueError(f"{who}: {what} has shape {where.shape}, but must broadcast to {axes} = {batch}") from None


def as_batch(outputs: Any, batch: tuple[int, ...]) -> Any:
    """What a rule returned, without what is None, the rows in their batch axes; one array is itself."""
    shaped = [y.reshape(*batch, *y.shape[1:]) if y.ndim else y for y in outputs if y is not None]
    return shaped[0] if len(shaped) == 1 else tuple(shaped)
