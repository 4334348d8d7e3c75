"""The kernel of the selective scan for Hopper, interpreted on the CPU: the values of XLA's, without races; and what it is not given."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers.kernels import mosaic
from layers.kernels.place import Place
from layers.kernels.selective_scan import KERNELS, ScanCall

H100 = Place("cuda", "9.0", "0.12")
CALL = ScanCall((2, 64, 256), "bfloat16", 16)


@pytest.fixture
def interpreted():
    """Kernels run here, and a data race is an error where JAX's interpreter finds it by itself (from 0.12 on)."""
    with mosaic.interpreting(detect_races=True):
        yield


def arguments(time, dtype=jnp.float32):
    """u, delta, A, with rates that forget at once, B, C, D, the bias and the first state."""
    shapes = (1, time, 128), (1, time, 128), (128, 4), (1, time, 4), (1, time, 4), (128,), (128,), (1, 128, 4)
    u, delta, a, *rest = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(jax.random.key(0), 8), shapes, strict=True))
    return u, delta, (-jnp.exp(a)).at[3].set(-jnp.inf), *rest


def relative_error(x, exact):
    x, exact = (np.asarray(v, np.float64) for v in (x, exact))
    return np.linalg.norm(x - exact) / np.linalg.norm(exact)


def value_and_gradients(args, implementation):
    def scan(u, delta, a, b, c, d, bias, state):
        options = {"delta_bias": bias, "delta_softplus": True, "initial_state": state, "return_last_state": True}
        return layers.selective_scan(u, delta, a, b, c, d, **options, implementation=implementation)

    out, pull = jax.vjp(scan, *args)
    return out, pull(jax.tree.map(jnp.cos, out))


@pytest.mark.parametrize("time, dtype, most", [(32, jnp.float32, 1e-5), (16, jnp.bfloat16, 0.02)], ids=["two chunks", "one of 16 bits"])
def test_values_and_gradients_are_those_of_xla(time, dtype, most, interpreted):
    args = arguments(time, dtype)
    for mine, theirs in zip(*(jax.tree.leaves(value_and_gradients(args, name)) for name in ("mosaic", "xla")), strict=True):
        assert mine.dtype == theirs.dtype and relative_error(mine, theirs) <= most


def test_second_derivatives_and_batches_are_those_of_xla(interpreted):
    u, delta, a, b, c, *_ = arguments(16)
    delta, a = jax.nn.softplus(delta), jnp.maximum(a, -3)

    def slope(u, implementation):
        return jax.grad(lambda u: jnp.sin(layers.selective_scan(u, delta, a, b, c, implementation=implementation)).sum())(u)

    for fn in (
        lambda name: jax.vmap(lambda u: slope(u, name))(jnp.stack([u, 2 * u])),
        lambda name: jax.grad(lambda u: jnp.square(slope(u, name)).sum())(u),
    ):
        np.testing.assert_allclose(fn("mosaic"), fn("xla"), rtol=1e-3, atol=1e-4 * float(abs(fn("xla")).max()))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"gate": True}, "it has no gate: multiply the output by silu(z)"),
        ({"segments": True}, "it has no packed sequences"),
        ({"states": 32}, "it takes 4, 8, 16 states, but these are 32"),
        ({"u": (2, 64, 200)}, "it takes multiples of 128 features, but these are 200"),
        ({"u": (2, 63, 256)}, "it takes multiples of 16 steps, but these are 63"),
        ({"u": (2, 0, 256)}, "a length is symbolic or 0"),
        ({"u": (2**10, 2**13, 256)}, "it counts elements in 32 bits, but there are 1024 x 8192 x 256"),
        ({"dtype": "float64"}, "it takes bfloat16, float16 and float32, but this is float64"),
        ({"mesh": "explicit"}, "its arrays may lie on several devices: use shard_map"),
    ],
    ids=str,
)
def test_call_that_it_cannot_do_is_refused_with_the_reason(change, words):
    assert KERNELS["mosaic"].refuse(replace(CALL, **change), H100) == words


def test_gate_and_packed_sequences_are_named(interpreted):
    u, delta, a, b, c, *_ = arguments(16)
    with pytest.raises(ValueError, match=r"selective_scan: implementation is 'mosaic', .* it has no gate"):
        layers.selective_scan(u, delta, a, b, c, z=u, implementation="mosaic")
    with pytest.raises(ValueError, match="it has no packed sequences"):
        layers.selective_scan(u, delta, a, b, c, segment_ids=jnp.zeros((1, 16), int), implementation="mosaic")


def test_what_was_not_verified_is_left_to_xla():
    u, delta, a, b, c, *_ = arguments(16)
    with layers.compiling_for("cuda", "9.0"):
        found = layers.implementations("selective_scan", u, delta, a, b, c)
    assert found.chosen == "xla" and "not verified for float32, 4 states, short, on cuda 9.0" in found.decisions[0].against["mosaic"]
