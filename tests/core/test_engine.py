"""The two engines: who chooses, what an `apply` becomes under each, and what is left where JAX has moved a private name."""

import functools
import importlib
import pkgutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers.core import compat, private
from layers.function import engine
from layers.function.function import Function
from tests.core.functions import Linear, Mul, ScaledShare, Split, Wrong, floats
from tests.support import assert_trees_close, temp_bytes

X = floats(4)
ENGINES = {"linear": "custom_jvp_call", "custom_vjp": "custom_vjp_call"}


def equation(fn, *args):
    (eqn,) = compat.open_jaxpr(jax.make_jaxpr(fn)(*args)).eqns
    return eqn


@pytest.mark.parametrize("name", ENGINES)
def test_apply_is_one_operation_that_bears_the_name_of_the_function(name):
    with layers.engine(name):
        eqn = equation(Mul.apply, X, X)
    coming = ("CustomVJPTraced", "call_hi_primitive")  # with JAX_CUSTOM_VJP3=1
    assert eqn.primitive.name in (ENGINES[name], *coming)
    assert "Mul" in str(eqn)


def test_function_compiled_under_one_engine_is_traced_anew_under_the_other():
    seen = []

    class Noted(Function):
        @staticmethod
        def forward(ctx, x, w):
            seen.append(ctx.needs_input_grad)
            return x * w

        @staticmethod
        def backward(ctx, g):
            return g, g

    step = jax.jit(jax.grad(lambda x: Noted.apply(x, X).sum()))
    for name, flags in {"linear": (True, False), "custom_vjp": (True, True)}.items():
        with layers.engine(name):
            np.testing.assert_array_equal(step(X), jnp.ones(4))
            assert seen[-1] == flags
            seen.clear()
            step(X)
            assert not seen


def test_engine_is_chosen_from_the_call_on_or_for_a_block():
    before = engine.current()
    chosen = layers.engine("custom_vjp")
    assert engine.current() == "custom_vjp"
    with layers.engine("linear"):
        assert engine.current() == "linear"
    assert engine.current() == "custom_vjp"
    chosen.__exit__(None, None, None)
    assert engine.current() == before


def test_other_engine_is_an_error_that_lists_them():
    with pytest.raises(ValueError, match="engine: name is 'fast', but must be one of 'linear', 'custom_vjp'"):
        layers.engine("fast")


@pytest.mark.parametrize("ways", [lambda f: f, jax.jit, jax.checkpoint, jax.vmap])
def test_forward_mode_is_refused_by_the_engine_of_custom_vjp(ways):
    with layers.engine("custom_vjp"):
        with pytest.raises(TypeError, match="forward"):
            jax.jvp(ways(Split.apply), (X,), (X,))
        with pytest.raises(TypeError, match="forward"):
            jax.jacfwd(ways(Split.apply))(X)


def test_refused_forward_mode_names_the_function_and_the_engine():
    with layers.engine("custom_vjp"), pytest.raises(TypeError, match=r"Split: forward mode .*the engine 'custom_vjp'.*layers.engine\('linear'\)"):
        jax.jvp(Split.apply, (X,), (X,))


def summed(loss, w, batches):
    return jax.lax.scan(lambda total, x: (total + jax.grad(loss)(w, x), None), jnp.zeros_like(w), batches)[0]


def summed_in_a_ref(loss, w, batches):
    ref = jax.new_ref(jnp.zeros_like(w))

    def step(_, x):
        y, pull = jax.vjp(lambda w: loss(w, x), w)
        pull.with_refs(ref)(jnp.ones_like(y))
        return None, None

    jax.lax.scan(step, None, batches)
    return ref[...]


@pytest.mark.parametrize("name", ENGINES)
def test_gradients_accumulate_into_a_ref_in_the_memory_of_a_sum(name):
    w, batches = floats(16, 8), floats(3, 4, 8, seed=1)
    loss = lambda w, x: jnp.sin(Linear.apply(x, w)).sum()
    with layers.engine(name):
        ways = [functools.partial(way, loss) for way in (summed, summed_in_a_ref)]
        np.testing.assert_allclose(jax.jit(ways[1])(w, batches), jax.jit(ways[0])(w, batches), rtol=1e-5, atol=1e-6)
        assert temp_bytes(ways[1], w, batches) <= temp_bytes(ways[0], w, batches)


def test_error_of_a_rule_is_not_taken_for_forward_mode():
    class Made(Function):
        @staticmethod
        def forward(ctx, x):
            raise TypeError("mine")

    with layers.engine("custom_vjp"), pytest.raises(TypeError, match="mine"):
        jax.grad(lambda x: Made.apply(x).sum())(X)


def test_absent_gradient_arrives_as_none_under_the_engine_of_custom_vjp():
    seen = []

    class Two(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            return 2 * x, 3 * x

        @staticmethod
        def backward(ctx, a, b):
            seen.append(b)
            return 2 * a

    with layers.engine("custom_vjp"):
        np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: Two.apply(x)[0].sum()))(X), jnp.full(4, 2.0))
    assert seen == [None]


def test_differentiated_closure_of_an_argument_is_refused_by_both_engines():
    class Call(Function):
        @staticmethod
        def forward(ctx, x, fn):
            return fn(x)

        @staticmethod
        def backward(ctx, g):
            return g, None

    for name in ENGINES:
        with layers.engine(name):
            np.testing.assert_array_equal(jax.jit(jax.grad(lambda x, w: Call.apply(x, lambda y: w * y).sum()))(X, X), jnp.ones(4))
            with pytest.raises(TypeError, match="argument 'fn' is a function that closes over an array which is being differentiated"):
                jax.grad(lambda w: Call.apply(X, lambda y: w * y).sum())(X)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_gradient_of_an_output_that_the_batch_shares_counts_once_under_the_engine_of_custom_vjp(axes):
    def total(fn):
        return jax.grad(lambda x, w: sum((y**2).sum() for y in jax.vmap(fn, axes)(x, w)), (0, 1))

    args = [floats(*((3, 4) if a == 0 else (4,)), seed=i) for i, a in enumerate(axes)]
    with layers.engine("custom_vjp"):
        assert_trees_close(total(ScaledShare.apply)(*args), total(lambda x, w: (x * w, 2 * w))(*args), rtol=1e-5)


def test_number_that_is_differentiated_has_its_gradient_under_both_engines():
    for name in ENGINES:
        with layers.engine(name):
            assert jax.grad(lambda x: Mul.apply(x, 3.0))(2.0) == 3


# --- what is left without a private name ---


def test_this_release_has_every_private_name():
    assert [name for name, found in private.FOUND.items() if found is None] == []


@pytest.fixture
def without(monkeypatch):
    """Makes the private names at these places absent, as far as `core/compat.py` sees."""
    resolve = pkgutil.resolve_name

    def hide(*places):
        def missing(place):
            if place in places:
                raise AttributeError(place)
            return resolve(place)

        monkeypatch.setattr(pkgutil, "resolve_name", missing)
        importlib.reload(private)
        importlib.reload(compat)

    yield hide
    monkeypatch.undo()
    importlib.reload(private)
    importlib.reload(compat)


@pytest.mark.parametrize("name", private.NAMES)
def test_function_works_without_any_one_private_name(name, without):
    place, loss = private.NAMES[name]
    without(place)
    assert private.missing(loss) == [place]
    assert engine.current() == ("custom_vjp" if loss == private.LINEAR else engine.current())
    np.testing.assert_allclose(jax.grad(lambda x: Wrong.apply(x).sum())(X), 3 * jnp.cos(X), rtol=1e-6)
    assert layers.residuals(lambda x: Mul.apply(x, jnp.sin(x)), X).rows


def test_engine_of_linear_operations_says_what_it_misses(without):
    without("jax.interpreters.ad:Zero")
    with pytest.raises(RuntimeError, match=r"has no jax.interpreters.ad:Zero, and without that is lost the engine of linear operations"):
        layers.engine("linear")


def test_rewrite_says_what_it_misses(without):
    without("jax.extend.core:Primitive.get_bind_params")
    with pytest.raises(RuntimeError, match=r"get_bind_params, and without that is lost `layers.rewrite`"):
        layers.rewrite(lambda x: jnp.sort(x) * 2)(X)


IMPORT = """
import pkgutil
def absent(place): raise AttributeError(place)
resolve, pkgutil.resolve_name = pkgutil.resolve_name, absent
import jax, layers
from layers.core import private
from layers.function import engine
assert set(private.FOUND.values()) == {None} and engine.current() == "custom_vjp"
print(jax.jit(jax.grad(lambda x: layers.silu(x)))(0.0), jax.jit(jax.vmap(jax.grad(lambda x: layers.softplus(x))))(jax.numpy.zeros(2)))
"""


def test_layers_are_imported_and_work_without_all_private_names():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.stdout.split() == ["0.5", "[0.5", "0.5]"], done.stderr


def test_environment_variable_chooses_the_engine(monkeypatch):
    monkeypatch.setenv("LAYERS_ENGINE", "custom_vjp")
    command = "from layers.function import engine; print(engine.current())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout.strip() == "custom_vjp", done.stderr


def test_every_layer_of_a_model_has_the_same_gradient_under_both_engines():
    def gradients():
        return jax.grad(lambda x, w, b: (layers.rms_norm(layers.gelu(Linear.apply(x, w, b)), 1 + b) ** 2).sum(), (0, 1, 2))(*args)

    args = floats(4, 3), floats(2, 3, seed=1), floats(2, seed=2)
    with layers.engine("linear"):
        expected = gradients()
    with layers.engine("custom_vjp"):
        assert_trees_close(gradients(), expected, rtol=1e-5, atol=1e-6)
