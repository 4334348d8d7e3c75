"""What is known while a function is rewritten is folded to the values that JAX computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.rewriting import folding
from layers.rewriting.reading import read

RNG = np.random.default_rng(0)
FLOATS = np.array([[0.0, -0.0, 1.5, np.nan], [np.inf, -np.inf, -2.25, 3e38]], np.float32)
OTHERS = RNG.permutation(FLOATS.ravel()).reshape(2, 4)
INTEGERS = np.array([[-7, 3, 0, 2], [127, -128, 5, -1]], np.int8)
FLAGS = FLOATS > 0
CASES = {
    "arithmetic": (lambda x, y: [x + y, x - y, x * y, x / y, -x, jnp.abs(x), jax.lax.max(x, y), jax.lax.min(x, y)], (FLOATS, OTHERS)),
    "16 bits": (lambda x, y: [x + y, x * y, x / y], (FLOATS.astype(jnp.bfloat16), OTHERS.astype(jnp.bfloat16))),
    "integers": (lambda x, y: [x + y, x * y, -x, jnp.abs(x), x & y, x ^ y, ~x], (INTEGERS, INTEGERS[::-1])),
    "integers divided": (lambda x, y: [jax.lax.div(x, y)], (INTEGERS, np.full_like(INTEGERS, -3))),
    "comparisons": (lambda x, y: [x < y, x <= y, x == y, x != y, x > y, x >= y, jnp.isfinite(x)], (FLOATS, OTHERS)),
    "booleans": (lambda x, y: [x & y, x | y, ~x, x ^ y], (FLAGS, FLAGS[::-1])),
    "casts": (lambda x, y: [x.astype(jnp.bfloat16), x.astype(jnp.int32), x.astype(bool), y.astype(jnp.float16)], (FLOATS, INTEGERS)),
    "selections": (lambda x, y: [jnp.where(x > 0, x, y), jax.lax.select_n(jnp.int32(x > 0), y, x)], (FLOATS, OTHERS)),
    "moves": (lambda x: [x.T, x.reshape(8), x[:, 1:4:2], jnp.concatenate([x, x], 1), x[None], jnp.broadcast_to(x[:, :1], (3, 2, 4))], (FLOATS,)),
    "positions": (lambda x: [jnp.tril(x), jax.lax.iota(jnp.int8, 4) + 0 * x, jax.lax.broadcasted_iota(jnp.float32, (2, 4), 1)], (INTEGERS,)),
    "by JAX": (lambda x: [jnp.exp(x), x.sum(1), jnp.cumsum(x, 1)], (FLOATS,)),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_on_known_arrays_give_the_values_of_jax(case):
    fn, args = CASES[case]
    closed = jax.make_jaxpr(fn)(*args)
    graph = read(closed.jaxpr, closed.consts)
    known = {id(v): x for v, x in zip(graph.inputs, args, strict=True)}
    value_of = lambda v: known[id(v)] if id(v) in known else np.asarray(v.const, v.dtype)
    for n in graph.nodes:
        known.update((id(o), x) for o, x in zip(n.outputs, folding.fold(n, [value_of(v) for v in n.inputs]), strict=True))
    for v, e in zip(graph.outputs, fn(*map(jnp.asarray, args)), strict=True):
        a = value_of(v)
        assert a.dtype == e.dtype and a.shape == e.shape
        np.testing.assert_array_equal(a.astype(np.float64), np.asarray(e).astype(np.float64))
