"""Equations that are not defined everywhere, that have no solution, and whose numbers cannot be squared: solved, or said not to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.implicit import LBFGS, ConvergenceError
from layers.implicit.argmin import argmin
from layers.implicit.fixed_point import fixed_point
from layers.implicit.root import root
from tests.support import jit_grad

LOG_ROOT = np.exp(-3.0)


def log_barrier(x):
    return jnp.sum(x - jnp.log(x))


@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
def test_minimum_is_found_where_the_first_step_leaves_the_domain(solver):
    x, convergence = jax.jit(lambda x0: argmin(log_barrier, x0, solver=solver))(jnp.array([3.0, 0.02]))
    assert convergence.converged
    np.testing.assert_allclose(x, 1, rtol=1e-4)


@pytest.mark.parametrize("solver", ["newton", "broyden", "anderson"])
def test_root_is_found_where_the_first_step_leaves_the_domain(solver):
    solve = jax.jit(lambda b: root(lambda x, b: jnp.log(x) + b, jnp.array([5.0]), b, solver=solver))
    x, convergence = solve(3.0)
    assert convergence.converged
    np.testing.assert_allclose(x, LOG_ROOT, rtol=1e-4)


@pytest.mark.parametrize("solver", ["anderson", "newton"])
def test_fixed_point_is_found_where_the_first_step_leaves_the_domain(solver):
    x, convergence = jax.jit(lambda x0: fixed_point(lambda x: x - jnp.log(x) - 3, x0, solver=solver))(jnp.array([5.0]))
    assert convergence.converged
    np.testing.assert_allclose(x, LOG_ROOT, rtol=1e-3)


def test_each_of_a_batch_is_shortened_for_itself():
    x, convergence = jax.jit(jax.vmap(lambda x0: argmin(log_barrier, x0)))(jnp.array([3.0, 1.1, -1.0]))
    np.testing.assert_array_equal(convergence.converged, [True, True, False])
    np.testing.assert_allclose(x[:2], 1, rtol=1e-4)


UNSOLVED = {
    "a fixed point that iteration leaves the domain for": lambda: fixed_point(lambda x: x - jnp.log(x) - 3, jnp.array([5.0]), solver="iteration"),
    "no root in the domain": lambda: root(lambda x: jnp.sqrt(x) + 1, jnp.array([1.0])),
    "no root in the domain, by Broyden": lambda: root(lambda x: jnp.sqrt(x) + 1, jnp.array([1.0]), solver="broyden"),
    "no root, and f that flattens": lambda: root(lambda x: jnp.arctan(x) + 2, jnp.array([1.0])),
    "no root, and f that flattens, by Broyden": lambda: root(lambda x: jnp.arctan(x) + 2, jnp.array([1.0]), solver="broyden"),
    "no root, and f that flattens, by Anderson": lambda: root(lambda x: jnp.arctan(x) + 2, jnp.array([1.0]), solver="anderson"),
    "no minimum, and f that flattens": lambda: argmin(lambda x: -jnp.log(x).sum(), jnp.array([1.0])),
    "no minimum, and f that flattens, by L-BFGS": lambda: argmin(lambda x: -jnp.log(x).sum(), jnp.array([1.0]), solver="lbfgs"),
    "no minimum, and f that steepens": lambda: argmin(lambda x: jnp.log(x).sum(), jnp.array([1.0])),
    "a start outside of the domain": lambda: argmin(log_barrier, jnp.array([-1e7])),
    "a start outside of the domain, by L-BFGS": lambda: argmin(log_barrier, jnp.array([-1e7]), solver="lbfgs"),
    "a start that is not a number": lambda: root(jnp.tanh, jnp.array([jnp.nan])),
    "a start at infinity": lambda: root(lambda x: 1 / x, jnp.array([jnp.inf])),
    "a value beyond half precision": lambda: fixed_point(lambda x: x + jnp.float16(6e4), jnp.ones(1, jnp.float16), solver="iteration"),
}


@pytest.mark.parametrize("name", UNSOLVED)
def test_what_has_no_solution_is_never_converged(name):
    assert not jax.jit(UNSOLVED[name])()[1].converged


@pytest.mark.parametrize(
    ("solve", "cause"),
    [
        (lambda: argmin(log_barrier, jnp.array([-1.0]), throw=True), "x has left where f is finite, or started outside"),
        (lambda: root(lambda x: jnp.arctan(x) + 2, jnp.array([1.0]), throw=True), "it is small only because x has grown"),
    ],
    ids=["domain", "runaway"],
)
def test_error_says_why(solve, cause):
    with pytest.raises(ConvergenceError, match=cause):
        solve()


@pytest.mark.parametrize("size", [1e30, 1e-15])
def test_numbers_that_cannot_be_squared_are_solved_for(size):
    start = jnp.array([5.0, 1.0])
    solves = jax.jit(
        lambda: (
            root(lambda x: size * (x**3 - 8), start, tol=size * 1e-6),
            argmin(lambda x: size * jnp.sum((x - 2) ** 2), start, tol=size * 1e-6),
            argmin(lambda x: size * jnp.sum((x - 2) ** 2), start, tol=size * 1e-6, solver=LBFGS(4)),
            fixed_point(lambda x: size * jnp.tanh(0.5 * x / size + 1), size * start, tol=min(size, 1) * 1e-6),
        )
    )()
    for x, convergence in solves[:3]:
        assert convergence.converged
        np.testing.assert_allclose(x, 2, rtol=1e-5)
    x, convergence = solves[3]
    np.testing.assert_allclose(x, size * np.tanh(0.5 * np.asarray(x) / size + 1), rtol=1e-4)


@pytest.mark.parametrize("size", [1e38, 1e-30])
def test_gradient_of_any_size_goes_through_the_linear_solve(size):
    slope = jit_grad(lambda b: size * root(lambda x, b: 2 * x - b, jnp.array([1.0, 2.0]), b)[0].sum())(jnp.ones(2))
    np.testing.assert_allclose(slope, size / 2, rtol=1e-5)
