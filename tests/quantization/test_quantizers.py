"""Values of each quantiser against its definition, gradients against the slope that its paper gives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers.core.bits import pack_bits, unpack_bits
from tests.support import saved_bytes

X = jnp.array([[-2.0, -1.0, -0.4], [0.0, 0.3, 1.5]])
DY = jnp.array([[1.0, -2.0, 0.5], [3.0, 4.0, -0.25]])


def gradient(fn, x, dy=DY):
    return jax.vjp(fn, x)[1](dy)[0]


@pytest.mark.parametrize("shape", [(), (1,), (8,), (3, 5), (2, 3, 4), (0, 3)])
def test_packed_bits_come_back(shape):
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, shape)
    packed = pack_bits(mask)
    assert packed.nbytes == -(-mask.size // 8)
    np.testing.assert_array_equal(unpack_bits(packed, shape), mask)


def test_round_ste_rounds_half_to_even_and_passes_the_gradient():
    x = jnp.array([0.5, 1.5, -0.5, 2.4])
    np.testing.assert_array_equal(layers.round_ste(x), np.round(x))
    np.testing.assert_array_equal(gradient(layers.round_ste, X), DY)


def test_binarize_is_the_sign_with_the_slope_of_hardtanh():
    np.testing.assert_array_equal(layers.binarize(X), np.where(X >= 0, 1, -1))
    np.testing.assert_array_equal(gradient(layers.binarize, X), np.where(np.abs(X) <= 1, DY, 0))


def test_binarize_saves_one_bit_an_element():
    x = jnp.ones((16, 64))
    assert saved_bytes(layers.binarize, x) + x.nbytes == x.size // 8


def ternary_by_hand(x, threshold):
    size = np.abs(x)
    kept = size > threshold * size.mean()
    return np.sign(x) * kept * (size[kept].mean() if kept.any() else 0)


def test_ternarize_follows_the_paper():
    np.testing.assert_allclose(layers.ternarize(X), ternary_by_hand(np.asarray(X), 0.7), rtol=1e-6)
    rows = np.stack([ternary_by_hand(row, 0.7) for row in np.asarray(X)])
    np.testing.assert_allclose(layers.ternarize(X, axis=0), rows, rtol=1e-6)
    np.testing.assert_array_equal(gradient(layers.ternarize, X), DY)


def test_ternarize_of_zeros_is_zero_and_finite():
    np.testing.assert_array_equal(layers.ternarize(jnp.zeros((2, 3))), np.zeros((2, 3)))


def lsq_by_hand(x, dy, step, low, high):
    """Equations 3 and 5 of the paper, in float64, entry by entry."""
    dx, ds = np.zeros_like(x), 0.0
    for i in np.ndindex(x.shape):
        u = x[i] / step
        if u <= low or u >= high:
            ds += dy[i] * (low if u <= low else high)
        else:
            dx[i] = dy[i]
            ds += dy[i] * (np.round(u) - u)
    return dx, ds / np.sqrt(x.size * high)


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (4, True), (8, True), (1, False), (4, False)])
def test_learned_step_has_the_gradient_of_the_paper(bits, signed):
    with jax.enable_x64(True):
        x, dy = np.asarray(X, np.float64), np.asarray(DY, np.float64)
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        step = 0.37
        y, pull = jax.vjp(lambda x, s: layers.fake_quantize(x, s, bits=bits, signed=signed), jnp.asarray(x), jnp.asarray(step))
        np.testing.assert_allclose(y, step * np.round(np.clip(x / step, low, high)), rtol=1e-12)
        dx, ds = pull(jnp.asarray(dy))
        expected = lsq_by_hand(x, dy, step, low, high)
        np.testing.assert_allclose(dx, expected[0], rtol=1e-12)
        np.testing.assert_allclose(ds, expected[1], rtol=1e-12)


def test_steps_for_channels_are_those_of_each_channel():
    steps = jnp.array([0.2, 0.5, 0.1])
    whole = jax.vjp(lambda x, s: layers.fake_quantize(x, s, bits=3, axis=1), X, steps)
    parts = [jax.vjp(lambda x, s: layers.fake_quantize(x, s, bits=3), X[:, i], steps[i]) for i in range(3)]
    np.testing.assert_allclose(whole[0], np.stack([p[0] for p in parts], 1), rtol=1e-6)
    grads = [p[1](DY[:, i]) for i, p in enumerate(parts)]
    np.testing.assert_allclose(whole[1](DY)[0], np.stack([g[0] for g in grads], 1), rtol=1e-6)
    np.testing.assert_allclose(whole[1](DY)[1], np.stack([g[1] for g in grads]), rtol=1e-5)


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_absmax_step_clips_nothing_but_the_lowest(axis):
    y = layers.fake_quantize(X, bits=8, axis=axis)
    np.testing.assert_allclose(y, X, atol=2.0 / 127 / 2 + 1e-6)
    np.testing.assert_array_equal(gradient(lambda x: layers.fake_quantize(x, bits=8, axis=axis), X), DY)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_largest_entry_of_each_channel_keeps_its_gradient(dtype):
    x = jax.random.normal(jax.random.key(0), (1000, 8), dtype)
    np.testing.assert_array_equal(jax.grad(lambda x: layers.fake_quantize(x, bits=4, axis=0).sum())(x), jnp.ones_like(x))


def test_zero_step_and_zero_input_are_finite():
    zero = jnp.zeros((2, 3))
    for x, step in ((zero, None), (X, jnp.float32(0.0))):
        y, pull = jax.vjp(lambda x, s=step: layers.fake_quantize(x, s), x)
        np.testing.assert_array_equal(y, zero)
        assert np.isfinite(pull(DY)[0]).all()


def test_quantised_bfloat16_keeps_its_dtype():
    x = X.astype(jnp.bfloat16)
    assert layers.fake_quantize(x, bits=4).dtype == jnp.bfloat16
    assert gradient(lambda x: layers.fake_quantize(x, bits=4), x, DY.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_fsq_reaches_every_code_once_and_no_other():
    levels = (4, 3, 2)
    grid = jnp.array(list(itertools.product(np.linspace(-4, 4, 41), repeat=3)))
    y, index = layers.finite_scalar_quantize(grid, levels)
    assert set(np.unique(index)) == set(range(24))
    codes = {tuple(np.round(v, 5)) for v in np.asarray(y)}
    assert len(codes) == 24
    assert np.abs(y).max() <= 1


def test_fsq_gradient_is_that_of_the_bound():
    levels = (8, 5, 3)
    half = (np.asarray(levels) - 1) * 1.001 / 2
    offset = np.where(np.asarray(levels) % 2 == 0, 0.5, 0.0)
    bound = lambda x: (half * jnp.tanh(x + np.arctanh(offset / half)) - offset) / (np.asarray(levels) // 2)
    with jax.enable_x64(True):
        x, dy = jnp.asarray(X, jnp.float64), jnp.asarray(DY, jnp.float64)
        np.testing.assert_allclose(gradient(lambda x: layers.finite_scalar_quantize(x, levels)[0], x, dy), gradient(bound, x, dy), rtol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.fake_quantize(X, bits=1), "bits is 1"),
        (lambda: layers.fake_quantize(X, axis=2), "axis is 2"),
        (lambda: layers.fake_quantize(X, jnp.ones(2), axis=1), r"step has shape \(2,\), but must be .* = \(3,\)"),
        (lambda: layers.ternarize(X, threshold=-1), "threshold"),
        (lambda: layers.ternarize(X, axis=5), "axis is 5"),
        (lambda: layers.fake_quantize(X, bits=10**30), "bits is"),
        (lambda: layers.finite_scalar_quantize(X, (3, 3)), "2 entries"),
        (lambda: layers.finite_scalar_quantize(X, (3, 3, 1)), "at least 2"),
    ],
)
def test_bad_options_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_learned_step_is_pulled_by_entries_at_the_clipping_levels():
    """Equation 3 of the paper: what is not strictly inside has the slope of its level."""
    dx, ds = jax.grad(lambda x, s: jnp.sum(layers.fake_quantize(x, s, bits=4)), (0, 1))(jnp.array([7.0, 8.0]), jnp.float32(1.0))
    np.testing.assert_allclose(dx, [0, 0])
    np.testing.assert_allclose(ds, 14 / np.sqrt(14), rtol=1e-6)


def test_what_a_dtype_cannot_tell_apart_is_an_error():
    with pytest.raises(ValueError, match="cannot tell 1000 levels apart"):
        layers.finite_scalar_quantize(jnp.ones((2, 1), jnp.bfloat16), (1000,))


@pytest.mark.parametrize("name", ["round_ste", "binarize", "ternarize", "fake_quantize", "finite_scalar_quantize"])
def test_integers_are_an_error(name):
    options = ((3, 3, 3),) if name == "finite_scalar_quantize" else ()
    with pytest.raises(TypeError, match=f"{name}: x is of dtype int32, but must be of a real floating-point dtype"):
        getattr(layers, name)(jnp.arange(3), *options)


@pytest.mark.parametrize("levels", [2, 7, 1001, 1002, 65536, 1 << 20])
def test_finite_scalar_quantiser_stays_within_its_levels(levels):
    y, index = layers.finite_scalar_quantize(jnp.array([[-50.0], [50.0]], jnp.float32), (levels,))
    np.testing.assert_array_equal(index, [0, levels - 1])
    assert jnp.abs(y).max() <= 1


def test_two_levels_are_taken_by_half_of_normal_inputs_each():
    x = jax.random.normal(jax.random.key(0), (10000, 3))
    y, index = layers.finite_scalar_quantize(x, (2, 2, 2))
    np.testing.assert_array_equal(y, np.where(x > 0, 0, -1))
    np.testing.assert_allclose(np.bincount(np.asarray(index), minlength=8), 1250, atol=200)


def test_two_levels_have_the_slope_of_tanh_about_zero():
    x, dy = jnp.array([[-1.0], [0.0], [2.0]]), jnp.array([[1.0], [2.0], [3.0]])
    np.testing.assert_allclose(gradient(lambda x: layers.finite_scalar_quantize(x, (2,))[0], x, dy), dy * 0.5005 * (1 - jnp.tanh(x) ** 2), rtol=1e-5)


@pytest.mark.parametrize("levels", [(2,), (3, 2), (8, 5, 3), (4, 7, 2, 5)])
def test_indices_and_codes_of_the_grid_go_there_and_back(levels):
    indices = jnp.arange(np.prod(levels))
    codes = layers.finite_scalar_codes(indices, levels)
    grid = itertools.product(*[(np.arange(n) - n // 2) / (n // 2) for n in reversed(levels)])
    np.testing.assert_allclose(codes, np.array(list(grid))[:, ::-1], rtol=1e-6)
    np.testing.assert_array_equal(layers.finite_scalar_indices(codes, levels), indices)


def test_quantised_features_are_the_codes_of_their_indices():
    x = 2 * jax.random.normal(jax.random.key(0), (4, 7, 3))
    y, index = layers.finite_scalar_quantize(x, (8, 5, 2))
    np.testing.assert_array_equal(y, layers.finite_scalar_codes(index, (8, 5, 2)))
    np.testing.assert_array_equal(index, layers.finite_scalar_indices(y, (8, 5, 2)))


SIZES = [3e38, 1e20, 1.0, 1e-20, 2e-36]


@pytest.mark.parametrize("size", SIZES)
def test_quantisers_of_any_size_are_those_of_size_one(size):
    x = jnp.array([[1.0, -0.7, 0.3, 0.1], [-0.5, 0.9, -0.2, 0.0]])
    for fn, atol in ((layers.fake_quantize, 0.004), (layers.ternarize, 1e-6)):
        np.testing.assert_allclose(np.asarray(fn(jnp.float32(size) * x), np.float64) / size, fn(x), atol=atol)
        np.testing.assert_array_equal(gradient(fn, jnp.float32(size) * x, jnp.ones_like(x)), jnp.ones_like(x))


@pytest.mark.parametrize("bits", [2, 6, 8, 12])
def test_largest_number_there_is_stays_finite(bits):
    largest = float(jnp.finfo(jnp.float32).max)
    np.testing.assert_allclose(layers.fake_quantize(jnp.array([largest, -largest, 0.0]), bits=bits), [largest, -largest, 0], rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("name", ["ternarize", "fake_quantize"])
def test_what_is_not_finite_shows_in_all_that_share_its_scale(name, bad):
    y = getattr(layers, name)(jnp.array([[1.0, bad], [2.0, 3.0]]), axis=0)
    assert not np.isfinite(y[0]).any() and np.isfinite(y[1]).all()


def test_what_is_not_a_number_has_no_sign():
    np.testing.assert_array_equal(layers.binarize(jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0])), [jnp.nan, 1, -1, 1])


@pytest.mark.parametrize(
    "call",
    [
        lambda: layers.fake_quantize(X, bits=4.5),
        lambda: layers.fake_quantize(X, signed="no"),
        lambda: layers.fake_quantize(X, jnp.array(1j)),
        lambda: layers.ternarize(X, axis=1.5),
        lambda: layers.finite_scalar_quantize(X, "543"),
        lambda: layers.finite_scalar_quantize(X, (5, 4.5, 3)),
    ],
)
def test_options_of_another_type_are_errors(call):
    with pytest.raises(TypeError, match=r"^(fake_quantize|ternarize|finite_scalar_quantize): \w+.* is .*, but must be"):
        call()
