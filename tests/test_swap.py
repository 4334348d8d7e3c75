"""Swapping keeps parameters, paths and values, and says what it did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import layers
from tests.support import assert_trees_close, temp_bytes

TOKENS = jnp.array([[1, 2, 3, 0], [4, 4, 1, 2]])


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs), nnx.RMSNorm(8, rngs=rngs)])
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.gelu, nnx.Linear(16, 8, rngs=rngs))
        self.group = nnx.GroupNorm(8, 2, rngs=rngs)
        self.batch = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.shared = self.norms[0]
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norms[0](x), is_causal=True)
        x = self.conv(self.shared(x) + self.mlp(self.norms[1](x)))
        return self.embed.attend(self.batch(self.group(x)))


def deterministic(seed=0):
    model = Model(nnx.Rngs(seed))
    model.eval()
    return model


def test_values_and_gradients_stay():
    plain, swapped = deterministic(), layers.swap(deterministic()).model
    assert_trees_close(swapped(TOKENS), plain(TOKENS), rtol=1e-4, atol=1e-5)
    loss = lambda m: jnp.sum(m(TOKENS) ** 2)
    ours, theirs = (nnx.to_pure_dict(nnx.grad(loss)(m)) for m in (swapped, plain))
    assert_trees_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_parameters_are_the_same_objects_at_the_same_paths():
    model = deterministic()
    before = dict(nnx.to_flat_state(nnx.state(model)))
    kernel = model.mlp.layers[0].kernel
    report = layers.swap(model)
    assert report.model is model
    assert model.mlp.layers[0].kernel is kernel
    after = dict(nnx.to_flat_state(nnx.state(model)))
    assert before.keys() == after.keys()


def test_every_layer_with_a_twin_is_replaced_and_the_rest_is_said():
    model = deterministic()
    report = layers.swap(model)
    assert type(model.embed) is layers.Embed
    assert type(model.norms[0]) is layers.LayerNorm
    assert model.shared is model.norms[0]
    assert type(model.mlp.layers[2]) is layers.Linear
    assert type(model.attention) is layers.MultiHeadAttention
    assert "conv" in {r.path for r in report.left}
    assert "no twin for Conv" in str(report)


def test_training_dropout_still_drops():
    model = layers.swap(Model(nnx.Rngs(0))).model
    y = model.dropout(jnp.ones((64, 64)))
    share = float((y == 0).mean())
    assert abs(share - 0.5) < 5 * 0.5 / 64


def test_root_that_is_a_layer_is_replaced_in_the_report():
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    report = layers.swap(layer)
    assert type(report.model) is layers.Linear
    assert report.model.kernel is layer.kernel


def test_only_and_skip_choose():
    model = deterministic()
    layers.swap(model, only=[nnx.Linear], skip=lambda path, layer: path == "mlp.layers.2")
    assert type(model.mlp.layers[0]) is layers.Linear
    assert type(model.mlp.layers[2]) is nnx.Linear
    assert type(model.embed) is nnx.Embed


def test_a_subclass_of_a_flax_layer_is_left():
    class Mine(nnx.Linear):
        pass

    model = nnx.Sequential(Mine(3, 4, rngs=nnx.Rngs(0)))
    report = layers.swap(model)
    assert type(model.layers[0]) is Mine
    assert [(r.path, r.layer, r.left_because) for r in report.left if "layers" in r.path] == [
        ("layers.0", "Mine", "a subclass of Linear may compute something else")
    ]


def test_what_is_swapped_already_is_not_reported_again():
    model = layers.swap(deterministic()).model
    assert not any("subclass" in r.left_because for r in layers.swap(model).rows)


def test_classes_from_a_generator_are_all_read():
    model = deterministic()
    layers.swap(model, only=(c for c in (nnx.LayerNorm, nnx.Linear)))
    assert type(model.norms[0]) is layers.LayerNorm
    assert type(model.mlp.layers[2]) is layers.Linear
    assert type(model.embed) is nnx.Embed


@pytest.mark.parametrize(("skip", "held"), [("head", "'h'"), (["head"], "'head'"), ([nnx.Linear, 3], "3"), (3, "3"), (None, "")], ids=str)
def test_choice_that_is_no_class_and_no_function_is_an_error_before_anything_is_changed(skip, held):
    model = deterministic()
    skip = model.embed if held == "" else skip
    with pytest.raises(TypeError, match=f"swap: skip holds {held or 'a layer, Embed'}, but must be classes of layers"):
        layers.swap(model, skip=skip)
    assert type(model.embed) is nnx.Embed


def test_trains_on_with_the_same_losses():
    import optax

    losses = []
    for model in (deterministic(), layers.swap(deterministic()).model):
        optimizer = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)
        track = []
        for _ in range(3):
            value, grads = nnx.value_and_grad(lambda m: jnp.mean(m(TOKENS) ** 2))(model)
            optimizer.update(model, grads)
            track.append(float(value))
        losses.append(track)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_what_is_no_module_is_an_error():
    with pytest.raises(TypeError, match="swap: model is a dict"):
        layers.swap({"a": jax.numpy.ones(3)})


@pytest.mark.parametrize("cell", [nnx.OptimizedLSTMCell, nnx.LSTMCell, nnx.GRUCell], ids=lambda c: c.__name__)
def test_recurrent_layer_keeps_its_cell_and_its_gradients(cell):
    rnn = nnx.RNN(cell(4, 6, rngs=nnx.Rngs(0)), rngs=False)
    x, start = jnp.sin(jnp.arange(40.0)).reshape(2, 5, 4), jnp.zeros((2, 6))
    carry = start if cell is nnx.GRUCell else (start, start)
    loss = lambda m: jnp.sum(jnp.cos(m(x, initial_carry=carry)))
    expected = nnx.to_pure_dict(nnx.grad(loss)(rnn))
    inner = rnn.cell
    report = layers.swap(rnn, only=nnx.RNN)
    assert type(report.model) is layers.RNN and report.model.cell is inner
    assert_trees_close(nnx.to_pure_dict(nnx.grad(loss)(report.model)), expected, rtol=1e-4, atol=1e-5)


def test_recurrent_layer_with_a_cell_of_its_own_is_left_with_the_reason():
    class Cell(nnx.LSTMCell):
        pass

    report = layers.swap(nnx.RNN(Cell(4, 6, rngs=nnx.Rngs(0)), rngs=False))
    assert "its cell is a Cell" in next(r.left_because for r in report.left if r.layer == "RNN")


def test_parts_of_a_swapped_layer_are_not_listed_as_left():
    class Both(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, normalize_qk=True, rngs=rngs)
            self.rnn = nnx.RNN(nnx.LSTMCell(8, 6, rngs=rngs), rngs=False)

    model = Both(nnx.Rngs(0))
    report = layers.swap(model)
    assert {r.path for r in report.rows} == {"attention", "attention.query_ln", "attention.key_ln", "rnn"} and not report.left
    assert type(model.attention.query_ln) is layers.LayerNorm
    assert not any(isinstance(m, layers.Linear) for _, m in nnx.iter_modules(model.rnn))
    assert not layers.swap(model).rows


def by_hand(query, key, value, **options):
    return nnx.dot_product_attention(query, key, value, **options)


OWN = {
    "dot_general": lambda rngs: nnx.Linear(3, 4, dot_general=lambda *a, **k: 2 * jax.lax.dot_general(*a, **k), rngs=rngs),
    "precision": lambda rngs: nnx.Linear(3, 4, precision="highest", rngs=rngs),
    "preferred_element_type": lambda rngs: nnx.Linear(3, 4, preferred_element_type=jnp.float32, rngs=rngs),
    "attention_fn": lambda rngs: nnx.MultiHeadAttention(2, 8, attention_fn=by_hand, decode=False, rngs=rngs),
}


@pytest.mark.parametrize("own", OWN)
def test_layer_that_flax_s_code_would_still_serve_is_left_with_the_reason(own):
    layer = OWN[own](nnx.Rngs(0))
    report = layers.swap(layer)
    assert report.model is layer
    assert f"its {own} is its own" in report.left[0].left_because


class Convolutional(nnx.Module):
    """Convolutions, batch and group norms, dropout."""

    def __init__(self, rngs):
        self.convs = nnx.List([nnx.Conv(3, 16, (3, 3), rngs=rngs), nnx.Conv(16, 16, (3, 3), rngs=rngs)])
        self.norms = nnx.List([nnx.BatchNorm(16, rngs=rngs), nnx.GroupNorm(16, 4, rngs=rngs)])
        self.dropout, self.head = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(self.dropout(x.mean((1, 2))))


class CrossAttending(nnx.Module):
    """A decoder of tokens that attends to features of an encoder, with learned positions, layer norms and biases."""

    def __init__(self, rngs):
        attention = lambda: nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
        self.embed, self.positions = nnx.Embed(40, 32, rngs=rngs), nnx.Param(jnp.zeros((24, 32)))
        self.own, self.cross = attention(), attention()
        self.norms = nnx.List([nnx.LayerNorm(32, rngs=rngs) for _ in range(4)])
        self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, tokens, heard):
        x = self.embed(tokens) + self.positions[...]
        x = x + self.own(self.norms[0](x), is_causal=True)
        x = x + self.cross(self.norms[1](x), heard)
        x = x + self.down(nnx.gelu(self.up(self.norms[2](x))))
        return self.embed.attend(self.norms[3](x))


class Looped(nnx.Module):
    """Blocks of 16-bit Linears and an RMS norm, in a loop over stacked parameters."""

    def __init__(self, rngs):
        def block(rngs):
            options = {"dtype": jnp.bfloat16, "rngs": rngs}
            return nnx.Sequential(nnx.RMSNorm(32, **options), nnx.Linear(32, 64, **options), nnx.silu, nnx.Linear(64, 32, **options))

        self.blocks = nnx.vmap(block)(rngs.split(4))

    def __call__(self, x):
        graph, state = nnx.split(self.blocks)
        return jax.lax.scan(lambda x, s: (x + nnx.merge(graph, s)(x), None), x, state)[0]


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn, self.head = nnx.RNN(nnx.OptimizedLSTMCell(64, 128, rngs=rngs), rngs=False), nnx.Linear(128, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x, initial_carry=(jnp.zeros((32, 128)), jnp.zeros((32, 128)))))


MODELS = {
    Convolutional: lambda: (jnp.ones((8, 16, 16, 3)),),
    CrossAttending: lambda: (jnp.ones((4, 24), int), jnp.ones((4, 24, 32))),
    Looped: lambda: (jnp.ones((64, 32), jnp.bfloat16),),
    Recurrent: lambda: (jnp.ones((32, 128, 64)),),
}


@pytest.mark.parametrize("kind", MODELS, ids=lambda k: k.__name__)
def test_swapped_model_takes_no_more_memory_than_the_plain_one(kind):
    def temporary(model):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def step(params, rest, *batch):
            model = nnx.merge(graph, params, rest, copy=True)
            return jnp.square(model(*batch).astype(jnp.float32)).mean(), nnx.state(model, nnx.Not(nnx.Param))

        return temp_bytes(jax.value_and_grad(step, has_aux=True), params, rest, *MODELS[kind]())

    plain, report = temporary(kind(nnx.Rngs(0))), layers.swap(kind(nnx.Rngs(0)))
    assert report.swapped
    assert temporary(report.model) <= plain
