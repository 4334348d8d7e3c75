"""Values, gradients, memory, options and edge cases of the embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import layers
from tests.support import assert_trees_close, draw_normal, jit_grad, saved_bytes, temp_bytes


def table(shape=(7, 5), dtype=jnp.float32, seed=0):
    return draw_normal(seed, shape, dtype)


@pytest.mark.parametrize("indices", [[[0, 3, 3], [6, 0, 3]], [-1, -7, 2], [], 4], ids=str)
def test_gradient_is_the_sum_by_index(indices):
    with jax.enable_x64(True):
        indices = jnp.asarray(indices, jnp.int32)
        e, dy = table(dtype=jnp.float64), table((*indices.shape, 5), jnp.float64, 1)
        y, pull = jax.vjp(lambda e: layers.embed(indices, e), e)
        expected = np.zeros((7, 5))
        for i in np.ndindex(indices.shape):
            expected[int(indices[i])] += np.asarray(dy[i])
        np.testing.assert_array_equal(y, np.asarray(e)[np.asarray(indices)])
        np.testing.assert_allclose(pull(dy)[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32, jnp.uint32])
def test_outside_of_the_table_is_nan_without_gradient_as_with_take(dtype):
    indices = jnp.array([7, 100, 2], dtype)
    ours, theirs = (jax.vjp(f, table()) for f in (lambda e: layers.embed(indices, e), lambda e: jnp.take(e, indices, axis=0)))
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert_trees_close(ours[1](jnp.ones((3, 5))), theirs[1](jnp.ones((3, 5))), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16])
def test_narrow_indices_reach_a_vocab_larger_than_their_dtype(dtype):
    indices = jnp.array([5, 100] if dtype == jnp.uint8 else [-1, 100], dtype)
    e = table((70_000, 2))
    ours, theirs = (jax.vjp(lambda e, i=i: layers.embed(i, e), e) for i in (indices, indices.astype(int)))
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1](jnp.ones((2, 2)))[0], theirs[1](jnp.ones((2, 2)))[0])


def test_below_minus_vocab_is_nan_without_gradient():
    y, pull = jax.vjp(lambda e: layers.embed(jnp.array([-8]), e), table())
    assert jnp.isnan(y).all()
    np.testing.assert_array_equal(pull(jnp.ones((1, 5)))[0], jnp.zeros((7, 5)))


def test_gradient_of_a_bfloat16_table_is_summed_in_float32():
    """4096 ones: bfloat16 alone stops at 256."""
    count = 4096
    gradient = jit_grad(lambda e: layers.embed(jnp.zeros(count, int), e).sum())(jnp.ones((3, 2), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient[0].astype(jnp.float32), count)


def test_bfloat16_error_is_not_above_that_of_autodiff():
    indices = jax.random.randint(jax.random.key(1), (2000,), 0, 7)
    dy = table((2000, 5), jnp.bfloat16, 2)
    reference = np.zeros((7, 5))
    np.add.at(reference, np.asarray(indices), np.asarray(dy, np.float64))
    error = lambda f: np.abs(np.asarray(jax.vjp(f, table(dtype=jnp.bfloat16))[1](dy)[0], np.float64) - reference).sum()
    assert error(lambda e: layers.embed(indices, e)) <= error(lambda e: jnp.take(e, indices, axis=0))


def test_forward_mode_second_derivatives_and_batches_pass_through():
    with jax.enable_x64(True):
        indices, e, v = jnp.array([1, 1, 4]), table(dtype=jnp.float64), table(dtype=jnp.float64, seed=1)
        run = lambda f: (
            jax.jvp(f, (e,), (v,)),
            jax.jvp(jax.grad(lambda e: (f(e) ** 3).sum()), (e,), (v,))[1],
            jax.vmap(jax.grad(lambda e: (f(e) ** 3).sum()))(jnp.stack([e, v])),
        )
        assert_trees_close(run(lambda e: layers.embed(indices, e)), run(lambda e: e[indices]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_embeddings", [1, 7])
@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}], ids=str)
def test_module_is_that_of_flax(num_embeddings, options):
    modules = [m(num_embeddings, 5, rngs=nnx.Rngs(0), **options) for m in (layers.Embed, nnx.Embed)]
    indices, query = jnp.array([[0, 3, 1], [6, 0, 2]]) % num_embeddings, table((2, 5))

    def run(module):
        loss = lambda m: jnp.sin(m(indices).astype(jnp.float32)).sum() + m.attend(query).astype(jnp.float32).sum()
        value, gradient = nnx.value_and_grad(loss)(module)
        return value, module(indices).astype(jnp.float32), nnx.to_pure_dict(gradient)["embedding"].astype(jnp.float32)

    assert vars(modules[0]).keys() == vars(modules[1]).keys()
    assert modules[0](indices).dtype == modules[1](indices).dtype
    assert_trees_close(run(modules[0]), run(modules[1]), rtol=2.0**-6 if options else 1e-5, atol=1e-5)


def test_custom_promote_dtype_is_used():
    up = lambda args, *, dtype=None, inexact=True: tuple(a.astype(jnp.float32) for a in args)
    assert layers.Embed(3, 2, promote_dtype=up, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(jnp.array([0])).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: layers.embed(jnp.ones(3), jnp.ones((3, 2))), TypeError, "embed: indices is of dtype float32"),
        (lambda: layers.embed(jnp.ones(3, int), jnp.ones(3)), ValueError, r"embed: embedding has shape \(3,\)"),
        (lambda: layers.embed(jnp.ones(3, int), jnp.ones((3, 2), int)), TypeError, "embed: embedding is of dtype int"),
        (lambda: layers.Embed(3, 2, rngs=nnx.Rngs(0))(jnp.ones(3)), TypeError, "Embed: inputs is of dtype float32, but must be of integers"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_saved_beyond_the_indices():
    indices, e = jnp.zeros((4, 8), jnp.int32), table((100, 5), jnp.bfloat16)
    assert saved_bytes(lambda e: layers.embed(indices, e), e) + e.nbytes <= indices.nbytes


def test_a_cast_to_the_compute_dtype_copies_no_table():
    """Rows are taken first and cast then."""
    module = layers.Embed(4096, 64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    indices = jax.ShapeDtypeStruct((8,), jnp.int32)
    assert temp_bytes(lambda s, i: nnx.merge(graph, s)(i), state, indices) < module.embedding[...].nbytes // 4


def test_training_takes_no_more_memory_than_what_flax_does():
    e, indices = jax.ShapeDtypeStruct((4096, 64), jnp.float32), jax.ShapeDtypeStruct((2048,), jnp.int32)

    def training(f):
        def run(e, indices):
            y, pull = jax.vjp(lambda e: f(e, indices), e)
            return y, pull(jnp.cos(y))

        return run

    ours, theirs = (temp_bytes(training(f), e, indices) for f in (lambda e, i: layers.embed(i, e), lambda e, i: jnp.take(e, i, axis=0)))
    assert ours <= theirs
