"""The kernel of the cross entropy for Hopper, interpreted on the CPU: the values of XLA's, without races; and what it is not given."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers.kernels import mosaic
from layers.kernels.cross_entropy import KERNELS, CrossEntropyCall
from layers.kernels.dispatch import decide
from layers.kernels.place import Place

H100 = Place("cuda", "9.0", "0.12")
CALL = CrossEntropyCall((8, 4096), "bfloat16")
LAYER = "softmax_cross_entropy"


@pytest.fixture
def interpreted():
    """Kernels run here, and a data race is an error where JAX's interpreter finds it by itself (from 0.12 on)."""
    with mosaic.interpreting(detect_races=True):
        yield


def logits(columns, dtype=jnp.float32):
    """Of four rows: far apart, with classes that are forbidden, with two infinite ones, and with NaN."""
    z = 4 * jax.random.normal(jax.random.key(0), (4, columns))
    return z.at[1, :100].set(-jnp.inf).at[2, 5].set(jnp.inf).at[2, -1].set(jnp.inf).at[3, 7].set(jnp.nan).astype(dtype)


def value_and_gradient(z, labels, implementation, **options):
    def loss(z):
        return layers.softmax_cross_entropy(z, labels, z_loss=0.1, return_logsumexp=True, implementation=implementation, **options)

    out, pull = jax.vjp(loss, z)
    return out, pull(jax.tree.map(lambda y: 1 + jnp.arange(y.size, dtype=y.dtype).reshape(y.shape), out))[0]


@pytest.mark.parametrize("columns, dtype", [(128, jnp.float32), (1155, jnp.bfloat16)], ids=["one tile", "an odd number of columns in two"])
def test_values_and_gradients_are_those_of_xla(columns, dtype, interpreted):
    z, labels = logits(columns, dtype), jnp.array([columns - 1, 120, 5, -100])
    options = {"class_weights": jnp.linspace(0.5, 2, columns), "reduction": "none"}
    mine, theirs = (value_and_gradient(z, labels, name, **options) for name in ("mosaic", "xla"))
    for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), y.astype(jnp.float32), rtol=1e-5 if dtype == jnp.float32 else 1e-2, atol=1e-6)


def test_row_that_does_not_count_has_no_gradient_whatever_is_in_it(interpreted):
    z, labels = logits(128), jnp.array([3, 120, 5, -100])
    gradient = jax.grad(lambda z: layers.softmax_cross_entropy(z, labels, reduction="sum", implementation="mosaic"))(z)
    np.testing.assert_array_equal(gradient[3], 0)
    assert jnp.isfinite(gradient).all()


def test_label_that_is_no_class_makes_its_row_nan(interpreted):
    gradient = jax.grad(lambda z: layers.softmax_cross_entropy(z, jnp.array([128, 1]), reduction="sum", implementation="mosaic"))(logits(128)[:2])
    assert jnp.isnan(gradient[0]).all() and jnp.isfinite(gradient[1]).all()


def test_second_derivatives_and_batches_are_those_of_xla(interpreted):
    z, labels = jax.random.normal(jax.random.key(1), (2, 3, 128)), jnp.array([1, 0, 127])

    def slope(z, implementation):
        return jax.grad(lambda z: layers.softmax_cross_entropy(z, labels, implementation=implementation))(z)

    for fn in (
        lambda name: jax.vmap(lambda z: slope(z, name))(z),
        lambda name: jax.grad(lambda z: jnp.square(slope(z, name)).sum())(z[0]),
    ):
        np.testing.assert_allclose(fn("mosaic"), fn("xla"), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "call, place, words",
    [
        (CALL, replace(H100, platform="cpu"), "it runs on NVIDIA GPUs, but this is compiled for cpu"),
        (CALL, replace(H100, architecture="8.0"), "it takes compute capability 9.0, but this is compiled for 8.0"),
        (replace(CALL, dtype="float64"), H100, "it takes bfloat16, float16 and float32, but this is float64"),
        (replace(CALL, mesh="automatic"), H100, "its arrays may lie on several devices: use shard_map"),
        (replace(CALL, varies=True), H100, "it does not say along which axes of a mesh its results vary: use shard_map(check_vma=False)"),
        (replace(CALL, logits=(8, 127)), H100, "it takes at least 128 classes, but these are 127"),
        (replace(CALL, logits=(0, 128)), H100, "a length is symbolic or 0"),
        (replace(CALL, logits=(2**16, 2**15)), H100, "it counts elements in 32 bits, but there are 65536 x 32768"),
        (replace(CALL, needs=("label smoothing", "accuracy")), H100, "it has no label smoothing, no accuracy"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_call_that_it_cannot_do_is_refused_with_the_reason(call, place, words):
    assert KERNELS["mosaic"].refuse(call, place) == words
    with pytest.raises(ValueError, match="implementation is 'mosaic', which cannot do this call"):
        decide(LAYER, call, KERNELS, place, "mosaic")


@pytest.mark.parametrize(
    "options, word",
    [
        ({"label_smoothing": 0.1}, "label smoothing"),
        ({"logit_soft_cap": 3.0}, "soft cap"),
        ({"return_accuracy": True}, "accuracy"),
        ({"return_entropy": True}, "entropy"),
    ],
    ids=str,
)
def test_option_that_the_kernel_does_not_have_is_named(options, word, interpreted):
    with pytest.raises(ValueError, match=f"softmax_cross_entropy: implementation is 'mosaic', .* it has no {word}"):
        layers.softmax_cross_entropy(logits(128), jnp.zeros(4, int), implementation="mosaic", **options)


def test_what_was_not_verified_is_left_to_xla():
    with layers.compiling_for("cuda", "9.0"):
        found = layers.implementations(LAYER, logits(2048, jnp.bfloat16), jnp.zeros(4, int))
    assert found.chosen == "xla"
    assert "not verified for bfloat16, plain, long rows, on cuda 9.0" in found.decisions[0].against["mosaic"]
