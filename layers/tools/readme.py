"""The generated parts of the README: `python -m layers.tools.readme` writes them, a test compares them."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import layers
from layers.function.engine import ENGINES, Engine, engine
from layers.function.function import Function
from layers.tools import bench_devices, goals_table, kernel_table
from layers.tools.bench import GPU_RESULTS, RESULTS
from layers.tools.bench_tables import markdown
from layers.tools.devices import DEVICES

README = Path(__file__).parents[2] / "README.md"


def layer_rows() -> list[tuple[str, str, str, str]]:
    """Family, functions, modules and one sentence of every file of a family that has public names, in their order."""
    files: dict[str, list[tuple[str, Any]]] = {}
    for name, value in vars(layers).items():
        home = getattr(value, "__module__", "")
        if home.count(".") == 2 and home.split(".")[1] not in ("core", "function", "checking", "rewriting", "tools"):
            files.setdefault(home, []).append((name, value))
    return [row for home, named in files.items() if any((row := _row(home.split(".")[1], named))[1:3])]


def _row(family: str, named: list[tuple[str, Any]]) -> tuple[str, str, str, str]:
    functions = {n: v for n, v in named if inspect.isfunction(v)}
    modules = {n: v for n, v in named if isinstance(v, type) and issubclass(v, nnx.Module)}
    described = next(iter((functions or modules or dict(named)).values()))
    sentence = (inspect.getdoc(described) or "").split("\n")[0]
    named_functions, named_modules = (" ".join(f"`{n}`" for n in part) for part in (functions, modules))
    return family, named_functions, named_modules, sentence


def layer_table() -> str:
    lines = ["| family | function | nnx and Linen module | |", "|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in layer_rows()])


def bench_table(path: Path = RESULTS) -> str:
    results = json.loads(path.read_text())
    machine = results["machine"]
    device = f"{machine['cores']} cores" if machine["device"] == "cpu" else machine["device"]
    note = f"{device}, JAX {machine['jax']}; ratios to the idiomatic code, smaller is better."
    return f"{note}\n\n{markdown(results)}"


def devices_table() -> str:
    results = json.loads(bench_devices.RESULTS.read_text())
    return bench_devices.markdown({name: results[name] for name in DEVICES})


class Scale(Function):
    """What the README shows the program of."""

    @staticmethod
    def forward(ctx, x, s):
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, dy):
        x, s = ctx.saved_tensors
        return dy * s, (dy * x).sum()


def engine_programs() -> str:
    """The program of one `apply` under each engine, as JAX prints it."""
    x, s = jax.ShapeDtypeStruct((3,), "float32"), jax.ShapeDtypeStruct((), "float32")

    def program(name: Engine) -> str:
        with engine(name):
            return str(jax.make_jaxpr(Scale.apply)(x, s))

    return "```\n" + "\n".join(map(program, ENGINES)) + "\n```"


def fill(text: str) -> str:
    """The README with its generated parts anew."""
    for mark, make in MADE.items():
        pattern = re.compile(rf"(<!-- {mark}: generated -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
    return text


MADE: dict[str, Callable[[], str]] = {
    "layers": layer_table,
    "engines": engine_programs,
    "bench": bench_table,
    "gpu": lambda: bench_table(GPU_RESULTS),
    "devices": devices_table,
    "goals": goals_table.table,
    "kernels": kernel_table.table,
}


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
