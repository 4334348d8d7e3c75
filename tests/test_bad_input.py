"""Whatever is given to a public function or constructor, there is a clear error or a right result: never a silent wrong one, nothing that hangs."""

import importlib
import inspect
from pathlib import Path

import pytest
from flax import nnx

import layers
from layers.function import engine
from tests.bad_input import mutate


def catalogue():
    """The good calls of all families, by public name."""
    calls = {}
    for path in sorted(Path(__file__).parent.glob("*/good_calls.py")):
        calls |= importlib.import_module(f"tests.{path.parent.name}.good_calls").CALLS
    return calls


CALLS = catalogue()


RUN_WHAT_THEY_ARE_GIVEN = {
    "check": "computes in NumPy and cannot be traced: tests/test_contract.py",
    "gradcheck": "computes in NumPy and cannot be traced: tests/checking/test_gradcheck.py",
    "gradgradcheck": "computes in NumPy and cannot be traced: tests/checking/test_gradcheck.py",
}
"""The public functions without a good call here, with the reason, and where their bad input is tested."""


def test_every_public_function_and_module_has_a_good_call():
    public = {name for name, x in vars(layers).items() if inspect.isfunction(x) or (isinstance(x, type) and issubclass(x, nnx.Module))}
    public = {name for name in public if not name.startswith("_")}
    assert public - set(CALLS) == set(RUN_WHAT_THEY_ARE_GIVEN)


def judge(name, *, values):
    target = layers
    for part in name.split("."):
        target = getattr(target, part)
    with layers.engine(engine.current()):  # a call of layers.engine holds until the end of this block
        findings = mutate(name.rpartition(".")[2], target, CALLS[name], values=values)
    said = "\n".join(f"{kind}: {line}" for kind in ("silent", "hanging", "unclear") for line in getattr(findings, kind))
    assert not findings.silent and not findings.hanging, said
    assert findings.well >= 0.95 * (findings.well + len(findings.unclear)), said


@pytest.mark.parametrize("name", CALLS)
def test_mutated_call_has_a_clear_error_or_can_be_traced(name):
    judge(name, values=False)


@pytest.mark.thorough
@pytest.mark.parametrize("name", CALLS)
def test_mutated_call_has_a_clear_error_or_a_right_result(name):
    judge(name, values=True)
