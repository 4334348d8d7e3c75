"""Roots and minima against closed forms, in values and derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.implicit import GMRES, LBFGS, Broyden, ConvergenceError, NewtonCG
from layers.implicit.argmin import argmin
from layers.implicit.fixed_point import fixed_point
from layers.implicit.root import root
from tests.support import assert_trees_close, draw_normal, jit_grad, jit_value_and_grad

TIGHT = {"tol": 1e-12, "backward_tol": 1e-12}


def cubic(x, a, b):
    return x**3 + a * x - b


def data():
    return draw_normal(0, (20, 4), jnp.float64), draw_normal(1, (20,), jnp.float64)


def ridge(w, lam, x, y):
    return jnp.sum((x @ w - y) ** 2) + lam * jnp.sum(w**2)


def exact_ridge(lam, x, y):
    return jnp.linalg.solve(x.T @ x + lam * jnp.eye(4), x.T @ y)


@pytest.mark.parametrize("solver", ["newton", Broyden(memory=5)], ids=str)
def test_root_has_the_derivatives_of_the_implicit_formula(solver):
    with jax.enable_x64(True):
        a, b = jnp.array([1.0, 2.0, 3.0]), jnp.float64(2.0)

        @jax.jit
        def run(a, b):
            solve = lambda a, b: root(cubic, jnp.ones(3), a, b, solver=solver, **TIGHT)
            x, convergence = solve(a, b)
            return x, convergence, jax.jacrev(lambda *p: solve(*p)[0], (0, 1))(a, b), jax.jacfwd(lambda b: solve(a, b)[0])(b)

        x, convergence, (da, db), db_forward = run(a, b)
        assert convergence.converged
        np.testing.assert_allclose(cubic(x, a, b), 0, atol=1e-11)
        slope = 3 * x**2 + a
        np.testing.assert_allclose(da, np.diag(-x / slope), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(db, 1 / slope, rtol=1e-10)
        np.testing.assert_allclose(db_forward, 1 / slope, rtol=1e-10)


def test_root_of_small_numbers_has_an_exact_gradient():
    solve = lambda b: root(lambda x: 1e-6 * (jnp.sinh(x) - b), jnp.zeros(3), tol=1e-12)[0]
    b = jnp.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(jit_grad(lambda b: solve(b).sum())(b), 1 / jnp.sqrt(1 + b**2), rtol=1e-4)


def test_newton_shortens_steps_that_go_too_far():
    x, convergence = root(jnp.arctan, jnp.float32(20.0))
    assert convergence.converged and abs(x) < 1e-4


@pytest.mark.parametrize("size", [30, 100])
def test_linear_system_without_structure_is_solved_by_default(size):
    with jax.enable_x64(True):
        a, b = draw_normal(0, (size, size), jnp.float64), jnp.ones(size)
        solve = lambda a: root(lambda x: a @ x - b, jnp.zeros(size))
        (_, (x, convergence)), da = jax.jit(jax.value_and_grad(lambda a: (solve(a)[0].sum(), solve(a)), has_aux=True))(a)
        want, slope = jit_value_and_grad(lambda a: jnp.linalg.solve(a, b).sum())(a)
        assert convergence.converged and convergence.iterations == 1
        np.testing.assert_allclose(x.sum(), want, rtol=1e-9)
        np.testing.assert_allclose(da, slope, rtol=1e-7, atol=1e-9 * abs(slope).max())


@pytest.mark.parametrize(("size", "restart"), [(7, 7), (100, 100), (400, 100), (2000, 32), (10**6, 20)])
def test_default_restart_is_the_dimension_of_a_small_system_and_bounded_in_memory(size, restart):
    program = jax.make_jaxpr(lambda b: GMRES().solve(lambda x: x, [b], 1e-3, 9).x)(jax.ShapeDtypeStruct((size,), jnp.float32))
    assert f"f32[{restart + 1},{size}]" in str(program)


def test_second_derivative_of_a_root_is_right():
    with jax.enable_x64(True):
        solve = lambda b: root(lambda x: jnp.exp(x) - b, jnp.float64(0.0), **TIGHT)[0]
        np.testing.assert_allclose(jax.jit(jax.grad(jax.grad(solve)))(jnp.float64(3.0)), -1 / 9, rtol=1e-9)


@pytest.mark.parametrize("solver", ["newton", LBFGS(memory=4)], ids=str)
def test_argmin_of_ridge_regression_is_the_closed_form(solver):
    with jax.enable_x64(True):
        x, y = data()
        lam = jnp.float64(3.0)
        solve = lambda lam, x, y: argmin(ridge, jnp.zeros(4), lam, x, y, solver=solver, **TIGHT)
        weights, convergence = jax.jit(solve)(lam, x, y)
        assert convergence.converged
        np.testing.assert_allclose(weights, exact_ridge(lam, x, y), rtol=1e-9)
        scalar = lambda fn, *a: jnp.sin(fn(*a)).sum()
        both = [jax.jit(jax.grad(partial(scalar, fn), (0, 1, 2)))(lam, x, y) for fn in (lambda *a: solve(*a)[0], exact_ridge)]
        assert_trees_close(*both, rtol=1e-9, atol=1e-11)


def test_second_derivative_of_an_argmin_is_right_through_a_closure():
    with jax.enable_x64(True):
        x, y = data()
        solve = lambda lam: argmin(lambda w: ridge(w, lam, x, y), jnp.zeros(4), **TIGHT)[0].sum()
        exact = lambda lam: exact_ridge(lam, x, y).sum()
        lam = jnp.float64(3.0)
        got, want = (jax.jit(jax.grad(jax.grad(fn)))(lam) for fn in (solve, exact))
        np.testing.assert_allclose(got, want, rtol=1e-8)


@pytest.mark.parametrize("solver", [NewtonCG(), LBFGS()], ids=str)
def test_argmin_goes_down_a_curved_valley(solver):
    with jax.enable_x64(True):
        rosenbrock = lambda x, a: jnp.sum((a - x[:-1]) ** 2 + 100 * (x[1:] - x[:-1] ** 2) ** 2)
        solve = lambda a: argmin(rosenbrock, jnp.array([-1.2, 1.0]), a, solver=solver)
        slope, (x, convergence) = jax.jit(jax.jacfwd(lambda a: (solve(a)[0], solve(a)), has_aux=True))(jnp.float64(1.0))
        assert convergence.converged and convergence.iterations > 10
        np.testing.assert_allclose(x, 1, rtol=1e-7)
        np.testing.assert_allclose(slope, [1, 2], rtol=1e-6)


def test_gradient_where_the_hessian_is_not_positive_is_nan():
    at_a_saddle = lambda a: argmin(lambda x: x[0] ** 2 - x[1] ** 2 + a * x.sum(), jnp.zeros(2), tol=10.0)[0].sum()
    assert np.isnan(jit_grad(at_a_saddle)(0.1))


def test_argmin_and_root_of_optimistix_are_taken():
    optx = pytest.importorskip("optimistix")
    with jax.enable_x64(True):
        x, y = data()
        solve = lambda lam: argmin(ridge, jnp.zeros(4), lam, x, y, solver=optx.BFGS(rtol=1e-10, atol=1e-10), tol=1e-6)
        got, convergence = jit_grad(lambda lam: ((found := solve(lam))[0].sum(), found[1]), has_aux=True)(jnp.float64(3.0))
        assert convergence.converged
        np.testing.assert_allclose(got, jit_grad(lambda lam: exact_ridge(lam, x, y).sum())(jnp.float64(3.0)), rtol=1e-6)
        z, convergence = jax.jit(partial(root, cubic, solver=optx.Dogleg(rtol=1e-10, atol=1e-10)))(jnp.ones(3), 1.0, 2.0)
        assert convergence.converged
        np.testing.assert_allclose(z, 1.0, rtol=1e-8)


class Noisy(nnx.Module):
    def __init__(self):
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def residual(self, x, b):
        return x + 0.1 * self.dropout(jnp.sin(x)) - b

    def __call__(self, x, b):
        return jnp.sum(x**2 / 2 - b * x - 0.1 * self.dropout(jnp.cos(x)))


@pytest.mark.parametrize("solve", [lambda b: root(Noisy().residual, b, b), lambda b: argmin(Noisy(), b, b)], ids=["root", "argmin"])
def test_module_that_changes_its_state_may_be_f(solve):
    b = jnp.linspace(0.5, 1.5, 8)
    (_, (x, convergence)), db = jit_value_and_grad(lambda b: (solve(b)[0].sum(), solve(b)), has_aux=True)(b)
    assert convergence.converged and jnp.isfinite(db).all() and 0 < (jnp.abs(x - b) < 1e-4).sum() < 8


@pytest.mark.parametrize("max_steps", [2, 100])
@pytest.mark.parametrize("solver", ["newton", "broyden", "anderson", "iteration", NewtonCG(), LBFGS()], ids=str)
def test_residual_is_that_of_the_returned_x(solver, max_steps):
    least = isinstance(solver, (NewtonCG, LBFGS))
    with jax.enable_x64(True):
        f = lambda x: jnp.sum(x**2 / 2 + jnp.cos(x) / 3 - x)
        solve = partial(argmin, f) if least else partial(root, jax.grad(f))
        x, convergence = jax.jit(partial(solve, solver=solver, max_steps=max_steps, tol=1e-3))(jnp.linspace(-1, 1, 5))
        rms = lambda a: jnp.sqrt(jnp.mean(a**2))
        np.testing.assert_allclose(convergence.residual, rms(jit_grad(f)(x)) / (1 + rms(x)), rtol=1e-6)


def test_throw_raises():
    with pytest.raises(ConvergenceError, match="root: the solve did not converge"):
        root(lambda x: x**2 + 1, jnp.float32(3.0), max_steps=5, throw=True)
    with pytest.raises(ConvergenceError, match="argmin: the solve did not converge"):
        argmin(lambda x: x, jnp.float32(3.0), max_steps=5, throw=True)


def test_error_names_the_options_that_may_help():
    with pytest.raises(ConvergenceError, match=r"max_steps=\.\.\., or a larger residual, tol=\.\.\.; .* solver=Newton\(restart="):
        root(lambda x: x**2 + 1, jnp.float32(3.0), max_steps=5, throw=True)
    with pytest.raises(RuntimeError, match=r"backward_steps=\.\.\., or a larger residual, backward_tol=\.\.\.; .* backward=GMRES\(restart="):
        b = jnp.array([1.0, 2.0, 3.0])
        jit_grad(lambda b: root(lambda x: x**2 - b, jnp.ones(3), backward_steps=1, throw=True)[0].sum())(b)


def test_function_that_returns_a_python_number_is_an_equation_too():
    x, convergence = fixed_point(lambda x: 0.5, 1.0)
    assert x == 0.5 and convergence.converged
    (a, b), convergence = root(lambda x: (x[0] - 2, 0.0), (1.0, 3.0))
    assert abs(a - 2) < 1e-5 and b == 3 and convergence.converged


def test_constant_objective_has_its_minimum_where_one_starts():
    x, convergence = argmin(lambda x: 1.0, 1.0)
    assert x == 1 and convergence.converged and convergence.iterations == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: root(lambda x: x[:1], jnp.ones(3)), ValueError, "root: f must return the shape of x"),
        (lambda: root(lambda x: x, jnp.ones(3), backward="one_step"), ValueError, "root: backward is 'one_step', but must be one of"),
        (lambda: root(lambda x: x, jnp.ones(3), backward_steps=-1), ValueError, "root: backward_steps is -1"),
        (
            lambda: argmin(lambda x: x, jnp.ones(3)),
            ValueError,
            "argmin: f must return a real scalar, but returned an array of float32, shape \\(3,\\)",
        ),
        (lambda: argmin(lambda x: x.sum(), jnp.ones(3, jnp.complex64)), (TypeError, ValueError), "argmin: "),
        (lambda: argmin(lambda x: x.sum(), jnp.ones(3), solver="iteration"), ValueError, "argmin: solver is 'iteration'"),
        (lambda: argmin(lambda x: x.sum(), 3), TypeError, "argmin: x0 must hold floating-point or complex arrays, but holds a int"),
    ],
    ids=range(7),
)
def test_bad_input_is_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()
