"""Vector quantisers against brute force, their papers' formulas and autodiff; memory, edge cases, the module."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from layers.quantization import codebook as shared
from layers.quantization.residual_vector_quantize import ResidualVectorQuantizeFunction, residual_vector_quantize
from layers.quantization.vector_quantize import VectorQuantizeFunction, VectorQuantizer, vector_quantize
from tests.support import assert_trees_close, draw_normal, jit_grad, jit_value_and_grad, saved_bytes, temp_bytes


def draw(seed, *shape, dtype=jnp.float32):
    return draw_normal(seed, shape, dtype)


def brute_force(x, codebook):
    """The first nearest code of each row, in float64."""
    x, codebook = np.asarray(x, np.float64), np.asarray(codebook, np.float64)
    return np.argmin(np.square(x[:, None] - codebook).sum(-1), -1)


def plain(x, codebook):
    """What people write: one matrix of distances, and stop_gradient."""
    hold = jax.lax.stop_gradient
    distances = jnp.square(x).sum(-1, keepdims=True) - 2 * x @ codebook.T + jnp.square(codebook).sum(-1)
    indices = jnp.argmin(distances, -1)
    q = codebook[indices]
    return x + hold(q - x), indices, (jnp.mean((hold(x) - q) ** 2), jnp.mean((x - hold(q)) ** 2))


def total(fn):
    def loss(*args):
        y, _, (a, b) = fn(*args)
        return (jnp.sin(jnp.arange(y.size)).reshape(y.shape) * y).sum() + jnp.sum(a) + 0.25 * jnp.sum(b)

    return loss


# The nearest code


@pytest.mark.parametrize("rows", [1, 64, 150], ids=["one row", "one block", "a ragged last block"])
def test_indices_are_those_of_brute_force(rows, monkeypatch):
    monkeypatch.setattr(shared, "BLOCK_BYTES", 1)
    x, codebook = draw(0, rows, 13), draw(1, 37, 13)
    y, indices, _ = vector_quantize(x, codebook)
    np.testing.assert_array_equal(indices, brute_force(x, codebook))
    np.testing.assert_array_equal(y, codebook[indices])
    assert indices.dtype == jnp.int32


def test_equal_codes_give_the_first():
    codebook = draw(0, 37, 13)
    codebook = codebook.at[jnp.array([36, 21, 35])].set(codebook[jnp.array([3, 5, 5])])
    _, indices, _ = vector_quantize(codebook, codebook)
    np.testing.assert_array_equal(indices[jnp.array([3, 36, 5, 21, 35])], [3, 3, 5, 5, 5])


def test_a_vector_halfway_between_codes_goes_to_the_first():
    codebook = jnp.array([[5.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    _, indices, _ = vector_quantize(jnp.array([[0.5, 0.0], [0.0, 0.5], [0.5, 0.5], [3.0, 0.0]]), codebook)
    np.testing.assert_array_equal(indices, [1, 1, 1, 0])


def test_codes_far_from_the_origin_lose_no_digits():
    x, codebook = 1000 + draw(0, 100, 8), 1000 + draw(1, 32, 8)
    np.testing.assert_array_equal(vector_quantize(x, codebook)[1], brute_force(x, codebook))
    assert (jnp.argmin(jnp.square(codebook).sum(-1) - 2 * x @ codebook.T, -1) != brute_force(x, codebook)).any()


def test_distances_of_bfloat16_are_those_of_float32():
    x, codebook = draw(0, 200, 16, dtype=jnp.bfloat16), draw(1, 64, 16, dtype=jnp.bfloat16)
    y, indices, losses = vector_quantize(x, codebook)
    np.testing.assert_array_equal(indices, brute_force(x, codebook))
    assert y.dtype == jnp.bfloat16
    assert losses.codebook.dtype == jnp.float32


# Gradients


def test_gradients_are_those_of_the_idiomatic_form_in_float64():
    with jax.enable_x64(True):
        x, codebook = draw(0, 30, 5, dtype=jnp.float64), draw(1, 11, 5, dtype=jnp.float64)
        assert_trees_close(
            jax.jit(jax.value_and_grad(total(vector_quantize), (0, 1)))(x, codebook),
            jax.jit(jax.value_and_grad(total(plain), (0, 1)))(x, codebook),
            rtol=1e-10,
            atol=1e-12,
        )


def test_rotation_is_the_formula_of_the_paper():
    with jax.enable_x64(True):
        x, codebook, dy = (np.asarray(draw(i, n, 5, dtype=jnp.float64)) for i, n in enumerate((6, 4, 6)))
        y, pull = jax.vjp(lambda x: vector_quantize(x, jnp.asarray(codebook), gradient="rotation")[0], jnp.asarray(x))
        for row, q, g, given in zip(x, np.asarray(y), dy, np.asarray(pull(jnp.asarray(dy))[0]), strict=True):
            u, v = row / np.linalg.norm(row), q / np.linalg.norm(q)
            r = (u + v) / np.linalg.norm(u + v)
            turn = np.eye(5) - 2 * np.outer(r, r) + 2 * np.outer(v, u)
            stretch = np.linalg.norm(q) / np.linalg.norm(row)
            np.testing.assert_allclose(stretch * turn @ row, q, rtol=1e-10)
            np.testing.assert_allclose(given, stretch * turn.T @ g, rtol=1e-10)


def test_rotation_keeps_the_angle_between_gradient_and_vector():
    x, codebook, dy = draw(0, 20, 5), draw(1, 4, 5), draw(2, 20, 5)
    y, pull = jax.vjp(lambda x: vector_quantize(x, codebook, gradient="rotation")[0], x)
    dx = pull(dy)[0]
    cosine = lambda a, b: (a * b).sum(-1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(cosine(dx, x), cosine(dy, y), atol=1e-5)


def test_rotation_of_an_opposite_code_is_a_reflection():
    x, dy = jnp.array([[2.0, 0.0]]), jnp.array([[3.0, 5.0]])
    dx = jax.vjp(lambda x: vector_quantize(x, jnp.array([[-1.0, 0.0]]), gradient="rotation")[0], x)[1](dy)[0]
    np.testing.assert_allclose(dx, [[-1.5, 2.5]])


def test_straight_through_passes_the_gradient_and_the_codebook_gets_none_of_it():
    x, codebook, dy = draw(0, 6, 3), draw(1, 4, 3), draw(2, 6, 3)
    dx, dcodebook = jax.vjp(lambda x, c: vector_quantize(x, c)[0], x, codebook)[1](dy)
    np.testing.assert_array_equal(dx, dy)
    np.testing.assert_array_equal(dcodebook, jnp.zeros_like(codebook))


def test_second_derivatives_are_those_of_the_idiomatic_form():
    with jax.enable_x64(True):
        x, codebook = draw(0, 4, 2, dtype=jnp.float64), draw(1, 3, 2, dtype=jnp.float64)
        ours, theirs = (jax.jit(jax.jacrev(jax.grad(total(f), (0, 1)), (0, 1)))(x, codebook) for f in (vector_quantize, plain))
        assert_trees_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_error_against_float64_is_not_above_that_of_autodiff(dtype):
    x, codebook = draw(0, 3000, 8, dtype=dtype), draw(1, 4, 8, dtype=dtype)
    with jax.enable_x64(True):
        exact = jax.jit(jax.grad(total(plain), (0, 1)))(x.astype(jnp.float64), codebook.astype(jnp.float64))
    for ours, theirs, e in zip(*(jax.jit(jax.grad(total(f), (0, 1)))(x, codebook) for f in (vector_quantize, plain)), exact, strict=True):
        error = lambda g, e=e: np.linalg.norm(np.asarray(g, np.float64) - np.asarray(e))
        assert error(ours) <= 1.05 * error(theirs) + 1e-9


# Memory


def test_backward_keeps_the_indices_only_beyond_the_arguments():
    x, codebook = draw(0, 100, 16), draw(1, 8, 16)
    assert saved_bytes(lambda *a: vector_quantize(*a)[0::2], x, codebook) <= 4 * 100
    assert saved_bytes(lambda x, *c: residual_vector_quantize(x, c)[0::2], x, codebook, 2 * codebook) <= 2 * 4 * 100


def test_the_matrix_of_distances_is_never_whole():
    x, codebook = jnp.zeros((16384, 32)), jnp.zeros((1024, 32))
    ours, theirs = (temp_bytes(jax.grad(total(f), (0, 1)), x, codebook) for f in (vector_quantize, plain))
    assert theirs > 16384 * 1024 * 4
    assert ours < 0.2 * theirs


# Residual quantisation


def residual_plain(x, *codebooks):
    hold, rest, indices, losses, y = jax.lax.stop_gradient, x, [], [], 0
    for c in codebooks:
        _, i, both = plain(rest, c)
        indices.append(i)
        losses.append(jnp.stack(both))
        y, rest = y + c[i], rest - hold(c[i])
    return x + hold(y - x), jnp.stack(indices, -1), jnp.stack(losses).T


def test_residual_quantisation_is_one_codebook_after_the_other_in_float64():
    with jax.enable_x64(True):
        x, codebooks = draw(0, 2, 15, 3, dtype=jnp.float64), [draw(i, n, 3, dtype=jnp.float64) / i for i, n in ((1, 7), (2, 5), (3, 4))]
        ours = lambda x, *c: residual_vector_quantize(x, c)
        theirs = lambda x, *c: residual_plain(x.reshape(-1, 3), *c)
        places = (0, 1, 2, 3)
        np.testing.assert_array_equal(jax.jit(ours)(x, *codebooks)[1].reshape(-1, 3), jax.jit(theirs)(x, *codebooks)[1])
        given, expected = (jax.jit(jax.value_and_grad(total(f), places))(x, *codebooks) for f in (ours, theirs))
        assert_trees_close(given, expected, rtol=1e-10, atol=1e-12)


def test_more_codebooks_leave_less():
    x, codebooks = draw(0, 500, 4), draw(1, 6, 32, 4) / 2.0 ** jnp.arange(6)[:, None, None]
    _, _, losses = jax.jit(residual_vector_quantize)(x, codebooks)
    assert (jnp.diff(losses.commitment) < 0).all()


def test_one_codebook_is_vector_quantisation():
    x, codebook = draw(0, 9, 4), draw(1, 5, 4)
    for gradient in ("straight_through", "rotation"):
        one = jax.jit(jax.grad(total(lambda x, c, g=gradient: vector_quantize(x, c, gradient=g)), (0, 1)))(x, codebook)
        same = jax.jit(jax.grad(total(lambda x, c, g=gradient: residual_vector_quantize(x, c[None], gradient=g)), (0, 1)))(x, codebook)
        assert_trees_close(same, one, rtol=1e-6, atol=1e-7)


# Edge cases


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("fn", [vector_quantize, lambda x, c, **o: residual_vector_quantize(x, (c, c), **o)], ids=["one", "residual"])
def test_zero_rows_zero_codes_and_no_rows_are_finite(fn, gradient):
    codebook = jnp.array([[0.0, 0.0], [1.0, -1.0], [1e20, 1e-30]])
    for x in (jnp.array([[0.0, 0.0], [1e-30, 0.0], [3.0, -3.0]]), jnp.zeros((0, 2)), jnp.zeros((2, 0, 2))):
        value, grads = jax.jit(jax.value_and_grad(total(lambda x, c: fn(x, c, gradient=gradient)), (0, 1)))(x, codebook)
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in grads)
        assert grads[0].shape == x.shape


def test_a_zero_vector_gets_the_gradient_as_it_is():
    dy = jnp.array([[2.0, 3.0]])
    pull = jax.vjp(lambda x: vector_quantize(x, jnp.ones((1, 2)), gradient="rotation")[0], jnp.zeros((1, 2)))[1]
    np.testing.assert_array_equal(pull(dy)[0], dy)


def test_a_vector_that_is_not_a_number_shows_in_the_losses():
    _, indices, losses = vector_quantize(jnp.array([[jnp.nan, 1.0], [jnp.inf, 0.0]]), jnp.ones((3, 2)))
    assert (indices >= 0).all() and (indices < 3).all()
    assert not np.isfinite(losses.commitment)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_code_that_is_not_finite_shows_in_the_losses(bad):
    assert not np.isfinite(vector_quantize(jnp.ones((3, 2)), jnp.ones((4, 2)).at[2, 1].set(bad))[2].codebook)


BAD = [
    ((jnp.ones((2, 3)), jnp.ones((4, 2))), {}, ValueError, r"codebook has shape \(4, 2\), but its last axis must be that of x"),
    ((jnp.ones((2, 3)), jnp.ones((0, 3))), {}, ValueError, "at least one code"),
    ((jnp.ones((2, 3)), jnp.ones(3)), {}, ValueError, r"must be \(codes, features\)"),
    ((jnp.ones((2, 3)), jnp.ones((4, 3))), {"gradient": "ste"}, ValueError, "gradient is 'ste'"),
    ((jnp.ones((2, 3), int), jnp.ones((4, 3))), {}, TypeError, "x is of dtype int32"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD)
def test_bad_input_is_an_error(args, options, error, message):
    with pytest.raises(error, match="^vector_quantize: .*" + message):
        vector_quantize(*args, **options)
    with pytest.raises(error, match="^residual_vector_quantize: .*" + message):
        residual_vector_quantize(args[0], [args[1]], **options)


def test_no_codebooks_are_an_error():
    with pytest.raises(ValueError, match="codebooks is empty"):
        residual_vector_quantize(jnp.ones((2, 3)), [])


# The module


def test_module_adds_the_losses_and_learns_by_gradient():
    module, x = VectorQuantizer(5, 3, commitment_weight=0.5, rngs=nnx.Rngs(0)), draw(0, 2, 4, 3)
    y, indices, loss = module(x)
    expected = vector_quantize(x, module.embedding[...])
    assert_trees_close((y, indices, loss), (*expected[:2], expected[2].codebook + 0.5 * expected[2].commitment), rtol=1e-6)
    grads = nnx.grad(lambda m: m(x)[2])(module)
    assert_trees_close(grads.embedding[...], jit_grad(lambda c: vector_quantize(x, c)[2].codebook)(module.embedding[...]), rtol=1e-6)


def test_moving_average_follows_the_paper():
    module, x = VectorQuantizer(4, 3, ema=True, decay=0.9, epsilon=1e-3, rngs=nnx.Rngs(0)), draw(0, 50, 3)
    embedding = np.asarray(module.embedding[...], np.float64)
    size, sums = np.ones(4), embedding.copy()
    for _ in range(2):
        indices = brute_force(x, embedding)
        _, given, loss = nnx.jit(lambda m, x: m(x))(module, x)
        np.testing.assert_array_equal(given, indices)
        np.testing.assert_allclose(loss, 0.25 * np.square(np.asarray(x) - embedding[indices]).mean(), rtol=1e-5)
        for k in range(4):
            size[k] = 0.9 * size[k] + 0.1 * (indices == k).sum()
            sums[k] = 0.9 * sums[k] + 0.1 * np.asarray(x)[indices == k].sum(0)
        smooth = (size + 1e-3) * size.sum() / (size.sum() + 4e-3)
        embedding = sums / smooth[:, None]
        np.testing.assert_allclose(module.embedding[...], embedding, rtol=1e-5, atol=1e-6)


def test_moving_average_is_no_parameter_and_rests_in_evaluation():
    module, x = VectorQuantizer(4, 3, ema=True, rngs=nnx.Rngs(0)), draw(0, 9, 3)
    assert not jax.tree.leaves(nnx.state(module, nnx.Param))
    before = jnp.array(module.embedding[...])
    module(x, deterministic=True)
    module.eval()
    module(x)
    np.testing.assert_array_equal(module.embedding[...], before)
    module.train()
    module(jnp.zeros((0, 3)))
    np.testing.assert_array_equal(module.embedding[...], before)
    module(x)
    assert (module.embedding[...] != before).any()


def test_moving_average_inside_a_gradient_takes_its_step():
    module, x = VectorQuantizer(4, 3, ema=True, gradient="rotation", rngs=nnx.Rngs(0)), draw(0, 9, 3)
    before = jnp.array(module.embedding[...])
    dx = nnx.jit(nnx.grad(lambda m, x: m(x)[0].sum() + m(x, deterministic=True)[2], argnums=1))(module, x)
    assert np.isfinite(dx).all()
    assert (module.embedding[...] != before).any()


def test_dead_codes_become_vectors():
    module = VectorQuantizer(4, 2, ema=True, decay=0.5, threshold_ema_dead_code=0.6, rngs=nnx.Rngs(0))
    x = jnp.array([[9.0, 9.0]]) + 0.1 * draw(0, 8, 2)
    module(x)
    chosen = [any(np.allclose(row, e, rtol=1e-3) for row in x) for e in module.embedding[...]]
    assert sum(chosen) == 3


def test_codes_that_nothing_chooses_stay_finite():
    module = VectorQuantizer(3, 2, ema=True, decay=0.0, rngs=nnx.Rngs(0))
    module(jnp.ones((5, 2)))
    assert np.isfinite(module.embedding[...]).all()


@pytest.mark.parametrize(("options", "message"), [({"decay": 1.5}, "decay is 1.5"), ({"threshold_ema_dead_code": 1.0}, "needs ema=True")])
def test_bad_options_of_the_module_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(4, 3, rngs=nnx.Rngs(0), **options)


def test_rotation_and_straight_through_agree_where_the_vector_is_its_code():
    codebook, dy = draw(0, 4, 3), draw(1, 4, 3)
    for cls, books in ((VectorQuantizeFunction, codebook), (ResidualVectorQuantizeFunction, (codebook,))):
        dx = jax.vjp(lambda x, cls=cls, books=books: cls.apply(x, books, "rotation")[0], codebook)[1](dy)[0]
        np.testing.assert_allclose(dx, dy, rtol=1e-4, atol=1e-5)


def test_revived_codes_stay_alive_while_they_are_chosen():
    rows = draw_normal(0, (512, 2))
    model = VectorQuantizer(8, 2, ema=True, threshold_ema_dead_code=2.0, rngs=nnx.Rngs(0))
    step = nnx.jit(lambda m, x: m(x)[1])
    for _ in range(10):
        indices = step(model, rows)
    before = np.asarray(model.embedding[...])
    chosen = np.unique(np.asarray(indices))
    step(model, rows)
    moved = np.linalg.norm(np.asarray(model.embedding[...]) - before, axis=-1)
    assert len(chosen) == 8
    assert moved[chosen].max() < 0.05


def test_devices_with_an_axis_name_keep_the_codebook_of_the_whole_batch():
    def make(axis_name=None):
        return VectorQuantizer(16, 2, ema=True, threshold_ema_dead_code=2.0, axis_name=axis_name, rngs=nnx.Rngs(0))

    x, whole = draw(3, 64, 2), make()
    structure, state = nnx.split(make("rows"))

    @jax.jit
    @partial(jax.shard_map, mesh=jax.sharding.Mesh(jax.devices(), ("rows",)), in_specs=(P(), P("rows")), out_specs=(P(), P("rows")))
    def step(state, x):
        module = nnx.merge(structure, state)
        y = module(x)[0]
        return nnx.state(module), y

    for _ in range(2):
        expected = whole(x)[0]
        state, y = step(state, x)
        np.testing.assert_allclose(y, expected, rtol=1e-6)
    kept = [jax.tree.leaves(nnx.filter_state(s, nnx.BatchStat)) for s in (state, nnx.state(whole))]
    assert len(kept[0]) == 3
    for ours, theirs in zip(*kept, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


# Padding

MASK = jnp.array([[True, True, False, True], [False, True, False, False]])


def padded(bad=jnp.nan):
    """Vectors of which some are padding that holds anything, and the others alone."""
    x = draw(0, 2, 4, 3)
    return jnp.where(MASK[..., None], x, bad), x[MASK]


PADDED = {
    "straight through": lambda x, c, **o: vector_quantize(x, c, **o),
    "rotation": lambda x, c, **o: vector_quantize(x, c, gradient="rotation", **o),
    "residual": lambda x, c, **o: residual_vector_quantize(x, (c, c[:3] / 2), **o),
    "residual rotation": lambda x, c, **o: residual_vector_quantize(x, (c, c[:3] / 2), gradient="rotation", **o),
}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 3e38])
@pytest.mark.parametrize("name", PADDED)
def test_padding_is_never_touched(name, bad):
    (x, real), codebook, fn = padded(bad), draw(1, 5, 3), PADDED[name]

    def loss(x, c, **options):
        y, indices, losses = fn(x, c, **options)
        real = y[MASK] if options else y
        return (jnp.sin(jnp.arange(real.size)).reshape(real.shape) * real).sum() + sum(jnp.sum(a) for a in losses), (y, indices, losses)

    run = jit_value_and_grad(loss, (0, 1), has_aux=True)
    (value, (y, indices, losses)), (dx, dcodebook) = jax.jit(partial(run, mask=MASK))(x, codebook)
    (expected, (y_real, indices_real, losses_real)), (dx_real, dcodebook_real) = jax.jit(run)(real, codebook)
    assert_trees_close((value, y[MASK], losses), (expected, y_real, losses_real), rtol=1e-5)
    assert_trees_close((dx[MASK], dcodebook), (dx_real, dcodebook_real), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(indices[MASK], indices_real)
    assert not y[~MASK].any() and not dx[~MASK].any() and (indices[~MASK] == -1).all()


@pytest.mark.parametrize("name", PADDED)
def test_a_gradient_that_is_not_a_number_stops_at_padding(name):
    x, codebook = padded(0.0)[0], draw(1, 5, 3)
    dy = jnp.where(MASK[..., None], jnp.ones(3), jnp.nan)
    dx = jax.vjp(lambda x: PADDED[name](x, codebook, mask=MASK)[0], x)[1](dy)[0]
    assert jnp.isfinite(dx).all() and not dx[~MASK].any()


@pytest.mark.parametrize("name", PADDED)
def test_all_padding_is_zero(name):
    y, indices, losses = PADDED[name](jnp.full((2, 3), jnp.nan), draw(1, 5, 3), mask=jnp.zeros(2, int))
    assert not y.any() and (indices == -1).all() and not any(a.any() for a in losses)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_moving_average_is_that_of_the_vectors_without_their_padding(threshold):
    x, real = padded()
    make = lambda: VectorQuantizer(5, 3, ema=True, threshold_ema_dead_code=threshold, rngs=nnx.Rngs(0))
    ours, theirs = make(), make()
    for _ in range(2):
        y, _, loss = nnx.jit(lambda m, x: m(x, mask=MASK))(ours, x)
        y_real, _, loss_real = nnx.jit(lambda m, x: m(x))(theirs, real)
        assert_trees_close((y[MASK], loss), (y_real, loss_real), rtol=1e-5)
    assert_trees_close(nnx.to_pure_dict(nnx.state(ours, nnx.BatchStat)), nnx.to_pure_dict(nnx.state(theirs, nnx.BatchStat)), rtol=1e-5)
    before = jnp.array(ours.embedding[...])
    ours(x, mask=jnp.zeros_like(MASK))
    np.testing.assert_array_equal(ours.embedding[...], before)


@pytest.mark.parametrize("mask", [jnp.ones((2, 5), bool), jnp.ones((2, 4, 3), bool), jnp.ones(2, bool)])
def test_mask_of_another_batch_is_an_error(mask):
    with pytest.raises(ValueError, match=r"vector_quantize: mask has shape .*, but must be"):
        vector_quantize(padded()[0], draw(1, 5, 3), mask=mask)


def test_devices_with_padding_of_their_own_keep_the_codebook_of_all_vectors():
    make = lambda axis=None: VectorQuantizer(6, 2, ema=True, threshold_ema_dead_code=2.0, axis_name=axis, rngs=nnx.Rngs(0))
    x, whole = draw(3, 32, 2), make()
    mask = jnp.arange(32) % 5 > 1
    structure, state = nnx.split(make("rows"))

    @jax.jit
    @partial(jax.shard_map, mesh=jax.sharding.Mesh(jax.devices(), ("rows",)), in_specs=(P(), P("rows"), P("rows")), out_specs=P())
    def step(state, x, mask):
        module = nnx.merge(structure, state)
        module(x, mask=mask)
        return nnx.state(module)

    whole(x[mask])
    state = step(state, jnp.where(mask[:, None], x, jnp.nan), mask)
    kept = [jax.tree.leaves(nnx.filter_state(s, nnx.BatchStat)) for s in (state, nnx.state(whole))]
    for ours, theirs in zip(*kept, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("power", [-100, -60, 0, 60, 100])
def test_nearest_code_is_the_same_at_every_scale(power):
    x, codebook = jax.random.normal(jax.random.key(0), (9, 3)), jax.random.normal(jax.random.key(1), (6, 3))
    scale = jnp.float32(2.0**power)
    find = jax.jit(lambda x, c: (vector_quantize(x, c)[1], residual_vector_quantize(x, jnp.stack([c, c / 4]))[1]))
    assert_trees_close(find(x * scale, codebook * scale), find(x, codebook), rtol=0)
    assert len(set(find(x, codebook)[0].tolist())) > 2


def test_nan_of_a_vector_is_seen_in_its_code():
    x, codebook = jnp.array([[1.0, jnp.nan], [0.0, 1.0]]), jnp.array([[0.0, 1.0], [2.0, 0.0]])
    for q in (vector_quantize(x, codebook)[0], residual_vector_quantize(x, [codebook])[0]):
        assert jnp.isnan(q[0]).any() and jnp.isfinite(q[1]).all()
    q = vector_quantize(x, codebook, mask=jnp.array([False, True]))[0]
    np.testing.assert_array_equal(q, [[0, 0], [0, 1]])
