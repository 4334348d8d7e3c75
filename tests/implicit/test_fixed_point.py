"""Gradients of fixed points against hundreds of unrolled steps in float64; solvers, transformations, failures, memory."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from layers.implicit import CG, GMRES, Anderson, Broyden, ConvergenceError, Iteration, Neumann, OneStep, vectors
from layers.implicit.fixed_point import fixed_point
from layers.implicit.linear import default_tolerance
from layers.tools.cases.case import forward_and_backward
from layers.tools.cases.implicit import CASES
from tests.support import assert_trees_close, draw_normal, jit_grad, saved_bytes, temp_bytes

TIGHT = {"tol": 1e-13, "backward_tol": 1e-12}
PLAIN = TIGHT | {"solver": "iteration", "backward": "iteration"}


def draw(seed, *shape, dtype=None):
    return draw_normal(seed, shape, dtype or jnp.float64)


def f(x, w, u):
    return jnp.tanh(x @ w + u)


def arguments(dtype=jnp.float64):
    return draw(0, 5, 5, dtype=dtype) / 5, draw(1, 3, 5, dtype=dtype)


def loss(z):
    return (jnp.sin(z) * jnp.arange(1, z.size + 1, dtype=z.dtype).reshape(z.shape) / z.size).sum()


def unrolled(w, u, fn=f, steps=300):
    return jax.lax.scan(lambda z, _: (fn(z, w, u), None), jnp.zeros_like(u), None, length=steps)[0]


def solved(w, u, **options):
    return fixed_point(f, jnp.zeros_like(u), w, u, **(TIGHT | options))


@cache
def expected():
    """Value and gradients of the unrolled loop."""
    return jax.jit(jax.value_and_grad(lambda *a: loss(unrolled(*a)), (0, 1)))(*arguments())


def gradients(fn, *args):
    return jax.jit(jax.grad(lambda *a: loss(fn(*a)), tuple(range(len(args)))))(*args)


WAYS = [
    {"solver": "anderson"},
    {"solver": "broyden", "backward": "broyden"},
    {"solver": "iteration", "backward": "iteration"},
    {"solver": Anderson(memory=2, mixing=0.8), "backward": GMRES(restart=3)},
    {"solver": "newton", "backward": Anderson(memory=3)},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_values_and_gradients_are_those_of_the_unrolled_loop(options):
    with jax.enable_x64(True):

        def value(w, u):
            z, convergence = solved(w, u, **options)
            return loss(z), convergence

        (y, convergence), grads = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(*arguments())
        assert convergence.converged and convergence.residual <= 1e-13 and 1 < convergence.iterations < 60
        assert_trees_close((y, grads), expected(), rtol=1e-10, atol=1e-11)


def test_second_derivatives_are_those_of_the_unrolled_loop_in_every_order_of_modes():
    with jax.enable_x64(True):
        w, u = arguments()
        v = draw(3, 5, 5)

        def all_orders(fn):
            scalar = lambda w: loss(fn(w, u))
            slope = lambda w: jnp.vdot(jax.grad(scalar)(w), v)
            return (
                jax.jvp(jax.grad(scalar), (w,), (v,))[1],
                jax.grad(slope)(w),
                jax.grad(lambda w: jax.jvp(scalar, (w,), (v,))[1])(w),
            )

        ours, theirs = (jax.jit(partial(all_orders, fn))() for fn in (lambda w, u: solved(w, u)[0], unrolled))
        assert_trees_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_neumann_is_the_truncated_series_and_one_step_its_first_term():
    with jax.enable_x64(True):
        w, u = arguments()
        z = jax.jit(solved)(w, u)[0]
        pull = jax.jit(lambda g: jax.vjp(f, z, w, u)[1](g))
        g = jit_grad(loss)(z)
        total = term = g
        terms = lambda method: gradients(lambda w, u: solved(w, u, solver="iteration", **method)[0], w, u)
        assert_trees_close(terms({"backward": OneStep()}), pull(total)[1:], rtol=1e-9, atol=1e-10)
        for _ in range(3):
            term = pull(term)[0]
            total = total + term
        for method in ({"backward": Neumann(3)}, {"backward": "neumann", "backward_steps": 3}):
            assert_trees_close(terms(method), pull(total)[1:], rtol=1e-9, atol=1e-10)


def test_forward_mode_of_a_truncated_series_is_its_own_transpose():
    with jax.enable_x64(True):
        w, u = arguments()
        scalar = lambda w: loss(solved(w, u, backward="neumann", backward_steps=2)[0])
        v = draw(3, 5, 5)
        forward, reverse = jax.jit(lambda w: (jax.jvp(scalar, (w,), (v,))[1], jnp.vdot(jax.grad(scalar)(w), v)))(w)
        np.testing.assert_allclose(forward, reverse, rtol=1e-9)


def test_conjugate_gradients_solve_a_symmetric_problem():
    with jax.enable_x64(True):
        w, u = arguments()
        quadratic = lambda z, w, u: z @ (w + w.T) / 4 + u
        solve = lambda w, u: fixed_point(quadratic, jnp.zeros_like(u), w, u, backward=CG(), **TIGHT)[0]
        assert_trees_close(gradients(solve, w, u), gradients(partial(unrolled, fn=quadratic), w, u), rtol=1e-10, atol=1e-11)


def test_starting_point_has_gradient_zero():
    with jax.enable_x64(True):
        w, u = arguments()
        g = jit_grad(lambda x0: loss(fixed_point(f, x0, w, u)[0]))(jnp.ones_like(u))
        assert not g.any()


# What f closes over


class Cell(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(5, 5, rngs=rngs, kernel_init=nnx.initializers.normal(0.1), param_dtype=jnp.float64)

    def __call__(self, z, u):
        return jnp.tanh(self.linear(z) + u)


CLOSURES = {
    "function": lambda w, u: fixed_point(lambda z: f(z, w, u), jnp.zeros_like(u), **PLAIN)[0],
    "jitted function": lambda w, u: fixed_point(jax.jit(lambda z: f(z, w, u)), jnp.zeros_like(u), **PLAIN)[0],
    "partial": lambda w, u: fixed_point(partial(f, w=w, u=u), jnp.zeros_like(u), **PLAIN)[0],
    "checkpoint": lambda w, u: fixed_point(jax.checkpoint(lambda z, u: f(z, w, u)), jnp.zeros_like(u), u, **PLAIN)[0],
}


@pytest.mark.parametrize("name", CLOSURES)
def test_closed_over_values_get_their_gradients_without_a_leak(name):
    with jax.enable_x64(True), jax.checking_leaks():
        assert_trees_close(gradients(CLOSURES[name], *arguments()), expected()[1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "solve",
    [
        lambda cell, u: fixed_point(lambda z: cell(z, u), jnp.zeros_like(u), **PLAIN),
        lambda cell, u: fixed_point(cell, jnp.zeros_like(u), u, **PLAIN),
        lambda cell, u: fixed_point(lambda z, cell, u: cell(z, u), jnp.zeros_like(u), cell, u, **PLAIN),
    ],
    ids=["closed over", "called", "argument"],
)
def test_modules_get_their_gradients(solve):
    with jax.enable_x64(True), jax.checking_leaks():
        cell, u = Cell(nnx.Rngs(0)), arguments()[1]
        got = nnx.jit(nnx.grad(lambda cell, u: loss(solve(cell, u)[0])))(cell, u)
        kernel = cell.linear.kernel[...]
        want = jit_grad(lambda k: loss(unrolled(k, u)))(kernel)
        np.testing.assert_allclose(got["linear"]["kernel"][...], want, rtol=1e-10, atol=1e-11)


class Noisy(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.float32(0.2))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, z, u):
        return self.dropout(self.scale * jnp.tanh(z)) + u

    def step(self, z, u):
        return self(z, u)


@pytest.mark.parametrize("method", [False, True], ids=["module", "method"])
def test_module_that_changes_its_state_may_be_f(method):
    module, u = Noisy(), jnp.arange(8.0)

    def value(module):
        z, convergence = fixed_point(module.step if method else module, jnp.zeros(8), u)
        return z.sum(), (z, convergence.converged)

    grads, (z, converged) = nnx.jit(nnx.grad(value, has_aux=True))(module)
    assert converged and 0 < (jnp.abs(z - u) < 1e-6).sum() < 8
    assert jnp.isfinite(grads["scale"][...]) and grads["scale"][...] != 0


def test_integers_and_keys_that_a_loop_traces_are_closed_over_without_a_leak():
    def total(w, u):
        def body(total, i):
            key = jax.random.fold_in(jax.random.key(0), i)
            g = lambda z: f(z, w, u) * (i + 1) / 3 + 0.1 * jax.random.normal(key, z.shape)
            z = fixed_point(g, jnp.zeros_like(u), solver="iteration", backward="iteration")[0]
            return total + loss(z), None

        return jax.lax.scan(body, jnp.zeros(()), jnp.arange(2))[0]

    with jax.checking_leaks():
        grads = jax.jit(jax.grad(total, (0, 1)))(*arguments(jnp.float32))
    assert all(np.isfinite(g).all() and g.any() for g in grads)


def test_any_pytree_is_solved_for():
    with jax.enable_x64(True):
        w, u = arguments()

        def coupled(z, w):
            return {"a": jnp.tanh(z["b"][0] @ w["w"] + u), "b": (0.3 * jnp.sin(z["a"]) + w["c"],)}

        def solve(w, n):
            start = {"a": jnp.zeros_like(u), "b": (jnp.zeros_like(u),)}
            if n:
                return jax.lax.scan(lambda z, _: (coupled(z, w), None), start, None, length=n)[0]
            return fixed_point(coupled, start, w, **PLAIN)[0]

        args = {"w": w, "c": jnp.float64(0.2)}
        both = [jax.jit(jax.grad(lambda w, n=n: sum(map(loss, jax.tree.leaves(solve(w, n))))))(args) for n in (0, 200)]
        assert_trees_close(*both, rtol=1e-10, atol=1e-11)


def test_complex_solutions_have_the_gradients_of_jax():
    with jax.enable_x64(True):
        w, u = arguments()
        w, u = w + 0.3j * w.T, u - 0.5j * u[::-1]
        step = lambda z, w, u: 0.5 * jnp.sin(z @ w) + 0.2 * jnp.conj(z) + u
        scalar = lambda z: (jnp.abs(z) ** 2 * jnp.arange(15.0).reshape(3, 5)).sum()
        ours = lambda w, u: scalar(fixed_point(step, jnp.zeros_like(u), w, u, **PLAIN)[0])
        theirs = lambda w, u: scalar(unrolled(w, u, fn=step))
        both = [jax.jit(jax.grad(fn, (0, 1)))(w, u) for fn in (ours, theirs)]
        assert_trees_close(*both, rtol=1e-9, atol=1e-9)


# Transformations with the default solvers; the contract runs them with plain iteration


@pytest.mark.devices(2)
def test_batches_and_devices_give_the_gradients_of_each_element():
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    with jax.enable_x64(True):
        w, u = arguments()
        us = jnp.stack([u, 0.1 * u])
        grad = jit_grad(lambda w, u: loss(solved(w, u)[0]), (0, 1))
        each = [jax.jit(grad)(w, u) for u in us]
        batched = jax.jit(jax.vmap(grad, (None, 0)))(w, us)
        assert_trees_close(batched, jax.tree.map(lambda *g: jnp.stack(g), *each), rtol=1e-10, atol=1e-11)
        on_each = lambda w, u: loss(fixed_point(lambda z: f(z, w, u[0]), jnp.zeros_like(u[0]), throw=True, **TIGHT)[0])[None]
        shared = jax.shard_map(on_each, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
        total = jax.jit(jax.grad(lambda w: shared(w, us).sum()))(w)
        np.testing.assert_allclose(total, batched[0].sum(0), rtol=1e-10, atol=1e-11)


def test_each_element_of_a_batch_stops_for_itself():
    slow_and_fast = jnp.array([0.9, 0.1])
    run = lambda a: fixed_point(lambda z: a * z + 1, 0.0, solver="iteration", max_steps=200)
    z, convergence = jax.jit(jax.vmap(run))(slow_and_fast)
    np.testing.assert_allclose(z, 1 / (1 - slow_and_fast), rtol=1e-4)
    assert convergence.iterations[0] > 50 > 10 > convergence.iterations[1]


# Failures


def test_solve_that_did_not_converge_is_flagged():
    z, convergence = fixed_point(lambda z: 2 * z + 1, jnp.ones(3), solver="iteration", max_steps=7)
    assert not convergence.converged and convergence.iterations == 7 and convergence.residual > 0.1
    assert np.isfinite(z).all()


@pytest.mark.parametrize("max_steps", [2, 100])
@pytest.mark.parametrize("solver", ["anderson", "broyden", "iteration", "newton"])
def test_residual_is_that_of_the_returned_x(solver, max_steps):
    with jax.enable_x64(True):
        w, u = arguments()
        z, convergence = jax.jit(partial(solved, solver=solver, max_steps=max_steps, tol=1e-3))(w, u)
        measure = vectors.rms([f(z, w, u) - z]) / (1 + vectors.rms([z]))
        np.testing.assert_allclose(convergence.residual, measure, rtol=1e-6)


def test_gradient_of_a_solve_that_did_not_converge_is_the_formula_at_the_last_x():
    with jax.enable_x64(True):
        g = lambda z, a: jnp.tanh(a * z + 1)
        solve = lambda a: fixed_point(g, jnp.float64(0.0), a, solver="iteration", max_steps=2, tol=1e-12)
        slope, (z, convergence) = jit_grad(lambda a: (solve(a)[0], solve(a)), has_aux=True)(jnp.float64(0.9))
        dz, da = jit_grad(g, (0, 1))(z, jnp.float64(0.9))
        assert not convergence.converged
        np.testing.assert_allclose(slope, da / (1 - dz), rtol=1e-9)


def test_slow_divergence_in_bfloat16_does_not_converge():
    run = lambda z: fixed_point(lambda z: jnp.bfloat16(1.02) * z, z, solver="iteration", max_steps=20)
    assert not run(jnp.full(4, 100, jnp.bfloat16))[1].converged


def test_default_tolerances():
    dtypes = [jnp.float64, jnp.float32, jnp.float16, jnp.bfloat16]
    np.testing.assert_allclose([default_tolerance([d]) for d in dtypes], [1.82e-12, 6.42e-6, 0.00195, 0.0156], rtol=5e-3)
    assert default_tolerance([jnp.float64, jnp.bfloat16]) == default_tolerance([jnp.bfloat16])


def test_solve_that_meets_nan_stops_and_is_flagged():
    _, convergence = fixed_point(lambda z: z * jnp.nan, jnp.ones(3), max_steps=50)
    assert not convergence.converged and convergence.iterations == 1


@pytest.mark.parametrize("backward", ["gmres", "iteration", "anderson"])
def test_gradient_whose_linear_solve_did_not_converge_is_nan(backward):
    w, u = arguments(jnp.float32)
    solve = lambda w: fixed_point(f, jnp.zeros_like(u), w, u, solver="iteration", backward=backward, backward_steps=1, backward_tol=1e-6)[0]
    assert np.isnan(gradients(solve, w)[0]).all()


def test_throw_raises_at_once_outside_jit():
    with pytest.raises(ConvergenceError, match=r"fixed_point: the solve did not converge: residual .* after 3 steps, tolerance"):
        fixed_point(lambda z: 2 * z + 1, jnp.ones(3), solver="iteration", max_steps=3, throw=True)


def test_throw_raises_inside_jit_and_vmap():
    run = lambda a: fixed_point(lambda z: a * z + 1, jnp.ones(3), solver="iteration", max_steps=9, throw=True)[0]
    with pytest.raises(jax.errors.JaxRuntimeError, match="fixed_point: the solve did not converge"):
        jax.block_until_ready(jax.jit(jax.vmap(run))(jnp.array([0.01, 2.0])))
    assert np.isfinite(jax.jit(jax.vmap(run))(jnp.array([0.01, 0.02]))).all()


def test_throw_raises_where_the_gradient_fails():
    w, u = arguments(jnp.float32)
    solve = lambda w: fixed_point(f, jnp.zeros_like(u), w, u, backward_steps=1, backward_tol=1e-6, throw=True)[0]
    with pytest.raises(jax.errors.JaxRuntimeError, match="the linear solve of its derivative did not converge"):
        jax.block_until_ready(jax.jit(jax.grad(lambda w: loss(solve(w))))(w))


# Edges


def test_acceleration_solves_what_iteration_does_not():
    with jax.enable_x64(True):
        a = jnp.diag(jnp.array([-3.0, 0.5, -0.9])) + 0.1
        run = jax.jit(lambda a, solver: fixed_point(lambda z: a @ z + 1, jnp.zeros(3), solver=solver, tol=1e-12), static_argnums=1)
        want = jnp.linalg.solve(jnp.eye(3) - a, jnp.ones(3))
        for solver in (Anderson(), Broyden()):
            np.testing.assert_allclose(run(a, solver)[0], want, rtol=1e-9)
        assert not run(a, Iteration())[1].converged
        got = jit_grad(lambda a: run(a, "anderson")[0].sum())(a)
        np.testing.assert_allclose(got, jit_grad(lambda a: jnp.linalg.solve(jnp.eye(3) - a, jnp.ones(3)).sum())(a), rtol=1e-8)


@pytest.mark.parametrize("solver", ["anderson", "broyden", "iteration", "newton"])
def test_solution_zero_and_a_start_at_the_solution_converge(solver):
    solve = jax.jit(lambda x: fixed_point(lambda z, a: a * z, x, jnp.float32(0.5), solver=solver))
    z, convergence = solve(jnp.ones(4))
    assert convergence.converged and abs(z).max() < 1e-4
    z, convergence = solve(jnp.zeros(4))
    assert convergence.converged and convergence.iterations <= 1 and not z.any()


def test_zero_gradient_and_empty_batch_are_no_failure():
    w, u = arguments(jnp.float32)
    assert not jit_grad(lambda w: 0 * fixed_point(f, jnp.zeros_like(u), w, u)[0].sum())(w).any()
    grads = jit_grad(lambda w: fixed_point(f, jnp.zeros((0, 5)), w, u[:0])[0].sum())(w)
    assert not grads.any()


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float32, 2e-8), (jnp.bfloat16, 5e-4)])
def test_error_is_not_above_that_of_the_unrolled_loop(dtype, tol):
    with jax.enable_x64(True):
        args = (draw(0, 32, 32) / 16).astype(dtype), draw(1, 48, 32).astype(dtype)
        exact = gradients(unrolled, *[a.astype(jnp.float64) for a in args])
        options = {"solver": "iteration", "backward": "iteration", "tol": tol, "backward_tol": tol}
        ours, theirs = gradients(lambda w, u: solved(w, u, **options)[0], *args), gradients(unrolled, *args)
        error = lambda grads: sum(float(jnp.linalg.norm(g.astype(jnp.float64) - e) / jnp.linalg.norm(e)) for g, e in zip(grads, exact, strict=True))
        assert [g.dtype for g in ours] == [dtype] * 2
        assert error(ours) <= 1.1 * error(theirs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_products_with_a_stack_are_those_with_each_vector(dtype):
    stack = [draw(0, 3, 4, 5, dtype=dtype), draw(1, 3, dtype=dtype)]
    a, weights = [draw(2, 4, 5, dtype=dtype), draw(3, dtype=dtype)], draw(4, 3, dtype=jnp.float32)
    each = [vectors.take(stack, i) for i in range(3)]
    np.testing.assert_allclose(vectors.dots(stack, a), [vectors.dot(one, a) for one in each], rtol=1e-5, atol=1e-5)
    want = [sum(w * x for w, x in zip(weights, xs, strict=True)) for xs in zip(*each, strict=True)]
    assert_trees_close(vectors.combine(weights, stack), want, rtol=1e-5, atol=1e-5)
    assert vectors.dots(stack, a).dtype == jnp.float32 and [x.dtype for x in vectors.combine(weights, stack)] == [dtype] * 2


def test_steps_may_be_numpy_integers():
    options = {"max_steps": np.int64(30), "backward_steps": np.int64(30)}
    for backward in ("gmres", "cg", "iteration", "anderson", "neumann"):
        assert jnp.isfinite(jit_grad(lambda a, b=backward: fixed_point(lambda z: a * z + 1, 0.0, backward=b, **options)[0])(0.5))


def test_start_is_cast_to_the_dtype_of_f():
    w, u = arguments(jnp.float32)
    z, convergence = fixed_point(f, jnp.zeros((3, 5), jnp.bfloat16), w, u)
    assert z.dtype == jnp.float32 and convergence.residual.dtype == jnp.float32 and convergence.converged


# Memory


def test_memory_is_a_tenth_of_the_unrolled_loop_and_does_not_grow_with_the_steps():
    def ours(steps):
        options = {"solver": "iteration", "backward": "iteration", "max_steps": steps, "backward_steps": steps}
        return jax.value_and_grad(lambda w, u: jnp.sin(fixed_point(f, jnp.zeros_like(u), w, u, **options)[0]).sum(), (0, 1))

    case = CASES[0]
    args = case.arguments()
    least = temp_bytes(forward_and_backward(case.ours), *args)
    assert least <= 4.1 * args[2].nbytes
    assert least <= 0.12 * temp_bytes(forward_and_backward(case.idiomatic), *args)
    assert temp_bytes(ours(11), *args[1:]) == temp_bytes(ours(100), *args[1:])


def test_nothing_but_the_solution_is_saved():
    w, u = arguments(jnp.float32)
    assert saved_bytes(lambda w, u: fixed_point(f, jnp.zeros_like(u), w, u)[0], w, u) <= 2 * u.nbytes


# Solvers of other libraries


def test_solvers_of_optimistix_and_lineax_are_taken():
    optx, lx = pytest.importorskip("optimistix"), pytest.importorskip("lineax")
    with jax.enable_x64(True):
        for solver, backward in [
            (optx.FixedPointIteration(rtol=1e-14, atol=1e-14), lx.GMRES(rtol=1e-12, atol=1e-14)),
            (optx.Newton(rtol=1e-14, atol=1e-14), lx.LU()),
        ]:
            solve = lambda w, u, s=solver, b=backward: solved(w, u, solver=s, backward=b, max_steps=200)
            convergence = jax.jit(solve)(*arguments())[1]
            assert convergence.converged and convergence.iterations > 1
            assert_trees_close(gradients(lambda w, u, f=solve: f(w, u)[0], *arguments()), expected()[1], rtol=1e-9, atol=1e-10)


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fixed_point(lambda z: z[:2], jnp.ones(3)), ValueError, "must return the shape of x, \\(3,\\), but returned \\(2,\\)"),
        (lambda: fixed_point(lambda z: (z, z), jnp.ones(3)), ValueError, "must return the structure of x"),
        (lambda: fixed_point(lambda z: z, jnp.arange(3)), TypeError, "floating-point or complex arrays, but holds an array of int32"),
        (lambda: fixed_point(lambda z: z, "x"), TypeError, "but holds a str"),
        (lambda: fixed_point(lambda z: z > 0, jnp.ones(3)), TypeError, "must return floating-point"),
        (lambda: fixed_point(lambda z: z, jnp.ones(3), solver="secant"), ValueError, "solver is 'secant', but must be one of 'anderson'"),
        (lambda: fixed_point(lambda z: z, jnp.ones(3), backward="lu"), ValueError, "backward is 'lu', but must be one of 'gmres'"),
        (lambda: fixed_point(lambda z: z, jnp.ones(3), solver=object()), TypeError, "solver is a object, but must be a name"),
        (lambda: fixed_point(lambda z: z, jnp.ones(3), backward=3), TypeError, "backward is a int, but must be a name"),
        (lambda: fixed_point(lambda z: z, jnp.ones(3), tol=-1.0), ValueError, "tol is -1.0, but must be a number of at least 0"),
        (lambda: fixed_point(lambda z: z, jnp.ones(3), max_steps=0), ValueError, "max_steps is 0, but must be a whole number"),
        (lambda: fixed_point(lambda z: z, jnp.ones(3), max_steps=True), TypeError, "max_steps is True, but must be a whole number"),
    ],
    ids=range(12),
)
def test_bad_input_is_explained(call, error, message):
    with pytest.raises(error, match=f"fixed_point: .*{message}"):
        call()
