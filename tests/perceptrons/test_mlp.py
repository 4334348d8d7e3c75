"""Values and gradients beside plain JAX and Flax, memory and edge cases of `mlp` and `gated_mlp`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.core.elementwise import ACTIVATIONS
from layers.perceptrons.gated_mlp import GatedMLP, gated_mlp
from layers.perceptrons.mlp import MLP, mlp
from tests.support import assert_trees_close, draw_normal, jit_grad, saved_bytes, temp_bytes

JAX_NN = {
    "gelu": jax.nn.gelu,
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "mish": jax.nn.mish,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
}
SHAPES = {"mlp": ((3, 7), (7, 4), (7,), (4,)), "gated_mlp": ((3, 7), (3, 7), (7, 4), (7,), (7,), (4,))}
OURS = {"mlp": mlp, "gated_mlp": gated_mlp}
BOTH = pytest.mark.parametrize("name", OURS)
SAVE = pytest.mark.parametrize("save", ["inputs", "preactivations"])


def plain_mlp(x, up, down, up_bias=0, down_bias=0, *, activation="gelu"):
    return JAX_NN[activation](x @ up + up_bias) @ down + down_bias


def plain_gated_mlp(x, gate, up, down, gate_bias=0, up_bias=0, down_bias=0, *, activation="silu"):
    return (JAX_NN[activation](x @ gate + gate_bias) * (x @ up + up_bias)) @ down + down_bias


PLAIN = {"mlp": plain_mlp, "gated_mlp": plain_gated_mlp}


def draw(shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))


def loss(y):
    return (jnp.sin(y) * jnp.arange(1, y.size + 1).reshape(y.shape)).sum()


def gradients(fn, args):
    """Value and all gradients, compiled."""
    return jax.jit(jax.value_and_grad(lambda *a: loss(fn(*a)), tuple(range(len(args)))))(*args)


# Values and gradients


@SAVE
@BOTH
def test_values_and_gradients_are_those_of_autodiff_in_float64(name, save):
    with jax.enable_x64(True):
        args = draw(((2, 5, 3), *SHAPES[name]), jnp.float64)
        ours = gradients(partial(OURS[name], save=save, block_size=4), args)
        assert_trees_close(ours, gradients(PLAIN[name], args), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_that_of_jax_nn(activation):
    with jax.enable_x64(True):
        args = draw(((6, 3), *SHAPES["mlp"][:2]), jnp.float64)
        ours, theirs = (gradients(partial(fn, activation=activation), args) for fn in (mlp, plain_mlp))
        assert_trees_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["gelu", "relu_squared"])
def test_gate_takes_any_activation(activation):
    with jax.enable_x64(True):
        args = draw(((6, 3), *SHAPES["gated_mlp"][:3]), jnp.float64)
        ours, theirs = (gradients(partial(fn, activation=activation), args) for fn in (gated_mlp, plain_gated_mlp))
        assert_trees_close(ours, theirs, rtol=1e-10, atol=1e-10)


@SAVE
@BOTH
def test_forward_mode_and_second_derivatives_are_those_of_autodiff(name, save):
    def second(fn, args):
        first = jit_grad(lambda *a: loss(fn(*a)), tuple(range(len(args))))
        dot = lambda *a: sum((g * jnp.cos(x)).sum() for g, x in zip(first(*a), a, strict=True))
        return jax.jvp(lambda *a: loss(fn(*a)), args, args)[1], jax.grad(dot, (0, 1))(*args)

    with jax.enable_x64(True):
        args = draw(((5, 3), *SHAPES[name]), jnp.float64)
        ours, theirs = (jax.jit(partial(second, fn))(args) for fn in (partial(OURS[name], save=save, block_size=2), PLAIN[name]))
        assert_trees_close(ours, theirs, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@SAVE
@BOTH
def test_error_is_not_above_that_of_autodiff(name, save, dtype):
    """Against float64, summed over the elements of the output and of all gradients.

    In float32 in one block, and to 2 %: XLA adds up the same products in an order of its own for each program, for better or worse.
    """
    shapes = {"mlp": ((32, 96), (96, 32)), "gated_mlp": ((32, 96), (32, 96), (96, 32))}[name]
    args = tuple((a / (1 if i == 0 else 6)).astype(dtype) for i, a in enumerate(draw(((640, 32), *shapes))))
    dy = draw_normal(9, (640, 32)).astype(dtype)

    def run(fn, *args):
        y, pull = jax.vjp(fn, *args)
        return y, *pull(dy.astype(y.dtype))

    found = [
        jax.jit(partial(run, fn))(*args) for fn in (partial(OURS[name], save=save, block_size=128 if dtype == jnp.bfloat16 else None), PLAIN[name])
    ]
    with jax.enable_x64(True):
        exact = jax.jit(partial(run, PLAIN[name]))(*(jnp.asarray(a, jnp.float64) for a in args))
        errors = [[np.abs(np.asarray(a, np.float64) - e).sum() for a, e in zip(way, exact, strict=True)] for way in found]
    for mine, autodiff in zip(*errors, strict=True):
        assert mine <= autodiff * (1.02 if dtype == jnp.float32 else 1)


@BOTH
def test_gradient_of_each_argument_alone_is_that_among_all(name):
    args = draw(((5, 3), *SHAPES[name]))
    fn = partial(OURS[name], block_size=2)
    together = gradients(fn, args)[1]
    for i, expected in enumerate(together):
        alone = jax.jit(jax.grad(lambda *a: loss(fn(*a)), i))(*args)
        np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-5)


def test_frozen_kernels_cost_no_product():
    x, up, down = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 8), (8, 16), (16, 8)))
    fn = lambda *a: loss(mlp(*a, save="preactivations", block_size=16))
    products = lambda argnums: str(jax.make_jaxpr(jax.grad(fn, argnums))(x, up, down)).count("dot_general")
    assert (products((0, 1, 2)), products(0), products(1), products(2)) == (6, 4, 4, 3)


@BOTH
def test_activation_may_be_any_function(name):
    with jax.enable_x64(True):
        args = draw(((6, 3), *SHAPES[name][: 2 if name == "mlp" else 3]), jnp.float64)
        f = lambda a: jnp.sin(a) * a
        ours = gradients(partial(OURS[name], activation=f, block_size=4), args)
        plain = (lambda x, u, d: f(x @ u) @ d) if name == "mlp" else (lambda x, g, u, d: (f(x @ g) * (x @ u)) @ d)
        assert_trees_close(ours, gradients(plain, args), rtol=1e-10, atol=1e-10)


@SAVE
@pytest.mark.parametrize("biased", [False, True])
def test_fused_gate_kernel_is_both_kernels_and_is_saved_as_it_is(save, biased):
    x, gate, up, down, gate_bias, up_bias, _ = draw(((6, 3), *SHAPES["gated_mlp"]))
    fused, bias = jnp.concatenate([gate, up], 1), jnp.concatenate([gate_bias, up_bias]) if biased else None
    one = lambda x, k, d: gated_mlp(x, k, None, d, bias, save=save, block_size=4)
    two = lambda x, k, d: gated_mlp(x, *jnp.split(k, 2, 1), d, *(jnp.split(bias, 2) if biased else (None, None)), save=save, block_size=4)
    assert_trees_close(gradients(one, (x, fused, down)), gradients(two, (x, fused, down)), rtol=1e-5, atol=1e-5)
    assert saved_bytes(one, x, fused, down) <= (2 * 6 * 7 * 4 if save == "preactivations" else 0) + (bias.nbytes if biased else 0)
    if biased:
        dbias = lambda fn: jit_grad(lambda b: loss(fn(b)))(bias)
        expected = dbias(lambda b: gated_mlp(x, gate, up, down, *jnp.split(b, 2), save=save))
        np.testing.assert_allclose(dbias(lambda b: gated_mlp(x, fused, None, down, b, save=save)), expected, rtol=1e-4, atol=1e-5)


@BOTH
def test_norm_before_it_has_an_offset_and_takes_huge_rows(name):
    x, scale, *kernels = draw(((6, 3), (3,), *SHAPES[name][: 2 if name == "mlp" else 3]))
    normed = lambda x, s, **k: OURS[name](x, *kernels, norm_scale=s, block_size=4, **k)
    ours, theirs = (gradients(fn, (x, scale)) for fn in (partial(normed, scale_offset=1.0), lambda x, s: normed(x, 1 + s)))
    assert_trees_close(ours, theirs, rtol=1e-5, atol=1e-5)
    direction = x / jnp.abs(x).max()
    np.testing.assert_allclose(normed(3e38 * direction, scale), normed(3e18 * direction, scale), rtol=1e-4, atol=1e-5)


# Modules


def reference(model, x):
    """The same with `nnx.Linear` layers of the same names."""
    if isinstance(model, MLP):
        return model.down(jax.nn.gelu(model.up(x)))
    return model.down(jax.nn.silu(model.gate(x)) * model.up(x))


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("cls", [MLP, GatedMLP])
def test_module_has_the_values_and_gradients_of_linear_layers_with_its_parameters(cls, use_bias):
    model = cls(6, 10, 4, use_bias=use_bias, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(1))
    x = draw(((2, 3, 6),))[0]
    run = lambda fn: nnx.jit(nnx.value_and_grad(lambda m, x: loss(fn(m, x)), argnums=(0, 1)))(model, x)
    ours, theirs = run(lambda m, x: m(x)), run(reference)
    assert_trees_close(*(jax.tree.map(jnp.asarray, nnx.to_pure_dict(g[1][0])) for g in (ours, theirs)), rtol=2e-4, atol=2e-4)
    assert_trees_close((ours[0], ours[1][1]), (theirs[0], theirs[1][1]), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("cls", [MLP, GatedMLP])
def test_parameters_have_the_names_that_flax_models_give_them(cls):
    state = nnx.to_pure_dict(nnx.state(cls(6, 10, use_bias=True, rngs=nnx.Rngs(0))))
    shapes = jax.tree.map(jnp.shape, state)
    up = {"kernel": (6, 10), "bias": (10,)}
    assert shapes == {"up": up, "down": {"kernel": (10, 6), "bias": (6,)}} | ({"gate": up} if cls is GatedMLP else {})


def test_module_computes_in_its_dtype_and_keeps_wide_gradients():
    model = GatedMLP(6, 10, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.ones((3, 6))
    y, grads = model(x), nnx.grad(lambda m: m(x).astype(jnp.float32).sum())(model)
    assert y.dtype == jnp.bfloat16
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


# Edge cases


@SAVE
@BOTH
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_empty_batch_has_zero_gradients_of_the_kernels(name, save, shape):
    args = (jnp.zeros(shape), *draw(SHAPES[name]))
    y, pull = jax.vjp(partial(OURS[name], save=save), *args)
    dx, *rest = pull(y)
    assert y.shape == (*shape[:-1], 4)
    assert dx.shape == shape
    assert all((g == 0).all() for g in rest)


@BOTH
def test_a_single_row_without_batch_axes_is_a_batch_of_one(name):
    args = draw(((3,), *SHAPES[name]))
    one, batch = OURS[name](*args), OURS[name](args[0][None], *args[1:])
    np.testing.assert_allclose(one, batch[0], rtol=1e-6)


@BOTH
def test_huge_preactivations_have_finite_gradients(name):
    x, *rest = draw(((5, 3), *SHAPES[name]))
    grads = gradients(OURS[name], (1e12 * x, *rest))[1]
    assert all(jnp.isfinite(g).all() for g in grads)


def test_common_dtype_of_the_arrays_is_that_of_the_output():
    x, up, down = draw(((5, 3), (3, 7), (7, 4)))
    y, pull = jax.vjp(mlp, x.astype(jnp.bfloat16), up, down)
    assert y.dtype == jnp.float32
    assert [g.dtype for g in pull(y)] == [jnp.bfloat16, jnp.float32, jnp.float32]


# Errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, k: mlp(x, k, k.T, activation="elu"), ValueError, "mlp: activation is 'elu', but must be one of 'gelu', "),
        (lambda x, k: mlp(x, k, k.T, save="all"), ValueError, "mlp: save is 'all', but must be one of 'inputs', 'preactivations'"),
        (lambda x, k: mlp(x, k, k.T, block_size=0), ValueError, "mlp: block_size is 0"),
        (lambda x, k: mlp(x, k.T, k.T), ValueError, r"mlp: up_kernel has shape \(7, 3\), but must be .* = \(3, 7\) .*: transpose it"),
        (lambda x, k: mlp(x, k, k), ValueError, "mlp: up_kernel has shape"),
        (lambda x, k: mlp(x, k, k[0]), ValueError, "mlp: down_kernel has shape"),
        (lambda x, k: mlp(x, k, k.T, k[0], k[0]), ValueError, r"mlp: down_bias has shape \(7,\), but must be \(out_features,\) = \(3,\)"),
        (lambda x, k: mlp(x[0, 0], k, k.T), ValueError, "mlp: x is a scalar"),
        (lambda x, k: mlp(x.astype(int), k, k.T), TypeError, "mlp: x is of dtype int32"),
        (lambda x, k: gated_mlp(x, k, k[:2], k.T), ValueError, r"gated_mlp: up_kernel has shape \(2, 7\)"),
        (lambda x, k: gated_mlp(x, k, k, k.T, norm_scale=k[0]), ValueError, r"gated_mlp: norm_scale has shape \(7,\)"),
        (lambda x, k: mlp(x, k, k.T, norm_scale=jnp.arange(3)), TypeError, "mlp: norm_scale is of dtype int32"),
        (lambda x, k: mlp(x, k, k.T, epsilon=-1), ValueError, "mlp: epsilon is -1"),
        (lambda x, k: MLP(3, 6, 0, rngs=nnx.Rngs(0)), ValueError, "MLP: out_features is 0"),
        (lambda x, k: GatedMLP(3, -6, rngs=nnx.Rngs(0)), ValueError, "GatedMLP: hidden_features is -6"),
        (lambda x, k: mlp(x, k, k.T, activation=lambda a: a.sum()), ValueError, "mlp: activation is a function that makes"),
        (lambda x, k: gated_mlp(x, k, None, k.T), ValueError, r"gated_mlp: gate_kernel has shape .* must be \(in_features, 2 \* hidden_features\)"),
        (lambda x, k: gated_mlp(x, k, k, k.T, scale_offset=1), ValueError, "gated_mlp: scale_offset is 1.0, but there is no norm_scale"),
        (lambda x, k: GatedMLP(3, 7, activation="elu", rngs=nnx.Rngs(0)), ValueError, "GatedMLP: activation is 'elu'"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones((5, 3)), jnp.ones((3, 7)))


# Memory


def abstract(*shapes, dtype=jnp.float32):
    return tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes)


LARGE = {"mlp": abstract((8192, 512), (512, 2048), (2048, 512)), "gated_mlp": abstract((8192, 512), (512, 2048), (512, 2048), (2048, 512))}


@pytest.mark.parametrize(
    ("name", "save", "ratio"),
    [("mlp", "inputs", 0.13), ("gated_mlp", "inputs", 0.13), ("mlp", "preactivations", 0.4), ("gated_mlp", "preactivations", 0.45)],
)
def test_temporary_memory_of_the_gradient_is_a_fraction_of_that_of_autodiff(name, save, ratio):
    def program(fn):
        def run(*args):
            y, pull = jax.vjp(fn, *args)
            return y, pull(jnp.cos(y))

        return run

    ours, theirs = (temp_bytes(program(fn), *LARGE[name]) for fn in (partial(OURS[name], save=save), PLAIN[name]))
    assert ours <= ratio * theirs


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("name", "arrays"), [("mlp", 1), ("gated_mlp", 2)])
def test_only_the_arguments_or_the_preactivations_are_saved(name, arrays, dtype):
    args = tuple(a.astype(dtype) for a in draw(((6, 3), *SHAPES[name])))
    assert saved_bytes(partial(OURS[name], save="inputs"), *args) <= 0
    assert saved_bytes(partial(OURS[name], save="preactivations"), *args) <= arrays * 6 * 7 * args[0].dtype.itemsize


def test_integer_dtype_is_an_error():
    with pytest.raises(TypeError, match="mlp: dtype is"):
        mlp(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones((4, 3)), dtype=jnp.int32)
