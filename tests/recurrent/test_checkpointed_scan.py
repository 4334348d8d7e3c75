"""`checkpointed_scan` against `jax.lax.scan`, `checkpointed_while` against the unrolled loop; gradients, closures, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.recurrent.checkpointed_scan import checkpointed_scan, checkpointed_while, segment_sizes
from tests.support import assert_trees_close, jit_grad, jit_value_and_grad, saved_bytes, temp_bytes

W = jnp.arange(9.0).reshape(3, 3) / 10


def run(scan, length, *, reverse=False, **options):
    """Value and gradients of a loss with integers in carry, xs and ys and a weight in the closure."""

    def loss(w, init, xs):
        def f(carry, x):
            c, count = carry
            c = jnp.sin(w @ c) + x["x"] * (1 + x["i"])
            return (c, count + x["i"]), {"y": c * w[0], "count": count}

        (c, count), ys = scan(f, (init, 0), {"x": xs, "i": jnp.arange(length) % 3}, reverse=reverse, **options)
        return (c**2).sum() + (ys["y"] ** 3).sum(), (c, count, ys)

    args = W.astype(float), jnp.ones(3, float), jnp.cos(jnp.arange(length * 3.0)).reshape(length, 3)
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*args)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "budget"), [(0, None), (1, None), (2, None), (12, None), (13, None), (13, 8), (13, 100)])
def test_values_and_gradients_are_those_of_scan(length, budget, reverse):
    with jax.enable_x64(True):
        mine, theirs = run(checkpointed_scan, length, reverse=reverse, budget=budget), run(jax.lax.scan, length, reverse=reverse)
        assert_trees_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_eager_calls_and_python_numbers_are_taken():
    f = lambda c, _: (c * 1.01, c)
    mine, theirs = (jit_value_and_grad(lambda x, s=s: s(f, x, None, length=9)[1].sum())(2.0) for s in (checkpointed_scan, jax.lax.scan))
    assert_trees_close(mine, theirs, rtol=1e-6)


MIXED = (0.5, jnp.ones(3, jnp.bfloat16), 0)


def mixed(carry, x):
    scale, c, count = carry
    return (scale * 1.5, c * scale, count + 1), (scale * x, scale, c)


@pytest.mark.parametrize("budget", [None, 8, 100])
def test_dtypes_and_weak_types_are_those_of_scan(budget):
    types = lambda scan, **options: jax.eval_shape(lambda x: scan(mixed, MIXED, x, **options), jnp.ones(13, jnp.bfloat16))
    assert str(types(checkpointed_scan, budget=budget)) == str(types(jax.lax.scan))


def test_dtypes_and_weak_types_are_those_of_scan_where_it_is_differentiated():
    xs = jnp.ones(13, jnp.bfloat16)
    aux = lambda scan: jit_grad(lambda x: (scan(mixed, MIXED, x)[1][0].astype(jnp.float32).sum(), scan(mixed, MIXED, x)), has_aux=True)(xs)
    mine, theirs = aux(checkpointed_scan), aux(jax.lax.scan)
    typed = lambda tree: [(x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    assert typed(mine) == typed(theirs)
    assert_trees_close(mine, theirs, rtol=2**-7)


def test_option_of_scan_that_splits_its_transpose_is_taken():
    f = lambda c, x: (c * x, c)
    mine, theirs = (s(f, 1.0, jnp.arange(1.0, 6), None, False, 1, True) for s in (checkpointed_scan, jax.lax.scan))
    assert_trees_close(mine, theirs, rtol=1e-6)


def test_gradient_reaches_a_module_in_the_closure():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.steps = nnx.Linear(3, 3, rngs=rngs), nnx.Variable(jnp.arange(3))

        def __call__(self, x):
            return jnp.tanh(self.dense(x)) + self.steps[...]

    net, x = Net(nnx.Rngs(0)), jnp.ones(3)
    loss = lambda scan: nnx.jit(nnx.value_and_grad(lambda net: scan(lambda c, _: (net(c), None), x, None, length=10)[0].sum()))(net)
    mine, theirs = loss(checkpointed_scan), loss(jax.lax.scan)
    assert_trees_close(jax.tree.leaves(mine), jax.tree.leaves(theirs), rtol=1e-5, atol=1e-6)


def test_random_keys_may_be_carried_and_closed_over():
    key = jax.random.key(1)

    def loss(scan, x, key):
        def f(carry, _):
            c, k = carry
            k, sub = jax.random.split(k)
            return (c * jax.random.normal(sub) + jax.random.normal(key), k), None

        return scan(f, (x, key), None, length=6)[0][0]

    mine, theirs = (jax.jit(jax.value_and_grad(lambda x, k, s=s: loss(s, x, k)))(jnp.float32(2), key) for s in (checkpointed_scan, jax.lax.scan))
    assert_trees_close(mine, theirs, rtol=1e-5)


@pytest.mark.parametrize("budget", [None, 7])
def test_forward_mode_vmap_and_second_derivatives_are_those_of_scan(budget):
    with jax.enable_x64(True):
        x = jnp.array([0.3, -0.7])

        def everything(scan, **options):
            f = lambda x, w: scan(lambda c, t: (jnp.sin(w * c) + x[0] * t, c[0] * w), x, jnp.arange(7.0), **options)[1].sum()
            hessians = jax.hessian(f, (0, 1))(x, 1.3), jax.jacrev(jax.grad(f))(x, 1.3)
            return hessians, jax.jvp(f, (x, 1.3), (x, 1.0)), jax.vmap(jax.grad(f), (0, None))(jnp.stack([x, 2 * x]), 1.3)

        mine, theirs = jax.jit(lambda: everything(checkpointed_scan, budget=budget))(), jax.jit(lambda: everything(jax.lax.scan))()
        assert_trees_close(mine, theirs, rtol=1e-10, atol=1e-11)


def test_frozen_xs_get_no_gradient_and_take_no_memory():
    w, xs = jnp.ones((16, 16)), jnp.ones((400, 16))
    loss = lambda w, xs: checkpointed_scan(lambda c, x: (jnp.tanh(w @ c + x), None), jnp.ones(16), xs)[0].sum()
    assert temp_bytes(jax.grad(loss), w, xs) < temp_bytes(jax.grad(loss, (0, 1)), w, xs) + 1
    assert temp_bytes(jax.grad(loss), w, xs) < xs.nbytes


def leapfrog(scan, q, p, length=10_000, **options):
    def f(state, _):
        q, p = state
        p = p - 0.01 * jnp.sin(q)
        return (q + 0.01 * p, p - 0.01 * jnp.sin(q)), None

    return scan(f, (q, p), None, length=length, **options)[0][0].sum()


def test_long_scan_takes_a_fraction_of_the_memory():
    q = jnp.ones((16, 32))
    temp = lambda scan, **o: temp_bytes(jax.grad(lambda q, p: leapfrog(scan, q, p, **o), (0, 1)), q, q)
    whole, root, less = temp(jax.lax.scan), temp(checkpointed_scan), temp(checkpointed_scan, budget=65)
    assert root <= 0.03 * whole, (root, whole)
    assert less <= 0.5 * root, (less, root)
    assert saved_bytes(lambda q, p: leapfrog(checkpointed_scan, q, p), q, q) <= 150 * 2 * q.nbytes


def test_weight_of_bfloat16_gets_its_gradient_summed_in_float32():
    w, x = jnp.bfloat16(0.5), jnp.ones(4, jnp.bfloat16)
    xs = jnp.ones((4096, 4), jnp.bfloat16)
    grad = jax.jit(jax.grad(lambda w: checkpointed_scan(lambda c, x: (c, x * w), x, xs, budget=4095)[1].astype(jnp.float32).sum()))(w)
    assert abs(float(grad) - 4 * 4096) <= 4 * 4096 * 2**-8


@pytest.mark.parametrize(("steps", "budget"), [(1, 1), (7, 7), (13, 8), (10_000, None), (10_000, 65), (10_007, 70), (10_000, 28), (2**31 - 1, 70)])
def test_sizes_cover_the_steps_within_the_budget(steps, budget):
    sizes = segment_sizes("test", steps, budget)
    assert np.prod(sizes) >= steps
    assert budget is None or sum(sizes) <= budget


def test_negative_length_is_an_error_and_a_whole_number_of_any_type_is_none():
    with pytest.raises(ValueError, match="checkpointed_scan: length is -1, but must be"):
        checkpointed_scan(lambda c, _: (c, None), 0.0, None, length=-1)
    assert checkpointed_scan(lambda c, _: (c + 1, None), 0.0, None, length=np.float64(4))[0] == 4


def test_small_budget_is_an_error():
    with pytest.raises(ValueError, match="budget is 6, but 13 steps need at least"):
        checkpointed_scan(lambda c, x: (c, None), 0.0, jnp.ones(13), budget=6)


@pytest.mark.parametrize(
    ("f", "init", "xs"),
    [(lambda c, x: (jnp.ones(2), None), jnp.ones(3), jnp.ones(4)), (lambda c, x: (c, None), 0.0, (jnp.ones(3), jnp.ones(4))), (len, 0.0, None)],
)
def test_bad_arguments_are_errors_as_in_scan(f, init, xs):
    for scan in (checkpointed_scan, jax.lax.scan):
        with pytest.raises((TypeError, ValueError)):
            scan(f, init, xs)


# The bounded while loop


def newton(loop, a, x, **options):
    """The square root of a, by as many steps as it takes."""
    cond = lambda s: jnp.abs(s[1] ** 2 - a) > 1e-6
    return loop(cond, lambda s: (s[0] + 1, (s[1] + a / s[1]) / 2), (0, x), **options)


def by_hand(a, x, steps):
    for _ in range(steps):
        x = (x + a / x) / 2
    return x


@pytest.mark.parametrize("budget", [None, 9, 100])
def test_while_runs_and_differentiates_the_steps_that_are_needed(budget):
    with jax.enable_x64(True):
        f = lambda a, x: newton(checkpointed_while, a, x, max_steps=23, budget=budget)
        steps, root = jax.jit(f)(3.0, 1.0)
        assert (steps, root) == newton(jax.lax.while_loop, 3.0, 1.0)
        everything = lambda f: (jax.grad(f, (0, 1))(3.0, 1.0), jax.hessian(f, (0, 1))(3.0, 1.0), jax.jvp(f, (3.0, 1.0), (1.0, 2.0)))
        mine = jax.jit(lambda: everything(lambda a, x: f(a, x)[1]))()
        assert_trees_close(mine, everything(lambda a, x: by_hand(a, x, int(steps))), rtol=1e-10, atol=1e-12)


def test_while_under_vmap_ends_each_element_on_its_own():
    a = jnp.array([2.0, 100.0, 1e4])
    f = lambda a: newton(checkpointed_while, a, 1.0, max_steps=30)
    steps, _ = jax.jit(jax.vmap(f))(a.astype(jnp.float32))
    assert len(set(steps.tolist())) == 3
    grads = jax.jit(jax.vmap(jax.grad(lambda a: f(a)[1])))(a)
    np.testing.assert_allclose(grads, [jax.grad(by_hand)(x, 1.0, int(n)) for x, n in zip(a, steps, strict=True)], rtol=1e-3)


def test_while_under_vmap_is_not_touched_by_what_the_body_is_after_an_element_has_ended():
    """x -> x - √x w ends at or before 0, where √ has no derivative; the first element has ended before its first step, at a state below 0."""

    def value_and_grads(x, w):
        return jit_value_and_grad(lambda x, w: checkpointed_while(lambda x: x > 0, lambda x: x - jnp.sqrt(x) * w, x, max_steps=9, budget=7), (0, 1))(
            x, w
        )

    xs, w = jnp.array([-1.0, 0.0, 1.0, 4.0, 2.0]), jnp.float32(1.0)
    together = jax.jit(jax.vmap(value_and_grads, (0, None)))(xs, w)
    alone = [value_and_grads(x, w) for x in xs]
    assert np.isfinite(jax.tree.leaves(together)).all()
    assert_trees_close(together, jax.tree.map(lambda *rows: jnp.stack(rows), *alone), rtol=1e-6)


@pytest.mark.parametrize("max_steps", [0, 3])
def test_while_stops_at_the_bound(max_steps):
    x, slope = jit_value_and_grad(lambda x: checkpointed_while(lambda x: True, lambda x: 2 * x, x, max_steps=max_steps))(jnp.float32(1.5))
    assert (x, slope) == (1.5 * 2**max_steps, 2**max_steps)


@pytest.mark.parametrize("max_steps", [5, 20])
def test_dtypes_and_weak_types_are_those_of_while_loop(max_steps):
    cond, body = lambda s: s[0] < 9, lambda s: (s[0] * 1.5, s[1] * s[0], s[2] + 1)
    mine = jax.eval_shape(lambda: checkpointed_while(cond, body, MIXED, max_steps=max_steps))
    assert str(mine) == str(jax.eval_shape(lambda: jax.lax.while_loop(cond, body, MIXED)))


@pytest.mark.parametrize("steps", [-1, 10**30])
def test_bound_that_is_negative_or_too_large_for_a_loop_is_an_error(steps):
    with pytest.raises(ValueError, match="checkpointed_while: max_steps is"):
        checkpointed_while(lambda x: True, lambda x: x, 1.0, max_steps=steps, budget=6)
