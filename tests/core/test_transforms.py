"""Every transformation of JAX sees a Function's own rule: right rules against autodiff, and one that is wrong on purpose."""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import layers
from layers.function.function import Function
from tests.core.functions import CASES, Cube, Linear, Mul, ScaledShare, Split, Unchanged, Wrong, floats
from tests.support import assert_trees_close, mesh_of, saved_bytes

# --- right rules: each transformation of every function, compared with the plain twin in one compiled program ---


def loss(fn):
    """A scalar that weighs every element of the output differently."""

    def scalar(*args):
        leaves = jax.tree.leaves(fn(*args))
        return sum(jnp.sum(jnp.sin(x) * jnp.linspace(0.5, 1.5, x.size).reshape(x.shape)) for x in leaves)

    return scalar


def every(args):
    return tuple(range(len(args)))


def over_rows(fn, args):
    """`scan` over three scaled copies of the first argument, the others shared."""
    rows = jnp.stack([args[0], 0.5 * args[0], -args[0]])
    return jax.lax.scan(lambda c, x: (c + 1, fn(x, *args[1:])), 0, rows)[1]


def batched(fn, args, moved):
    """`vmap` over axis 1 of the arguments in `moved`, the rest shared."""
    stacked = [jnp.stack([a, 0.5 * a], axis=1) if i in moved else a for i, a in enumerate(args)]
    return jax.vmap(fn, in_axes=tuple(1 if i in moved else None for i in range(len(args))))(*stacked)


def some_batched(fn, args):
    subsets = [s for n in range(1, len(args) + 1) for s in itertools.combinations(range(len(args)), n)]
    return [batched(fn, args, s) for s in subsets[:7]]


def nested_vmap(fn, args):
    inner = lambda *a: jax.vmap(fn, in_axes=(0,) + (None,) * (len(a) - 1))(*a)
    first = jnp.stack([jnp.stack([args[0], -args[0]]), jnp.stack([2 * args[0], 0.5 * args[0]])], axis=1)
    return jax.vmap(inner, in_axes=(1,) + (None,) * (len(args) - 1), out_axes=1)(first, *args[1:])


def grad(fn, args):
    return jax.grad(loss(fn), every(args))(*args)


TRANSFORMS = {
    "value": lambda f, a: f(*a),
    "jit": lambda f, a: grad(jax.jit(f), a),
    "grad": grad,
    "grad of the first argument": lambda f, a: jax.grad(loss(f))(*a),
    "grad of the last argument": lambda f, a: jax.grad(loss(f), len(a) - 1)(*a),
    "value_and_grad": lambda f, a: jax.value_and_grad(loss(f), every(a))(*a),
    "vjp": lambda f, a: (lambda y, pull: pull(jax.tree.map(jnp.cos, y)))(*jax.vjp(f, *a)),
    "jvp": lambda f, a: jax.jvp(f, a, tuple(map(jnp.cos, a))),
    "linearize": lambda f, a: jax.linearize(f, *a)[1](*map(jnp.cos, a)),
    "jacrev": lambda f, a: jax.jacrev(f, every(a))(*a),
    "jacfwd": lambda f, a: jax.jacfwd(f, every(a))(*a),
    "hessian": lambda f, a: jax.hessian(loss(f), every(a))(*a),
    "reverse over reverse": lambda f, a: jax.jacrev(jax.grad(loss(f), every(a)), every(a))(*a),
    "reverse over forward": lambda f, a: jax.jacrev(jax.jacfwd(loss(f), every(a)), every(a))(*a),
    "forward over forward": lambda f, a: jax.jacfwd(jax.jacfwd(loss(f), every(a)), every(a))(*a),
    "vmap, every in_axes": lambda f, a: some_batched(f, a),
    "vmap of grad, every in_axes": lambda f, a: some_batched(lambda *b: grad(f, b), a),
    "grad of vmap, every in_axes": lambda f, a: [grad(lambda *b, m=(i,): batched(f, b, m), a) for i in range(len(a))],
    "nested vmap": nested_vmap,
    "grad of nested vmap": lambda f, a: grad(lambda *b: nested_vmap(f, b), a),
    "hessian of vmap": lambda f, a: jax.hessian(loss(lambda *b: batched(f, b, (0,))))(*a),
    "scan": lambda f, a: grad(lambda *b: over_rows(f, b), a),
    "hessian of scan": lambda f, a: jax.hessian(loss(lambda *b: over_rows(f, b)))(*a),
    "grad of grad of scan": lambda f, a: grad(lambda *b: grad(lambda *c: over_rows(f, c), b), a),
    "while_loop": lambda f, a: jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, f(*a)), (0, f(*a)))[1],
    "cond": lambda f, a: grad(lambda *b: jax.lax.cond(b[0].sum() < 1e9, f, f, *b), a),
    "switch": lambda f, a: grad(lambda *b: jax.lax.switch(jnp.int32(b[0].sum() > 1e9), [f, f], *b), a),
    "checkpoint": lambda f, a: grad(jax.checkpoint(f), a),
    "checkpoint, nothing saved": lambda f, a: grad(jax.checkpoint(f, policy=jax.checkpoint_policies.nothing_saveable), a),
    "checkpoint, everything saved": lambda f, a: grad(jax.checkpoint(f, policy=jax.checkpoint_policies.everything_saveable), a),
    "checkpoint, dots saved": lambda f, a: grad(jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable), a),
    "checkpoint of scan": lambda f, a: grad(lambda *b: over_rows(jax.checkpoint(f), b), a),
    "hessian of checkpoint": lambda f, a: jax.hessian(loss(jax.checkpoint(f)))(*a),
    "jvp of checkpoint": lambda f, a: jax.jvp(jax.checkpoint(f), a, a),
    "third order": lambda f, a: jax.jacrev(jax.hessian(loss(f)))(*a),
    "third order, all reverse": lambda f, a: jax.jacrev(jax.jacrev(jax.grad(loss(f))))(*a),
}


def marked(names):
    """The names, those of forward mode marked so."""
    forward = ("jvp", "linearize", "jacfwd", "over forward")
    return [pytest.param(n, marks=pytest.mark.linear_engine) if any(word in n for word in forward) else n for n in names]


def both(op, cases=CASES):
    """`(ours, theirs)` of one transformation of every case, from one compiled program."""

    def run(arrays):
        out: dict[str, Any] = {}
        for case, a in zip(cases, arrays, strict=True):
            try:
                out[case.name] = op(case.fn, a), op(case.reference, a)
            except Exception as error:
                error.add_note(f"in the case '{case.name}'")
                raise
        return out

    return jax.jit(run)([c.arrays for c in cases])


HEAVY = ("over", "order", "hessian", "of vmap", "every in_axes", "grad of grad", "scan", "switch", "cond", "nested", "saved")
FEW = [c for c in CASES if c.name in ("linear without bias", "mul", "cube", "tree")]


@pytest.mark.parametrize("name", marked(TRANSFORMS))
def test_right_rules_agree_with_autodiff(name):
    cases = FEW if any(word in name for word in HEAVY) else CASES
    for case, (ours, theirs) in both(TRANSFORMS[name], cases).items():
        try:
            assert_trees_close(ours, theirs, rtol=3e-5, atol=3e-5)
        except AssertionError as error:
            error.add_note(f"in the case '{case}'")
            raise


@pytest.mark.parametrize("name", marked(["grad", "hessian", "jacfwd", "scan"]))
def test_right_rules_agree_with_autodiff_in_float64(name):
    with jax.enable_x64(True):
        cases = [type(c)(c.name, c.fn, c.reference, tuple(a.astype(jnp.float64) for a in c.arrays)) for c in FEW]
        for ours, theirs in both(TRANSFORMS[name], cases).values():
            assert all(x.dtype == np.float64 for x in jax.tree.leaves(ours))
            assert_trees_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES[:2] + CASES[3:5], ids=repr)
def test_outside_jit_the_gradient_is_the_same(case):
    assert_trees_close(grad(case.fn, case.arrays), grad(case.reference, case.arrays), rtol=1e-5, atol=1e-5)


# --- a rule that is wrong on purpose: three times the derivative of sin, under every transformation and every pair ---

X = floats(4, 4)
automatic = functools.partial(mesh_of, 2, "d", jax.sharding.AxisType.Auto)


def sharded(fn, check_vma):
    return lambda x: jax.shard_map(fn, mesh=automatic(), in_specs=P("d"), out_specs=P("d"), check_vma=check_vma)(x)


WRAPPERS = {
    "jit": jax.jit,
    "vmap": jax.vmap,
    "vmap axis -1": lambda f: jax.vmap(f, in_axes=-1, out_axes=-1),
    "checkpoint": jax.checkpoint,
    "checkpoint dots": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, row: (c, f(row)), 0, x)[1],
    "map": lambda f: lambda x: jax.lax.map(f, x),
    "cond": lambda f: lambda x: jax.lax.cond(x.sum() > -1e9, f, jnp.zeros_like, x),
    "switch": lambda f: lambda x: jax.lax.switch(jnp.int32(x.sum() > -1e9), [jnp.zeros_like, f], x),
    "fori_loop": lambda f: lambda x: jax.lax.fori_loop(0, 1, lambda _, y: f(y), x),
    "shard_map": lambda f: sharded(f, True),
    "shard_map unchecked": lambda f: sharded(f, False),
}

DERIVATIVES = {
    "grad": lambda f, x: jax.grad(lambda x: f(x).sum())(x),
    "jit of grad": lambda f, x: jax.jit(jax.grad(lambda x: f(x).sum()))(x),
    "vjp": lambda f, x: jax.vjp(f, x)[1](jnp.ones_like(x))[0],
    "jvp": lambda f, x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1],
    "linearize": lambda f, x: jax.linearize(f, x)[1](jnp.ones_like(x)),
    "jacrev": lambda f, x: jnp.einsum("ijij->ij", jax.jacrev(f)(x)),
    "jacfwd": lambda f, x: jnp.einsum("ijij->ij", jax.jacfwd(f)(x)),
    "value_and_grad": lambda f, x: jax.value_and_grad(lambda x: f(x).sum())(x)[1],
    "vmap of grad": lambda f, x: jax.vmap(jax.grad(lambda x: f(x[None]).sum()))(x) if f is Wrong.apply else jax.grad(lambda x: f(x).sum())(x),
}


def pairs():
    for outer, inner in itertools.product(WRAPPERS, WRAPPERS):
        if not (outer.startswith("shard_map") and inner.startswith("shard_map")):
            yield outer, inner


@pytest.mark.parametrize("derivative", marked(DERIVATIVES))
def test_no_single_transformation_goes_past_the_rule(derivative):
    take = DERIVATIVES[derivative]
    found = jax.jit(lambda x: {name: take(wrap(Wrong.apply), x) for name, wrap in WRAPPERS.items()} | {"": take(Wrong.apply, x)})(X)
    for name, given in found.items():
        np.testing.assert_allclose(given, 3 * jnp.cos(X), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("outer", WRAPPERS)
def test_no_pair_of_transformations_goes_past_the_rule(outer):
    inners = [i for o, i in pairs() if o == outer]
    found = jax.jit(lambda x: {i: jax.grad(lambda x, i=i: WRAPPERS[outer](WRAPPERS[i](Wrong.apply))(x).sum())(x) for i in inners})(X)
    for inner, given in found.items():
        np.testing.assert_allclose(given, 3 * jnp.cos(X), rtol=1e-5, err_msg=f"{outer} of {inner}")


@pytest.mark.linear_engine
@pytest.mark.parametrize("outer", WRAPPERS)
def test_no_pair_of_transformations_goes_past_the_rule_in_forward_mode(outer):
    inners = [i for o, i in pairs() if o == outer]
    ones = jnp.ones_like(X)
    found = jax.jit(lambda x: {i: jax.jvp(WRAPPERS[outer](WRAPPERS[i](Wrong.apply)), (x,), (ones,))[1] for i in inners})(X)
    for inner, given in found.items():
        np.testing.assert_allclose(given, 3 * jnp.cos(X), rtol=1e-5, err_msg=f"{outer} of {inner}")


@pytest.mark.parametrize("wrapper", ["jit", "scan", "checkpoint", "shard_map", "cond"])
def test_outside_jit_no_transformation_goes_past_the_rule(wrapper):
    fn = WRAPPERS[wrapper](Wrong.apply)
    np.testing.assert_allclose(jax.grad(lambda x: fn(x).sum())(X), 3 * jnp.cos(X), rtol=1e-5)


# --- the trap: one traced call site, differentiated in two patterns ---

SITES = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x, w: jax.lax.scan(lambda c, _: (c, f(x, w)), 0, None, length=1)[1][0],
    "jit of checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
    "vmap": lambda f: lambda x, w: jax.vmap(f)(x[None], w[None])[0],
}


@pytest.mark.parametrize("site", SITES)
def test_one_call_site_differentiated_in_two_patterns_has_both_gradients(site):
    shared = SITES[site](Mul.apply)
    x, w, stop = floats(3), floats(3, seed=1), jax.lax.stop_gradient

    def discriminator(call, x, w):
        return (call(stop(x), w) ** 2 - call(x, stop(w)) ** 3).sum()

    expected = jax.grad(functools.partial(discriminator, lambda x, w: x * w), (0, 1))(x, w)
    assert_trees_close(jax.grad(functools.partial(discriminator, shared), (0, 1))(x, w), expected, rtol=1e-5)
    assert_trees_close(jax.jit(jax.grad(functools.partial(discriminator, shared), (0, 1)))(x, w), expected, rtol=1e-5)


@pytest.mark.parametrize("site", ["jit", "checkpoint", "jit of checkpoint"])
def test_call_site_differentiated_again_after_another_pattern_is_right(site):
    shared = SITES[site](Mul.apply)
    x, w = floats(3), floats(3, seed=1)
    _, pull_x = jax.vjp(lambda x: shared(x, w), x)
    _, pull_both = jax.vjp(shared, x, w)
    one = jnp.ones(3)
    np.testing.assert_allclose(pull_x(one)[0], w)
    assert_trees_close(pull_both(one), (w, x), rtol=1e-6)
    assert_trees_close(pull_x(one), (w,), rtol=1e-6)


# --- an output that the batch shares ---


@pytest.mark.parametrize("out_axes", [(0, 0), pytest.param((0, None), marks=pytest.mark.linear_engine)])
@pytest.mark.parametrize("compiled", [False, True])
def test_output_shared_by_the_batch_has_the_gradient_of_the_sum(out_axes, compiled):
    def total(fn):
        def run(x, w):
            y, z = jax.vmap(fn, in_axes=(0, None), out_axes=out_axes)(x, w)
            return (y**2).sum() + (z**3).sum()

        return jax.grad(run, (0, 1))

    ours, theirs = total(ScaledShare.apply), total(lambda x, w: (x * w, 2 * w))
    ours = jax.jit(ours) if compiled else ours
    assert_trees_close(ours(floats(5, 3), floats(3, seed=1)), theirs(floats(5, 3), floats(3, seed=1)), rtol=1e-5)


@pytest.mark.linear_engine
def test_output_shared_by_two_batches_has_the_gradient_of_the_sum():
    def total(fn):
        inner = lambda x, w: jax.vmap(fn, in_axes=(0, None), out_axes=(0, None))(x, w)
        return jax.grad(lambda x, w: sum((a**2).sum() for a in jax.vmap(inner, in_axes=(0, None), out_axes=(0, None))(x, w)), (0, 1))

    args = floats(2, 3, 4), floats(4, seed=1)
    assert_trees_close(jax.jit(total(ScaledShare.apply))(*args), jax.jit(total(lambda x, w: (x * w, 2 * w)))(*args), rtol=1e-5)


@pytest.mark.linear_engine
def test_output_shared_by_the_batch_is_right_in_forward_mode_and_to_second_order():
    def total(fn):
        return lambda w: sum((a**3).sum() for a in jax.vmap(fn, in_axes=(0, None), out_axes=(0, None))(floats(5, 3), w))

    w = floats(3, seed=1)
    ours, theirs = total(ScaledShare.apply), total(lambda x, w: (x * w, 2 * w))
    assert_trees_close(jax.jit(jax.jacfwd(ours))(w), jax.jit(jax.jacfwd(theirs))(w), rtol=1e-5)
    assert_trees_close(jax.jit(jax.hessian(ours))(w), jax.jit(jax.hessian(theirs))(w), rtol=1e-4, atol=1e-5)


@pytest.mark.linear_engine
def test_output_shared_by_the_batch_under_shard_map():
    def total(fn):
        def local(x, w):
            y, z = jax.vmap(fn, in_axes=(0, None), out_axes=(0, None))(x, w)
            return jax.lax.psum((y**2).sum(), "d") + (z**3).sum()

        return jax.grad(lambda x, w: jax.shard_map(local, mesh=automatic(), in_specs=(P("d"), P()), out_specs=P())(x, w), (0, 1))

    args = floats(4, 3), floats(3, seed=1)
    assert_trees_close(jax.jit(total(ScaledShare.apply))(*args), jax.jit(total(lambda x, w: (x * w, 2 * w)))(*args), rtol=1e-5)


# --- many devices ---


def linear(x, w, b):
    return x @ w.T + b


LINEAR = floats(4, 3), floats(2, 3, seed=1), floats(2, seed=2)


@pytest.mark.parametrize("check_vma", [True, False])
def test_grad_of_shard_map_sums_a_shared_weight_over_the_mesh(check_vma):
    def total(fn):
        mapped = jax.shard_map(fn, mesh=automatic(), in_specs=(P("d"), P(), P()), out_specs=P("d"), check_vma=check_vma)
        return jax.jit(jax.grad(lambda *a: (mapped(*a) ** 2).sum(), (0, 1, 2)))

    assert_trees_close(total(Linear.apply)(*LINEAR), total(linear)(*LINEAR), rtol=1e-5)


def test_grad_inside_shard_map_sums_a_shared_weight_over_the_mesh():
    def total(fn):
        inside = jax.grad(lambda x, w, b: (fn(x, w, b) ** 2).sum(), (0, 1, 2))
        return jax.jit(jax.shard_map(inside, mesh=automatic(), in_specs=(P("d"), P(), P()), out_specs=(P("d"), P(), P())))

    assert_trees_close(total(Linear.apply)(*LINEAR), total(linear)(*LINEAR), rtol=1e-5)


def test_grad_inside_unchecked_shard_map_stays_on_its_device():
    def total(fn):
        inside = jax.grad(lambda x, w, b: (fn(x, w, b) ** 2).sum(), (0, 1, 2))
        summed = lambda *a: (lambda g: (g[0], *jax.lax.psum(g[1:], "d")))(inside(*a))
        return jax.jit(jax.shard_map(summed, mesh=automatic(), in_specs=(P("d"), P(), P()), out_specs=(P("d"), P(), P()), check_vma=False))

    assert_trees_close(total(Linear.apply)(*LINEAR), total(linear)(*LINEAR), rtol=1e-5)


@pytest.mark.parametrize("wrap", ["scan", "checkpoint", "jit", "vmap"])
def test_transformations_inside_shard_map_agree_with_autodiff(wrap):
    def total(fn):
        wrapped = {
            "scan": lambda x, w, b: jax.lax.scan(lambda c, row: (c, fn(row[None], w, b)[0]), 0, x)[1],
            "checkpoint": jax.checkpoint(fn),
            "jit": jax.jit(fn),
            "vmap": lambda x, w, b: jax.vmap(lambda row, w, b: fn(row[None], w, b)[0], in_axes=(0, None, None))(x, w, b),
        }[wrap]
        mapped = jax.shard_map(wrapped, mesh=automatic(), in_specs=(P("d"), P(), P()), out_specs=P("d"))
        return jax.jit(jax.grad(lambda *a: (mapped(*a) ** 2).sum(), (0, 1, 2)))

    assert_trees_close(total(Linear.apply)(*LINEAR), total(linear)(*LINEAR), rtol=1e-5)


@pytest.mark.linear_engine
def test_forward_mode_and_hessian_through_shard_map_agree_with_autodiff():
    def total(fn):
        mapped = jax.shard_map(fn, mesh=automatic(), in_specs=(P("d"), P(), P()), out_specs=P("d"))
        scalar = lambda *a: (jnp.sin(mapped(*a)) ** 2).sum()
        return jax.jit(lambda *a: (jax.jvp(mapped, a, a), jax.hessian(scalar, (0, 1))(*a)))

    assert_trees_close(total(Linear.apply)(*LINEAR), total(linear)(*LINEAR), rtol=1e-4, atol=1e-5)


def test_unvarying_gradient_is_accepted_under_shard_map():
    class Ones(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return jnp.ones(ctx.shape)

    mapped = jax.shard_map(lambda x: Ones.apply(x)[None], mesh=automatic(), in_specs=P("d"), out_specs=P("d"))
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: mapped(x).sum()))(X), jnp.ones_like(X))


def test_output_reduced_over_the_mesh_inside_the_rule_gives_each_device_its_gradient():
    class Both(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w, jax.lax.psum((x * w).sum(0), "d"), 2 * w

        @staticmethod
        def backward(ctx, dy, dz, dv):
            x, w = ctx.saved_tensors
            return (dy + dz) * w, (dy + dz) * x + 2 * dv / x.shape[0]

    def total(fn):
        def local(x, w):
            y, z, v = fn(x, w)
            return jax.lax.psum((y**2).sum(), "d") + (z**2).sum() + (v**3).sum()

        return jax.grad(lambda x, w: jax.shard_map(local, mesh=automatic(), in_specs=(P("d"), P()), out_specs=P())(x, w), (0, 1))

    plain = lambda x, w: (x * w, jax.lax.psum((x * w).sum(0), "d"), 2 * w)
    args = floats(4, 3), floats(3, seed=1)
    assert_trees_close(jax.jit(total(Both.apply))(*args), jax.jit(total(plain))(*args), rtol=1e-5)


@pytest.mark.parametrize("spec", [P("d"), P(None, "d")])
def test_jit_with_sharded_inputs_agrees_with_autodiff(spec):
    x = jax.device_put(floats(4, 4), NamedSharding(automatic(), spec))
    w = jax.device_put(floats(2, 4, seed=1), NamedSharding(automatic(), P()))
    given = jax.jit(jax.grad(lambda x, w: (Linear.apply(x, w, None) ** 2).sum(), (0, 1)))(x, w)
    assert_trees_close(given, jax.grad(lambda x, w: ((x @ w.T) ** 2).sum(), (0, 1))(floats(4, 4), floats(2, 4, seed=1)), rtol=1e-5)


explicit = functools.partial(mesh_of, 2, "e", jax.sharding.AxisType.Explicit)


@pytest.mark.parametrize("wrap", ["plain", "vmap", "scan"])
def test_gradients_on_a_mesh_with_explicit_axes_have_the_sharding_of_their_argument(wrap):
    wrapped = {
        "plain": Split.apply,
        "vmap": jax.vmap(Split.apply),
        "scan": lambda x: jax.lax.scan(lambda c, row: (c, Split.apply(row)), 0, x)[1],
    }[wrap]
    with jax.set_mesh(explicit()):
        x = jax.device_put(X, NamedSharding(explicit(), P(None, "e") if wrap == "scan" else P("e")))
        given = jax.jit(jax.grad(lambda x: (wrapped(x) ** 2).sum()))(x)
        assert given.sharding.is_equivalent_to(x.sharding, x.ndim)
    np.testing.assert_allclose(given, jax.grad(lambda x: (jnp.tanh(2 * x) ** 2).sum())(X), rtol=1e-5)


def test_replicated_gradient_is_resharded_on_a_mesh_with_explicit_axes():
    class Ones(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return jnp.ones(ctx.shape)

    with jax.set_mesh(explicit()):
        x = jax.device_put(X, NamedSharding(explicit(), P("e")))
        given = jax.jit(jax.grad(Ones.apply))(x)
        assert given.sharding.is_equivalent_to(x.sharding, x.ndim)
    np.testing.assert_array_equal(given, jnp.ones_like(X))


@pytest.mark.devices(8)
def test_pmap_agrees_with_autodiff():
    if not hasattr(jax, "pmap"):
        pytest.skip("this JAX has no pmap")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = jax.grad(lambda x: jax.pmap(Wrong.apply)(x).sum())(X[:2])
    np.testing.assert_allclose(given, 3 * jnp.cos(X[:2]), rtol=1e-5)


@pytest.mark.linear_engine
def test_collective_over_a_vmapped_axis_may_stand_in_both_rules():
    class Mean(Function):
        @staticmethod
        def forward(ctx, x):
            return x - jax.lax.pmean(x, "batch")

        @staticmethod
        def backward(ctx, grad):
            return grad - jax.lax.pmean(grad, "batch")

    def total(fn):
        return jax.jit(jax.grad(lambda x: (jax.vmap(fn, axis_name="batch")(x) ** 3).sum()))

    assert_trees_close(total(Mean.apply)(X), total(lambda x: x - jax.lax.pmean(x, "batch"))(X), rtol=1e-5, atol=1e-6)


# --- what remat keeps ---

sees_names = pytest.mark.skipif(getattr(jax.config, "jax_remat3", False), reason="this remat shows its policy no names inside a rule")


@sees_names
def test_policy_may_select_saved_arrays_by_name():
    names = jax.checkpoint_policies.save_only_these_names
    kept = lambda *chosen: saved_bytes(jax.checkpoint(lambda x: Cube.apply(jnp.sin(x))[0], policy=names(*chosen)), X)
    assert kept("Cube.saved1") == kept() + X.nbytes
    assert kept("Cube.saved7") == kept()


@sees_names
def test_saved_output_keeps_its_name_for_policies():
    names = jax.checkpoint_policies.save_only_these_names
    remat = lambda *chosen: jax.checkpoint(lambda x: jnp.sin(Split.apply(Split.apply(x))), policy=names(*chosen))
    fn = remat("Split.saved0")
    assert saved_bytes(fn, X) > saved_bytes(remat(), X) == 0
    assert_trees_close(jax.grad(lambda x: fn(x).sum())(X), jax.grad(lambda x: jnp.sin(jnp.tanh(2 * jnp.tanh(2 * x))).sum())(X), rtol=1e-4, atol=1e-6)


def test_frozen_argument_is_not_kept_for_backward():
    w = floats(4, 4, seed=1)
    assert saved_bytes(lambda x: Mul.apply(jnp.sin(x), w), X) < saved_bytes(lambda x: Mul.apply(jnp.sin(x), jnp.cos(x)), X)


# --- around compilation ---


def test_eval_shape_gives_the_type_of_the_gradient():
    given = jax.eval_shape(jax.grad(lambda x: Wrong.apply(x).sum()), X)
    assert (given.shape, given.dtype) == (X.shape, X.dtype)


def test_exported_function_has_the_gradient_of_its_rule():
    exported = jax.export.export(jax.jit(Wrong.apply))(jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert exported.has_vjp()
    np.testing.assert_allclose(exported.vjp().call(X, jnp.ones_like(X))[0], 3 * jnp.cos(X), rtol=1e-5)


def test_serialized_function_has_the_gradient_of_its_rule():
    pytest.importorskip("flatbuffers")
    blob = jax.export.export(jax.jit(Wrong.apply))(jax.ShapeDtypeStruct(X.shape, X.dtype)).serialize(vjp_order=1)
    given = jax.grad(lambda x: jax.export.deserialize(blob).call(x).sum())(X)
    np.testing.assert_allclose(given, 3 * jnp.cos(X), rtol=1e-5)


def test_donated_parameters_may_be_saved():
    step = jax.jit(lambda w, x: w - 0.1 * jax.grad(lambda w: (Mul.apply(w, x) ** 2).sum())(w), donate_argnums=0)
    w, x = floats(4), floats(4, seed=1)
    expected = w - 0.1 * 2 * w * x * x
    np.testing.assert_allclose(step(w + 0, x), expected, rtol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("tree", "noise", "gaps", "options", "sort")], ids=repr)
def test_no_tracer_leaks(case):
    with jax.checking_leaks():
        jax.jit(lambda a: grad(lambda *b: over_rows(jax.checkpoint(case.fn), b), a))(case.arrays)
        jax.jit(lambda a: jax.vmap(lambda x: jax.hessian(loss(case.fn))(x, *a[1:]))(a[0][None]))(case.arrays)


def test_nan_debugging_lets_finite_gradients_through_and_stops_others():
    class Bad(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            return grad * jnp.nan

    with jax.debug_nans(True):
        np.testing.assert_allclose(jax.grad(lambda x: Wrong.apply(x).sum())(X), 3 * jnp.cos(X), rtol=1e-5)
        with pytest.raises(FloatingPointError):
            jax.grad(lambda x: Bad.apply(x).sum())(X)


def test_optimizer_step_with_mixed_precision_keeps_the_dtype_of_each_parameter():
    w = floats(2, 3, seed=1).astype(jnp.bfloat16)

    def total(w):
        return jax.lax.scan(lambda c, x: (c + Linear.apply(x, w.astype(jnp.float32), None).sum(), None), 0.0, floats(4, 2, 3))[0]

    assert jax.jit(jax.grad(total))(w).dtype == jnp.bfloat16


# --- the second derivatives of PyTorch's document, in the column that says what happens here ---


class SavedIntermediate(Function):
    """`(2 x^2)^2 / 2`, where backward uses an intermediate."""

    @staticmethod
    def forward(ctx, x):
        a = 2 * x * x
        ctx.save_for_backward(x, a)
        return a * a / 2

    @staticmethod
    def backward(ctx, grad):
        x, a = ctx.saved_tensors
        return grad * a * 4 * x


class SavedOutput(Function):
    """`exp`, where backward uses the output."""

    @staticmethod
    def forward(ctx, x):
        y = jnp.exp(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * y


class Rounded(Function):
    """`round` with the gradient `grad * y`, which is not its derivative."""

    @staticmethod
    def forward(ctx, x):
        y = jnp.round(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * y


class Hosted(Function):
    """`sin` computed outside JAX."""

    @staticmethod
    def forward(ctx, x):
        y = jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential")
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * jnp.cos(x)


SECOND = {
    "reverse over reverse": lambda f: jax.grad(jax.grad(f)),
    "forward over reverse": lambda f: jax.hessian(f),
    "reverse over forward": lambda f: jax.grad(jax.jacfwd(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "compiled": lambda f: jax.jit(jax.grad(jax.jit(jax.grad(jax.jit(f))))),
    "rematerialised": lambda f: jax.grad(jax.grad(jax.checkpoint(f))),
}


@pytest.mark.parametrize("order", marked(SECOND))
def test_second_derivative_through_a_saved_intermediate_is_complete(order):
    np.testing.assert_allclose(SECOND[order](SavedIntermediate.apply)(1.5 * jnp.ones(())), 24 * 1.5**2, rtol=1e-6)


@pytest.mark.parametrize("order", marked(SECOND))
def test_second_derivative_through_a_saved_output_is_complete(order):
    np.testing.assert_allclose(SECOND[order](SavedOutput.apply)(jnp.float32(0.5)), np.exp(0.5), rtol=1e-6)


@pytest.mark.parametrize("order", marked(SECOND))
def test_second_derivative_of_a_surrogate_rule_differentiates_the_body_of_forward(order):
    x = jnp.float32(2.3)
    assert jax.grad(Rounded.apply)(x) == 2
    assert SECOND[order](Rounded.apply)(x) == 0


@pytest.mark.parametrize(
    "order",
    [
        "reverse over reverse",
        *[pytest.param(f"{o} over {i}", marks=pytest.mark.linear_engine) for o, i in (("forward", "reverse"), ("reverse", "forward"))],
    ],
)
def test_second_derivative_of_a_forward_that_jax_cannot_differentiate_is_that_of_its_backward(order):
    np.testing.assert_allclose(jax.jit(jax.grad(Hosted.apply))(jnp.float32(0.5)), np.cos(0.5), rtol=1e-5)
    np.testing.assert_allclose(SECOND[order](Hosted.apply)(jnp.float32(0.5)), -np.sin(0.5), rtol=1e-5)


def test_returned_intermediate_gives_the_right_third_derivative():
    np.testing.assert_allclose(jax.grad(jax.grad(jax.grad(lambda x: Cube.apply(x)[0])))(jnp.float32(1.3)), 6.0, rtol=1e-6)


# --- forward mode ---


@pytest.mark.linear_engine
def test_forward_mode_is_the_same_inside_the_context_and_outside():
    compiled = jax.jit(lambda x: jax.jvp(Wrong.apply, (x,), (jnp.ones_like(x),))[1])
    outside = compiled(X)
    with layers.forward_mode():
        inside = compiled(X)
    np.testing.assert_array_equal(inside, outside)
    np.testing.assert_allclose(inside, 3 * jnp.cos(X), rtol=1e-5)


def test_forward_mode_decorates_a_function():
    @layers.forward_mode()
    def hessian(x):
        """Kept."""
        return jax.hessian(lambda x: Split.apply(x).sum())(x)

    assert (hessian.__name__, hessian.__doc__) == ("hessian", "Kept.")
    assert_trees_close(hessian(X[0]), jax.hessian(lambda x: jnp.tanh(2 * x).sum())(X[0]), rtol=1e-4, atol=1e-5)


def test_function_compiled_inside_the_context_is_right_outside():
    compiled = jax.jit(jax.grad(lambda x: Wrong.apply(x).sum()))
    with layers.forward_mode():
        np.testing.assert_allclose(compiled(X), 3 * jnp.cos(X), rtol=1e-5)
    np.testing.assert_allclose(compiled(X), 3 * jnp.cos(X), rtol=1e-5)


def test_unchanged_input_is_differentiated_by_the_rule():
    class Reversed(Unchanged):
        @staticmethod
        def backward(ctx, grad):
            return -grad

    for wrap in WRAPPERS.values():
        np.testing.assert_array_equal(jax.grad(lambda x, w=wrap: w(Reversed.apply)(x).sum())(X), -jnp.ones_like(X))
