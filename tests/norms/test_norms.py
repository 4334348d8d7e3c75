"""Values and gradients against NumPy and Flax, memory, options and edge cases of every normalisation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import layers
from layers.norms import statistics
from layers.norms.batch_norm import BatchNormFunction
from tests.norms.reference import jacobian_product, normalize
from tests.support import assert_trees_close, draw_normal, jit_grad, jit_value_and_grad, saved_bytes, temp_bytes

pytestmark = pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
"""Flax writes float64 statistics to float32 ones."""

TWINS = {
    "rms_norm": (layers.RMSNorm, nnx.RMSNorm, {}),
    "layer_norm": (layers.LayerNorm, nnx.LayerNorm, {}),
    "group_norm": (layers.GroupNorm, nnx.GroupNorm, {"num_groups": 3}),
    "batch_norm": (layers.BatchNorm, nnx.BatchNorm, {}),
}
EVERY = pytest.mark.parametrize("name", TWINS)


def draw(seed, shape, dtype=jnp.float64):
    return draw_normal(seed, shape, dtype)


def pair(name, features=6, **kwargs):
    """Our module and Flax's, with the same random parameters."""
    ours, theirs, needed = TWINS[name]
    bias = {} if name == "rms_norm" else {"bias_init": nnx.initializers.normal(1.0)}
    kwargs = needed | {"scale_init": nnx.initializers.normal(1.0)} | bias | kwargs
    return ours(features, rngs=nnx.Rngs(7), **kwargs), theirs(features, rngs=nnx.Rngs(7), **kwargs)


def loss(y):
    return (jnp.sin(y) * jnp.arange(1, y.size + 1).reshape(y.shape) / y.size).sum()


def grads(module, x, **kwargs):
    """Value, gradient of x and of each parameter, running statistics."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def run(params, x):
        module = nnx.merge(graph, params, rest, copy=True)
        y = module(x, **kwargs)
        return loss(y), (y, nnx.state(module, nnx.BatchStat))

    out, (dparams, dx) = jit_value_and_grad(run, argnums=(0, 1), has_aux=True)(params, x)
    return jax.tree.map(jnp.asarray, (out, nnx.to_pure_dict(dparams), dx))


# Values and gradients


@pytest.mark.parametrize("blocks", [False, True])
@EVERY
def test_values_and_gradients_are_those_of_flax_in_float64(name, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(statistics, "BLOCK_BYTES", 4 * 6 * 4)
    with jax.enable_x64(True):
        ours, theirs = pair(name, param_dtype=jnp.float64)
        x = draw(1, (2, 11, 6))
        assert_trees_close(grads(ours, x), grads(theirs, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("fn", "axes", "centered"),
    [
        (layers.rms_norm, (-1,), False),
        (layers.layer_norm, (-1,), True),
        (lambda *a, epsilon: layers.batch_norm(*a, epsilon=epsilon)[0], (0, 1), True),
    ],
    ids=["rms_norm", "layer_norm", "batch_norm"],
)
def test_gradients_are_those_of_the_full_jacobian(fn, axes, centered):
    with jax.enable_x64(True):
        x, scale, bias, dy = draw(1, (4, 5, 6)), draw(2, (6,)), draw(3, (6,)), draw(4, (4, 5, 6))
        args = (x, scale, bias) if centered else (x, scale)
        y, pull = jax.vjp(jax.jit(partial(fn, epsilon=1e-3)), *args)
        xhat = normalize(x, axes, 1e-3, centered)
        expected = (jacobian_product(x, dy * scale, axes, 1e-3, centered), (dy * xhat).sum((0, 1)), dy.sum((0, 1)))
        np.testing.assert_allclose(y, xhat * scale + (bias if centered else 0), rtol=1e-10, atol=1e-12)
        assert_trees_close(pull(dy), expected[: len(args)], rtol=1e-10, atol=1e-11)


def test_group_norm_has_the_gradients_of_the_full_jacobian():
    with jax.enable_x64(True):
        x, scale, bias, dy = draw(1, (3, 5, 6)), draw(2, (6,)), draw(3, (6,)), draw(4, (3, 5, 6))
        y, pull = jax.vjp(jax.jit(partial(layers.group_norm, num_groups=2, epsilon=1e-3)), x, scale, bias)
        split = (3, 5, 2, 3)
        xhat = normalize(x.reshape(split), (1, 3), 1e-3).reshape(x.shape)
        dx = jacobian_product(x.reshape(split), (dy * scale).reshape(split), (1, 3), 1e-3).reshape(x.shape)
        np.testing.assert_allclose(y, xhat * scale + bias, rtol=1e-10, atol=1e-12)
        assert_trees_close(pull(dy), (dx, (dy * xhat).sum((0, 1)), dy.sum((0, 1))), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("fused", "norm", "parameters"), [(layers.add_rms_norm, layers.rms_norm, 1), (layers.add_layer_norm, layers.layer_norm, 2)])
def test_sum_and_norm_in_one_are_those_apart(fused, norm, parameters, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(statistics, "BLOCK_BYTES", 4 * 6 * 4)
    with jax.enable_x64(True):
        args = (draw(1, (2, 11, 6)), draw(2, (2, 11, 6)), *(draw(3 + i, (6,)) for i in range(parameters)))
        apart = lambda x, r, *p: (norm(x + r, *p), x + r)
        both = [jax.vjp(jax.jit(f), *args) for f in (fused, apart)]
        dy = (draw(6, (2, 11, 6)), draw(7, (2, 11, 6)))
        assert_trees_close(both[0][0], both[1][0], rtol=1e-12)
        assert_trees_close(both[0][1](dy), both[1][1](dy), rtol=1e-10, atol=1e-12)


@EVERY
def test_forward_mode_and_second_derivatives_are_those_of_flax(name):
    with jax.enable_x64(True):
        ours, theirs = pair(name, param_dtype=jnp.float64)
        x, v = draw(1, (2, 3, 6)), draw(2, (2, 3, 6))

        def both(module):
            graph, state = nnx.split(module)
            f = lambda x: loss(nnx.merge(graph, state, copy=True)(x))
            run = lambda x, v: (jax.jvp(f, (x,), (v,)), jax.jvp(jax.grad(f), (x,), (v,))[1], jax.vmap(jax.grad(f))(jnp.stack([x, v])))
            return jax.jit(run)(x, v)

        assert_trees_close(both(ours), both(theirs), rtol=1e-9, atol=1e-10)


def test_blocks_of_rows_have_forward_mode(monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK_BYTES", 4 * 6 * 4)
    with jax.enable_x64(True):
        ours, theirs = pair("layer_norm", param_dtype=jnp.float64)
        x, v = draw(1, (22, 6)), draw(2, (22, 6))
        run = lambda m: jax.jit(lambda: (jax.jvp(m, (x,), (v,))[1], jax.jvp(jax.grad(lambda x: loss(m(x))), (x,), (v,))[1]))()
        assert_trees_close(run(ours), run(theirs), rtol=1e-9, atol=1e-10)


# Options of the modules


OPTIONS = [
    ("rms_norm", {"use_scale": False}),
    ("rms_norm", {"reduction_axes": (1, 2), "feature_axes": -1}),
    ("rms_norm", {"reduction_axes": 1, "feature_axes": 2}),
    ("rms_norm", {"epsilon": 0.1}),
    ("layer_norm", {"use_scale": False}),
    ("layer_norm", {"use_bias": False, "use_fast_variance": False}),
    ("layer_norm", {"reduction_axes": (0, 2), "feature_axes": -1}),
    ("layer_norm", {"reduction_axes": (1,), "feature_axes": 2}),
    ("group_norm", {"num_groups": None, "group_size": 2}),
    ("group_norm", {"use_bias": False}),
    ("group_norm", {"use_scale": False, "use_fast_variance": False}),
    ("batch_norm", {"use_bias": False, "momentum": 0.7}),
    ("batch_norm", {"use_scale": False, "use_fast_variance": False}),
    ("batch_norm", {"use_running_average": True}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_options_are_those_of_flax(name, options):
    with jax.enable_x64(True):
        ours, theirs = pair(name, param_dtype=jnp.float64, **options)
        x = draw(1, (2, 5, 6))
        assert_trees_close(grads(ours, x), grads(theirs, x), rtol=1e-10, atol=1e-10)


def test_batch_norm_takes_another_feature_axis():
    with jax.enable_x64(True):
        ours, theirs = pair("batch_norm", features=5, axis=1, param_dtype=jnp.float64)
        x = draw(1, (4, 5, 3))
        assert_trees_close(grads(ours, x), grads(theirs, x), rtol=1e-10, atol=1e-10)


@EVERY
def test_mask_is_that_of_flax(name):
    with jax.enable_x64(True):
        ours, theirs = pair(name, param_dtype=jnp.float64)
        x = draw(1, (3, 5, 6))
        mask = jnp.asarray((np.random.default_rng(3).random(x.shape) < 0.7) | (np.arange(6) % 3 == 0))
        assert_trees_close(grads(ours, x, mask=mask), grads(theirs, x, mask=mask), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32])
@EVERY
def test_dtypes_and_values_are_those_of_flax(name, x_dtype, dtype):
    ours, theirs = pair(name, dtype=dtype, param_dtype=jnp.float32)
    x = draw(1, (2, 5, 6), x_dtype)
    a, b = (nnx.jit(lambda m, x: m(x))(module, x) for module in (ours, theirs))
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2.0**-7 if a.dtype == jnp.bfloat16 else 1e-5, atol=1e-5)
    assert jax.eval_shape(lambda: grads(ours, x)[2]).dtype == x_dtype


@EVERY
def test_parameters_and_attributes_are_those_of_flax(name):
    ours, theirs = pair(name)
    assert_trees_close(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)), rtol=0)
    assert vars(ours).keys() == vars(theirs).keys()
    assert isinstance(ours, nnx.Module)


def test_custom_promote_dtype_is_used():
    up = lambda args, *, dtype=None: tuple(None if a is None else a.astype(jnp.float32) for a in args)
    module = layers.RMSNorm(6, promote_dtype=up, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert module(draw(1, (2, 6), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.devices(4)
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "batch_norm"])
def test_statistics_are_shared_over_a_named_axis_as_in_flax(name):
    axes = {} if name == "batch_norm" else {"reduction_axes": (0, 1), "feature_axes": -1}
    with jax.enable_x64(True):
        modules = pair(name, param_dtype=jnp.float64, axis_name="data", use_fast_variance=False, **axes)
        x = draw(1, (8, 3, 6))
        mesh = Mesh(np.array(jax.devices()[:4]), "data")

        def run(module):
            graph, state = nnx.split(module)

            def mean_loss(state, x):
                local = lambda s, x: jax.lax.psum(jnp.sin(nnx.merge(graph, s, copy=True)(x.reshape(-1, 6)) * jnp.arange(6)).sum(), "data")
                return jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())(state, x)

            value, (dstate, dx) = jax.jit(jax.value_and_grad(mean_loss, argnums=(0, 1)))(state, x)
            return value, nnx.to_pure_dict(nnx.filter_state(dstate, nnx.Param)), dx

        assert_trees_close(run(modules[0]), run(modules[1]), rtol=1e-10, atol=1e-10)


@pytest.mark.devices(4)
def test_batch_norm_on_devices_is_batch_norm_of_the_whole_batch():
    with jax.enable_x64(True):
        x, scale, bias, dy = draw(1, (8, 3, 6)), draw(2, (6,)), draw(3, (6,)), draw(4, (8, 3, 6))
        mesh = Mesh(np.array(jax.devices()[:4]), "data")
        shared = jax.shard_map(
            lambda x, s, b: layers.batch_norm(x, s, b, axis_name="data"), mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=(P("data"), P(), P())
        )
        run = lambda fn: jit_value_and_grad(lambda *a: (fn(*a)[0] * dy).sum(), argnums=(0, 1, 2))(x, scale, bias)
        assert_trees_close(jax.jit(lambda: run(shared))(), run(layers.batch_norm), rtol=1e-10, atol=1e-12)
        assert_trees_close(jax.jit(shared)(x, scale, bias), jax.jit(layers.batch_norm)(x, scale, bias), rtol=1e-10, atol=1e-12)


def test_running_statistics_get_no_gradient():
    x = draw(1, (4, 6), jnp.float32)
    gradient = jit_grad(lambda x: sum(s.sum() for s in BatchNormFunction.apply(x, None, None, 1e-5)[1:]))(x)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(x))


# Edge cases


FUNCTIONS = {
    "rms_norm": layers.rms_norm,
    "layer_norm": layers.layer_norm,
    "group_norm": partial(layers.group_norm, num_groups=2),
    "batch_norm": lambda x, *a, **k: layers.batch_norm(x, *a, **k)[0],
    "add_rms_norm": lambda x, *a, **k: layers.add_rms_norm(x, jnp.zeros_like(x), *a, **k)[0],
    "add_layer_norm": lambda x, *a, **k: layers.add_layer_norm(x, jnp.zeros_like(x), *a, **k)[0],
}
EVERY_FUNCTION = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize("fill", [0.0, 3.0])
@EVERY_FUNCTION
def test_constant_input_has_finite_output_and_gradients(name, fill, epsilon):
    x, scale = jnp.full((4, 6), fill), jnp.arange(1.0, 7.0)
    y, pull = jax.vjp(jax.jit(partial(FUNCTIONS[name], epsilon=epsilon)), x, scale)
    assert np.isfinite(y).all()
    assert all(np.isfinite(g).all() for g in pull(jnp.ones_like(y)))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
@EVERY_FUNCTION
def test_empty_batch_has_zero_gradient_of_the_scale(name, shape):
    y, pull = jax.vjp(jax.jit(FUNCTIONS[name]), jnp.zeros(shape), jnp.ones(6))
    dx, dscale = pull(jnp.ones(shape))
    assert y.shape == dx.shape == shape
    np.testing.assert_array_equal(dscale, jnp.zeros(6))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "group_norm", "batch_norm", "add_rms_norm", "add_layer_norm"])
def test_parameters_may_be_lists(name):
    inputs = [jnp.arange(12.0).reshape(3, 4)] * (2 if name.startswith("add") else 1)
    parameters = [[1.0, 2.0, 3.0, 4.0]] * (1 if "rms" in name else 2)
    norm = partial(getattr(layers, name), **({"num_groups": 2} if name == "group_norm" else {}))
    assert_trees_close(norm(*inputs, *parameters), norm(*inputs, *map(jnp.array, parameters)), rtol=0)


@EVERY_FUNCTION
def test_no_scale_is_a_scale_of_one(name):
    x = draw(1, (3, 6), jnp.float32)
    run = lambda *p: jit_value_and_grad(lambda x: loss(FUNCTIONS[name](x, *p)))(x)
    assert_trees_close(run(), run(jnp.ones(6)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "group_norm"])
def test_bfloat16_error_is_not_above_that_of_autodiff(name):
    """Against float64, the summed error over many rows, gradients of x and of the parameters."""
    x = (draw(1, (64, 33, 48), jnp.float32) * 3 + 1).astype(jnp.bfloat16)
    ours, theirs = pair(name, features=48, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    with jax.enable_x64(True):
        exact = pair(name, features=48, param_dtype=jnp.float64)[1]
        nnx.update(exact, jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float64), nnx.state(ours)))
        dy = draw(2, x.shape).astype(jnp.bfloat16)

        def run(module, x):
            graph, state = nnx.split(module)
            y, pull = jax.vjp(jax.jit(lambda s, x: nnx.merge(graph, s, copy=True)(x)), state, x)
            return jax.tree.map(lambda a: np.asarray(a, np.float64), jax.tree.leaves((y, pull(dy.astype(y.dtype)))))

        reference = run(exact, x.astype(jnp.float64))
        errors = [[np.abs(a - r).sum() for a, r in zip(run(m, x), reference, strict=True)] for m in (ours, theirs)]
    for mine, autodiff in zip(*errors, strict=True):
        assert mine <= autodiff * 1.001


@EVERY_FUNCTION
def test_function_returns_the_dtype_of_its_input_whatever_the_scale(name):
    x = draw(1, (3, 6), jnp.bfloat16)
    y, pull = jax.vjp(jax.jit(FUNCTIONS[name]), x, jnp.ones(6, jnp.float32))
    dx, dscale = pull(y)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert dscale.dtype == jnp.float32


# Errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: layers.rms_norm(jnp.ones((3, 8)), jnp.ones(7)),
            ValueError,
            r"rms_norm: scale has shape \(7,\), but must be \(features,\) = \(8,\) \(x: \(3, 8\)\)",
        ),
        (lambda: layers.layer_norm(jnp.ones((3, 8)), None, jnp.ones(7)), ValueError, "layer_norm: bias has shape"),
        (lambda: layers.rms_norm(jnp.ones((3, 8), int)), TypeError, "rms_norm: x is of dtype int"),
        (lambda: layers.rms_norm(jnp.ones(())), ValueError, "rms_norm: x is a scalar"),
        (lambda: layers.rms_norm(jnp.ones(3), epsilon=-1), ValueError, "rms_norm: epsilon is -1"),
        (lambda: layers.group_norm(jnp.ones((3, 8)), num_groups=3), ValueError, "group_norm: num_groups is 3"),
        (lambda: layers.group_norm(jnp.ones(8), num_groups=2), ValueError, "group_norm: x has shape"),
        (lambda: layers.batch_norm(jnp.ones((3, 8)), jnp.ones(7)), ValueError, "batch_norm: scale has shape"),
        (lambda: layers.add_rms_norm(jnp.ones((3, 8)), jnp.ones(8)), ValueError, "add_rms_norm: residual has shape"),
        (lambda: layers.add_layer_norm(jnp.ones((3, 8)), jnp.ones((3, 8), int)), TypeError, "add_layer_norm: residual is of dtype"),
        (lambda: layers.GroupNorm(6, 3, reduction_axes=(1,), rngs=nnx.Rngs(0))(jnp.ones((2, 3, 6))), ValueError, "must contain the last axis"),
        (lambda: layers.LayerNorm(6, dtype=jnp.complex64, rngs=nnx.Rngs(0)), TypeError, "LayerNorm: dtype is .*real floating-point dtype"),
        (
            lambda: layers.LayerNorm(5, rngs=nnx.Rngs(0))(jnp.ones((2, 3))),
            ValueError,
            r"LayerNorm: x has shape \(2, 3\), but must have num_features = 5",
        ),
        (lambda: layers.GroupNorm(6, True, rngs=nnx.Rngs(0)), TypeError, "GroupNorm: num_groups is True"),
        (lambda: layers.group_norm(jnp.ones((3, 8)), num_groups=True), TypeError, "group_norm: num_groups is True"),
        (lambda: layers.layer_norm(None), TypeError, "layer_norm: x is None"),
        (lambda: layers.layer_norm(jnp.ones(3), epsilon="1e-6"), TypeError, "layer_norm: epsilon is '1e-6'"),
        (lambda: layers.rms_norm(jnp.ones(3), jnp.ones(3) * 1j), TypeError, "rms_norm: scale is of dtype complex64"),
        (lambda: layers.rms_norm(jnp.ones(3), scale_offset=1), ValueError, "rms_norm: scale_offset is 1.0, but there is no scale"),
        (lambda: layers.batch_norm(jnp.ones((2, 3)), axis_name="data"), ValueError, "batch_norm: axis_name is 'data'"),
        (lambda: layers.LayerNorm(3, rngs=nnx.Rngs(0))(jnp.ones((2, 3)), mask=jnp.ones(2)), ValueError, "LayerNorm: mask has shape"),
        (lambda: jax.grad(lambda e: layers.rms_norm(jnp.ones(3), epsilon=e).sum())(0.1), TypeError, "rms_norm: epsilon has no gradient"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Memory


ROWS, FEATURES = 8192, 1024


@pytest.mark.parametrize(("name", "ratio"), [("rms_norm", 0.1), ("layer_norm", 0.25), ("group_norm", 1.0), ("batch_norm", 1.0)])
def test_temporary_memory_of_the_gradient_is_a_fraction_of_that_of_flax(name, ratio):
    x, s = jax.ShapeDtypeStruct((8, ROWS // 8, FEATURES), jnp.float32), jax.ShapeDtypeStruct((FEATURES,), jnp.float32)

    def gradient(module):
        def run(x, s, dy):
            graph, state = nnx.split(module)
            module_ = nnx.merge(graph, state, copy=True)
            module_.scale = nnx.Param(s)
            return (module_(x) * dy).sum()

        return jax.grad(run, argnums=(0, 1))

    ours, theirs = (temp_bytes(gradient(m), x, s, x) for m in pair(name, features=FEATURES, **({"num_groups": 32} if name == "group_norm" else {})))
    assert ours <= ratio * theirs


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("name", "numbers", "sets"), [("rms_norm", 1, 32), ("layer_norm", 2, 32), ("group_norm", 2, 4 * 2), ("batch_norm", 2, 48)])
def test_only_statistics_are_saved(name, numbers, sets, dtype):
    x, p = jnp.ones((4, 8, 48), dtype), jnp.ones(48, dtype)
    args = (x, p) if name == "rms_norm" else (x, p, p)
    assert saved_bytes(FUNCTIONS[name], *args) <= numbers * sets * 4


@pytest.mark.parametrize(("fused", "numbers"), [(layers.add_rms_norm, 1), (layers.add_layer_norm, 2)])
def test_only_the_sum_and_statistics_are_saved(fused, numbers):
    x, p = jnp.ones((4, 8, 48)), jnp.ones(48)
    assert saved_bytes(fused, x, x, p) + 2 * x.nbytes <= x.nbytes + numbers * 32 * 4 + x.nbytes


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize(("name", "ratio"), [("rms_norm", 0.7), ("layer_norm", 0.7)])
def test_stack_of_norms_and_nonlinearities_takes_less_memory(name, ratio, scanned):
    x, scales = jax.ShapeDtypeStruct((2048, 256), jnp.bfloat16), jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)

    def gradient(norm):
        step = lambda h, s: (jnp.tanh(norm(h, s)), None)

        def run(x, scales):
            if scanned:
                return jax.lax.scan(step, x, scales)[0].astype(jnp.float32).sum()
            for i in range(8):
                x, _ = step(x, scales[i])
            return x.astype(jnp.float32).sum()

        return jax.grad(run, argnums=(0, 1))

    def flax(h, s):
        module = TWINS[name][1](256, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        module.scale = nnx.Param(s)
        return module(h)

    assert temp_bytes(gradient(FUNCTIONS[name]), x, scales) <= ratio * temp_bytes(gradient(flax), x, scales)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_traced_scale_offset_gives_what_a_known_one_does_and_has_a_gradient(name):
    x, scale = jax.random.normal(jax.random.key(0), (3, 5)), jnp.linspace(-0.5, 0.5, 5)
    rows = (x, x) if name == "add_rms_norm" else (x,)
    run = lambda offset: jax.value_and_grad(
        lambda x, s: sum(jnp.sin(y).sum() for y in jax.tree.leaves(getattr(layers, name)(*x, s, scale_offset=offset))), (0, 1)
    )(rows, scale)
    assert_trees_close(jax.jit(run)(1.0), run(1.0), rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda offset: run(offset)[0])(1.0)
    np.testing.assert_allclose(slope, run(1.0)[1][1].sum(), rtol=1e-5)
