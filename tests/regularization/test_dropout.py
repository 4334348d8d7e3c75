"""Masks, their statistics, gradients, memory, options and edge cases of dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import layers
from layers.core.hashing import hash_bits
from tests.support import assert_trees_close, draw_normal, jit_value_and_grad, saved_bytes, temp_bytes

N = 1 << 18
SIGMAS = 4.5


def words(seed):
    return jax.random.key_data(jax.random.key(seed))


def bits(generator, seed, shape=(N,)):
    if generator == "hash":
        return np.asarray(hash_bits(words(seed), shape))
    return np.asarray(jax.random.bits(jax.random.key(seed), shape))


def signs(x, bit):
    return 2.0 * ((x >> bit) & 1) - 1


def correlation(a, b):
    """In standard deviations of that of independent signs."""
    return abs((a * b).mean()) * np.sqrt(a.size)


# Statistics of the generator: each is passed by JAX's own


GENERATORS = pytest.mark.parametrize("generator", ["hash", "threefry"])
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])


@SEEDS
@GENERATORS
def test_every_bit_is_one_half_of_the_time(generator, seed):
    x = bits(generator, seed)
    assert max(correlation(signs(x, b), np.ones(N)) for b in range(32)) < SIGMAS


@pytest.mark.parametrize("width", [8, 16])
@SEEDS
@GENERATORS
def test_patterns_of_bytes_are_uniform(generator, seed, width):
    """Chi-square over the patterns at every byte of the words."""
    x = bits(generator, seed)
    for shift in range(0, 33 - width, 8):
        counts = np.bincount((x >> shift) & (2**width - 1), minlength=2**width)
        expected = N / 2**width
        chi = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi - (2**width - 1)) < SIGMAS * np.sqrt(2 * 2**width)


@GENERATORS
def test_neighbours_in_every_direction_are_independent(generator):
    """Lags of one axis, of powers of two and of others, of the top bits, which decide a mask."""
    x = bits(generator, 3)
    for bit in (31, 30, 24, 0):
        s = signs(x, bit)
        assert max(correlation(s[:-lag], s[lag:]) for lag in (1, 2, 3, 7, 64, 255, 256, 257, 1024, 65536)) < SIGMAS


@GENERATORS
def test_successive_pairs_are_uniform(generator):
    x = bits(generator, 4) >> 26
    counts = np.bincount(x[:-1].astype(int) * 64 + x[1:], minlength=4096)
    expected = (N - 1) / 4096
    assert abs(((counts - expected) ** 2 / expected).sum() - 4095) < SIGMAS * np.sqrt(2 * 4095)


@GENERATORS
def test_masks_of_different_keys_are_independent(generator):
    """Consecutive seeds, single flipped bits and keys that are split from one another, at every bit and at lags."""
    x = bits(generator, 0)
    for other in (1, 2, 3, 256, 2**16, 2**31 - 1):
        y = bits(generator, other)
        assert max(correlation(signs(x, b), signs(y, b)) for b in (31, 30, 16, 0)) < SIGMAS
        assert max(correlation(signs(x, 31)[:-lag], signs(y, 31)[lag:]) for lag in (1, 2, 1024)) < SIGMAS


def test_every_word_of_the_key_acts():
    keys = [jnp.array(w, jnp.uint32) for w in ((0, 0), (1, 0), (0, 1), (1, 1), (0x80000000, 0), (0, 0x80000000))]
    drawn = [np.asarray(hash_bits(k, (N,))) for k in keys]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert correlation(signs(a, 31), signs(b, 31)) < SIGMAS


def test_a_flipped_bit_of_the_key_flips_half_of_the_bits():
    x = hash_bits(jnp.array([5, 9], jnp.uint32), (4096,))
    for word in range(2):
        for bit in range(0, 32, 3):
            other = hash_bits(jnp.array([5, 9], jnp.uint32).at[word].set([5, 9][word] ^ (1 << bit)), (4096,))
            changed = np.unpackbits(np.asarray(x ^ other).view(np.uint8)).mean()
            assert abs(changed - 0.5) < SIGMAS * 0.5 / np.sqrt(4096 * 32)


def test_rows_and_columns_of_a_mask_have_the_expected_spread():
    """The means along each axis vary as those of independent draws."""
    keep = 0.9
    mask = np.asarray(layers.dropout(jnp.ones((512, 384)), 11, rate=1 - keep)) != 0
    for axis in (0, 1):
        means = mask.mean(axis)
        ratio = means.var() / (keep * (1 - keep) / mask.shape[axis])
        assert abs(ratio - 1) < SIGMAS * np.sqrt(2 / means.size)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
@GENERATORS
def test_share_of_zeros_is_the_rate_and_the_mean_stays(generator, rate):
    y = np.asarray(layers.dropout(jnp.ones(N), 5, rate=rate, generator=generator))
    assert abs((y == 0).mean() - rate) < SIGMAS * np.sqrt(rate * (1 - rate) / N)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 2**16, 2**16), (1, 2**17, 2**16)])
def test_words_do_not_repeat_after_2_to_the_32_indices(shape):
    """Slices one period apart; the whole array is never made."""
    rows = jax.jit(lambda w: hash_bits(w, shape).reshape(-1, 2**16)[:: 2**16, :64])
    compiled = rows.lower(words(0)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
    first, second, *_ = compiled(words(0))
    assert (first != second).all()


# Gradients


@pytest.mark.parametrize("broadcast_dims", [(), (1,), (0, -1)])
@GENERATORS
def test_gradient_has_the_mask_of_the_output(generator, broadcast_dims):
    with jax.enable_x64(True):
        x, dy = (draw_normal(i, (4, 5, 6), jnp.float64) for i in range(2))
        y, pull = jax.vjp(lambda x: layers.dropout(x, 7, rate=0.3, broadcast_dims=broadcast_dims, generator=generator), x)
        expected = np.where(np.asarray(y) != 0, np.asarray(dy) / 0.7, 0)
        np.testing.assert_allclose(pull(dy)[0], expected, rtol=1e-10)


def test_forward_mode_and_second_derivatives_pass_through():
    x, v = jnp.arange(1.0, 13.0).reshape(3, 4), jnp.ones((3, 4))
    f = lambda x: layers.dropout(x, 7, rate=0.5)
    factor = f(x) / x
    np.testing.assert_allclose(jax.jvp(f, (x,), (v,))[1], factor, rtol=1e-6)
    hessian_vector = jax.jvp(jax.grad(lambda x: (f(x) ** 3).sum()), (x,), (v,))[1]
    np.testing.assert_allclose(hessian_vector, 6 * x * factor**3, rtol=1e-5)


def test_mask_is_the_same_in_jit_and_under_a_batch_of_keys():
    x, keys = jnp.ones((3, 8)), jax.random.split(jax.random.key(0), 3)
    one_by_one = jnp.stack([layers.dropout(a, k, rate=0.5) for a, k in zip(x, keys, strict=True)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda a, k: layers.dropout(a, k, rate=0.5)))(x, keys), one_by_one)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_threefry_is_the_mask_of_jax_random(impl):
    key, x = jax.random.key(3, impl=impl), jnp.ones((5, 6))
    mask = jax.random.bernoulli(key, 0.7, (5, 1))
    y = layers.dropout(x, key, rate=0.3, broadcast_dims=(1,), generator="threefry")
    np.testing.assert_array_equal(y != 0, jnp.broadcast_to(mask, x.shape))


@GENERATORS
def test_keys_old_and_new_and_seeds_are_one(generator):
    draw = lambda key: layers.dropout(jnp.ones(99), key, rate=0.5, generator=generator)
    np.testing.assert_array_equal(draw(5), draw(jax.random.key(5)))
    np.testing.assert_array_equal(draw(jax.random.PRNGKey(5)), draw(jax.random.key(5)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_stays(dtype):
    y, pull = jax.vjp(lambda x: layers.dropout(x, 0, rate=0.1), jnp.ones(9, dtype))
    assert y.dtype == pull(y)[0].dtype == dtype


# Edge cases and errors


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_what_is_dropped_is_zero_whatever_it_was(bad):
    mask = layers.dropout(jnp.ones(64), 0, rate=0.5) != 0
    y = layers.dropout(jnp.full(64, bad), 0, rate=0.5)
    np.testing.assert_array_equal(y[~mask], jnp.zeros_like(y[~mask]))


@pytest.mark.parametrize(("rate", "factor"), [(0, 1.0), (1, 0.0)])
def test_rates_zero_and_one_have_finite_gradients(rate, factor):
    y, dy = jit_value_and_grad(lambda x: layers.dropout(x, 0, rate=rate).sum())(jnp.ones(4))
    assert y == 4 * factor
    np.testing.assert_array_equal(dy, jnp.full(4, factor))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_empty_and_scalar_inputs_keep_their_shape(shape):
    assert layers.dropout(jnp.ones(shape), 0, rate=0.5).shape == shape


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layers.dropout(jnp.ones(3), 0, rate=1.5), ValueError, "dropout: rate is 1.5"),
        (lambda: layers.dropout(jnp.ones(3), 0, rate=0.5, generator="md5"), ValueError, "dropout: generator is 'md5'"),
        (lambda: layers.dropout(jnp.ones(3), 0, rate=0.5, broadcast_dims=(1,)), ValueError, "dropout: broadcast_dims is 1"),
        (lambda: layers.dropout(jnp.ones(3, int), 0, rate=0.5), TypeError, "x is of dtype int"),
        (lambda: layers.dropout(jnp.ones(3), jax.random.split(jax.random.key(0)), rate=0.5), ValueError, "key has shape"),
        (lambda: layers.dropout(jnp.ones(3), 0, rate=float("nan")), ValueError, "dropout: rate is nan"),
        (lambda: layers.Dropout(1.5), ValueError, "Dropout: rate is 1.5"),
        (lambda: layers.Dropout(0.5, rngs=3), TypeError, "Dropout: rngs is 3"),
        (lambda: layers.Dropout(0.5, rngs=nnx.Rngs(0))(jnp.ones(3, int)), TypeError, "Dropout: inputs is of dtype int"),
        (lambda: layers.Dropout(0.5)(jnp.ones(3), rngs="dropout"), TypeError, "Dropout: rngs is 'dropout'"),
        (lambda: layers.Dropout(0.5, deterministic=None)(jnp.ones(3)), ValueError, "give `deterministic`"),
        (lambda: layers.Dropout(0.5)(jnp.ones(3)), ValueError, "give `rngs`"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The module


@pytest.mark.parametrize("options", [{}, {"broadcast_dims": (1,)}, {"deterministic": True}, {"rng_collection": "noise"}], ids=str)
def test_module_with_threefry_is_that_of_flax(options):
    x = draw_normal(0, (4, 5))
    ours = layers.Dropout(0.4, rngs=nnx.Rngs(3, noise=4), generator="threefry", **options)
    theirs = nnx.Dropout(0.4, rngs=nnx.Rngs(3, noise=4), **options)
    for _ in range(2):
        run = lambda m: jit_value_and_grad(lambda x: m(x).sum())(x) if m.deterministic else (m(x),)
        assert_trees_close(run(ours), run(theirs), rtol=1e-6)


def test_module_draws_a_new_mask_each_call_and_none_in_eval():
    module, x = layers.Dropout(0.5, rngs=nnx.Rngs(0)), jnp.ones(256)
    assert (module(x) != module(x)).any()
    module.eval()
    np.testing.assert_array_equal(module(x), x)


# Memory


def test_only_the_key_is_saved():
    x, key = jnp.ones((64, 32), jnp.bfloat16), jnp.zeros(2, jnp.uint32)
    assert saved_bytes(lambda x: layers.dropout(x, key, rate=0.1), x) + x.nbytes <= key.nbytes


@pytest.mark.parametrize("ratio", [0.35])
def test_stack_of_dropouts_and_nonlinearities_takes_less_memory(ratio):
    def gradient(drop):
        def run(x):
            for i in range(8):
                x = drop(jnp.sin(x), i)
            return x.sum()

        return jax.grad(run)

    def flax(x, i):
        return nnx.Dropout(0.1)(x, rngs=jax.random.key(i))

    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    ours = temp_bytes(gradient(lambda x, i: layers.dropout(x, i, rate=0.1)), x)
    assert ours <= ratio * temp_bytes(gradient(flax), x)


@pytest.mark.parametrize("generator", ["hash", "threefry"])
def test_traced_rate_gives_what_a_known_one_does(generator):
    x = jax.random.normal(jax.random.key(0), (4, 5))
    run = lambda rate: jax.value_and_grad(lambda x: jnp.sin(layers.dropout(x, jax.random.key(1), rate=rate, generator=generator)).sum())(x)
    for rate in (0.0, 0.25, 0.9, 1.0):
        assert_trees_close(jax.jit(run)(rate), run(rate), rtol=1e-5, atol=1e-5)
        assert_trees_close(jax.jit(run)(jnp.float16(rate)), run(float(jnp.float16(rate))), rtol=1e-5, atol=1e-5)


def test_rate_has_no_gradient():
    with pytest.raises(TypeError, match="dropout: rate has no gradient"):
        jax.grad(lambda rate: layers.dropout(jnp.ones(3), jax.random.key(1), rate=rate).sum())(0.5)
