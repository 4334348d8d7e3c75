"""Libraries that take over `jax.lax.dot_general` while a model runs (qwix does, to quantise it or to add LoRA).

Swapped models are to them what unswapped ones are, and nothing of it stays behind.
"""

import contextlib
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import layers
from layers.core.products import products_are_patched
from tests.support import assert_trees_close

TOKENS = jnp.array([[1, 2, 3, 0], [4, 4, 1, 2]])


class Model(nnx.Module):
    """A layer of each kind that multiplies matrices and has a twin."""

    def __init__(self, recurrent=True):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(8, 8, rngs=rngs), rngs=rngs) if recurrent else nnx.Linear(8, 8, rngs=rngs)
        self.linear = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, tokens):
        x = self.norm(self.embed(tokens))
        return self.linear(self.rnn(x + self.attention(x)))


def make(swapped, **options):
    return layers.swap(Model(**options)).model if swapped else Model(**options)


def run(model, wrt=nnx.Param):
    """The output and the gradient of some variables, compiled and not."""
    loss = lambda m: (jnp.sin(m(TOKENS)) * jnp.arange(6)).sum()
    grad = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))
    ways = [(model(TOKENS), grad(model)), (nnx.jit(lambda m: m(TOKENS))(model), nnx.jit(grad)(model))]
    return [(y, nnx.to_pure_dict(g)) for y, g in ways]


@contextlib.contextmanager
def halved_products():
    """What qwix does: JAX's function gets other code while this runs. Here each product is half of what it was."""
    product, code = jax.lax.dot_general, jax.lax.dot_general.__code__
    original = type(product)(code, product.__globals__, product.__name__, product.__defaults__, product.__closure__)
    original.__kwdefaults__ = product.__kwdefaults__
    product.__globals__["_halved"] = lambda *args, **kwargs: original(*args, **kwargs) / 2
    product.__code__ = (lambda *args, **kwargs: _halved(*args, **kwargs)).__code__  # noqa: F821
    try:
        yield
    finally:
        product.__code__ = code
        del product.__globals__["_halved"]


def test_patch_is_seen_by_name_and_by_code(monkeypatch):
    assert not products_are_patched()
    with halved_products():
        assert products_are_patched()
    assert not products_are_patched()
    monkeypatch.setattr(jax.lax, "dot_general", lambda *args, **kwargs: None)
    assert products_are_patched()


def test_swapped_model_has_the_patched_products_of_an_unswapped_one():
    with halved_products():
        ours, theirs = run(make(True)), run(make(False))
    assert_trees_close(ours, theirs, rtol=1e-5, atol=1e-5)


CALLS = {
    "linear": lambda x, w: layers.linear(x, w),
    "mlp": lambda x, w: layers.mlp(x, w, x),
    "gated_mlp": lambda x, w: layers.gated_mlp(x, w, w, x),
    "dot_product_attention": lambda x, w: layers.dot_product_attention(*[x[None, :, None]] * 3),
    "linear_cross_entropy": lambda x, w: layers.linear_cross_entropy(x, w, jnp.arange(8)),
    "linear_jsd": lambda x, w: layers.linear_jsd(x, w, 2 * x, w),
    "lstm": lambda x, w: layers.lstm(x[None], jnp.tile(w, 4), jnp.tile(x[:, :8], 4))[0],
    "gru": lambda x, w: layers.gru(x[None], jnp.tile(w, 3), jnp.tile(x[:, :8], 3))[0],
    "gated_linear_attention": lambda x, w: layers.gated_linear_attention(*[x[None, :, None]] * 3, -jnp.abs(x[None, :, None])),
    "selective_scan": lambda x, w: layers.selective_scan(x[None], jnp.abs(x[None]), -jnp.abs(w), x[None, :, :8], x[None, :, :8]),
    "int8_linear": lambda x, w: layers.int8_linear(x, w),
    "vector_quantize": lambda x, w: layers.vector_quantize(x, 2 * x)[0],
}
"""Of x (8, features) and w (features, 8)."""


@pytest.mark.parametrize("name", CALLS)
def test_what_is_traced_under_a_patch_leaves_nothing_behind(name):
    """No product is taken from a cache that was filled under the patch, nor under it from one that was filled before."""
    x = jax.random.normal(jax.random.key(0), (8, 8 + list(CALLS).index(name)))  # of a shape of its own, so that no other test fills the cache

    def program():
        run = jax.value_and_grad(lambda x, w: jnp.sin(CALLS[name](x, w)).sum(), (0, 1))
        return Counter(operations(jax.make_jaxpr(run)(x, x.T).jaxpr))

    with halved_products():
        patched = program()
    after = program()
    with halved_products():
        again = program()
    jax.clear_caches()
    assert patched == again
    assert patched["div"] > after["div"]
    assert after == program()


def operations(jaxpr):
    """The names of the operations of a program, and of the programs in it."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(value, "eqns"):
                yield from operations(getattr(value, "jaxpr", value))


# qwix itself


@pytest.fixture
def qwix():
    return pytest.importorskip("qwix")


def adapted(qwix, provider, swapped):
    """The model as qwix gives it, with LoRA parameters that do something; of a loop over time it makes nothing, Flax's or ours."""
    model = qwix.quantize_model(make(swapped, recurrent=False), provider, TOKENS, rngs=nnx.Rngs(3))
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        variable[...] = variable[...] + 0.3
    return model


def assert_close(ours, theirs, tolerance):
    """All arrays together, by their Euclidean norm: some gradients are 0 but for rounding."""
    ours, theirs = (jnp.concatenate([jnp.ravel(a) for a in jax.tree.leaves(tree)]) for tree in (ours, theirs))
    assert jnp.linalg.norm(ours - theirs) <= tolerance * jnp.linalg.norm(theirs)


PROVIDERS = {
    "LoRA": (lambda qwix: qwix.LoraProvider(module_path=".*", rank=2, alpha=2.0), nnx.LoRAParam, 1e-4),
    "LoRA on 8 bits": (lambda qwix: qwix.LoraProvider(module_path=".*", rank=2, alpha=2.0, weight_qtype="int8"), nnx.LoRAParam, 1e-4),
    "QAT": (lambda qwix: qwix.QtProvider([qwix.QtRule(module_path=".*", weight_qtype="int8", act_qtype="int8")]), nnx.Param, 2**-6),
}
"""What makes it, the variables that are trained, and how close two models are: where their inputs differ by rounding, 8 bits may differ by one."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")
@pytest.mark.parametrize("name", PROVIDERS)
def test_swapped_model_is_quantised_and_adapted_as_an_unswapped_one(qwix, name):
    provider, wrt, tolerance = PROVIDERS[name]
    plain = run(make(False, recurrent=False))
    ours, theirs = (run(adapted(qwix, provider(qwix), swapped), wrt) for swapped in (True, False))
    assert jax.tree.leaves(ours[0][1])
    assert_close(ours, theirs, tolerance)
    assert_close(run(make(False, recurrent=False)), plain, 1e-6)
    assert_close(run(make(True, recurrent=False)), plain, 1e-4)
