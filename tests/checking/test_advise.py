"""Advice names the way that keeps least, for each layer and in all, and the line to change."""

import jax.numpy as jnp
import pytest
from flax import nnx

from layers import advise, residuals

X = jnp.linspace(-1.0, 1.0, 32).reshape(4, 8)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        return jnp.sin(self.norm(x))


def test_plan_has_each_layer_with_what_it_keeps_and_could_keep():
    advice, audit = advise(Model(nnx.Rngs(0)), X), residuals(Model(nnx.Rngs(0)), X)
    assert {s.layer: s.kept for s in advice.steps} == audit.by_layer()
    norm = next(s for s in advice.steps if s.layer.endswith("norm"))
    assert 0 < norm.could_keep < norm.kept and norm.way in advice.audit.with_ways
    assert advice.steps[0] is norm
    assert all(s.could_keep <= s.kept for s in advice.steps)


def test_plan_names_the_line_of_the_model():
    lines = [s.source for s in advise(Model(nnx.Rngs(0)), X).steps if s.way == ""]
    assert lines and all(line.startswith("test_advise.py:") for line in lines)


def test_best_way_is_the_one_that_keeps_least_and_the_text_says_it():
    advice = advise(Model(nnx.Rngs(0)), X)
    best = advice.audit.with_ways[advice.best].extra
    assert best < advice.audit.extra and best == min(a.extra for a in advice.audit.with_ways.values())
    assert f"Write {advice.best}" in " ".join(str(advice).split())
    assert "<table>" in advice._repr_html_()


class OwnNorm(nnx.Module):
    def __call__(self, x):
        return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


class HandWritten(nnx.Module):
    def __init__(self):
        self.own = OwnNorm()
        self.scale = nnx.Param(jnp.ones(8))

    def __call__(self, x):
        return jnp.sin(self.own(x) * self.scale)


def test_what_a_model_writes_by_hand_is_for_rewrite():
    advice = advise(HandWritten(), X)
    (own,) = [s for s in advice.steps if s.layer.endswith("own")]
    assert own.way == "layers.rewrite(fn)" and own.could_keep < own.kept
    assert advice.best == "layers.rewrite(fn)"


def test_where_nothing_would_keep_less_it_says_so():
    advice = advise(lambda x, w: x @ w, X, jnp.ones((8, 3)))
    assert advice.best == "" and "Nothing here would keep less" in " ".join(str(advice).split())


def test_arguments_are_those_of_residuals():
    with pytest.raises(TypeError, match="floating-point"):
        advise(lambda i: i, jnp.arange(3))
