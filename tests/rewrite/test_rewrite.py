"""`rewrite` as a transformation: what it takes, how it composes, what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import layers
from tests.rewrite import plain_llama
from tests.support import assert_trees_close

PARAMS = plain_llama.init(jax.random.key(0), depth=1, width=32, vocab=50, heads=2, kv=1, hidden=48)
TOKENS = jax.random.randint(jax.random.key(1), (2, 17), 0, 50)


@pytest.fixture(autouse=True)
def _everything_pays(everything_pays):
    pass


@pytest.fixture(scope="module")
def expected():
    return jax.jit(jax.grad(plain_llama.loss))(PARAMS, TOKENS)


def close(actual, expected):
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-6)


WAYS = {
    "grad": lambda f: jax.grad(layers.rewrite(f)),
    "jit of grad": lambda f: jax.jit(jax.grad(layers.rewrite(f))),
    "grad of jit": lambda f: jax.grad(jax.jit(layers.rewrite(f))),
    "of jit": lambda f: jax.grad(layers.rewrite(jax.jit(f))),
    "remat of it": lambda f: jax.grad(jax.checkpoint(layers.rewrite(f))),
    "of remat": lambda f: jax.grad(layers.rewrite(jax.checkpoint(f))),
    "twice": lambda f: jax.grad(layers.rewrite(layers.rewrite(f))),
    "linearize": lambda f: lambda p, t: jax.linear_transpose(jax.linearize(lambda p: layers.rewrite(f)(p, t), p)[1], p)(1.0)[0],
    "of the gradient": lambda f: layers.rewrite(jax.grad(f)),
    "of vmap": lambda f: jax.grad(layers.rewrite(lambda p, t: jax.vmap(f, (None, 0))(p, t[:, None]).mean())),
    "vmap of it": lambda f: jax.grad(lambda p, t: jax.vmap(layers.rewrite(f), (None, 0))(p, t[:, None]).mean()),
    "inside a scan": lambda f: jax.grad(lambda p, t: jax.lax.scan(lambda c, t: (c + layers.rewrite(f)(p, t[None]) / 2, None), 0.0, t)[0]),
    "of a cond": lambda f: jax.grad(layers.rewrite(lambda p, t: jax.lax.cond(t[0, 0] >= 0, f, lambda p, t: 2 * f(p, t), p, t))),
}


@pytest.mark.parametrize("way", WAYS)
def test_gradient_is_the_same_under_each_transformation(way, expected):
    close(jax.jit(WAYS[way](plain_llama.loss))(PARAMS, TOKENS), expected)


def test_forward_mode_and_second_derivatives_are_the_same(expected):
    def along(f):
        slope = jax.jvp(lambda p: f(p, TOKENS), (PARAMS,), (expected,))[1]
        return slope, jax.jvp(lambda p: jax.grad(f)(p, TOKENS), (PARAMS,), (expected,))[1]

    plain, new = (jax.jit(lambda f=f: along(f))() for f in (plain_llama.loss, layers.rewrite(plain_llama.loss)))
    assert_trees_close(new, plain, rtol=2e-3, atol=1e-5)


def test_function_is_traced_once_for_a_signature():
    count = []

    @layers.rewrite
    def fn(x, *, power):
        count.append(1)
        return x**power

    for _ in range(3):
        fn(jnp.ones(3), power=2)
        jax.grad(lambda x: fn(x, power=2).sum())(jnp.ones(3))
    assert len(count) == 1
    fn(jnp.ones(4), power=2)
    assert len(count) == 2


def test_decorator_takes_options_and_keeps_the_name():
    @layers.rewrite(skip="norm")
    def fn(x):
        """Says what it does."""
        return layers.rms_norm(x)

    assert (fn.__name__, fn.__doc__) == ("fn", "Says what it does.")
    np.testing.assert_allclose(fn(jnp.ones((2, 3))), 1, rtol=1e-5)


def test_other_arguments_are_part_of_the_program():
    @layers.rewrite
    def fn(x, kind, options):
        return {"y": x * 2 if kind == "double" else x, "flag": options["flag"]}

    out = fn(jnp.ones(2), "double", {"flag": None, "other": True})
    assert out["flag"] is None
    np.testing.assert_array_equal(out["y"], [2, 2])


def test_output_types_stay():
    def fn(x):
        return x * 2, jnp.where(x > 0, 1.0, 2.0), x.astype(int), (x > 0)

    plain, new = (jax.eval_shape(f, jnp.ones(3)) for f in (fn, layers.rewrite(fn)))
    assert [(a.dtype, a.weak_type) for a in plain] == [(a.dtype, a.weak_type) for a in new]


def test_prints_keys_and_rules_of_others_pass_through(capfd):
    @jax.custom_vjp
    def tripled(x):
        return x

    tripled.defvjp(lambda x: (x, None), lambda _, d: (3 * d,))

    @layers.rewrite
    def fn(x, key):
        jax.debug.print("once {}", x.sum())
        return tripled(x * jax.random.uniform(key, x.shape)).sum()

    gradient = jax.grad(fn)(jnp.ones(3), jax.random.key(0))
    jax.effects_barrier()
    np.testing.assert_allclose(gradient, 3 * jax.random.uniform(jax.random.key(0), (3,)), rtol=1e-6)
    assert capfd.readouterr().out.count("once") == 1


def test_source_lines_and_scopes_stay():
    def scoped(p, t):
        with jax.named_scope("model"):
            return plain_llama.loss(p, t)

    text = jax.jit(layers.rewrite(scoped)).lower(PARAMS, TOKENS).as_text(debug_info=True)
    assert "model" in text and "plain_llama.py" in text
    row = next(r for r in layers.rewrite(scoped).report(PARAMS, TOKENS).replaced if r.name == "gated_mlp")
    assert "model" in row.layer and row.source.startswith("plain_llama.py") and "(mlp)" in row.source


@pytest.mark.devices(8)
@pytest.mark.parametrize("where", ["sharded batch", "constraint", "of shard_map", "in shard_map"])
def test_gradient_is_the_same_on_eight_devices(where):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens = jax.random.randint(jax.random.key(1), (8, 9), 0, 50)
    plain = plain_llama.loss
    sharded = jax.device_put(tokens, NamedSharding(mesh, P("d")))

    def mapped(f):
        return jax.shard_map(lambda p, t: jax.lax.pmean(f(p, t), "d"), mesh=mesh, in_specs=(P(), P("d")), out_specs=P())

    def constrained(p, t):
        return plain(jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P())), p), t)

    new = {
        "sharded batch": layers.rewrite(plain),
        "constraint": layers.rewrite(constrained),
        "of shard_map": layers.rewrite(mapped(plain)),
        "in shard_map": mapped(layers.rewrite(plain)),
    }[where]
    actual = jax.jit(jax.grad(new))(PARAMS, sharded)
    close(jax.device_get(actual), jax.device_get(jax.jit(jax.grad(plain))(PARAMS, tokens)))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: layers.rewrite(3), TypeError, "rewrite: fn is 3, but must be a function"),
        (lambda: layers.rewrite(jnp.sin, only="norms"), ValueError, "rewrite: only is 'norms', but must be one of"),
        (lambda: layers.rewrite(jnp.sin, skip=["norm", "x"]), ValueError, "rewrite: skip is 'x', but must be one of"),
    ],
)
def test_bad_input_is_an_error(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_report_says_where_a_backward_pass_is_in_it_already():
    assert "not the other way round" in str(layers.rewrite(jax.grad(plain_llama.loss)).report(PARAMS, TOKENS))
    assert "not the other way round" not in str(layers.rewrite(plain_llama.loss).report(PARAMS, TOKENS))


def test_body_of_shard_map_is_entered():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(lambda p, t: jax.lax.pmean(plain_llama.loss(p, t), "d"), mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    report = layers.rewrite(mapped).report(PARAMS, jnp.zeros((8, 9), int))
    names = {r.name for r in report.replaced if "in shard_map" in r.layer}
    assert names >= {"dot_product_attention", "rms_norm", "gated_mlp", "linear_cross_entropy"}


def test_a_larger_program_traces_it_in_place_first_and_then_from_the_cache():
    traced = []

    def f(x):
        traced.append(isinstance(x, jax.core.Tracer))
        return jax.nn.silu(x).sum()

    g = layers.rewrite(f)
    program = jax.make_jaxpr(lambda x: jax.grad(g)(x) + jax.grad(g)(x) + jax.grad(g)(x))(jnp.ones(4))
    assert traced == [True] * 2
    assert not any(e.primitive.name in ("jit", "pjit") and e.params["name"] == "f" for e in program.jaxpr.eqns)
