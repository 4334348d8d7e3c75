"""Layers train on a batch that lies over the devices of a mesh, of explicit axes (what `jax.make_mesh` gives by default) and of automatic ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import layers
from tests.support import assert_trees_close, draw_normal, mesh_of

explicit = partial(mesh_of, 8, "data", AxisType.Explicit)
X = draw_normal(0, (16, 5, 8))
Q = X.reshape(16, 5, 2, 4)


def heads(x: jax.Array) -> jax.Array:
    return layers.dot_product_attention(x, x[:, :, :1], x[:, :, 1:], is_causal=True, sinks=jnp.ones(2), key_value_seq_lengths=jnp.full(len(x), 5))


CASES: dict[str, tuple[Any, jax.Array]] = {
    "relu": (layers.relu, X),
    "binarize": (layers.binarize, X),
    "swiglu": (lambda x: layers.swiglu(x, 2 * x), X),
    "rotary_embedding": (layers.rotary_embedding, Q),
    "dot_product_attention": (heads, Q),
    "dot_product_attention in bfloat16": (heads, Q.astype(jnp.bfloat16)),
    "linear_recurrence": (lambda x: layers.linear_recurrence(jnp.cos(x), x, axis=1), X),
    "linear_recurrence over rows of a batch": (lambda x: layers.linear_recurrence(jnp.cos(x), x, axis=2), X),
    "dropout": (lambda x: layers.dropout(x, jax.random.key(1), rate=0.5), X),
}


def values_and_gradients(fn: Any, *args: Any) -> Any:
    return jax.jit(lambda *args: (fn(*args), jax.grad(lambda *args: jnp.sum(fn(*args).astype(jnp.float32) ** 2), range(len(args)))(*args)))(*args)


def on_mesh(fn: Any, x: jax.Array, *replicated: Any) -> Any:
    with jax.set_mesh(explicit()):
        x = jax.device_put(x, NamedSharding(explicit(), P("data")))
        return jax.device_get(values_and_gradients(fn, x, *jax.device_put(replicated, NamedSharding(explicit(), P()))))


@pytest.mark.parametrize("name", CASES)
def test_function_of_a_batch_over_devices_is_that_on_one(name: str) -> None:
    fn, x = CASES[name]
    rtol = 1e-5 if x.dtype == jnp.float32 else 2e-2
    assert_trees_close(on_mesh(fn, x), jax.device_get(values_and_gradients(fn, x)), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("make", [lambda r: layers.Linear(8, 4, rngs=r), lambda r: layers.MultiHeadAttention(2, 8, decode=False, rngs=r)])
def test_module_of_a_batch_over_devices_has_the_gradients_of_one_device(make: Any) -> None:
    graph, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
    run = lambda x, params, rest: nnx.merge(graph, params, rest, copy=True)(x)
    ours = on_mesh(lambda x, p: run(x, p, rest), X, params)
    assert_trees_close(ours, jax.device_get(values_and_gradients(lambda x, p: run(x, p, rest), X, params)), rtol=1e-5, atol=1e-5)


@pytest.mark.devices(8)
@pytest.mark.parametrize("fn", [layers.relu, layers.binarize])
def test_bits_of_a_batch_over_devices_stay_where_they_are(fn: Any) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    program = jax.jit(jax.grad(lambda x: jnp.sum(fn(x) ** 2))).lower(x).compile().as_text()
    assert not any(kind in program for kind in ("all-gather", "all-to-all", "collective-permute"))
