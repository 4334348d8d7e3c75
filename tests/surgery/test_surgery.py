"""Layers that only change the gradient: values untouched, gradients by hand."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers.surgery.clip_gradient import ClipGradientFunction
from tests.support import jit_grad

X = jnp.array([[-2.0, -0.5, 0.0], [0.25, 1.0, 3.0]])
DY = jnp.array([[1.0, -2.0, 0.5], [0.0, 4.0, -0.25]])
TREE = {"a": X, "b": [2 * X, jnp.arange(3)]}


def gradient(fn, x, dy):
    return jax.vjp(fn, x)[1](dy)[0]


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (layers.reverse_gradient, -DY),
        (lambda x: layers.reverse_gradient(x, scale=0.5), -0.5 * DY),
        (lambda x: layers.scale_gradient(x, 3.0), 3 * DY),
        (lambda x: layers.scale_gradient(x, jnp.float32(3.0)), 3 * DY),
        (lambda x: layers.clip_gradient(x, max_value=0.5), np.clip(DY, -0.5, 0.5)),
        (lambda x: layers.clip_gradient(x, max_norm=1.0), DY / np.linalg.norm(DY)),
        (lambda x: layers.clip_gradient(x, max_norm=100.0), DY),
    ],
    ids=["reverse", "reverse scaled", "scale", "scale by an array", "clip value", "clip norm", "clip norm inactive"],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"])
def test_values_stay_and_gradient_is_changed(fn, expected, wrap):
    np.testing.assert_array_equal(fn(X), X)
    np.testing.assert_allclose(gradient(wrap(fn), X, DY), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "fn",
    [
        layers.reverse_gradient,
        lambda t: layers.scale_gradient(t, 2.0),
        lambda t: layers.clip_gradient(t, max_norm=1.0),
        lambda t: layers.add_gradient_noise(t, jax.random.key(0), stddev=0.1),
    ],
)
def test_pytrees_keep_structure_and_integers(fn):
    out = fn(TREE)
    assert jax.tree.structure(out) == jax.tree.structure(TREE)
    assert out["b"][1].dtype == TREE["b"][1].dtype
    grads = jit_grad(lambda t: jnp.sum(fn(t)["a"] * DY) + jnp.sum(fn(t)["b"][0]), allow_int=True)(TREE)
    assert grads["a"].shape == X.shape


def test_clip_norm_is_over_all_leaves_together():
    clip = lambda t: layers.clip_gradient(t, max_norm=1.0)
    da, db = gradient(clip, [X, X], [DY, 2 * DY])
    norm = np.sqrt(np.sum(np.square(DY)) + np.sum(np.square(2 * DY)))
    np.testing.assert_allclose(da, DY / norm, rtol=1e-6)
    np.testing.assert_allclose(db, 2 * DY / norm, rtol=1e-6)


def test_clip_of_a_zero_gradient_is_zero_and_finite():
    np.testing.assert_array_equal(gradient(lambda x: layers.clip_gradient(x, max_norm=1.0), X, jnp.zeros_like(X)), jnp.zeros_like(X))


def test_clip_in_forward_mode_is_the_identity():
    np.testing.assert_array_equal(jax.jvp(lambda x: layers.clip_gradient(x, max_norm=0.1), (X,), (DY,))[1], DY)
    assert ClipGradientFunction.jvp(None, DY) is DY


def test_noise_is_drawn_from_the_key():
    noisy = lambda key: gradient(lambda x: layers.add_gradient_noise(x, key, stddev=0.1), jnp.zeros(10000), jnp.ones(10000)) - 1
    first, again, other = noisy(jax.random.key(0)), noisy(jax.random.key(0)), noisy(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(jnp.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(10000)
    np.testing.assert_allclose([first.mean(), first.std()], [0, 0.1], atol=5 * 0.1 / np.sqrt(10000))


def test_straight_through_rounds_and_passes_the_gradient():
    ste = layers.straight_through(jnp.round)
    np.testing.assert_array_equal(ste(X), jnp.round(X))
    np.testing.assert_array_equal(gradient(ste, X, DY), DY)
    np.testing.assert_array_equal(jax.vmap(jax.grad(lambda x: ste(x).sum()))(X), jnp.ones_like(X))


def test_straight_through_of_a_function_that_changes_shape_is_an_error():
    with pytest.raises(ValueError, match="straight_through: sum"):
        layers.straight_through(jnp.sum)(X)


def test_straight_through_of_a_tuple():
    ste = layers.straight_through(lambda t: (jnp.round(t[0]), t[1]))
    np.testing.assert_array_equal(jit_grad(lambda x: ste((x, 3))[0].sum())(X), jnp.ones_like(X))


def test_what_a_straight_through_function_closes_over_gets_no_gradient():
    ds, dx = jit_grad(lambda s, x: layers.straight_through(lambda v: jnp.round(v / s) * s)(x).sum(), (0, 1))(0.5, X)
    assert ds == 0
    np.testing.assert_array_equal(dx, jnp.ones_like(X))


def test_replaced_gradient_is_that_of_the_other_function():
    step = layers.replace_gradient(jnp.sign, jnp.tanh)
    np.testing.assert_array_equal(step(X), jnp.sign(X))
    np.testing.assert_allclose(gradient(step, X, DY), DY * (1 - jnp.tanh(X) ** 2), rtol=1e-5)
    hessian = jax.hessian(lambda x: step(x).sum())(X)
    np.testing.assert_allclose(hessian, jax.hessian(lambda x: jnp.tanh(x).sum())(X), rtol=1e-5, atol=1e-6)


def test_replaced_gradient_of_several_arguments_and_outputs():
    forward = lambda a, b: (jnp.round(a * b), jnp.round(a))
    smooth = lambda a, b: (a * b, a)
    both = layers.replace_gradient(forward, smooth)
    grads = jax.vjp(both, X, 2 * X)[1]((DY, DY))
    np.testing.assert_allclose(grads[0], DY * 2 * X + DY, rtol=1e-6)
    np.testing.assert_allclose(grads[1], DY * X, rtol=1e-6)


@pytest.mark.parametrize("number", [3, 3.0, True, np.float32(3)])
def test_replaced_gradient_goes_past_numbers(number):
    step = layers.replace_gradient(lambda d, k: jnp.sign(d["x"]) * k, lambda d, k: jnp.tanh(d["x"]) * k)
    dx = jit_grad(lambda x: step({"x": x, "none": None, "two": 2}, k=number).sum())(X)
    np.testing.assert_allclose(dx, number * (1 - jnp.tanh(X) ** 2), rtol=1e-5)


def test_replaced_gradient_of_a_named_tuple():
    pair = collections.namedtuple("pair", "y count")
    step = layers.replace_gradient(lambda x: pair(jnp.sign(x), 1), lambda x: pair(jnp.tanh(x), 1))
    assert isinstance(step(X), pair)
    np.testing.assert_allclose(jit_grad(lambda x: step(x).y.sum())(X), 1 - jnp.tanh(X) ** 2, rtol=1e-5)


def test_replaced_gradient_of_other_shapes_is_an_error():
    with pytest.raises(ValueError, match="replace_gradient"):
        layers.replace_gradient(jnp.sign, jnp.sum)(X)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.clip_gradient(X), "max_value, max_norm"),
        (lambda: layers.clip_gradient(X, max_norm=-1.0), "max_norm is -1.0, but must be a number in"),
        (lambda: layers.reverse_gradient(X, scale=jnp.ones(3)), "must be a number"),
        (lambda: layers.scale_gradient(X, jnp.ones(3)), "must be a number"),
        (lambda: layers.add_gradient_noise(X, jax.random.key(0), stddev=-1.0), "of at least 0"),
    ],
)
def test_bad_options_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_leaf_that_is_no_array_is_an_error():
    with pytest.raises(TypeError, match="reverse_gradient: x holds a str"):
        layers.reverse_gradient({"a": "text"})


@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_norm_of_a_gradient_that_cannot_be_squared_is_right(size):
    given = jit_grad(lambda x: jnp.sum(layers.clip_gradient(x, max_norm=1.0) * size))(jnp.ones(4))
    np.testing.assert_allclose(given, jnp.full(4, min(0.5, size)), rtol=1e-6)


@pytest.mark.parametrize("number", [np.float32(-1), jnp.float32(-1), jnp.nan])
def test_negative_bounds_are_errors_whatever_holds_them(number):
    for option in ("max_norm", "max_value"):
        with pytest.raises(ValueError, match=f"clip_gradient: {option} is .*, but must be a number"):
            layers.clip_gradient(jnp.ones(2), **{option: number})
    with pytest.raises(ValueError, match=r"add_gradient_noise: stddev is .*, but must be a number"):
        layers.add_gradient_noise(jnp.ones(2), jax.random.key(0), stddev=number)


def test_scale_that_is_no_number_is_an_error_in_the_forward():
    with pytest.raises(TypeError, match="scale_gradient: scale is 'abc', but must be a number"):
        layers.scale_gradient(X, "abc")


@pytest.mark.parametrize("step", [lambda x: x > 0, lambda x: (x > 0).astype(jnp.int32)])
def test_step_without_a_floating_result_is_an_error(step):
    with pytest.raises(ValueError, match="cast what forward_fn returns"):
        layers.replace_gradient(step, jax.nn.sigmoid)(jnp.ones(2))


@pytest.mark.parametrize("bound", [1e-6, 1.0, 1e30])
@pytest.mark.parametrize("size", [3e38, 1e38, 1e20])
def test_gradients_as_large_as_can_be_are_clipped(size, bound):
    clip = jax.jit(lambda dy: gradient(lambda x: layers.clip_gradient(x, max_norm=bound), jnp.ones(4), dy))
    np.testing.assert_allclose(clip(jnp.full(4, size, jnp.float32)), np.full(4, min(bound / 2, size)), rtol=1e-6)


def test_gradient_that_is_not_a_number_is_not_taken_for_a_small_one():
    assert np.isnan(gradient(lambda x: layers.clip_gradient(x, max_norm=1.0), jnp.ones(3), jnp.array([1.0, jnp.nan, 0.0]))).all()
