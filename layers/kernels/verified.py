"""The table of what was verified: for which calls a kernel is taken without being asked for.

`verified.json` has one row for each layer, kernel, minor version of JAX, architecture, dtype and class of shapes that was tried, written by
`python -m layers verify` on a machine that has that device. What is not in it is not taken: a kernel fails closed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from layers.kernels.place import Place

TABLE = Path(__file__).with_name("verified.json")
KEY = ("layer", "implementation", "jax", "platform", "architecture", "dtype", "shape_class")


def key_of(layer: str, implementation: str, dtype: str, shape_class: str, place: Place) -> tuple[str | None, ...]:
    """What identifies a row."""
    return layer, implementation, place.jax, place.platform, place.architecture, dtype, shape_class


@functools.cache
def rows() -> dict[tuple[str | None, ...], dict[str, Any]]:
    """The rows of the table, by what identifies them."""
    return {tuple(row[k] for k in KEY): row for row in json.loads(TABLE.read_text())}


def why_not(layer: str, implementation: str, dtype: str, shape_class: str, place: Place) -> str | None:
    """Why a kernel is not taken for a call that it can do; None where it is."""
    row = rows().get(key_of(layer, implementation, dtype, shape_class, place))
    if row is None:
        return f"not verified for {dtype}, {shape_class}, on {place}: python -m layers verify"
    return row["against"] or None


def write(new: list[dict[str, Any]], path: Path = TABLE) -> None:
    """Puts rows into the table at `path`, in place of those of the same key."""
    old = json.loads(path.read_text()) if path.exists() else []
    found = {tuple(row[k] for k in KEY): row for row in (*old, *new)}
    ordered = sorted(found.values(), key=lambda row: tuple(str(row[k]) for k in KEY))
    path.write_text(json.dumps(ordered, indent=1) + "\n")
    rows.cache_clear()
