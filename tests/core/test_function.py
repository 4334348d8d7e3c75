"""The table of `Function`, row by row: what PyTorch does, and each error message."""

from __future__ import annotations

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.function import engine
from layers.function.function import Function, GradFn, once_differentiable
from tests.core.functions import Cube, Linear, Masked, Mul, NoArrays, Noise, Options, Sort, Split, Tree, Unchanged, Wrong, floats
from tests.support import assert_trees_close

X = floats(4)


def rule(forward, backward=None, **others):
    """A Function from plain functions, called `Made`."""
    methods = {"forward": forward, "backward": backward, **others}
    return type("Made", (Function,), {k: staticmethod(v) for k, v in methods.items() if v is not None})


def returns(*grads, forward=lambda ctx, x, y: x * y):
    """A Function whose backward returns `grads` whatever arrives."""
    return rule(forward, lambda ctx, *_: grads)


def gradient(cls, *args, argnums=0):
    return jax.grad(lambda *a: cls.apply(*a).sum(), argnums)(*args)


# --- arguments ---


def test_any_python_object_passes_through_untouched():
    @dataclasses.dataclass
    class Settings:
        gain: float

    seen = []

    def forward(ctx, x, *options):
        seen.append(options)
        return 2 * x

    given = (Settings(1.0), "name", None, 3, 2.5, True, {"a": [1, "b"]}, len, object())
    cls = rule(forward, lambda ctx, g: (2 * g, *[None] * len(given)))
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: cls.apply(x, *given).sum()))(X), 2 * jnp.ones(4))
    assert all(options == given and all(type(a) is type(b) for a, b in zip(options, given, strict=True)) for options in seen)


def test_numpy_array_that_is_differentiated_can_be_indexed_by_a_traced_one():
    class Take(Function):
        @staticmethod
        def forward(ctx, x, order):
            ctx.save_for_backward(order)
            ctx.shape = x.shape
            return x.reshape(-1)[order]

        @staticmethod
        def backward(ctx, dy):
            (order,) = ctx.saved_tensors
            return jnp.zeros(dy.shape).at[order].set(dy).reshape(ctx.shape), None

    x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    gradient = jax.jit(lambda keys: jax.grad(lambda x: Take.apply(x, jnp.argsort(keys)) @ jnp.arange(6.0))(x))(-jnp.arange(6.0))
    np.testing.assert_array_equal(gradient, jnp.arange(5.0, -1.0, -1.0).reshape(2, 3))


def test_numpy_arrays_count_as_arrays():
    given = jax.grad(lambda w: Linear.apply(np.ones((4, 3), np.float32), w, np.zeros(2, np.float32)).sum())(floats(2, 3))
    np.testing.assert_allclose(given, np.full((2, 3), 4.0))


def test_no_array_at_all_is_a_plain_call():
    np.testing.assert_array_equal(NoArrays.apply(3, "ones"), np.ones(3))
    np.testing.assert_array_equal(jax.jit(lambda x: x + NoArrays.apply(3, kind="zeros"))(1.0), np.ones(3))


def test_keyword_arguments_and_defaults_are_bound_by_name():
    key = jax.random.key(0)
    given = jax.jit(jax.grad(lambda x: Noise.apply(x, rate=0.5, key=key).sum()))(X)
    np.testing.assert_array_equal(given, jax.grad(lambda x: Noise.apply(x, key, 0.5).sum())(X))
    np.testing.assert_array_equal(jax.grad(lambda x: Noise.apply(x, key, 0.5, train=False).sum())(X), jnp.ones(4))


def test_keyword_only_arguments_need_no_gradient():
    mask = jnp.array([True, False, True, True])
    np.testing.assert_array_equal(jax.grad(lambda x: Masked.apply(x, mask, negate=True, scale=5.0).sum())(X), 5.0 * ~mask)


def test_keyword_only_argument_does_not_fill_in_the_defaults_before_it():
    def forward(ctx, x, y=None, *, gain):
        ctx.gain = gain
        assert len(ctx.needs_input_grad) == 2
        return gain * x

    cls = rule(forward, lambda ctx, g: (g * ctx.gain,))
    np.testing.assert_array_equal(jax.grad(lambda x: cls.apply(x, gain=3.0).sum())(X), jnp.full(4, 3.0))


@pytest.mark.parametrize("call", [lambda: Mul.apply(X), lambda: Mul.apply(X, X, X), lambda: Mul.apply(X, X, x=X), lambda: Mul.apply(X, z=X)])
def test_arguments_that_do_not_fit_forward_are_an_error_that_shows_it(call):
    with pytest.raises(TypeError, match=r"Mul.apply: .*forward takes \(x, y\)"):
        call()


def test_integer_boolean_and_key_arguments_have_no_gradient():
    seen = {}

    def forward(ctx, x, index, mask, key):
        seen["forward"] = ctx.needs_input_grad
        return jnp.where(mask, x[index], 0) * jax.random.uniform(key)

    cls = rule(forward, lambda ctx, g: (seen.update(backward=ctx.needs_input_grad) or jnp.zeros(4), None, None, None))
    jax.jit(jax.grad(lambda x: cls.apply(x, jnp.arange(3), jnp.array([True, False, True]), jax.random.key(1)).sum()))(X)
    assert seen == {"forward": (True, False, False, False), "backward": (True, False, False, False)}


def test_gradient_for_an_integer_array_is_dropped():
    cls = rule(lambda ctx, x, i: x[i], lambda ctx, g: (jnp.ones(4), jnp.ones(77)))
    np.testing.assert_array_equal(gradient(cls, X, jnp.arange(2)), jnp.ones(4))


def test_same_array_twice_gets_the_sum():
    cls = rule(lambda ctx, x, y: x + y, lambda ctx, g: (g, 10 * g))
    np.testing.assert_array_equal(jax.grad(lambda x: cls.apply(x, x).sum())(X), jnp.full(4, 11.0))


def test_variadic_forward_takes_a_list_of_parameters():
    cls = rule(lambda ctx, n, *ps: sum(ps) * n, lambda ctx, g: (None, *[g * (i + 1) for i in range(len(ctx.needs_input_grad) - 1)]))
    given = jax.grad(lambda ps: cls.apply(2.0, *ps).sum())([X, X, X])
    assert_trees_close(given, [jnp.ones(4), 2 * jnp.ones(4), 3 * jnp.ones(4)], rtol=0)


def test_pytree_argument_may_have_none_for_any_subtree():
    first, second = floats(4, seed=1), floats(4, seed=2)

    def run(backward):
        cls = rule(Tree.forward, backward)
        run = lambda p, i: cls.apply(p, i)["affine"].sum()
        return jax.grad(run, (0, 1))({"scale": X, "shift": X}, (first, (second, None)))

    zero, one = jnp.zeros(4), jnp.ones(4)
    assert_trees_close(run(lambda ctx, g: (None, None)), ({"scale": zero, "shift": zero}, (zero, (zero, None))), rtol=0)
    some = run(lambda ctx, g: ({"scale": None, "shift": g["affine"]}, (g["affine"], None)))
    assert_trees_close(some, ({"scale": zero, "shift": one}, (one, (zero, None))), rtol=0)


def test_named_tuple_and_dataclass_arguments_keep_their_type():
    class Pair(typing.NamedTuple):
        a: jax.Array
        b: jax.Array

    def forward(ctx, pair):
        assert isinstance(pair, Pair)
        return pair.a * 2 + pair.b

    cls = rule(forward, lambda ctx, g: (Pair(2 * g, g),))
    given = jax.jit(jax.grad(lambda p: cls.apply(p).sum()))(Pair(X, X))
    assert_trees_close(given, Pair(jnp.full(4, 2.0), jnp.ones(4)), rtol=0)


class Pair(typing.NamedTuple):
    a: jax.Array
    b: jax.Array


@pytest.mark.parametrize("kind", [Pair, lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: ((a, b),)])
@pytest.mark.parametrize("wrap", [lambda g: g, lambda g: (g,)])
def test_gradient_of_the_structure_of_the_only_argument_is_its_gradient(kind, wrap):
    def backward(ctx, g):
        a, b = jax.tree.leaves(ctx.saved_tensors)
        return wrap(kind(g * b, g * a))

    def forward(ctx, pair):
        ctx.save_for_backward(pair)
        return jnp.multiply(*jax.tree.leaves(pair))

    given = jax.grad(lambda p: rule(forward, backward).apply(p).sum())(kind(X, 2 * X))
    assert_trees_close(given, kind(2 * X, X), rtol=1e-6)


@jax.tree_util.register_pytree_node_class
class Converting:
    """A pytree whose constructor takes nothing but what can be an array of floats."""

    def __init__(self, a, b):
        self.a, self.b = jnp.asarray(a, float), jnp.asarray(b, float)

    def tree_flatten(self):
        return (self.a, self.b), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Product(Function):
    @staticmethod
    def forward(ctx, pair):
        ctx.save_for_backward(pair)
        return Converting(pair.a * pair.b, pair.a), pair.b

    @staticmethod
    def backward(ctx, dy, dz):
        (pair,) = ctx.saved_tensors
        return Converting(dy.a * pair.b + dy.b, dy.a * pair.a + dz)

    @staticmethod
    def jvp(ctx, dot):
        (pair,) = ctx.saved_tensors
        return Converting(dot.a * pair.b + pair.a * dot.b, dot.a), dot.b


@pytest.mark.linear_engine
def test_class_that_converts_its_leaves_is_an_argument_an_output_a_gradient_and_a_tangent():
    given = Converting(X, 2 * X)
    loss = lambda p: sum(y.sum() for y in jax.tree.leaves(Product.apply(p)))
    for differentiate in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        assert_trees_close(differentiate(loss)(given), Converting(2 * X + 1, X + 1), rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(loss, (given,), (given,))[1], (4 * X * X + 3 * X).sum(), rtol=1e-5)
    (y, _), grad_fn = Product.vjp(given)
    assert_trees_close(grad_fn.apply(y, None)[0], Converting(y.a * 2 * X + y.b, y.a * X), rtol=1e-6)
    assert_trees_close(grad_fn.apply(None, X)[0], Converting(jnp.zeros(4), X), rtol=1e-6)


def test_numbers_are_as_good_as_arrays():
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    cls = rule(forward, lambda ctx, g: (g * ctx.saved_tensors[1], g * ctx.saved_tensors[0]))
    assert cls.apply(2.0, 3.0) == 6
    assert jax.grad(cls.apply, 0)(2.0, 3.0) == 3 and jax.grad(cls.apply, 1)(2.0, 3.0) == 2
    assert jax.jit(jax.grad(cls.apply))(2.0, 3) == 3
    assert jax.grad(lambda x: cls.apply(x, 3.0))(2.0) == 3
    assert cls.vjp(2.0, 3.0)[0] == 6


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
@pytest.mark.parametrize("mask", [np.array([True, False, True, True]), np.array([0, 2, 3])], ids=["mask", "indices"])
def test_numpy_mask_and_indices_are_known_while_a_program_is_traced(wrap, mask):
    def forward(ctx, x, mask):
        ctx.mask = mask
        return x[mask]

    def backward(ctx, g):
        assert g.shape == (3,)
        return jnp.zeros(4).at[ctx.mask].set(g), None

    cls = rule(forward, backward)
    np.testing.assert_array_equal(wrap(lambda x: cls.apply(x, mask))(X), X[mask])
    np.testing.assert_array_equal(wrap(jax.grad(wrap(lambda x: (X[mask] * cls.apply(x, mask)).sum())))(X), X * np.array([1, 0, 1, 1]))


def test_forward_without_ctx_is_an_error_that_says_so():
    cls = rule(lambda x, w: x * w, lambda ctx, g: (g, g))
    with pytest.raises(
        TypeError, match=r"Made.apply: too many positional arguments.*'x', which is the context: is `ctx` missing, forward\(ctx, x, ...\)"
    ):
        cls.apply(X, X)


@pytest.mark.parametrize(
    "hide", [lambda f: {f}, lambda f: frozenset([f]), lambda f: (g for g in [f]), lambda f: iter([f]), lambda f: map(f, [1]), lambda f: iter([{f}])]
)
def test_traced_array_hidden_in_a_set_or_an_iterator_is_refused(hide):
    cls = rule(lambda ctx, x, hidden: x * 1.0, lambda ctx, g: (g, None))
    with pytest.raises(TypeError, match=r"Made: argument 'hidden' is a .* that holds a traced array"):
        jax.grad(lambda x: cls.apply(X, hide(lambda y: x * y)).sum())(X)


def test_flax_param_is_passed_as_it_is():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x = floats(4, 3)

    def total(model):
        return (Linear.apply(x, jnp.swapaxes(model.kernel[...], 0, 1), model.bias) ** 2).sum()

    given = nnx.jit(nnx.grad(total))(model)
    theirs = nnx.grad(lambda m: (m(x) ** 2).sum())(model)
    np.testing.assert_allclose(given["bias"][...], theirs["bias"][...], rtol=1e-5)
    np.testing.assert_allclose(given["kernel"][...], theirs["kernel"][...], rtol=1e-5)


def test_flax_param_inside_a_pytree_argument_has_its_gradient():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self):
            self.scale, self.shift = nnx.Param(X), nnx.Param(2 * X)

    def total(model, first):
        return Tree.apply({"scale": model.scale, "shift": model.shift}, (first, (first, None)))["affine"].sum()

    first = floats(4, seed=1)
    given = nnx.grad(total)(Model(), first)
    np.testing.assert_allclose(given["scale"][...], first)
    np.testing.assert_allclose(given["shift"][...], jnp.ones(4))


def test_function_runs_inside_nnx_scan_and_remat():
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(1 + 0.1 * jax.random.normal(rngs.params(), (4,)))

        def __call__(self, x, mul):
            return mul(jnp.sin(x), self.scale)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def blocks(rngs):
        return Block(rngs)

    def run(mul):
        model = blocks(nnx.Rngs(0))

        def total(model, x):
            step = nnx.remat(lambda x, block: block(x, mul))
            return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, model).sum()

        return nnx.jit(nnx.grad(total))(model, X)["scale"][...]

    np.testing.assert_allclose(run(Mul.apply), run(lambda x, s: x * s), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lift", ["scan", "remat"])
def test_function_runs_inside_linen_scan_and_remat(lift):
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        mul: typing.Any

        @nn.compact
        def __call__(self, x, _):
            return self.mul(jnp.sin(x), self.param("scale", nn.initializers.normal(1.0), (4,))), None

    class Model(nn.Module):
        mul: typing.Any

        @nn.compact
        def __call__(self, x):
            if lift == "remat":
                return nn.remat(Block)(self.mul)(x, None)[0]
            return nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(self.mul)(x, None)[0]

    params = Model(jnp.multiply).init(jax.random.key(0), X)
    run = lambda mul: jax.jit(jax.grad(lambda p: Model(mul).apply(p, X).sum()))(params)
    assert_trees_close(run(Mul.apply), run(jnp.multiply), rtol=1e-5, atol=1e-7)


# --- ctx ---


def test_saved_tensors_come_back_in_order_with_none_and_pytrees():
    seen = []

    def forward(ctx, x):
        ctx.save_for_backward(x, None, {"a": (2 * x, np.ones(2))}, jnp.arange(2))
        return x * 1.0

    def backward(ctx, g):
        seen[:] = [ctx.saved_tensors, ctx.saved_tensors]
        return g

    gradient(rule(forward, backward), X)
    (a, none, tree, index), again = seen
    assert none is None and again[0] is a
    assert_trees_close((a, tree, index), (X, {"a": (2 * X, jnp.ones(2))}, jnp.arange(2)), rtol=0)


def test_nothing_saved_is_an_empty_tuple():
    seen = []
    gradient(rule(lambda ctx, x: x * 1.0, lambda ctx, g: seen.append(ctx.saved_tensors) or g), X)
    assert seen == [()]


@pytest.mark.parametrize(
    ("misuse", "error", "message"),
    [
        (lambda ctx, x: (ctx.save_for_backward(x), ctx.save_for_backward(x)), RuntimeError, "Made: ctx.save_for_backward is called twice"),
        (lambda ctx, x: ctx.save_for_backward(x, len), TypeError, "Made: save_for_backward can only save arrays, but argument 1 is of type builtin"),
        (lambda ctx, x: ctx.save_for_backward("s"), TypeError, "argument 0 is of type str"),
        (lambda ctx, x: ctx.saved_tensors, RuntimeError, "Made: ctx.saved_tensors is for backward"),
        (lambda ctx, x: ctx.mark_dirty(x), RuntimeError, "Made: ctx.mark_dirty has no meaning in JAX.*Return the new value"),
        (lambda ctx, x: ctx.mark_non_differentiable(3), TypeError, "Made: mark_non_differentiable takes arrays.* argument 0 is of type int"),
        (lambda ctx, x: ctx.mark_non_differentiable(x + 1), ValueError, "Made: mark_non_differentiable.*forward does not return"),
        (lambda ctx, x: ctx.missing, AttributeError, "Made: ctx has no attribute 'missing'"),
        (lambda ctx, x: setattr(ctx, "saved_tensors", x), AttributeError, "Made: ctx.saved_tensors is not writable"),
    ],
)
def test_misuse_of_ctx_is_an_error_that_says_what_to_do(misuse, error, message):
    def forward(ctx, x):
        misuse(ctx, x)
        return x * 1.0

    with pytest.raises(error, match=message):
        gradient(rule(forward, lambda ctx, g: g), X)


def test_attributes_of_ctx_keep_arrays_and_anything_else():
    marker = object()

    def forward(ctx, x):
        ctx.twice, ctx.marker, ctx.mixed = 2 * x, marker, {"a": x, "name": "n", "list": [1, [x]]}
        return x * 1.0

    def backward(ctx, g):
        assert ctx.marker is marker
        assert ctx.mixed["name"] == "n" and ctx.mixed["list"][0] == 1
        return g * ctx.twice + ctx.mixed["a"] + ctx.mixed["list"][1][0]

    cls = rule(forward, backward)
    for wrap in (jax.jit, jax.checkpoint, lambda f: lambda x: jax.lax.scan(lambda c, _: (c, f(x)), 0, None, length=1)[1][0]):
        np.testing.assert_allclose(jax.grad(lambda x, w=wrap: w(cls.apply)(x).sum())(X), 4 * X, rtol=1e-6)


def test_object_that_hides_a_traced_array_is_refused():
    class Holder:
        def __init__(self, theta):
            self.theta = theta

    def forward(ctx, x):
        ctx.holder = Holder(2 * x)
        return x * 1.0

    with pytest.raises(TypeError, match=r"Made: an attribute of ctx is a Holder that holds a traced array in `.theta`"):
        jax.jit(lambda x: gradient(rule(forward, lambda ctx, g: g), x))(X)
    with pytest.raises(TypeError, match=r"Made: argument 'y' is a Holder that holds a traced array in `.theta`"):
        jax.jit(lambda x: rule(lambda ctx, x, y: x).apply(x, Holder(x)))(X)


def test_deprecated_saved_variables_warns_and_works():
    cls = rule(lambda ctx, x: (ctx.save_for_backward(x), x * x)[1], lambda ctx, g: 2 * g * ctx.saved_variables[0])
    with pytest.warns(DeprecationWarning, match="saved_tensors"):
        np.testing.assert_allclose(gradient(cls, X), 2 * X)


WRAPS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda x, y: jax.vmap(f)(x[None], y[None])[0],
    "scan": lambda f: lambda x, y: jax.lax.scan(lambda c, _: (c, f(x, y)), 0, None, length=1)[1][0],
    "checkpoint": jax.checkpoint,
    "cond": lambda f: lambda x, y: jax.lax.cond(x.sum() > -1e9, f, lambda x, y: x, x, y),
    "jit of scan": lambda f: lambda x, y: jax.jit(lambda x, y: jax.lax.scan(lambda c, _: (c, f(x, y)), 0, None, length=1)[1][0])(x, y),
}


@pytest.mark.linear_engine
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("argnum", [0, 1])
def test_needs_input_grad_is_true_for_what_is_differentiated_only(wrap, argnum):
    seen = []

    def backward(ctx, g):
        seen.append(ctx.needs_input_grad)
        return g, g

    cls = rule(lambda ctx, x, y: x + y, backward)
    jax.grad(lambda *a: WRAPS[wrap](cls.apply)(*a).sum(), argnum)(X, X)
    assert seen and set(seen) == {(argnum == 0, argnum == 1)}


def test_needs_input_grad_is_all_false_where_nothing_is_differentiated():
    seen = []
    cls = rule(lambda ctx, x, n: seen.append((ctx.needs_input_grad, ctx.requires_grad)) or x)
    cls.apply(X, 2)
    jax.jit(cls.apply, static_argnums=1)(X, 2)
    assert set(seen) == {((False, False), False)}


def test_needs_input_grad_has_one_flag_for_each_argument_given_and_in_the_split_form_for_each_parameter():
    seen = []
    jax.grad(lambda x: rule(lambda ctx, x, n=2: seen.append(ctx.needs_input_grad) or x * n, lambda ctx, g: g).apply(x).sum())(X)
    split = rule(
        lambda x, n=2: x * n, lambda ctx, g: (g, None), setup_context=lambda ctx, inputs, output: seen.append((ctx.needs_input_grad, len(inputs)))
    )
    jax.grad(lambda x: split.apply(x).sum())(X)
    assert (True,) in seen and seen[-1] == ((True, False), 2)


# --- outputs ---


@pytest.mark.linear_engine
def test_marked_output_has_no_gradient_and_zeros_arrive_for_it():
    seen = []

    def forward(ctx, x):
        y, z = 2 * x, 3 * x
        ctx.mark_non_differentiable(z)
        return y, z

    cls = rule(forward, lambda ctx, gy, gz: seen.append(gz) or 2 * gy)
    given = jax.grad(lambda x: sum(a.sum() for a in cls.apply(x)))(X)
    np.testing.assert_array_equal(given, jnp.full(4, 2.0))
    np.testing.assert_array_equal(seen[0], jnp.zeros(4))
    assert_trees_close(jax.jvp(cls.apply, (X,), (X,))[1], (2 * X, jnp.zeros(4)), rtol=1e-6)


def test_gradient_of_an_integer_output_arrives_as_integer_zeros():
    seen = []
    cls = rule(lambda ctx, x: (x * 1.0, jnp.argsort(x)), lambda ctx, g, gi: seen.append(gi) or g)
    jax.grad(lambda x: cls.apply(x)[0].sum())(X)
    assert seen[0].dtype == jnp.int32 and not seen[0].any()


def test_key_among_the_outputs_arrives_as_none():
    seen = []
    cls = rule(lambda ctx, x, key: (x * 1.0, jax.random.split(key)), lambda ctx, g, gk: seen.append(gk) or (g, None))
    jax.grad(lambda x: cls.apply(x, jax.random.key(0))[0].sum())(X)
    assert seen == [None]


@pytest.mark.parametrize("wrap", ["plain", "jit", "vmap"])
def test_without_materialised_grads_an_unused_output_arrives_as_none(wrap):
    seen = []

    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return 2 * x, 3 * x, jnp.argsort(x)

    def backward(ctx, gy, gz, gi):
        seen.append((gy is None, gz is None, gi is None))
        return 2 * gy

    cls = rule(forward, backward)
    run = {"plain": cls.apply, "jit": jax.jit(cls.apply), "vmap": lambda x: jax.vmap(cls.apply)(x[None])}[wrap]
    np.testing.assert_array_equal(jax.grad(lambda x: run(x)[0].sum())(X), jnp.full(4, 2.0))
    assert set(seen) == {(False, True, True)}


def test_outputs_that_are_no_arrays_pass_through():
    cls = rule(lambda ctx, x: (x * 2, 3, None, "name", True, len), lambda ctx, g, *rest: 2 * g if all(r is None for r in rest) else None)
    run = lambda x: (cls.apply(x)[0].sum(), cls.apply(x)[1:])
    given, rest = jax.grad(run, has_aux=True)(X)
    np.testing.assert_array_equal(given, jnp.full(4, 2.0))
    assert rest == (3, None, "name", True, len)
    jax.jit(lambda x: cls.apply(x)[0])(X)


def test_list_output_is_one_output_with_one_gradient():
    cls = rule(lambda ctx, x: [2 * x, 3 * x], lambda ctx, g: 2 * g[0] + 3 * g[1])
    np.testing.assert_array_equal(jax.grad(lambda x: sum(a.sum() for a in cls.apply(x)))(X), jnp.full(4, 5.0))


def test_one_tuple_and_empty_outputs_stay_what_they_are():
    assert isinstance(rule(lambda ctx, x: (x,)).apply(X), tuple)
    assert jax.jit(lambda x: (rule(lambda ctx, x: ()).apply(x), rule(lambda ctx, x: None).apply(x)))(X) == ((), None)


def test_same_array_returned_twice_has_a_gradient_for_each():
    def forward(ctx, x):
        y = x * 1.0
        return y, y

    cls = rule(forward, lambda ctx, a, b: 1 * a + 10 * b)
    np.testing.assert_array_equal(jax.grad(lambda x: sum(a.sum() for a in cls.apply(x)))(X), jnp.full(4, 11.0))
    np.testing.assert_array_equal(jax.grad(lambda x: cls.apply(x)[1].sum())(X), jnp.full(4, 10.0))


def test_integer_outputs_of_sort_are_the_order():
    y, order = jax.jit(Sort.apply)(X)
    np.testing.assert_array_equal(X[order], y)
    assert order.dtype == jnp.int32


def test_forward_may_be_called_directly_as_plain_python():
    ctx = type("Plain", (), {"save_for_backward": lambda *_: None})()
    np.testing.assert_allclose(Wrong.forward(ctx, X), jnp.sin(X))


# --- what backward returns ---


def test_extra_trailing_none_is_ignored():
    np.testing.assert_array_equal(gradient(returns(jnp.ones(4), None, None, None), X, X), jnp.ones(4))


def test_list_of_gradients_and_a_bare_gradient_are_accepted():
    np.testing.assert_array_equal(gradient(rule(lambda ctx, x, y: x * y, lambda ctx, g: [g, None]), X, X), jnp.ones(4))
    np.testing.assert_array_equal(gradient(rule(lambda ctx, x: x * 2, lambda ctx, g: g), X), jnp.ones(4))


def test_none_is_a_zero_gradient():
    np.testing.assert_array_equal(gradient(returns(None, None), X, X), jnp.zeros(4))


@pytest.mark.parametrize(
    ("given", "kept"),
    [((2, 4), (4,)), ((4, 2, 3), (2, 1)), ((1,), ()), ((3, 4), ()), ((5, 4), (1, 4)), ((3, 1), (1, 1))],
)
def test_larger_gradient_is_summed_to_the_shape_of_its_argument(given, kept):
    gradients = floats(*given)
    cls = rule(lambda ctx, x: x.sum() * 1.0, lambda ctx, g: gradients)
    extra = len(given) - len(kept)
    expected = np.asarray(gradients).sum(tuple(range(extra)))
    expected = expected.sum(tuple(i for i, n in enumerate(kept) if n == 1 and expected.shape[i] != 1), keepdims=True) if kept else expected
    found = jax.grad(cls.apply)(jnp.ones(kept))
    assert found.shape == kept
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32, jnp.bool_])
def test_gradient_is_cast_to_the_dtype_of_its_argument(dtype):
    found = gradient(returns(jnp.ones(4, dtype), None), X, X)
    assert found.dtype == X.dtype
    np.testing.assert_array_equal(found, jnp.ones(4))


def test_gradient_of_a_narrow_argument_is_narrow():
    found = jax.jit(jax.grad(lambda x: returns(np.ones(4, np.float32), None).apply(x, X).astype(jnp.float32).sum()))(X.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16


def test_python_number_and_numpy_array_are_gradients():
    assert gradient(rule(lambda ctx, x: x * 2, lambda ctx, g: 2.0), jnp.float32(1)) == 2
    np.testing.assert_array_equal(gradient(returns(np.ones(4), None), X, X), jnp.ones(4))


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ((jnp.ones(4),), ValueError, r"Made.backward returned 1 gradient\(s\), but forward was given 2 argument\(s\) \(x, y\): return one for each"),
        ((jnp.ones(4), None, jnp.ones(4)), ValueError, r"Made.backward returned 3 gradient\(s\), but forward was given 2"),
        ((jnp.ones(3), None), ValueError, r"Made.backward returned a gradient of shape \(3,\) for argument 'x' of shape \(4,\): it must have"),
        ((jnp.ones(()), None), ValueError, r"shape \(\) for argument 'x' of shape \(4,\)"),
        ((jnp.ones((4, 1)), None), ValueError, r"shape \(4, 1\) for argument 'x' of shape \(4,\)"),
        (("zero", None), TypeError, "Made.backward returned a str as the gradient of argument 'x': return an array or None"),
        ((jnp.ones(4) * 1j, None), TypeError, "Made.backward returned a complex64 gradient for argument 'x' of dtype float32: .*real part"),
        (({"a": jnp.ones(4)}, None), TypeError, "Made.backward returned a dict as the gradient of argument 'x': return an array or None"),
    ],
)
def test_wrong_gradient_is_an_error_that_names_class_argument_given_and_what_must_hold(grads, error, message):
    for differentiate in (gradient, lambda *a: jax.jit(lambda *b: gradient(*a[:1], *b))(*a[1:])):
        with pytest.raises(error, match=message):
            differentiate(returns(*grads), X, X)


def test_gradient_for_what_is_no_array_is_an_error():
    with pytest.raises(TypeError, match=r"Made.backward returned a gradient for argument 'y', which is no array: return None there"):
        gradient(returns(jnp.ones(4), jnp.ones(()), forward=lambda ctx, x, y: x), X, "3")
    with pytest.raises(TypeError, match=r"Made.backward returned a gradient for 'y\['mode'\]', which is no array: return None there"):
        gradient(returns(jnp.ones(4), {"scale": None, "mode": jnp.ones(())}, forward=lambda ctx, x, y: x), X, {"scale": 2.0, "mode": "3"})


def test_wrong_structure_for_a_pytree_names_the_leaf():
    cls = rule(lambda ctx, tree: tree["a"] + tree["b"][0], lambda ctx, g: ({"a": g, "b": [jnp.ones(3)]},))
    with pytest.raises(ValueError, match=r"shape \(3,\) for argument 'tree\['b'\]\[0\]' of shape \(4,\)"):
        jax.grad(lambda t: cls.apply(t).sum())({"a": X, "b": [X]})
    cls = rule(lambda ctx, tree: tree["a"] + tree["b"], lambda ctx, g: ({"a": g},))
    with pytest.raises(ValueError, match=r"argument 'tree'.*return the same structure"):
        jax.grad(lambda t: cls.apply(t).sum())({"a": X, "b": X})


def test_exception_in_backward_keeps_its_type():
    class Odd(Exception):
        pass

    def backward(ctx, g):
        raise Odd("boom")

    with pytest.raises(Odd, match="boom"):
        gradient(rule(lambda ctx, x: x * 1.0, backward), X)


def test_boxed_gradients_arrive_as_one_list():
    class Boxed(Function):
        boxed_grads_call = True

        @staticmethod
        def forward(ctx, x):
            return 2 * x, 3 * x

        @staticmethod
        def backward(ctx, grads):
            assert isinstance(grads, list)
            return 2 * grads[0] + 3 * grads[1]

    np.testing.assert_array_equal(jax.grad(lambda x: sum(a.sum() for a in Boxed.apply(x)))(X), jnp.full(4, 5.0))


# --- the shape of the class ---


def test_instance_is_refused_with_the_right_call():
    with pytest.raises(TypeError, match=r"Mul is not instantiated.*call Mul.apply"):
        Mul()


def test_forward_without_backward_is_legal_until_it_is_differentiated():
    cls = rule(lambda ctx, x: 2 * x)
    np.testing.assert_array_equal(jax.jit(jax.vmap(cls.apply))(X), 2 * X)
    with pytest.raises(NotImplementedError, match="Made has no backward rule: write `backward"):
        gradient(cls, X)


def test_missing_forward_says_what_to_write():
    with pytest.raises(NotImplementedError, match="write `forward"):
        type("Empty", (Function,), {}).apply(X)


@pytest.mark.parametrize("method", ["forward", "backward", "setup_context", "jvp", "vmap"])
def test_method_that_is_not_static_is_refused_where_it_is_written(method):
    with pytest.raises(TypeError, match=f"Loose.{method} must be a static method: put @staticmethod above it"):
        type("Loose", (Function,), {method: lambda self, x: x})


def test_vjp_is_another_name_for_backward():
    cls = rule(lambda ctx, x: 2 * x, vjp=lambda ctx, g: 5 * g)
    np.testing.assert_array_equal(gradient(cls, X), jnp.full(4, 5.0))
    assert isinstance(cls.vjp(X)[1], GradFn)
    with pytest.raises(TypeError, match="'vjp' is another name for 'backward'; write one"):
        rule(lambda ctx, x: x, lambda ctx, g: g, vjp=lambda ctx, g: g)


def test_class_methods_and_inherited_methods_work():
    class Base(Function):
        gain = 2.0

        @classmethod
        def forward(cls, ctx, x):
            return cls.gain * x

        @classmethod
        def backward(cls, ctx, g):
            return cls.gain * g

    class Child(Base):
        gain = 3.0

    class Other(Unchanged):
        @staticmethod
        def backward(ctx, g):
            return 7 * Unchanged.backward(ctx, g)

    np.testing.assert_array_equal(gradient(Child, X), jnp.full(4, 3.0))
    np.testing.assert_array_equal(gradient(Other, X), jnp.full(4, 7.0))


def test_split_form_sees_all_bound_arguments_and_the_output_itself():
    seen = []

    def setup(ctx, inputs, output):
        seen.append((len(inputs), type(output), ctx.needs_input_grad))
        ctx.save_for_backward(*inputs[:1], output[0])

    cls = rule(lambda x, n=2: (x * n,), lambda ctx, g: (g * ctx.saved_tensors[1] / ctx.saved_tensors[0], None), setup_context=setup)
    np.testing.assert_allclose(jax.grad(lambda x: cls.apply(x)[0].sum())(X), jnp.full(4, 2.0), rtol=1e-6)
    assert (2, tuple, (True, False)) in seen


def test_split_form_runs_setup_context_without_differentiation_too():
    seen = []
    rule(lambda x: x, setup_context=lambda ctx, i, o: seen.append(ctx.needs_input_grad)).apply(X)
    assert seen == [(False,)]


@pytest.mark.linear_engine
def test_rules_may_call_other_functions():
    class Square(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return Mul.apply(x, x)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return Mul.apply(2 * g, x)

    np.testing.assert_allclose(jax.vmap(jax.grad(Square.apply))(X), 2 * X, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.hessian(Square.apply))(X), jnp.full(4, 2.0), rtol=1e-6)


def test_name_of_the_class_stands_in_the_printed_program():
    assert "Wrong" in str(jax.make_jaxpr(Wrong.apply)(X))


@pytest.mark.linear_engine
def test_complex_gradient_follows_the_convention_of_jax():
    class Square(Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z * z

        @staticmethod
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    z = X + 1j * floats(4, seed=1)
    for fn in (Square.apply, lambda z: z * z):
        np.testing.assert_allclose(jax.grad(lambda z, f=fn: f(z).real.sum())(z), 2 * z, rtol=1e-5)
    np.testing.assert_allclose(jax.jvp(Square.apply, (z,), (1j * z,))[1], 2j * z * z, rtol=1e-5)


# --- once_differentiable ---


class Once(Function):
    @staticmethod
    def forward(ctx, x, gain=2.0):
        ctx.gain = gain
        ctx.save_for_backward(x)
        return gain * jnp.sin(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ctx.gain * g * jnp.cos(ctx.saved_tensors[0]), None


@pytest.mark.linear_engine
@pytest.mark.parametrize("wrap", ["jit", "checkpoint", "scan", "vmap", "plain"])
def test_once_differentiable_rule_is_differentiated_once(wrap):
    run = {
        "plain": Once.apply,
        "jit": jax.jit(Once.apply),
        "checkpoint": jax.checkpoint(Once.apply),
        "scan": lambda x: jax.lax.scan(lambda c, y: (c, Once.apply(y)), 0, x)[1],
        "vmap": jax.vmap(Once.apply),
    }[wrap]
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: run(x).sum()))(X), 2 * jnp.cos(X), rtol=1e-5)
    np.testing.assert_allclose(jax.jvp(run, (X,), (X,))[1], 2 * X * jnp.cos(X), rtol=1e-5)


@pytest.mark.parametrize(
    "twice",
    [
        lambda f: jax.grad(lambda x: jax.grad(f)(x).sum()),
        lambda f: jax.jit(jax.grad(lambda x: jax.jit(jax.grad(f))(x).sum())),
        jax.hessian,
        pytest.param(lambda f: jax.jacfwd(jax.jacfwd(f)), marks=pytest.mark.linear_engine),
        pytest.param(lambda f: jax.jacrev(jax.jacfwd(f)), marks=pytest.mark.linear_engine),
        lambda f: lambda x: jax.linearize(jax.grad(f), x)[1](x),
    ],
    ids=["grad of grad", "jit", "hessian", "forward over forward", "reverse over forward", "linearize"],
)
def test_once_differentiable_rule_refuses_a_second_differentiation(twice):
    with pytest.raises(RuntimeError, match="Once: trying to differentiate twice a function that was marked with @once_differentiable"):
        twice(lambda x: Once.apply(x).sum())(X)


# --- the tape ---


def test_vjp_gives_the_output_and_the_tape():
    x, w, b = floats(4, 3), floats(2, 3, seed=1), floats(2, seed=2)
    y, grad_fn = Linear.vjp(x, w, b)
    dy = floats(4, 2, seed=3)
    np.testing.assert_allclose(y, x @ w.T + b, rtol=1e-5)
    assert_trees_close(grad_fn.apply(dy), jax.vjp(lambda x, w, b: x @ w.T + b, x, w, b)[1](dy), rtol=1e-5)
    assert_trees_close(grad_fn(dy), grad_fn.apply(dy), rtol=0)
    assert_trees_close(grad_fn.saved_tensors, (x, w, b), rtol=0)
    assert grad_fn.needs_input_grad == (True, True, True)
    assert (grad_fn.name(), repr(grad_fn)) == ("LinearBackward", "<LinearBackward>")


def test_tape_has_none_for_what_has_no_gradient():
    _, grad_fn = Noise.vjp(X, jax.random.key(0), 0.5)
    dx, *rest = grad_fn.apply(jnp.ones(4))
    assert dx.shape == (4,) and rest == [None, None]
    assert grad_fn.needs_input_grad == (True, False, False)


def test_tape_of_several_outputs_takes_none_for_zero_and_pytrees():
    (_, _), grad_fn = Cube.vjp(X)
    np.testing.assert_allclose(grad_fn.apply(jnp.ones(4), None)[0], 3 * X**2, rtol=1e-5)
    _, grad_fn = Tree.vjp({"scale": X, "shift": X}, (X, (X, None)))
    (params, inputs) = grad_fn.apply({"affine": jnp.ones(4), "rest": (None, None)})
    assert_trees_close((params, inputs), ({"scale": X, "shift": jnp.ones(4)}, (X, (jnp.zeros(4), None))), rtol=1e-6)


def test_tape_is_a_pytree_that_passes_through_jit():
    grad_fn = jax.jit(lambda x: Wrong.vjp(x)[1])(X)
    np.testing.assert_allclose(jax.jit(lambda g, dy: g(dy))(grad_fn, jnp.ones(4))[0], 3 * jnp.cos(X), rtol=1e-5)
    assert [leaf.shape for leaf in jax.tree.leaves(grad_fn)] == [(4,)]


def test_tape_refuses_complex_gradients_of_real_outputs_and_what_is_no_array():
    grad_fn = rule(lambda ctx, x: x * 1.0, lambda ctx, g: g).vjp(X)[1]
    with pytest.raises(TypeError, match=r"Made: the gradient of output 0 is of dtype complex64, but that of a real output \(float32\) is real"):
        grad_fn.apply(1j * X)
    with pytest.raises(TypeError, match="Made: the gradient of output 0 is a str, but must be an array or None"):
        grad_fn.apply("one")


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ((X, X), r"Made: forward returned 1 output\(s\), but 2 gradient\(s\) were given"),
        ((jnp.ones(3),), r"Made: output 0 has shape \(4,\), but its gradient has shape \(3,\)"),
        (((X, X),), "Made: the gradient of output 0 must have its structure"),
    ],
)
def test_tape_refuses_what_does_not_fit_the_outputs(grads, message):
    with pytest.raises(ValueError, match=message):
        rule(lambda ctx, x: x * 1.0, lambda ctx, g: g).vjp(X)[1](*grads)


# --- jvp and vmap static methods ---


class Both(Function):
    """Reverse mode three times, forward mode five times too large."""

    @staticmethod
    def forward(ctx, x, key, n):
        ctx.n = n
        ctx.save_for_backward(x)
        return x**n, jnp.argsort(x)

    @staticmethod
    def backward(ctx, g, _):
        return 3 * g * ctx.n * ctx.saved_tensors[0] ** (ctx.n - 1), None, None

    @staticmethod
    def jvp(ctx, dx, dkey, dn):
        assert dkey is None and dn is None
        return 5 * dx * ctx.n * ctx.saved_tensors[0] ** (ctx.n - 1), None


@pytest.mark.linear_engine
@pytest.mark.parametrize("wrap", ["plain", "jit", "vmap", "checkpoint", "scan"])
def test_written_jvp_is_forward_mode_and_backward_stays_reverse_mode(wrap):
    fn = lambda x: Both.apply(x, jax.random.key(0), 2)[0]
    run = {
        "plain": fn,
        "jit": jax.jit(fn),
        "vmap": lambda x: jax.vmap(fn)(x[None])[0],
        "checkpoint": jax.checkpoint(fn),
        "scan": lambda x: jax.lax.scan(lambda c, _: (c, fn(x)), 0, None, length=1)[1][0],
    }[wrap]
    np.testing.assert_allclose(jax.jvp(run, (X,), (jnp.ones(4),))[1], 10 * X, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: run(x).sum())(X), 6 * X, rtol=1e-5)


@pytest.mark.linear_engine
def test_jvp_sees_what_was_saved_for_it():
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(2 * x, x)
        return x * x

    cls = rule(forward, lambda ctx, g: 2 * g * ctx.saved_tensors[0], jvp=lambda ctx, t: t * ctx.saved_tensors[0])
    np.testing.assert_allclose(jax.jvp(cls.apply, (X,), (jnp.ones(4),))[1], 2 * X, rtol=1e-6)
    np.testing.assert_allclose(gradient(cls, X), 2 * X, rtol=1e-6)


@pytest.mark.linear_engine
@pytest.mark.parametrize(
    ("jvp", "message"),
    [
        (lambda ctx, t: (t, t, t), r"Made.jvp returned 3 tangent\(s\), but forward has 2 output\(s\): return one for each"),
        (lambda ctx, t: (t, t[:2]), r"Made.jvp returned a tangent of shape \(2,\) for output 1 of shape \(4,\)"),
        (lambda ctx, t: (t, [t, t]), "Made.jvp returned .* as the tangent of output 1: return the structure of that output"),
    ],
)
def test_wrong_tangents_are_an_error_that_names_class_and_output(jvp, message):
    cls = rule(lambda ctx, x: (x * 1.0, x * 2.0), lambda ctx, a, b: a, jvp=jvp)
    with pytest.raises(ValueError, match=message):
        jax.jvp(cls.apply, (X,), (X,))


@pytest.mark.linear_engine
def test_none_is_a_zero_tangent():
    cls = rule(lambda ctx, x: (x * 1.0, x * 2.0), lambda ctx, a, b: a, jvp=lambda ctx, t: (t, None))
    assert_trees_close(jax.jvp(cls.apply, (X,), (X,))[1], (X, jnp.zeros(4)), rtol=0)


@pytest.mark.linear_engine
def test_backward_that_is_not_linear_says_so_in_forward_mode_and_works_in_reverse():
    cls = rule(lambda ctx, x: x * 1.0, lambda ctx, g: jnp.clip(g, -0.1, 0.1))
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(cls.apply)))(X), jnp.full(4, 0.1))
    with pytest.raises(TypeError, match=r"Made has no jvp rule, and forward mode cannot be derived.*Write `jvp"):
        jax.jvp(cls.apply, (X,), (X,))


def test_backward_with_an_unbounded_loop_works_in_reverse_mode_under_every_wrapper():
    def backward(ctx, g):
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * 2), (0, g))[1]

    cls = rule(lambda ctx, x: 8 * x, backward)
    for run in (cls.apply, jax.jit(cls.apply), jax.checkpoint(cls.apply), jax.vmap(cls.apply)):
        np.testing.assert_array_equal(jax.jit(jax.grad(lambda x, r=run: r(x).sum()))(X), jnp.full(4, 8.0))


class Batched(Function):
    """Its own rule for vmap, which adds 100 to show where it is used."""

    @staticmethod
    def forward(x, w):
        return x * w, w * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy, dz):
        x, w = ctx.saved_tensors
        return dy * w, dy * x + 2 * dz

    @staticmethod
    def vmap(info, in_dims, x, w):
        assert info.batch_size == 3 and info.randomness == "error"
        assert in_dims == (0, None)
        return (x * w + 100, w * 2), (0, None)


def test_written_vmap_rule_replaces_the_derived_one():
    y, z = jax.vmap(Batched.apply, in_axes=(1, None), out_axes=(0, None))(floats(4, 3), X)
    np.testing.assert_allclose(y, floats(4, 3).T * X + 100, rtol=1e-5)
    np.testing.assert_allclose(z, 2 * X)
    np.testing.assert_allclose(Batched.apply(X, X)[0], X * X)


def test_written_vmap_rule_keeps_the_gradient():
    def total(x, w):
        return (jax.vmap(Batched.apply, in_axes=(0, None))(x, w)[0] ** 1).sum()

    x = floats(3, 4)
    given = jax.jit(jax.grad(total, (0, 1)))(x, X)
    assert_trees_close(given, (jnp.broadcast_to(X, (3, 4)), x.sum(0)), rtol=1e-5)


@pytest.mark.parametrize(
    ("returned", "message"),
    [(lambda x: x, r"Made.vmap must return \(output, out_dims\), but returned"), (lambda x: (x, (0, 0)), "Made.vmap returned out_dims=.*structure")],
)
def test_wrong_result_of_a_vmap_rule_is_an_error(returned, message):
    cls = rule(lambda x: x * 1.0, lambda ctx, g: g, setup_context=lambda ctx, i, o: None, vmap=lambda info, in_dims, x: returned(x))
    with pytest.raises(TypeError, match=message):
        jax.vmap(cls.apply)(X)


def test_vmap_rule_needs_the_split_form_and_no_generated_one():
    with pytest.raises(TypeError, match=r"Made.vmap needs the split form"):
        rule(lambda ctx, x: x, vmap=lambda *a: a)
    with pytest.raises(TypeError, match="Twice has both generate_vmap_rule=True and a vmap method; keep one"):
        type("Twice", (Split,), {"generate_vmap_rule": True, "vmap": staticmethod(lambda *a: a)})


def test_generated_vmap_rule_is_what_happens_anyway():
    cls = type("Generated", (Split,), {"generate_vmap_rule": True})
    np.testing.assert_allclose(jax.vmap(cls.apply)(X), Split.apply(X), rtol=1e-6)


# --- closures over traced values ---


def closures(y):
    """Callables that hold `y`, each in its own way: all compute `x * y`."""

    def inner(x):
        return x * y

    def default(x, z=y):
        return x * z

    return {
        "lambda": lambda x: x * y,
        "nested": lambda x: inner(x),
        "default": default,
        "partial": functools.partial(jnp.multiply, y),
        "partial of closure": functools.partial(lambda x, k: inner(x) * k, k=1.0),
        "tree_util partial": jax.tree_util.Partial(jnp.multiply, y),
        "inside a list": [inner],
    }


KINDS = list(closures(0.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: lambda x, y: jax.lax.scan(lambda c, _: (c, f(x, y)), 0, None, length=1)[1]])
def test_callable_that_closes_over_a_traced_value_is_hoisted(kind, wrap):
    if wrap is jax.checkpoint and engine.current() == "custom_vjp" and getattr(jax.config, "jax_remat3", False):
        pytest.skip("this remat says that all is differentiated")
    cls = rule(
        lambda ctx, x, fn: (setattr(ctx, "fn", fn), ctx.save_for_backward(x), _call(fn, x))[2],
        lambda ctx, g: (jax.vjp(functools.partial(_call, ctx.fn), ctx.saved_tensors[0])[1](g)[0], None),
    )
    y = floats(4, seed=1)
    with jax.checking_leaks():
        given = jax.jit(jax.grad(lambda x, y: wrap(lambda x, y: cls.apply(x, closures(jax.lax.stop_gradient(2 * y))[kind]))(x, y).sum()))(X, y)
    np.testing.assert_allclose(given, 2 * y, rtol=1e-6)


def _call(fn, x):
    return (fn[0] if isinstance(fn, list) else fn)(x)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_callable_that_closes_over_a_differentiated_value_is_a_clear_error(wrap):
    with pytest.raises(TypeError, match=r"Options: argument 'fn' is a function that closes over an array which is being.*Pass that array"):
        jax.grad(lambda y: wrap(lambda y: Options.apply(X, lambda x: x * y, {"gain": 1.0}).sum())(y))(2.0)


def test_jitted_callable_that_closes_over_a_traced_value_is_handled_or_refused():
    def run(x, y):
        return jax.grad(lambda x: Options.apply(x, jax.jit(lambda x: x * y), {"gain": 1.0}).sum())(x)

    with pytest.raises(TypeError, match=r"Options: argument 'fn' .* holds a traced array"):
        jax.jit(run)(X, X)


def test_bound_method_of_an_object_that_holds_a_traced_value_is_refused():
    class Holder:
        def __init__(self, y):
            self.y = y

        def call(self, x):
            return x * self.y

    with pytest.raises(TypeError, match=r"Options: argument 'fn' .* holds a traced array in `.y`"):
        jax.jit(lambda x, y: Options.apply(x, Holder(y).call, {"gain": 1.0}))(X, X)


def test_mutually_recursive_callables_are_fine():
    def even(x, n=2):
        return x if n == 0 else odd(x, n - 1)

    def odd(x, n):
        return even(2 * x, n - 1)

    np.testing.assert_array_equal(jax.jit(lambda x: Options.apply(x, even, {"gain": 1.0}))(X), 2 * X)


@pytest.mark.parametrize("deep", [False, True])
def test_rule_that_closes_over_a_traced_value_is_refused(deep):
    def run(x, y):
        helper = lambda g: g * y
        return gradient(rule(lambda ctx, x: x * 1.0, (lambda ctx, g: helper(g)) if deep else (lambda ctx, g: g * y)), x)

    with pytest.raises(TypeError, match=r"Made.backward closes over a traced array \((y|helper)\).*pass it to apply as an argument"):
        jax.jit(run)(X, X)


def test_rule_may_close_over_concrete_values():
    np.testing.assert_array_equal(gradient(rule(lambda ctx, x: x * 2, lambda ctx, g: g * X), X), X)


@pytest.mark.linear_engine
def test_a_python_number_that_is_differentiated_may_be_saved():
    class Square(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            return 2 * x * dy

    for transform in (lambda f: f, jax.jit):
        np.testing.assert_allclose(transform(jax.grad(Square.apply))(1.5), 3.0)
        np.testing.assert_allclose(jax.grad(transform(jax.grad(Square.apply)))(1.5), 2.0)
        np.testing.assert_allclose(jax.jvp(transform(Square.apply), (1.5,), (2.0,))[1], 6.0)


def test_once_differentiable_rule_leaves_no_tracer_behind():
    class Once(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @once_differentiable
        def backward(ctx, dy):
            return 2 * ctx.saved_tensors[0] * dy

    with jax.checking_leaks():
        np.testing.assert_allclose(jax.jit(jax.grad(lambda x: Once.apply(x).sum()))(jnp.arange(3.0)), [0, 2, 4])
