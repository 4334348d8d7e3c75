"""The checker finds every planted fault, refuses no right rule, and names what is wrong."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers import Function, GradcheckError, gradcheck, gradgradcheck


def draw(*shapes, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    out = [rng.normal(size=s) for s in shapes]
    return tuple((x + 1j * rng.normal(size=x.shape) if dtype == np.complex128 else x).astype(dtype) for x in out)


def rule(forward, backward, **methods):
    """A Function of these two; `forward` is a function of the arguments, which are saved."""

    def run(ctx, *args):
        ctx.save_for_backward(*args)
        return forward(*args)

    def back(ctx, *dy):
        return backward(*ctx.saved_tensors, *dy)

    return type("Planted", (Function,), {"forward": staticmethod(run), "backward": staticmethod(back), **methods})


MATMUL = lambda x, w: x @ w
BIAS = lambda x, b: x + b
SQUARE = lambda x: x * x
SORT = lambda x: (jnp.sort(x), jnp.argsort(x))
TREE = ({"a": draw((3,))[0], "b": [draw((3,), seed=1)[0]]},)
GRID = np.arange(9.0).reshape(3, 3)
TWO = lambda x: (x * x, jnp.sin(x))


def one_entry(factor, n=1000):
    return rule(SQUARE, lambda x, g: 2 * x * g * jnp.ones(n).at[537].set(factor))


WRONG = {
    "missing factor": (rule(SQUARE, lambda x, g: x * g), draw((3, 2)), "constant factor: the gradient is 0.5"),
    "wrong sign": (rule(jnp.cos, lambda x, g: jnp.sin(x) * g), draw((4,)), "sign"),
    "transposed gradient": (
        rule(lambda x: x @ GRID, lambda x, g: (g @ GRID.T).T),
        draw((3, 3)),
        "transposed",
    ),
    "matrix from the wrong side": (
        rule(lambda x: x @ GRID, lambda x, g: g @ GRID),
        draw((3,)),
        "transposed",
    ),
    "dropped sum over a broadcast axis": (rule(BIAS, lambda x, b, g: (g, g[0])), draw((4, 3), (3,)), "broadcast"),
    "mean for a sum over a broadcast axis": (rule(BIAS, lambda x, b, g: (g, g.mean(0))), draw((4, 3), (3,)), "constant factor: the gradient is 0.25"),
    "forgotten argument": (rule(MATMUL, lambda x, w, g: (g @ w.T, None)), draw((4, 3), (3, 2)), "forgotten"),
    "swapped gradients": (rule(lambda a, b: a * b, lambda a, b, g: (a * g, b * g)), draw((3,), (3,)), "wrong"),
    "dropped term": (rule(lambda x: x * jnp.sin(x), lambda x, g: jnp.sin(x) * g), draw((5,)), "term"),
    "ignores the output's gradient": (rule(SQUARE, lambda x, g: 2 * x), draw((3,)), "not multiplied"),
    "adds a constant": (rule(SQUARE, lambda x, g: 2 * x * g + 1e-3), draw((3,)), "not multiplied"),
    "not linear in the gradient": (rule(SQUARE, lambda x, g: 2 * x * jnp.tanh(g)), draw((3,)), "not linear"),
    "clipped gradient": (rule(SQUARE, lambda x, g: 2 * x * jnp.clip(g, -0.1, 0.1)), draw((3,)), "not linear"),
    "depends on the sign of the gradient": (
        rule(lambda x: jnp.maximum(x, 0.1), lambda x, g: ((x >= 0.1) | (g < 0)) * g),
        (np.array([-1.0, -0.5, 0.7]),),
        "-1 times that gives not -1 times",
    ),
    "depends on the size of single gradients": (
        rule(lambda x: 1.0 * x, lambda x, g: g * jnp.abs(g) / jnp.maximum(jnp.linalg.norm(g), 1e-30)),
        draw((3,)),
        "not linear in the gradient of the output: the sum of two",
    ),
    "right for gradients of single entries": (
        rule(lambda x: 1.0 * x, lambda x, g: jnp.where(jnp.sum(g != 0) > 1, 2 * g, g)),
        draw((3,)),
        "not their product with the Jacobian",
    ),
    "drops small gradients": (rule(SQUARE, lambda x, g: jnp.where(jnp.abs(g) < 1e-2, 0, 2 * x * g)), draw((3,)), "-0.001 times"),
    "nan": (rule(SQUARE, lambda x, g: 2 * x * g / (x - x)), draw((3,)), "not finite"),
    "one entry of 1000 by 1.01": (one_entry(1.01), draw((1000,)), r"\[537\]"),
    "one entry zero": (one_entry(0.0), draw((1000,)), r"\[537\]"),
    "missing conjugate": (rule(lambda x: x.real**2 + x.imag**2, lambda x, g: 2 * x * g), draw((3,), dtype=np.complex128), "wrong"),
    "second output forgotten": (rule(TWO, lambda x, a, b: 2 * x * a), draw((3,)), "output 1"),
    "wrong with respect to the second output": (rule(TWO, lambda x, a, b: 2 * x * a - jnp.cos(x) * b), draw((3,)), "output 1"),
    "straight through": (rule(jnp.round, lambda x, g: g), draw((3,)), "does not depend"),
    "softmax without its cross term": (rule(jax.nn.softmax, lambda x, g: jax.nn.softmax(x) * g), draw((4,)), "wrong"),
    "absolute value without sign": (rule(jnp.abs, lambda x, g: g), draw((6,)), "wrong"),
}

RIGHT = {
    "square": (rule(SQUARE, lambda x, g: 2 * x * g), draw((3, 2))),
    "matmul": (rule(MATMUL, lambda x, w, g: (g @ w.T, x.T @ g)), draw((4, 3), (3, 2))),
    "broadcast bias": (rule(BIAS, lambda x, b, g: (g, g.sum(0))), draw((4, 3), (3,))),
    "broadcast summed by the library": (rule(BIAS, lambda x, b, g: (g, g)), draw((4, 3), (3,))),
    "two outputs": (rule(TWO, lambda x, a, b: 2 * x * a + jnp.cos(x) * b), draw((3,))),
    "scalar": (rule(SQUARE, lambda x, g: 2 * x * g), draw(())),
    "softmax": (rule(jax.nn.softmax, lambda x, g: (lambda y: y * (g - jnp.sum(g * y)))(jax.nn.softmax(x))), draw((4,))),
    "complex product": (rule(lambda a, b: a * b, lambda a, b, g: (b * g, a * g)), draw((3,), (3,), dtype=np.complex128)),
    "complex to real": (rule(lambda x: x.real**2 + x.imag**2, lambda x, g: 2 * x.conj() * g), draw((3,), dtype=np.complex128)),
    "real to complex": (rule(lambda x: x * (1 + 2j), lambda x, g: (g * (1 + 2j)).real), draw((3,))),
    "pytree": (
        rule(lambda t: t["a"] * t["b"][0], lambda t, g: {"a": g * t["b"][0], "b": [g * t["a"]]}),
        ({"a": draw((3,))[0], "b": [draw((3,), seed=1)[0]]},),
    ),
    "integer argument": (rule(lambda x, i: x[i], lambda x, i, g: (jnp.zeros_like(x).at[i].add(g), None)), (*draw((4,)), np.array([0, 2, 2]))),
    "integer output": (
        rule(lambda x: (jnp.sort(x), jnp.argsort(x)), lambda x, g, _: jnp.zeros_like(x).at[jnp.argsort(x)].set(g, unique_indices=True)),
        draw((5,)),
    ),
    "no output that can be differentiated": (rule(lambda x: jnp.argsort(x), lambda x, g: None), draw((3,))),
    "plain function": (lambda x, n: jnp.sin(x) ** n, (*draw((3,)), 3)),
    "linear layer": (layers.LinearFunction, draw((5, 3), (4, 3), (4,))),
}


@pytest.mark.parametrize("name", WRONG)
def test_planted_fault_is_caught_and_named(name):
    fn, args, message = WRONG[name]
    with pytest.raises(GradcheckError, match=message):
        gradcheck(fn, args)
    assert not gradcheck(fn, args, raise_exception=False)


@pytest.mark.parametrize("name", RIGHT)
def test_right_rule_is_not_refused(name):
    fn, args = RIGHT[name]
    assert gradcheck(fn, args, check_batched_grad=True, check_forward_ad=True, check_grad_dtypes=True)


@pytest.mark.parametrize("name", ["missing factor", "wrong sign", "dropped term", "swapped gradients", "second output forgotten"])
def test_fast_mode_catches_dense_faults(name):
    fn, args, _ = WRONG[name]
    with pytest.raises(GradcheckError):
        gradcheck(fn, args, fast_mode=True)


@pytest.mark.parametrize("name", ["matmul", "two outputs", "complex product", "pytree"])
def test_fast_mode_refuses_no_right_rule(name):
    fn, args = RIGHT[name]
    assert gradcheck(fn, args, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("name", ["square", "matmul", "softmax", "two outputs", "complex product"])
def test_second_order_of_right_rules(name):
    fn, args = RIGHT[name]
    assert gradgradcheck(fn, args)


def test_second_order_finds_a_backward_that_is_cut_off():
    cut = rule(SQUARE, lambda x, g: 2 * jax.lax.stop_gradient(x) * g)
    assert gradcheck(cut, draw((3,)))
    with pytest.raises(GradcheckError):
        gradgradcheck(cut, draw((3,)))


def test_wrong_jvp_is_found_in_forward_mode_only():
    fn = rule(SQUARE, lambda x, g: 2 * x * g, jvp=staticmethod(lambda ctx, t: 3 * ctx.saved_tensors[0] * t))
    args = draw((3,))
    assert gradcheck(fn, args)
    with pytest.raises(GradcheckError, match=r"forward derivative.*\n.*\n.*\n.*\n.*constant factor"):
        gradcheck(fn, args, check_forward_ad=True)
    with pytest.raises(GradcheckError, match="forward"):
        gradcheck(fn, args, check_forward_ad=True, check_backward_ad=False)


def test_jax_test_util_misses_what_is_found_here():
    from jax.test_util import check_grads

    fn, (x,), _ = WRONG["one entry of 1000 by 1.01"]
    check_grads(fn.apply, (jnp.asarray(x, jnp.float32),), order=1, modes=("rev",))
    with pytest.raises(GradcheckError):
        gradcheck(fn, (x,))


def test_random_backward_is_not_repeatable():
    rng = np.random.default_rng(0)

    def noisy(x, g):
        noise = jax.pure_callback(lambda _: rng.normal(size=3), jax.ShapeDtypeStruct((3,), g.dtype), g, vmap_method="sequential")
        return 2 * x * g * (1 + 1e-5 * noise)

    with pytest.raises(GradcheckError, match="repeatable"):
        gradcheck(rule(SQUARE, noisy), draw((3,)))


def test_float32_is_checked_as_float64_with_a_warning():
    with pytest.warns(UserWarning, match="not float64"):
        assert gradcheck(jnp.sin, (jnp.ones(3, jnp.float32),))


def test_argnums_leaves_the_others_alone():
    fn, args, _ = WRONG["forgotten argument"]
    assert gradcheck(fn, args, argnums=(0,))


def test_nothing_to_check_is_an_error_always():
    with pytest.raises(ValueError, match="nothing to check"):
        gradcheck(lambda x: x, (np.arange(3),), raise_exception=False)
    with pytest.raises(ValueError, match="at least one"):
        gradcheck(jnp.sin, draw((3,)), check_backward_ad=False)


@pytest.mark.parametrize(
    ("fn", "args", "message"),
    [
        (lambda x: None, draw((3,)), "fn returns no array"),
        (lambda x: x * x, draw((0, 3)), "fn returns an empty array"),
        (rule(SQUARE, lambda x, g: 2 * x * g), draw((0,)), "fn returns an empty array"),
    ],
)
@pytest.mark.parametrize("check", [layers.gradcheck, layers.gradgradcheck])
def test_function_without_a_result_is_an_error(check, fn, args, message):
    with pytest.raises(ValueError, match=f"gradcheck: there is nothing to check, since {message}"):
        check(fn, args)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": -1e-6}, ValueError, "gradcheck: eps is -1e-06, but must be a number above 0"),
        ({"eps": float("nan")}, ValueError, "gradcheck: eps is nan"),
        ({"eps": "small"}, TypeError, "gradcheck: eps is 'small', but must be a number"),
        ({"atol": -1}, ValueError, "gradcheck: atol is -1, but must be a number in \\[0, inf\\]"),
        ({"rtol": float("nan")}, ValueError, "gradcheck: rtol is nan"),
        ({"nondet_tol": None}, TypeError, "gradcheck: nondet_tol is None"),
        ({"argnums": (5,)}, ValueError, "gradcheck: argnums names argument 5, but there is 1"),
        ({"fast_mode": "no"}, TypeError, "gradcheck: fast_mode is 'no', but must be True or False"),
        ({"raise_exception": None}, TypeError, "gradcheck: raise_exception is None, but must be True or False"),
        ({"argnums": True}, TypeError, "gradcheck: argnums is True, but must be"),
        ({"argnums": "x"}, TypeError, "gradcheck: argnums is 'x', but must be"),
    ],
)
@pytest.mark.parametrize("check", [layers.gradcheck, layers.gradgradcheck])
def test_option_out_of_range_is_an_error_that_names_it(check, options, error, message):
    with pytest.raises(error, match=message):
        check(jnp.sin, draw((3,)), **options)


@pytest.mark.parametrize("check", [layers.gradcheck, layers.gradgradcheck])
def test_what_is_no_function_is_named(check):
    with pytest.raises(TypeError, match="gradcheck: fn is 'sin', but must be a function"):
        check("sin", draw((3,)))


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ([], ValueError, "grad_outputs holds 0, but must be one for each of the 1 floating-point outputs"),
        ([np.ones(2)], ValueError, r"grad_outputs has shape \(2,\), but must be the shapes of the outputs = \(3,\)"),
        (["x"], TypeError, "grad_outputs is 'x', but must be an array"),
    ],
)
def test_gradients_that_do_not_fit_the_outputs_are_named(grads, error, message):
    with pytest.raises(error, match=f"gradgradcheck: {message}"):
        layers.gradgradcheck(jnp.sin, draw((3,)), grads)
    assert layers.gradgradcheck(jnp.sin, draw((3,)), [np.ones(3)])


def test_option_counts_as_numpy_has_it():
    fn, args, _ = WRONG["forgotten argument"]
    assert gradcheck(fn, args, raise_exception=np.False_) is False


def test_argnums_may_be_one_number_and_count_from_the_end():
    right_in_the_second = rule(lambda x, y: x * y, lambda x, y, g: (0 * g, g * x))
    assert layers.gradcheck(right_in_the_second, draw((3,), (3,)), argnums=-1)
    assert not layers.gradcheck(right_in_the_second, draw((3,), (3,)), argnums=0, raise_exception=False)


def test_errors_of_the_function_are_not_swallowed():
    def broken(x):
        raise ZeroDivisionError("mine")

    with warnings.catch_warnings(), pytest.raises(ZeroDivisionError, match="mine"):
        gradcheck(broken, draw((3,)), raise_exception=False)
