"""Rules that are right at one point and in the first derivative, and wrong elsewhere: the contract refuses each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers import Function
from layers.checking.contract import catalogue
from tests.core.functions import floats

X = floats(5)


def made(forward, backward, **more):
    methods = {"forward": forward, "backward": backward, "example": lambda key, dtype: (X.astype(dtype),), **more}
    return type("Made", (Function,), {name: staticmethod(m) for name, m in methods.items()})


def saved(fn):
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return fn(x)

    return forward


def length(ctx, x):
    ctx.save_for_backward(x)
    return jnp.sqrt((x * x).sum())


def option(wrong):
    """A mean or a sum of squares; `wrong` says for which the rule is off by a factor."""

    def forward(ctx, x, reduction="mean"):
        ctx.save_for_backward(x)
        ctx.reduction = reduction
        return (x * x).mean() if reduction == "mean" else (x * x).sum()

    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x / (x.size if ctx.reduction == "mean" and wrong != "mean" else 1) * (2 if ctx.reduction == wrong == "sum" else 1), None

    def examples(key, dtype):
        return {"sum": (X.astype(dtype), "sum"), "mean": (X.astype(dtype), "mean"), "no rows": (jnp.zeros(0, dtype), "sum")}

    return made(forward, backward, examples=examples)


WRONG = {
    "NaN at zero": (
        made(length, lambda ctx, g: g * ctx.saved_tensors[0] / jnp.sqrt((ctx.saved_tensors[0] ** 2).sum())),
        "far out",
        "times the example",
    ),
    "stop_gradient in backward": (
        made(saved(jnp.sin), lambda ctx, g: g * jax.lax.stop_gradient(jnp.cos(ctx.saved_tensors[0]))),
        "second derivative",
        "backward hides how it depends on the arguments",
    ),
    "NaN second derivative far out": (
        made(saved(jax.nn.softplus), lambda ctx, g: g / (1 + jnp.exp(-ctx.saved_tensors[0]))),
        "far out",
        "the second derivative of array 0 is NaN where all arrays are",
    ),
    "wrong where the example is not": (option("sum"), "example: sum", "constant factor: the gradient is 2 times"),
    "wrong for an option": (
        made(
            saved(jnp.abs),
            lambda ctx, g: g * jnp.where(ctx.saved_tensors[0] > 1e3, 2.0, jnp.sign(ctx.saved_tensors[0])),
            examples=lambda key, dtype: {"large": (1e4 * jnp.ones(2, dtype),)},
        ),
        "example: large",
        "constant factor",
    ),
    "NaN at infinity": (
        made(
            saved(jnp.tanh),
            lambda ctx, g: g / jnp.square(jnp.cosh(jnp.clip(ctx.saved_tensors[0], -300, 300))) * (1 + 0 * ctx.saved_tensors[0]),
            examples=lambda key, dtype: {"infinite": (jnp.array([jnp.inf, 1.0, -jnp.inf], dtype),)},
        ),
        "example: infinite",
        "the gradient of array 0 is NaN at",
    ),
}


@pytest.mark.linear_engine
@pytest.mark.parametrize("name", WRONG)
def test_wrong_rule_is_refused_by_its_clause_alone(name):
    fn, clause, words = WRONG[name]
    failed = {r.clause: r.detail for r in layers.check(fn).rows if r.outcome == "failed"}
    assert list(failed) == [clause]
    assert words in failed[clause]


@pytest.mark.linear_engine
def test_right_rule_passes_with_all_its_examples():
    report = layers.check(option(None))
    assert report
    assert {r.clause: r.detail for r in report.rows if r.clause.startswith("example")} == {
        "example: sum": "as finite differences, and its derivative is right",
        "example: mean": "as finite differences, and its derivative is right",
        "example: no rows": "no NaN",
    }


def test_after_a_nan_one_clause_speaks():
    report = layers.check(made(saved(jnp.sin), lambda ctx, g: g * jnp.log(-jnp.abs(ctx.saved_tensors[0]))))
    assert [r.clause for r in report.rows if r.outcome == "failed"] == ["no NaN"]
    assert {r.outcome for r in report.rows if r.clause != "no NaN"} == {"skipped"}


def test_first_of_the_examples_stands_for_the_example():
    fn = made(saved(jnp.sin), lambda ctx, g: g * jnp.cos(ctx.saved_tensors[0]), examples=lambda key, dtype: {"one": (X.astype(dtype),)})
    del fn.example
    assert layers.check(fn)


def test_rule_that_is_differentiable_once_is_not_asked_for_its_second_derivative():
    fn = made(saved(jnp.sin), layers.once_differentiable(lambda ctx, g: g * jnp.cos(ctx.saved_tensors[0])))
    rows = {r.clause: r for r in layers.check(fn).rows}
    assert (rows["second derivative"].outcome, rows["far out"].detail) == ("skipped", "differentiable once")


def test_gradgradcheck_says_that_a_rule_hides_a_dependence():
    fn, _, _ = WRONG["stop_gradient in backward"]
    with pytest.raises(layers.GradcheckError, match=r"likely: backward hides a dependence: .*stop_gradient, NumPy"):
        layers.gradgradcheck(fn, (np.asarray(X, np.float64),))


def test_examples_of_the_catalogue_are_named_arguments():
    for layer in catalogue():
        if hasattr(layer, "examples"):
            assert all(isinstance(name, str) and isinstance(args, tuple) for name, args in layer.examples(jax.random.key(0), jnp.float32).items())
