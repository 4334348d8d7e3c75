"""Mixtures of experts against every expert applied to every token in float64: values, derivatives, empty and overfull experts, memory, training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import layers
from layers.experts.moe import moe
from tests.support import assert_trees_close, saved_bytes

T, D, H, E, K = 6, 3, 5, 4, 2
rng = np.random.default_rng(0)
X, W = rng.normal(size=(T, D)), rng.normal(size=(T, K))
UP, DOWN, GATE = (rng.normal(size=s) for s in ((E, D, H), (E, H, D), (E, D, H)))
INDICES = {
    "mixed": np.array([[0, 2], [2, 0], [2, 3], [3, 2], [1, 0], [0, 3]]),
    "one expert has all": np.full((T, K), 1),
    "one has none": np.array([[0, 2], [2, 0], [2, 3], [3, 2], [3, 0], [0, 3]]),
    "choices that are none": np.array([[0, 4], [4, 4], [2, -1], [9, 2], [1, 0], [0, 4]]),
}


def plain(x, w, up, down, gate, indices, f):
    a = jnp.einsum("ti,eih->teh", x, up)
    h = f(a) if gate is None else f(jnp.einsum("ti,eih->teh", x, gate)) * a
    share = ((indices[..., None] == jnp.arange(E)) * w[..., None]).sum(1)
    return jnp.einsum("teh,eho,te->to", h, down, share)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", INDICES)
def test_values_and_all_derivatives_are_those_of_every_expert_applied_to_every_token(name, gated):
    with jax.enable_x64(True):
        dy, indices = np.cos(np.arange(T * D)).reshape(T, D), INDICES[name]
        args = (X, W, UP, DOWN, GATE) if gated else (X, W, UP, DOWN)
        ours = lambda x, w, u, d, g=None: (moe(x, w, indices, u, d, g, activation="silu") * dy).sum()
        theirs = lambda x, w, u, d, g=None: (plain(x, w, u, d, g, indices, jax.nn.silu) * dy).sum()

        def run(fn):
            every = tuple(range(len(args)))
            slope = lambda *a: sum((g**2).sum() for g in jax.grad(fn, every)(*a))
            return jax.value_and_grad(fn, every)(*args), jax.jvp(slope, args, tuple(np.ones_like(a) for a in args))

        assert_trees_close(jax.jit(lambda: run(ours))(), jax.jit(lambda: run(theirs))(), rtol=1e-9, atol=1e-10)


def test_activation_may_be_any_function_and_dtype_that_of_the_products():
    f = lambda a: jnp.sin(a) * a
    found = moe(X.astype(np.float32), W.astype(np.float32), INDICES["mixed"], UP.astype(np.float32), DOWN.astype(np.float32), activation=f)
    np.testing.assert_allclose(found, plain(X, W, UP, DOWN, None, INDICES["mixed"], f), rtol=1e-4, atol=1e-5)
    assert moe(jnp.asarray(X), jnp.asarray(W), INDICES["mixed"], jnp.asarray(UP), jnp.asarray(DOWN), dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_tokens_and_experts_that_nobody_chose_are_never_touched():
    indices = jnp.array([[0, 4], [4, 4], [0, 2], [2, 0], [4, 2], [0, 4]])
    x, w, up, down = (jnp.asarray(a, jnp.float32) for a in (X, W, UP, DOWN))

    def run(number):
        args = x.at[1].set(number), jnp.where(indices == 4, number, w), up.at[jnp.array([1, 3])].set(number), down.at[1].set(number)
        return jax.value_and_grad(lambda *a: (moe(a[0], a[1], indices, *a[2:]) ** 2).sum(), (0, 1, 2, 3))(*args)

    found = run(jnp.nan)
    assert_trees_close(found, run(0.0), rtol=1e-6)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(found))


def test_input_weights_and_preactivations_are_what_is_saved():
    x, w, up, down, gate = (jnp.asarray(a, jnp.float32) for a in (X, W, UP, DOWN, GATE))
    indices = jnp.asarray(INDICES["mixed"], jnp.int32)
    arguments = sum(a.nbytes for a in (x, w, up, down, gate, indices))
    saved = saved_bytes(lambda *a: moe(*a[:2], indices, *a[2:]), x, w, up, down, gate)
    assert saved <= arguments - sum(a.nbytes for a in (x, w, up, down, gate)) + 2 * T * K * H * 4


def test_devices_send_their_own_tokens():
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    x, w, up, down = (jnp.asarray(a, jnp.float32) for a in (X, W, UP, DOWN))
    xs, ws, indices = jnp.tile(x, (8, 1)), jnp.tile(w, (8, 1)), jnp.tile(jnp.asarray(INDICES["mixed"]), (8, 1))
    shards = jax.jit(jax.shard_map(moe, mesh=mesh, in_specs=(P("data"), P("data"), P("data"), P(), P()), out_specs=P("data")))
    run = lambda fn: jax.value_and_grad(lambda u, d: (fn(xs, ws, indices, u, d) ** 2).sum(), (0, 1))(up, down)
    assert_trees_close(run(shards), run(moe), rtol=1e-4, atol=1e-4)


# Modules


def reference(module, x, k, f, *, gated):
    """What a module gives, from its parameters, dropless, softmax."""
    s = jax.nn.softmax(x @ module.router[...])
    indices = jnp.argsort(-s, stable=True)[:, :k]
    w = jnp.take_along_axis(s, indices, 1)
    w = w / w.sum(-1, keepdims=True)
    share = ((indices[..., None] == jnp.arange(s.shape[1])) * w[..., None]).sum(1)
    a = jnp.einsum("ti,eih->teh", x, module.up[...])
    h = f(jnp.einsum("ti,eih->teh", x, module.gate[...])) * a if gated else f(a)
    return jnp.einsum("teh,eho,te->to", h, module.down[...], share)


@pytest.mark.parametrize(("module", "f"), [(layers.MoE, jax.nn.gelu), (layers.GatedMoE, jax.nn.silu)])
def test_module_gives_what_its_parameters_say_with_their_gradients(module, f):
    with jax.enable_x64(True):
        model = module(D, H, E, K, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)
        ours = lambda state, x: (nnx.merge(graph, state)(x) ** 2).sum()
        theirs = lambda state, x: (reference(nnx.merge(graph, state), x, K, f, gated=module.gated) ** 2).sum()
        assert_trees_close(jax.value_and_grad(ours, (0, 1))(state, X), jax.value_and_grad(theirs, (0, 1))(state, X), rtol=1e-9, atol=1e-12)


def test_experts_are_drawn_as_one_expert_would_be():
    model = layers.MoE(200, 300, 3, 1, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(model.up[...].std((1, 2)), 200**-0.5, rtol=0.05)
    assert model.router.shape == (200, 3) and model.gate is None
    assert not jnp.array_equal(model.up[0], model.up[1])


def test_no_token_is_lost_without_a_capacity_and_some_are_with_one():
    model = layers.GatedMoE(D, H, E, K, rngs=nnx.Rngs(0))
    _, free = model(jnp.asarray(X, jnp.float32), return_routing=True)
    assert free.counts.sum() == T * K
    tight = layers.GatedMoE(D, H, E, K, capacity_factor=0.4, rngs=nnx.Rngs(0))
    y, routing = tight(jnp.asarray(X, jnp.float32), return_routing=True)
    assert routing.counts.max() <= 2 and (routing.indices == E).any() and jnp.isfinite(y).all()


def test_padding_gives_zero_and_counts_for_nothing():
    model = layers.MoE(D, H, E, K, rngs=nnx.Rngs(0))
    x, mask = jnp.asarray(X, jnp.float32).reshape(2, 3, D), jnp.array([[1, 1, 0], [1, 0, 0]], bool)
    y, routing = model(jnp.where(mask[..., None], x, jnp.nan), mask, return_routing=True)
    np.testing.assert_allclose(y, jnp.where(mask[..., None], model(x), 0), rtol=1e-5, atol=1e-6)
    assert routing.counts.sum() == 3 * K


def test_half_precision_is_routed_in_float32():
    model = layers.MoE(D, H, E, K, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y, routing = model(jnp.asarray(X, jnp.bfloat16), return_routing=True)
    assert y.dtype == jnp.bfloat16 and routing.weights.dtype == jnp.float32 and model.router.dtype == jnp.float32


def test_bias_balances_experts_without_a_loss():
    model = layers.MoE(D, H, E, 1, use_balance_bias=True, scores="sigmoid", rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(256, D)) + 2, jnp.float32)

    @nnx.jit
    def step(model):
        _, routing = model(x, return_routing=True)
        model.balance(routing.counts, rate=0.02)
        return routing.counts

    first, *_, last = (step(model) for _ in range(60))
    assert first.max() > 1.7 * 64 and last.max() < 1.4 * 64
    assert "bias" not in nnx.state(model, nnx.Param)


def test_it_is_trained_by_nnx_and_optax():
    model = layers.GatedMoE(D, 16, E, K, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = jnp.asarray(rng.normal(size=(64, D)), jnp.float32)
    target = jnp.where(x[:, :1] > 0, jnp.sin(2 * x), x[:, ::-1])

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            y, routing = model(x, return_routing=True)
            return ((y - target) ** 2).mean() + 1e-2 * routing.balance_loss + 1e-3 * routing.z_loss

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    first, *_, last = (step(model, optimizer) for _ in range(200))
    assert last < 0.2 * first


WRONG = {
    "k": (lambda: layers.MoE(D, H, E, 9, rngs=nnx.Rngs(0)), r"MoE: k is 9, but must be a whole number in \[1, 4\]"),
    "features": (lambda: layers.GatedMoE(D, H, E, K, rngs=nnx.Rngs(0))(jnp.ones((2, 4))), r"GatedMoE: x has shape \(2, 4\), but must be"),
    "no bias": (lambda: layers.MoE(D, H, E, K, rngs=nnx.Rngs(0)).balance(jnp.ones(E)), "MoE.balance: there is no bias"),
    "down": (
        lambda: moe(jnp.ones((2, D)), jnp.ones((2, K)), jnp.zeros((2, K), int), jnp.ones((E, D, H)), jnp.ones((E, D, H))),
        "moe: down_kernels has",
    ),
    "indices": (
        lambda: moe(jnp.ones((2, D)), jnp.ones((2, K)), jnp.zeros(2, int), jnp.ones((E, D, H)), jnp.ones((E, H, D))),
        "moe: indices has shape",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_is_named(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()
