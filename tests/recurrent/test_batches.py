"""Layers on a batch over devices, in each of the three ways of JAX, and on a symbolic batch (`jax.export`), are those of one device."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.recurrent.checkpointed_scan import checkpointed_scan, checkpointed_while
from layers.recurrent.gated_delta_rule import gated_delta_rule
from layers.recurrent.gated_linear_attention import gated_linear_attention
from layers.recurrent.gru import gru
from layers.recurrent.lstm import lstm
from layers.recurrent.short_convolution import short_convolution
from layers.recurrent.state_space_dual import state_space_dual
from tests.recurrent.cells import draw, loss, short_chunks
from tests.support import assert_trees_close

X, W, R = draw(0, (8, 5, 4), jnp.float32), draw(1, (4, 8), jnp.float32), draw(2, (2, 8), jnp.float32)


def scanned(x, w, r):
    """With a weight that all devices share, in a loop that is cut twice."""
    step = lambda c, x: (jnp.tanh(c @ w[:, :4] + x @ w[:, 4:]), (c * r[0, 0]))
    last, ys = checkpointed_scan(step, x[:, 0], jnp.moveaxis(x, 1, 0))
    return last, jnp.moveaxis(ys, 0, 1)


def repeated(x, w, r):
    """With a number of steps of its own on each device under `shard_map`, and a count that starts as the same on all."""
    go_on = lambda s: (s[0] < 6) & (jnp.abs(s[1]).max() < 1e3)
    return checkpointed_while(go_on, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w[:, :4]) + r[0, :4]), (0, x[:, 0]), max_steps=7)[1]


def attention(x, w, r):
    q, k, v = (x[:, :, None, :2], x[:, :, None, 2:], x[:, :, None] * w[:, 0])
    return gated_linear_attention(q, k, v, -jnp.abs(q), scale=r[0, 0], return_state=True, chunk_size=2)


def delta_rule(x, w, r):
    q, k, v = (x[:, :, None, :2], x[:, :, None, 2:], x[:, :, None] * w[:, 0])
    return gated_delta_rule(q, k, v, -jnp.abs(x[..., :1]), r[0, 0] * x[..., 1:2], return_state=True, chunk_size=2)


def dual(x, w, r):
    b, c = x[:, :, None, :2], x[:, :, None, 2:]
    return state_space_dual((x * w[:, 0])[..., None], x, -jnp.abs(w[0, :4]), b, c, r[0, :4], return_last_state=True, chunk_size=2)


LAYERS = {
    "lstm": lambda x, w, r: lstm(x, w, r, seq_lengths=jnp.where(x[:, 0, 0] > 0, 5, 3), reverse=True),
    "gru": lambda x, w, r: gru(x, w[:, :6], r[:, :6], r[0, :6], r[1, :6]),
    "gated_linear_attention": attention,
    "gated_delta_rule": delta_rule,
    "state_space_dual": dual,
    "short_convolution": lambda x, w, r: short_convolution(x, w[:, :4], r[0, :4], activation="silu", return_state=True),
    "checkpointed_scan": scanned,
    "checkpointed_while": repeated,
}


@pytest.fixture(scope="module", autouse=True)
def expected():
    with pytest.MonkeyPatch.context() as patch:
        short_chunks(patch, 2)
        yield {name: jax.jit(both(fn))(X, W, R) for name, fn in LAYERS.items()}


def both(fn):
    """The outputs, and the gradient of every argument."""
    return jax.value_and_grad(lambda *args: (loss(out := fn(*args)), out), (0, 1, 2), has_aux=True)


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", ["checkpointed_scan", "checkpointed_while"])
def test_shard_map_gives_the_values_and_gradients_of_one_device(name, expected):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(LAYERS[name], mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"))
    assert_trees_close(jax.device_get(jax.jit(both(run))(X, W, R)), expected[name], rtol=2e-5, atol=2e-5)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, AxisType.Explicit) for name in LAYERS), *((name, AxisType.Auto) for name in ("lstm", "gated_linear_attention", "checkpointed_scan"))],
    ids=str,
)
def test_batch_over_devices_gives_those_of_one_and_is_not_gathered(name, kind, expected):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    args = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((X, P("data")), (W, P()), (R, P()))]
    program = jax.jit(both(LAYERS[name])).lower(*args).compile()
    assert not any(moved in program.as_text() for moved in ("all-gather(", "all-to-all(", "collective-permute("))
    assert_trees_close(jax.device_get(program(*args)), expected[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "shape"), [("lstm", "b, t, 4"), ("gru", "b, 5, 4"), ("checkpointed_scan", "b, t, 4")])
def test_layer_is_exported_for_any_batch_and_time(name, shape, expected):
    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
    call = jax.export.export(jax.jit(both(LAYERS[name])))(batch, W, R).call
    assert_trees_close(call(X, W, R), expected[name], rtol=2e-5, atol=2e-5)
