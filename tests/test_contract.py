"""Every layer of the catalogue passes the contract, and the contract finds what is planted."""

import gc

import jax.numpy as jnp
import pytest

import layers
from layers import Function
from layers.checking.contract import catalogue


@pytest.mark.parametrize("layer", catalogue(), ids=lambda c: c.__name__)
def test_layer_passes_the_contract(layer):
    layers.check(layer).raise_if_failed()


def planted(backward, forward=lambda x, w: x * w):
    def run(ctx, x, w):
        ctx.save_for_backward(x, w)
        return forward(x, w)

    return type("Planted", (Function,), {"forward": staticmethod(run), "backward": staticmethod(backward)})


def only_when_both(ctx, dy):
    x, w = ctx.saved_tensors
    both = all(ctx.needs_input_grad)
    return dy * w, dy * x * (1 if both else 2)


leaked = []


def leaking(ctx, dy):
    x, w = ctx.saved_tensors
    leaked.append(dy)
    return dy * w, dy * x


def infinite_in_half(ctx, dy):
    x, w = ctx.saved_tensors
    return dy * w, dy * x if x.dtype in (jnp.float32, jnp.float64) else dy * x / 0


FAULTS = {
    "wrong gradient": (planted(lambda ctx, dy: (dy * ctx.saved_tensors[1], 2 * dy * ctx.saved_tensors[0])), "gradient"),
    "not linear": (planted(lambda ctx, dy: (dy * ctx.saved_tensors[1], jnp.abs(dy) * ctx.saved_tensors[0])), "linear in the gradient"),
    "depends on the size": (
        planted(lambda ctx, dy: (dy * jnp.abs(dy) / jnp.maximum(jnp.linalg.norm(dy), 1e-30) * ctx.saved_tensors[1], dy * ctx.saved_tensors[0])),
        "linear in the gradient",
    ),
    "depends on the sign": (
        planted(lambda ctx, dy: (((ctx.saved_tensors[0] > 0) | (dy < 0)) * dy * ctx.saved_tensors[1], dy * ctx.saved_tensors[0])),
        "linear in the gradient",
    ),
    "wrong for one argument alone": (planted(only_when_both), "each argument alone"),
    "leaks": (planted(leaking), "no leak"),
    "infinite in half precision": (planted(infinite_in_half), "dtypes"),
    "not transposable": (planted(lambda ctx, dy: (dy * ctx.saved_tensors[1], jnp.sinh(dy) * 0 + dy * ctx.saved_tensors[0])), "forward mode"),
}

ARGS = (jnp.array([0.5, -1.5, 2.0]), jnp.array([1.0, 2.0, -0.5]))


@pytest.fixture
def nothing_older_refers():
    """JAX looks for what refers to a leaked tracer, among all objects there are: less than those that other tests have left."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_older_refers")
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found_by_its_clause(name):
    fn, clause = FAULTS[name]
    report = layers.check(fn, *ARGS)
    leaked.clear()
    assert not report
    assert clause in {r.clause for r in report.rows if r.outcome == "failed"}
    with pytest.raises(AssertionError, match="Planted breaks its contract"):
        report.raise_if_failed()


def test_right_rule_and_plain_function_pass():
    right = planted(lambda ctx, dy: (dy * ctx.saved_tensors[1], dy * ctx.saved_tensors[0]))
    assert layers.check(right, *ARGS)
    assert layers.check(lambda x, w: jnp.sin(x) * w, *ARGS)


def test_report_prints_and_shows_in_a_notebook():
    report = layers.check(layers.LinearFunction)
    assert "memory kept" in str(report)
    assert "<table>" in report._repr_html_()


def test_missing_arguments_are_an_error():
    with pytest.raises(TypeError, match="check: fn is 3, but must be a function"):
        layers.check(3)
    with pytest.raises(TypeError, match="give its arguments"):
        layers.check(jnp.sin)
    with pytest.raises(TypeError, match="no argument"):
        layers.check(lambda i: i, jnp.arange(3))
