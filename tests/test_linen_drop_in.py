"""`from layers import linen as nn` in a Linen file: the same paths, variables, values and losses.

It takes no more memory, but for the joined kernels of recurrent cells.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as flax_nn
from flax.core import meta

from layers import linen as nn
from tests.linen_models import MODELS
from tests.support import assert_trees_close, planned_bytes, temp_bytes

pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")

OURS = {
    "BatchNorm",
    "Dense",
    "Dropout",
    "Embed",
    "GroupNorm",
    "LayerNorm",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "RMSNorm",
    "RNN",
    "SelfAttention",
    "dot_product_attention",
}


def step_of(model, batch, loss):
    """A step of gradient descent with momentum, `(variables, moments) -> (variables, moments, loss)`, and its first state."""
    variables = jax.jit(model.init)(jax.random.key(0), *batch)
    optimizer = optax.sgd(0.05, momentum=0.9)

    def step(variables, moments):
        rest = {k: v for k, v in variables.items() if k != "params"}

        def scored(params):
            logits, written = model.apply({"params": params, **rest}, *batch, mutable=list(rest))
            return loss(logits), written

        (value, written), grads = jax.value_and_grad(scored, has_aux=True)(variables["params"])
        updates, moments = optimizer.update(grads, moments)
        return {"params": optax.apply_updates(variables["params"], updates), **rest, **written}, moments, value

    return step, (variables, optimizer.init(variables["params"]))


@pytest.mark.parametrize("name", MODELS)
def test_model_of_people_s_make_has_the_same_variables_values_and_losses_and_takes_no_more_memory(name):
    tracks = []
    for kind in (nn, flax_nn):
        step, state = step_of(*MODELS[name](kind))
        first, losses, compiled = state[0], [], jax.jit(step).lower(*state).compile()
        memory = planned_bytes(compiled)
        for _ in range(5):
            *state, value = compiled(*state)
            losses.append(value)
        tracks.append((first, losses, state[0], memory))
    (ours, our_losses, our_end, our_memory), (theirs, their_losses, their_end, their_memory) = tracks
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)  # with the names of partitioned axes
    assert_trees_close(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(our_losses, their_losses, rtol=2e-4)
    assert_trees_close(our_end.get("batch_stats", {}), their_end.get("batch_stats", {}), rtol=1e-2, atol=1e-3)
    joined = jax.tree.leaves(ours["params"].get("LSTMCell_0", {}))  # kernels of the gates of a cell, joined, with their gradients and biases
    guarded = jax.tree.leaves(ours.get("batch_stats", {}))  # our norms hold a second mean, variance and root, for squares that overflow
    assert our_memory <= their_memory + 3 * sum(k.nbytes for k in joined) + 2 * sum(x.nbytes for x in guarded)


X = jnp.sin(jnp.arange(2 * 6 * 8.0)).reshape(2, 6, 8)
INDICES = jnp.array([[0, 3, 3], [6, 1, 0]])
PARTED = flax_nn.with_partitioning(flax_nn.initializers.normal(), ("a", "b"))
CALLS = {
    "Dense": ("Dense", (5,), {}, X),
    "Dense without bias": ("Dense", (5, False), {}, X),
    "Dense of bfloat16": ("Dense", (5,), {"dtype": jnp.bfloat16}, X),
    "Dense, partitioned": ("Dense", (5,), {"kernel_init": PARTED}, X),
    "Dense of high precision": ("Dense", (5,), {"precision": "highest"}, X),
    "Dense with a product of its own": ("Dense", (5,), {"dot_general": lambda *a, **k: 2 * jax.lax.dot_general(*a, **k)}, X),
    "DenseGeneral": ("DenseGeneral", ((2, 3),), {"axis": (-2, -1)}, X),
    "Embed": ("Embed", (7, 4), {}, INDICES),
    "Embed of bfloat16": ("Embed", (7, 4), {"dtype": jnp.bfloat16}, INDICES),
    "LayerNorm": ("LayerNorm", (), {}, X),
    "LayerNorm with its first argument": ("LayerNorm", (0.1,), {}, X),
    "LayerNorm over two axes": ("LayerNorm", (), {"reduction_axes": (-2, -1), "feature_axes": (-2, -1)}, X),
    "LayerNorm of integers": ("LayerNorm", (), {}, INDICES),
    "LayerNorm in 16 bits": ("LayerNorm", (), {"dtype": jnp.bfloat16, "force_float32_reductions": False}, X.astype(jnp.bfloat16)),
    "RMSNorm": ("RMSNorm", (), {}, X),
    "RMSNorm of bfloat16": ("RMSNorm", (1e-3, jnp.bfloat16), {}, X),
    "RMSNorm without scale": ("RMSNorm", (), {"use_scale": False}, X),
    "BatchNorm": ("BatchNorm", (False,), {}, X),
    "BatchNorm of two axes": ("BatchNorm", (False,), {"axis": (1, 2)}, X),
    "BatchNorm in use": ("BatchNorm", (True,), {}, X),
    "GroupNorm": ("GroupNorm", (4,), {}, X),
    "GroupNorm of group size": ("GroupNorm", (None, 4), {}, X),
    "GroupNorm of one image": ("GroupNorm", (2,), {"reduction_axes": (0, 1, 2)}, X),
    "SelfAttention": ("SelfAttention", (2,), {}, X),
    "MultiHeadAttention": ("MultiHeadAttention", (2,), {"qkv_features": 12, "out_features": 5}, X),
    "MultiHeadDotProductAttention": ("MultiHeadDotProductAttention", (2,), {"normalize_qk": True, "force_fp32_for_softmax": True}, X),
    "attention of high precision": ("MultiHeadDotProductAttention", (2,), {"precision": "highest"}, X),
    "RNN": ("RNN", (flax_nn.GRUCell(5),), {}, X),
}


@pytest.mark.parametrize("case", CALLS)
def test_module_has_the_variables_values_and_gradients_of_linen(case):
    name, args, options, x = CALLS[case]
    ours, theirs = (getattr(kind, name)(*args, **options) for kind in (nn, flax_nn))
    assert isinstance(ours, getattr(flax_nn, name))
    variables, expected = (jax.jit(m.init)(jax.random.key(0), x) for m in (ours, theirs))
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    assert_trees_close(variables, expected, rtol=0)

    def outcome(module, variables):
        y, written = module.apply(variables, x, mutable=["batch_stats"])
        weights = jnp.cos(jnp.arange(float(y.size))).reshape(y.shape)
        return (y * weights).astype(jnp.float32).sum(), (y, written)

    ours_out, theirs_out = (jax.jit(jax.value_and_grad(lambda v, m=m: outcome(m, v), has_aux=True))(variables) for m in (ours, theirs))
    rough = jax.tree.leaves(theirs_out)[1].dtype == jnp.bfloat16
    assert [y.dtype for y in jax.tree.leaves(ours_out)] == [y.dtype for y in jax.tree.leaves(theirs_out)]
    assert_trees_close(meta.unbox(ours_out), meta.unbox(theirs_out), rtol=3e-2 if rough else 1e-4, atol=3e-2 if rough else 1e-5)


def test_everything_else_is_linen_s_own():
    for name in dir(flax_nn):
        if not name.startswith("__"):
            assert (getattr(nn, name) is getattr(flax_nn, name)) == (name not in OURS), name
    assert set(dir(flax_nn)) <= set(dir(nn))


@pytest.mark.parametrize("name", sorted(OURS - {"dot_product_attention"}))
def test_fields_are_those_of_linen_in_their_order(name):
    ours, theirs = (list(getattr(kind, name).__dataclass_fields__) for kind in (nn, flax_nn))
    assert [f for f in ours if f in theirs] == theirs
    assert set(ours) - set(theirs) <= {"generator", "save"}


def test_dropout_is_a_function_of_its_stream_and_of_the_flag_in_linen_s_place():
    module, key = nn.Dropout(0.25), jax.random.key(3)
    assert module.init(key, X, False) == {}  # without a stream of its own
    assert module.apply({}, X, True) is X
    dropped = [np.asarray(module.apply({}, jnp.ones((64, 64)), False, rngs={"dropout": k})) for k in (key, key, jax.random.key(4))]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert (dropped[0] != dropped[2]).any()
    np.testing.assert_allclose((dropped[0] == 0).mean(), 0.25, atol=5 * (0.25 * 0.75) ** 0.5 / 64)
    given = module.apply({}, jnp.ones((64, 64)), False, key)
    np.testing.assert_array_equal(given, nn.Dropout(0.25).apply({}, jnp.ones((64, 64)), deterministic=False, rng=key))


def test_dropout_by_threefry_has_flax_s_masks():
    key = jax.random.key(3)
    ours = nn.Dropout(0.5, (0,), False, generator="threefry").apply({}, X, rngs={"dropout": key})
    np.testing.assert_array_equal(ours, flax_nn.Dropout(0.5, (0,), False).apply({}, X, rngs={"dropout": key}))


def test_dropout_in_a_model_needs_no_stream_at_init_and_one_in_training():
    model, batch, _ = MODELS["language model"](nn)
    variables = model.init(jax.random.key(0), *batch, deterministic=False)
    outs = [model.apply(variables, *batch, deterministic=False, rngs={"dropout": jax.random.key(i)}) for i in (1, 2)]
    assert np.isfinite(outs[0]).all() and (outs[0] != outs[1]).any()


def test_batch_statistics_over_a_named_axis_are_linen_s():
    x = jnp.sin(jnp.arange(4 * 3 * 5.0)).reshape(4, 3, 5)
    results = []
    for kind in (nn, flax_nn):
        module = kind.BatchNorm(use_running_average=False, axis_name="batch")
        variables = module.init(jax.random.key(0), x[0])
        results.append(jax.vmap(lambda x, m=module, v=variables: m.apply(v, x, mutable=["batch_stats"]), axis_name="batch")(x))
    assert_trees_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["SelfAttention", "MultiHeadDotProductAttention"])
def test_attention_decodes_as_linen_s(attention):
    ours, theirs = (getattr(kind, attention)(2, decode=True) for kind in (nn, flax_nn))
    states = [m.init(jax.random.key(0), X) for m in (ours, theirs)]
    for t in range(3):
        outs = []
        for i, module in enumerate((ours, theirs)):
            y, cache = module.apply(states[i], X[:, t : t + 1], mutable=["cache"])
            states[i] = {**states[i], **cache}
            outs.append(y)
        np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-6)


def test_sown_weights_and_masks_are_linen_s():
    mask = flax_nn.make_causal_mask(X[..., 0])
    ours, theirs = (kind.MultiHeadDotProductAttention(2) for kind in (nn, flax_nn))
    variables = ours.init(jax.random.key(0), X)
    for options in ({"mask": mask}, {"mask": mask, "sow_weights": True}):
        outs = [m.apply(variables, X, mutable=["intermediates"], **options) for m in (ours, theirs)]
        assert_trees_close(*outs, rtol=1e-4, atol=1e-6)


def test_attention_function_is_known_by_linen_s_name_too():
    query = X.reshape(2, 6, 2, 4)
    np.testing.assert_allclose(
        nn.dot_product_attention(query, query, query), flax_nn.dot_product_attention(query, query, query), rtol=1e-4, atol=1e-6
    )
    saved = [
        temp_bytes(jax.grad(lambda q, f=f: f(q, q, q).sum()), jnp.ones((1, 512, 2, 8)))
        for f in (nn.dot_product_attention, flax_nn.dot_product_attention)
    ]
    assert saved[0] < saved[1] / 2


def test_wrong_sizes_are_linen_s_errors():
    variables = nn.Dense(3).init(jax.random.key(0), X)
    with pytest.raises(flax_nn.module.errors.ScopeParamShapeError):
        nn.Dense(3).apply(variables, X[..., :4])
