"""The generated parts of the README: `python -m layers.tools.readme` writes them, a test compares them."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path

import layers
from layers.core.function import Function
from layers.tools.bench import RESULTS, markdown

README = Path(__file__).parents[2] / "README.md"


def layer_rows() -> list[tuple[str, str, str, str]]:
    """Family, function, module and one sentence of every layer among the public names, in their order."""
    rows: dict[str, tuple[str, str, str, str]] = {}
    for name, value in vars(layers).items():
        home = getattr(value, "__module__", "")
        if not inspect.isfunction(value) or home.split(".")[:2] in (["layers", "core"], ["layers", "check"]) or home == "layers.swap":
            continue
        source = importlib.import_module(home)
        if not any(isinstance(v, type) and issubclass(v, Function) and v.__module__ == home for v in vars(source).values()):
            continue
        modules = [f"`{k}`" for k, v in vars(layers).items() if isinstance(v, type) and v.__module__ == home and not issubclass(v, Function)]
        rows[name] = (home.split(".")[1], f"`{name}`", " ".join(modules), inspect.getdoc(value).split("\n")[0])  # type: ignore[union-attr]
    return list(rows.values())


def layer_table() -> str:
    lines = ["| family | function | nnx and Linen module | |", "|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in layer_rows()])


def bench_table() -> str:
    results = json.loads(RESULTS.read_text())
    machine = results["machine"]
    note = f"{machine['cores']} cores, {machine['device']}, JAX {machine['jax']}; ratios to the idiomatic code, smaller is better."
    return f"{note}\n\n{markdown(results)}"


def fill(text: str) -> str:
    """The README with its generated parts anew."""
    for mark, make in (("layers", layer_table), ("bench", bench_table)):
        pattern = re.compile(rf"(<!-- {mark}: generated -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
