"""Second derivatives of Functions that call NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.function.function import Function, once_differentiable

X = jnp.float32(0.5)


def host(fn):
    return lambda x: jax.pure_callback(fn, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential")


def made(name, forward, backward):
    """A Function of one argument. `forward(x)` gives the output and what to save, `backward(saved)` the derivative."""

    def run(ctx, x):
        y, saved = forward(x)
        ctx.save_for_backward(saved)
        return y

    return type(name, (Function,), {"forward": staticmethod(run), "backward": staticmethod(lambda ctx, g: g * backward(*ctx.saved_tensors))})


Cos = made("Cos", lambda x: (host(np.cos)(x), x), lambda x: -host(np.sin)(x))
Sin = made("Sin", lambda x: (host(np.sin)(x), x), lambda x: Cos.apply(x))
Exp = made("Exp", lambda x: 2 * (host(np.exp)(x),), lambda y: y)
Bare = made("Bare", lambda x: (host(np.sin)(x), x), lambda x: host(np.cos)(x))
Inner = made("Inner", lambda x: (host(np.sin)(x), host(np.cos)(x)), lambda c: c)

SECOND = {
    "reverse over reverse": lambda f: jax.grad(jax.grad(f)),
    "forward over reverse": jax.hessian,
    "compiled": lambda f: jax.jit(jax.grad(jax.grad(f))),
    "batched": lambda f: lambda x: jax.vmap(jax.grad(jax.grad(f)))(x[None])[0],
}


@pytest.mark.parametrize("order", SECOND)
@pytest.mark.parametrize(("cls", "expected"), [(Sin, -np.sin(0.5)), (Exp, np.exp(0.5))], ids=["made of Functions", "by the output"])
def test_numpy_rule_made_of_functions_is_differentiated_again(cls, expected, order):
    np.testing.assert_allclose(SECOND[order](cls.apply)(X), expected, rtol=1e-5)


def test_function_of_its_own_output_is_differentiated_to_any_order():
    np.testing.assert_allclose(jax.grad(jax.grad(jax.grad(lambda x: Exp.apply(2 * x))))(X), 8 * np.exp(1.0), rtol=1e-5)


@pytest.mark.parametrize("order", SECOND)
def test_bare_call_of_numpy_in_backward_is_an_error_that_names_the_function_and_the_cure(order):
    np.testing.assert_allclose(jax.grad(Bare.apply)(X), np.cos(0.5), rtol=1e-5)
    with pytest.raises(TypeError, match=r"Bare.backward cannot be differentiated.*in a Function of its own.*call that in Bare.backward"):
        SECOND[order](Bare.apply)(X)


@pytest.mark.parametrize("order", SECOND)
def test_saved_intermediate_of_numpy_is_an_error_that_names_the_function_and_the_cure(order):
    np.testing.assert_allclose(jax.grad(Inner.apply)(X), np.cos(0.5), rtol=1e-5)
    with pytest.raises(TypeError, match=r"Inner.forward cannot be differentiated.*save arguments and outputs only"):
        SECOND[order](Inner.apply)(X)


def test_once_differentiable_numpy_rule_keeps_its_error():
    cls = type("Once", (Bare,), {"backward": staticmethod(once_differentiable(Bare.backward))})
    np.testing.assert_allclose(jax.grad(cls.apply)(X), np.cos(0.5), rtol=1e-5)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        jax.grad(jax.grad(cls.apply))(X)


def test_error_that_has_nothing_to_do_with_derivatives_is_raised_as_it_is():
    def broken(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        jax.grad(jax.grad(made("Broken", lambda x: (jnp.sin(x), x), broken).apply))(X)
    with pytest.raises(KeyError, match="mine"):
        jax.grad(jax.grad(made("Broken", broken, broken).apply))(X)
