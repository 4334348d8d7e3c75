"""The shape of the library, read from its source: who imports whom, where JAX's private parts are touched, one shape for each layer's file."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "layers"
FILES = sorted(PACKAGE.rglob("*.py"))
FACADE = {"swapping", "linen", "rewriting"}
FLOORS = {"core": {"core"}, "function": {"core", "function"}, "kernels": {"core", "kernels"}}
FLOORS["checking"] = {*FLOORS, "checking"}
"""The parts that families are built on, and what each may import."""
FAMILIES = {p.parent.name for p in PACKAGE.glob("*/__init__.py")} - FACADE - {*FLOORS, "tools"}


def place(path):
    """The part of the library that a file belongs to: a family's or folder's name, or that of a file at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """The modules that a file imports anywhere in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def may_import(part, other):
    if part in FLOORS:
        return other in FLOORS[part]
    if part in FAMILIES:
        return other in ("core", "function", "kernels", part)
    if part in FACADE:
        return other in FAMILIES | {"core", "function", "checking", part}
    return part in ("__init__", "__main__", "tools")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_imports_what_its_place_may(path):
    part = place(path)
    for name, line in imports(path):
        if name == "layers" or name.startswith("layers."):
            other = name.split(".")[1] if "." in name else "facade"
            inside = part == "checking" and path.name in ("catalogue.py", "implementations.py") and name == "layers"  # these look for layers by name
            assert inside or may_import(part, other), f"{path.name}:{line} imports {name}, which {part} may not"


@pytest.mark.parametrize("path", [p for p in FILES if place(p) == "kernels"], ids=lambda p: p.name)
def test_kernels_are_plain_functions(path):
    """No `Function`, no Flax: the rule of a layer is in its family."""
    for name, line in imports(path):
        assert not re.match(r"flax|layers\.function", name), f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if place(p) in ("core", "function")], ids=lambda p: p.name)
def test_core_knows_neither_flax_nor_anything_but_jax_and_numpy(path):
    for name, line in imports(path):
        top = name.split(".")[0]
        assert top in {"jax", "numpy", "layers"} | set(sys.stdlib_module_names), f"{path.name}:{line} imports {name}"


def test_private_parts_of_jax_are_touched_in_compat_by_the_table_of_private_names():
    assert [p.name for p in FILES if "jax._src" in p.read_text()] == ["private.py"]
    assert {p.name for p in FILES if "private.FOUND" in p.read_text()} == {"compat.py"}


JITTED_PRODUCTS = {"matmul", "einsum", "dot", "vdot", "vecdot", "matvec", "vecmat", "tensordot", "inner", "outer", "kron", "cov", "convolve"}


def code_of_rules(node):
    """The nodes of a file, but for those of examples and of what rules are compared with."""
    yield node
    for child in ast.iter_child_nodes(node):
        if getattr(child, "name", "") not in ("example", "surrogate"):
            yield from code_of_rules(child)


@pytest.mark.parametrize("path", [p for p in FILES if place(p) not in ("tools", "checking")], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_products_call_dot_general_themselves(path):
    """A jitted function of `jnp` that multiplies matrices keeps what it was traced to, be it another library's product for the time being."""
    for node in code_of_rules(ast.parse(path.read_text())):
        assert not any("jax.jit" in ast.unparse(d) for d in getattr(node, "decorator_list", ())), f"{path}:{node.lineno}: products.jit instead"
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        hidden = name.removeprefix("jnp.") in JITTED_PRODUCTS and name.startswith("jnp.")
        assert not hidden and not isinstance(getattr(node, "op", None), ast.MatMult), f"{path}:{getattr(node, 'lineno', 0)} hides a product"


def test_custom_vjp_is_used_by_its_engine_and_the_benchmark_only():
    users = [p for p in FILES if re.search(r"jax\.custom_vjp\(|@jax\.custom_vjp", p.read_text())]
    assert [p.name for p in users] == ["engine_custom_vjp.py", "bench_function.py"]


def test_engine_of_custom_vjp_uses_public_names_of_jax_alone():
    path = PACKAGE / "function" / "engine_custom_vjp.py"
    assert all(name.split(".")[1] != "interpreters" for name, _ in imports(path) if name.startswith("jax."))
    assert {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "compat"} == {
        "is_key",
        "may_be_batched",
        "varying_axes",
    }


def test_there_is_no_import_cycle():
    modules = {".".join(("layers", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in FILES}
    graph = {
        name: {m for found, _ in imports(path) for m in (found, found.rpartition(".")[0]) if m in modules and m != name}
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name, above):
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_families_export_what_the_facade_does():
    facade = set(re.findall(r"^from layers\.\w+\.\w+ import .*$", (PACKAGE / "__init__.py").read_text(), re.MULTILINE))
    for family in FAMILIES:
        lines = [line for line in (PACKAGE / family / "__init__.py").read_text().splitlines() if line.startswith("from ")]
        assert {line for line in facade if line.startswith(f"from layers.{family}.")} <= set(lines), family
        assert all(line.startswith(f"from layers.{family}.") for line in lines)


def test_no_part_of_the_library_is_hidden_by_a_public_name():
    """`layers.linear` is the function, and no folder or file of that name is left for `import layers.linear` to mean."""
    public = re.findall(r"^from layers\.\w+\.?\w* import .* as (\w+)$", (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    assert {"linear", "mlp", "check", "rewrite", "swap"} <= set(public)
    assert not {place(p) for p in FILES} & set(public)


def test_facade_holds_one_explicit_line_for_each_name():
    """Below them, what is imported on first use."""
    text = (PACKAGE / "__init__.py").read_text().split("\nif _TYPE_CHECKING:")[0]
    lines = [line for line in text.splitlines()[1:] if line and not re.fullmatch(r"(from typing )?import .* as _\w+", line)]
    assert all(re.fullmatch(r"from layers(\.\w+)+ import (\w+) as \2", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.split(" import ")[0].split("."))


def test_importing_the_library_needs_jax_flax_and_jaxtyping_only():
    """`tools` and its dependencies are not loaded by `import layers`."""
    code = "import sys, layers; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "layers" in loaded
    assert not loaded & {"sklearn", "nbclient", "optimistix", "lineax", "torch", "pytest"}
    assert "layers.tools" not in loaded


def test_parts_that_nothing_needs_are_imported_on_first_use():
    code = """
import sys, layers
assert "linen" in dir(layers) and "Linear" in dir(layers) and "layers.linen" not in sys.modules
print(layers.linen.Linear(3, 4).__class__.__name__, layers.tools.__name__)
assert not hasattr(layers, "missing") and not hasattr(layers, "__path_of__")
from layers import linen
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["Linear", "layers.tools"]


def _layer_files():
    """The files of families that the facade takes a function from, and that hold its rule."""
    homes = {
        m[1].replace(".", "/") for m in re.finditer(r"^from layers\.(\w+\.(\w+)) import \2 as", (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    }
    for path in FILES:
        home = str(path.relative_to(PACKAGE).with_suffix(""))
        if home in homes and place(path) in FAMILIES and re.search(r"^class \w+Function\(\w*Function\):", path.read_text(), re.MULTILINE):
            yield path


@pytest.mark.parametrize("path", list(_layer_files()), ids=lambda p: p.stem)
def test_layer_file_has_derivation_function_and_public_function_in_this_order(path):
    tree = ast.parse(path.read_text())
    text = ast.get_docstring(tree) or ""
    assert "Reference" in text and re.search(r"[Ss]aved|[Kk]ept|Nothing", text), f"{path.name}: docstring without Saved or Reference"
    functions = [n.lineno for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Function")]
    public = [n.lineno for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == path.stem]
    modules = [
        n.lineno for n in tree.body if isinstance(n, ast.ClassDef) and any("Module" in ast.unparse(b) or "nnx." in ast.unparse(b) for b in n.bases)
    ]
    assert public, f"{path.name} has no public function {path.stem}"
    assert functions[0] < public[0]
    assert all(public[0] < m for m in modules)


def test_audit_names_no_line_of_the_floors_that_every_layer_stands_on():
    parts = importlib.import_module("layers.checking.residuals")._PARTS
    assert {("layers", floor) for floor in FLOORS if floor != "kernels"} <= set(parts)
