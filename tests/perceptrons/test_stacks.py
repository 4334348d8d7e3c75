"""Perceptrons with the norm before them: values, gradients, and the memory of stacks of them, unrolled and in a loop."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.norms.rms_norm import RMSNorm, rms_norm
from layers.perceptrons.gated_mlp import GatedMLP, gated_mlp
from layers.perceptrons.mlp import MLP, mlp
from tests.perceptrons.test_mlp import BOTH, OURS, PLAIN, SAVE, SHAPES, abstract, draw, gradients, plain_gated_mlp
from tests.support import assert_trees_close, draw_normal, jit_grad, planned_bytes, saved_bytes


def plain_norm(x, scale, epsilon=1e-6):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon) * scale


def normed(name, **options):
    return lambda x, scale, *rest: OURS[name](x, *rest, norm_scale=scale, **options)


def plain_normed(name):
    return lambda x, scale, *rest: PLAIN[name](plain_norm(x, scale), *rest)


# Values and gradients


@SAVE
@BOTH
def test_values_and_gradients_with_a_norm_are_those_of_autodiff_in_float64(name, save):
    with jax.enable_x64(True):
        args = draw(((2, 5, 3), (3,), *SHAPES[name]), jnp.float64)
        ours = gradients(normed(name, save=save, block_size=4), args)
        assert_trees_close(ours, gradients(plain_normed(name), args), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("argnums", [0, 1, 2])
def test_gradient_of_one_argument_with_a_norm_is_that_among_all(argnums):
    args = draw(((5, 3), (3,), *SHAPES["mlp"]))
    fn = lambda *a: jnp.sin(normed("mlp", block_size=2)(*a)).sum()
    np.testing.assert_allclose(jit_grad(fn, argnums)(*args), jit_grad(fn, (0, 1, 2))(*args)[argnums], rtol=1e-5, atol=1e-6)


def test_row_of_zeros_without_epsilon_has_the_output_of_rms_norm_and_finite_gradients():
    x, scale, *kernels = draw(((5, 3), (3,), *SHAPES["mlp"][:2]))
    x = x.at[1].set(0)
    y, pull = jax.vjp(lambda *a: mlp(a[0], *a[2:], norm_scale=a[1], epsilon=0.0, block_size=2), x, scale, *kernels)
    np.testing.assert_allclose(y, mlp(rms_norm(x, scale, epsilon=0.0), *kernels), rtol=1e-5, atol=1e-6)
    grads = pull(jnp.ones_like(y))
    assert all(np.isfinite(g).all() for g in grads)
    assert not grads[0][1].any()


@SAVE
def test_error_with_a_norm_is_not_above_that_of_autodiff_in_bfloat16(save):
    shapes = ((640, 32), (32,), (32, 96), (32, 96), (96, 32))
    args = tuple((a / (6 if a.ndim == 2 and i else 1)).astype(jnp.bfloat16) for i, a in enumerate(draw(shapes)))
    dy = draw_normal(9, (640, 32)).astype(jnp.bfloat16)

    def run(fn, *args):
        y, pull = jax.vjp(fn, *args)
        return y, *pull(dy.astype(y.dtype))

    with jax.enable_x64(True):
        exact = jax.jit(partial(run, plain_normed("gated_mlp")))(*(jnp.asarray(a, jnp.float64) for a in args))
    ways = normed("gated_mlp", save=save, block_size=128), plain_normed("gated_mlp")
    found = [jax.jit(partial(run, fn))(*args) for fn in ways]
    errors = [[np.abs(np.asarray(a, np.float64) - np.asarray(e)).sum() for a, e in zip(way, exact, strict=True)] for way in found]
    assert all(mine <= autodiff for mine, autodiff in zip(*errors, strict=True))


@pytest.mark.parametrize("cls", [MLP, GatedMLP])
def test_module_takes_the_scale_of_a_norm(cls):
    norm, model = RMSNorm(6, epsilon=1e-3, rngs=nnx.Rngs(0)), cls(6, 10, rngs=nnx.Rngs(1))
    norm.scale[...], x = draw(((6,), (3, 6)))
    np.testing.assert_allclose(model(x, norm.scale[...], norm.epsilon), model(norm(x)), rtol=1e-5, atol=1e-6)


# Memory


def test_norm_is_not_saved():
    args = draw(((6, 3), (3,), *SHAPES["gated_mlp"]))
    assert saved_bytes(normed("gated_mlp", save="inputs"), *args) <= 0
    assert saved_bytes(normed("gated_mlp", save="preactivations"), *args) <= 2 * 6 * 7 * 4


DEPTH, TOKENS, FEATURES, HIDDEN = 16, 1024, 64, 256


def plain_block(x, params):
    scale, *kernels = params
    return x + plain_gated_mlp(plain_norm(x, scale), *kernels)


def our_block(save, x, params):
    scale, *kernels = params
    return x + gated_mlp(x, *kernels, save=save, block_size=128, norm_scale=scale)


def two_layers(save, x, params):
    scale, *kernels = params
    return x + gated_mlp(rms_norm(x, scale), *kernels, save=save, block_size=128)


BLOCKS = {
    "autodiff": plain_block,
    "checkpoint": jax.checkpoint(plain_block),
    "dots policy": jax.checkpoint(plain_block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    **{save: partial(our_block, save) for save in ("inputs", "preactivations")},
    **{f"{save}, norm apart": partial(two_layers, save) for save in ("inputs", "preactivations")},
}


@cache
def stack(block, scanned):
    """The compiled gradient of a stack of blocks."""
    block = BLOCKS[block]
    shapes = (FEATURES,), (FEATURES, HIDDEN), (FEATURES, HIDDEN), (HIDDEN, FEATURES)

    def run(x, params):
        if scanned:
            return jnp.sin(jax.lax.scan(lambda x, p: (block(x, p), None), x, params)[0]).sum()
        for p in params:
            x = block(x, p)
        return jnp.sin(x).sum()

    params = abstract(*((DEPTH, *s) for s in shapes)) if scanned else [abstract(*shapes)] * DEPTH
    return jax.jit(jax.grad(run, (0, 1))).lower(*abstract((TOKENS, FEATURES)), params).compile()


def memory(block, scanned):
    return planned_bytes(stack(block, scanned))


@pytest.mark.parametrize(
    ("scanned", "rival", "ours", "ratio"),
    [
        (False, "autodiff", "preactivations", 0.4),
        (False, "dots policy", "preactivations", 0.95),
        (False, "checkpoint", "inputs", 0.5),
        (False, "autodiff", "preactivations, norm apart", 0.49),
        (True, "autodiff", "preactivations", 0.35),
        (True, "dots policy", "preactivations", 0.98),
        (True, "checkpoint", "inputs", 0.6),
        (True, "autodiff", "preactivations, norm apart", 0.38),
        (True, "checkpoint", "inputs, norm apart", 1.01),
    ],
)
def test_stack_of_norms_and_perceptrons_takes_a_fraction_of_the_memory(scanned, rival, ours, ratio):
    assert memory(ours, scanned) <= ratio * memory(rival, scanned)


@pytest.mark.parametrize(("save", "products"), [("preactivations", 9), ("inputs", 11)])
def test_recomputation_is_in_the_compiled_program_of_an_unrolled_stack(save, products):
    """Nine products of matrices a block without recomputation, two more with it: XLA has merged none with those of forward."""
    assert len(re.findall(r" dot\(", stack(save, scanned=False).as_text())) == DEPTH * products
