"""The Mamba block against its formula in float64, its initial values, decoding step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.recurrent.mamba import Mamba
from tests.support import assert_trees_close, draw_normal


def by_formula(block, inputs):
    """The block from its parameters, with Flax's convolution and a scan over time."""
    x, z = jnp.split(inputs @ block.in_proj.kernel[...], 2, -1)
    x = jax.nn.silu(block.conv1d(x))
    low, b, c = jnp.split(x @ block.x_proj.kernel[...], [block.dt_rank, block.dt_rank + block.d_state], -1)
    delta = jax.nn.softplus(low @ block.dt_proj.kernel[...] + block.dt_proj.bias[...])
    a = -jnp.exp(block.A_log[...])

    def step(h, row):
        x, d, b, c = row
        h = jnp.exp(d[..., None] * a) * h + (d * x)[..., None] * b[:, None]
        return h, (h * c[:, None]).sum(-1)

    start = jnp.zeros((x.shape[0], *a.shape), a.dtype)
    y = jnp.moveaxis(jax.lax.scan(step, start, tuple(jnp.moveaxis(v, 1, 0) for v in (x, delta, b, c)))[1], 0, 1)
    return ((y + block.D[...] * x) * jax.nn.silu(z)) @ block.out_proj.kernel[...]


def test_values_and_gradients_are_those_of_the_formula():
    with jax.enable_x64(True):
        block = Mamba(6, d_state=4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        x = draw_normal(1, (2, 19, 6), jnp.float64)
        graph, state = nnx.split(block)

        def run(fn):
            loss = lambda state, x: jnp.sum(jnp.sin(fn(nnx.merge(graph, state), x)))
            return jax.jit(jax.value_and_grad(loss, (0, 1)))(state, x)

        assert_trees_close(run(lambda m, x: m(x)), run(by_formula), rtol=1e-10, atol=1e-12)


def test_decoding_step_by_step_gives_the_whole_sequence():
    block = Mamba(6, d_state=4, rngs=nnx.Rngs(0))
    x = draw_normal(1, (2, 7, 6))
    outs, run = [], nnx.jit(lambda block, x, state: block(x, state, return_state=True))
    whole, last = run(block, x, None)
    out, state = run(block, x[:, :2], None)
    outs.append(out)
    for t in range(2, 7):
        out, state = run(block, x[:, t : t + 1], state)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, rtol=1e-4, atol=1e-6)
    assert_trees_close(state, last, rtol=1e-4, atol=1e-6)


def test_parameters_have_the_names_shapes_and_initial_values_of_the_paper():
    block = Mamba(32, rngs=nnx.Rngs(0))
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(block, nnx.Param)))
    assert shapes == {
        "in_proj": {"kernel": (32, 128)},
        "conv1d": {"kernel": (4, 1, 64), "bias": (64,)},
        "x_proj": {"kernel": (64, 2 + 32)},
        "dt_proj": {"kernel": (2, 64), "bias": (64,)},
        "A_log": (64, 16),
        "D": (64,),
        "out_proj": {"kernel": (64, 32)},
    }
    steps = jax.nn.softplus(block.dt_proj.bias[...])
    assert 0.001 * 0.999 <= steps.min() < 0.01 < steps.max() <= 0.1 * 1.001
    np.testing.assert_allclose(jnp.exp(block.A_log[...])[5], jnp.arange(1.0, 17.0), rtol=1e-6)
    assert jnp.abs(block.dt_proj.kernel[...]).max() <= 2**-0.5


def test_dtype_is_what_is_computed_in():
    block = Mamba(6, d_state=4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert block(jnp.ones((1, 5, 6))).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mamba(6, dt_init="zeros", rngs=nnx.Rngs(0)), "dt_init is 'zeros'"),
        (lambda: Mamba(6, dt_rank="all", rngs=nnx.Rngs(0)), "dt_rank is 'all'"),
        (lambda: Mamba(6, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 7))), "inputs have shape"),
    ],
)
def test_bad_arguments_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
