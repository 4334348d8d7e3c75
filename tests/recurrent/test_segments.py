"""Packed sequences: values and gradients are those of the sequences one by one, whatever stands in the others."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import layers
import layers.linen
from tests.recurrent.cells import draw, loss, quick_compilation, short_chunks
from tests.support import assert_trees_close, jit_grad, temp_bytes

__all__ = ["quick_compilation"]

selective_scan_module = importlib.import_module("layers.recurrent.selective_scan")
short_convolution_module = importlib.import_module("layers.recurrent.short_convolution")

IDS = np.array([[3, 3, 3, 3, 3, 1, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1, 1]])
"""Packed sequences: of one step, across chunks, and with an id that comes back."""
BATCH, TIME = IDS.shape
HIT = np.array([[0, 0, 0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]], bool)
"""One sequence of each row, for what may stand there."""
ACROSS = np.array([[3, 3, 3, 1, 1, 1, 3, 3, 3], [0, 0, 1, 1, 1, 1, 1, 0, 0]])
"""The same with one that goes across the border of two chunks, between others in both."""


def linear_recurrence(rows, weights, *, reverse=False, **options):
    a, b = rows
    h = layers.linear_recurrence(a * weights[0], b, axis=1, reverse=reverse, **options)
    return h, h[:, 0 if reverse else -1]


def selective_scan(rows, weights, **options):
    u, delta, b, c, z = rows
    a, d, bias = weights
    return layers.selective_scan(u, delta, -jnp.exp(a), b, c, d, z=z, delta_bias=bias, delta_softplus=True, return_last_state=True, **options)


def attention(rows, weights, **options):
    q, k, v, g = rows
    return layers.gated_linear_attention(q, k, v, -jnp.abs(g) * weights[0] ** 2, return_state=True, chunk_size=4, **options)


def delta_rule(rows, weights, **options):
    q, k, v, g, beta = rows
    return layers.gated_delta_rule(q, k / 2, v, -jnp.abs(g) * weights[0] ** 2, beta / 2, return_state=True, chunk_size=4, **options)


def dual(rows, weights, **options):
    x, dt, b, c, z = rows
    a, d, bias = weights
    options = {"dt_softplus": True, "return_last_state": True, "chunk_size": 4, **options}
    return layers.state_space_dual(x, dt, -jnp.exp(a), b, c, d, z=z, dt_bias=bias, **options)


def convolution(rows, weights, **options):
    return layers.short_convolution(*rows, *weights, activation="silu", return_state=True, **options)


def mamba(rows, weights, **options):
    block = nnx.eval_shape(lambda: layers.Mamba(3, d_state=2, expand=1, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    graph, parameters = nnx.split(block)
    leaves, tree = jax.tree.flatten(parameters)
    with jax.ensure_compile_time_eval():  # or every program draws them, which takes most of its compilation
        drawn = [draw(50 + i, x.shape) / 2 for i, x in enumerate(leaves)]
    drawn = jax.tree.map(lambda x: x * weights[0], drawn)
    return nnx.merge(graph, tree.unflatten(drawn))(rows[0], return_state=True, **options)


def cell(name, rows, weights, **options):
    return getattr(layers, name)(*rows, *weights, **options)


CASES = {
    "linear_recurrence": (linear_recurrence, [(3,), (3,)], [(3,)]),
    "linear_recurrence, reverse": (functools.partial(linear_recurrence, reverse=True), [(3,), (3,)], [(3,)]),
    "selective_scan": (selective_scan, [(3,), (3,), (2,), (2,), (3,)], [(3, 2), (3,), (3,)]),
    "gated_linear_attention": (attention, [(2, 3), (2, 3), (2, 4), (2, 3)], [(3,)]),
    "gated_delta_rule": (delta_rule, [(2, 3), (2, 3), (2, 4), (2,), (2,)], [()]),
    "state_space_dual": (dual, [(2, 3), (2,), (1, 4), (1, 4), (2, 3)], [(2,), (2,), (2,)]),
    "short_convolution": (convolution, [(3,)], [(4, 3), (3,)]),
    "mamba": (mamba, [(3,)], [()]),
    "lstm": (functools.partial(cell, "lstm"), [(3,)], [(3, 8), (2, 8), (8,)]),
    "gru, reverse, gates": (functools.partial(cell, "gru", reverse=True, save="gates"), [(3,)], [(3, 6), (2, 6), (6,), (6,)]),
}
AT_ONCE = ["linear_recurrence", "selective_scan", "gated_linear_attention", "gated_delta_rule", "state_space_dual"]
"""What an accelerator is given other programs for."""


def arguments(name):
    _, rows, weights = CASES[name]
    return tuple(draw(i, (BATCH, TIME, *s)) for i, s in enumerate(rows)), tuple(draw(10 + i, s) for i, s in enumerate(weights))


def packed(name):
    return lambda rows, weights: CASES[name][0](rows, weights, segment_ids=jnp.asarray(IDS))


def one_by_one(name):
    """A loop over the sequences, each by itself; the last state of a row is that of the sequence that is run last."""
    fn, last = CASES[name][0], 0 if "reverse" in name else -1

    def run(rows, weights):
        outs, states = [], []
        for i, ids in enumerate(IDS):
            borders = [0, *(np.flatnonzero(np.diff(ids)) + 1), TIME]
            each = [fn(tuple(x[i : i + 1, a:b] for x in rows), weights) for a, b in itertools.pairwise(borders)]
            outs.append(jnp.concatenate([y for y, _ in each], 1))
            states.append(each[last][1])
        return jnp.concatenate(outs), jax.tree.map(lambda *s: jnp.concatenate(s), *states)

    return run


def program(run):
    """The outputs, every gradient of a loss of them, and the outputs' tangents."""

    def everything(rows, weights):
        args = rows, weights
        grads, out = jit_grad(lambda *args: (loss(out := run(*args)), out), (0, 1), has_aux=True)(*args)
        return out, grads, jax.jvp(run, args, jax.tree.map(jnp.cos, args))[1]

    return jax.jit(everything)


@functools.cache
def expected(name):
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        chunks_of_four(patch)
        return jax.device_get(program(one_by_one(name))(*arguments(name)))


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    chunks_of_four(monkeypatch)


def chunks_of_four(patch):
    short_chunks(patch, 4)
    patch.setattr(selective_scan_module, "CHUNK", 4)
    patch.setattr(short_convolution_module, "CHUNK", 4)


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_tangents_are_those_of_the_sequences_one_by_one(name):
    with jax.enable_x64(True):
        assert_trees_close(program(packed(name))(*arguments(name)), expected(name), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", AT_ONCE)
def test_all_steps_at_once_are_right_too(name):
    with jax.enable_x64(True), layers.compiling_for("cuda"):
        assert_trees_close(program(packed(name))(*arguments(name)), expected(name), rtol=1e-10, atol=1e-11)


def spoilt(x, hit):
    """`x` with NaN in one sequence of each row."""
    return jnp.where(hit.reshape(BATCH, TIME, *(1 for _ in x.shape[2:])), jnp.nan, x)


@pytest.mark.parametrize(("name", "device"), [*((name, "cpu") for name in CASES), *((name, "cuda") for name in AT_ONCE[:3])])
def test_nothing_in_a_sequence_reaches_another(name, device):
    """Neither value nor gradient nor tangent, where every array of one sequence is NaN, and its tangents and cotangents are."""
    with jax.enable_x64(True), layers.compiling_for(device):
        rows, weights = arguments(name)

        @jax.jit
        def run(rows, ids, hit):
            fn = lambda rows: CASES[name][0](rows, weights, segment_ids=ids)[0]
            out, pull = jax.vjp(fn, rows)
            return out, pull(spoilt(jnp.cos(out), hit))[0], jax.jvp(fn, (rows,), (rows,))[1]

        for ids, hit in ((IDS, HIT), (ACROSS, ACROSS == 1)):
            bad = tuple(spoilt(x, hit) for x in rows)
            for got, right in zip(jax.tree.leaves(run(bad, ids, hit)), jax.tree.leaves(run(rows, ids, hit)), strict=True):
                np.testing.assert_allclose(np.asarray(got)[~hit], np.asarray(right)[~hit], rtol=1e-12, atol=1e-13)


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", ["linear_recurrence", "selective_scan", "gated_delta_rule", "short_convolution", "lstm", "gru, reverse, gates"])
def test_batch_may_be_that_of_vmap_or_lie_on_several_devices(name):
    with jax.enable_x64(True):
        fn, (rows, weights), ids = CASES[name][0], arguments(name), jnp.asarray(IDS)
        run = lambda rows, weights, ids: fn(rows, weights, segment_ids=ids)
        alone = lambda rows, ids: jax.tree.map(lambda y: y[0], run([x[None] for x in rows], weights, ids[None]))
        mesh = Mesh(np.array(jax.devices()[:BATCH]), "data")
        spread = jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data"))
        gradient = jax.jit(
            lambda rows, weights, ids: jit_grad(lambda *args: (loss(out := spread(*args, ids)), out), (0, 1), has_aux=True)(rows, weights)
        )
        grads, out = gradient(rows, weights, ids)
        expected_out, expected_grads, _ = expected(name)
        assert_trees_close(jax.device_get((out, grads)), (expected_out, expected_grads), rtol=1e-10, atol=1e-11)
        assert_trees_close(jax.jit(jax.vmap(alone))(rows, ids), expected_out, rtol=1e-10, atol=1e-11)


INITIAL = {
    "linear_recurrence": ((3,), "initial"),
    "gated_linear_attention": ((2, 3, 4), "initial_state"),
    "short_convolution": ((3, 3), "initial_state"),
    "gru, reverse, gates": ((2,), "initial_carry"),
}


@pytest.mark.parametrize("name", INITIAL)
def test_first_sequence_alone_starts_from_the_initial_state(name):
    with jax.enable_x64(True):
        (rows, weights), (shape, argument) = arguments(name), INITIAL[name]
        run = lambda state, ids: CASES[name][0](rows, weights, segment_ids=ids, **{argument: state})[0]
        start = draw(30, (BATCH, *shape))
        packed, one = (jax.jit(run)(start, jnp.asarray(ids)) for ids in (IDS, np.zeros_like(IDS)))
        first = IDS[:, ::-1][:, :1] == IDS if "reverse" in name else np.stack([np.arange(TIME) < 5, np.arange(TIME) < 1])
        first = np.stack([np.arange(TIME) >= 6, np.arange(TIME) >= 1]) if "reverse" in name else first
        np.testing.assert_allclose(packed[first], one[first], rtol=1e-12)
        np.testing.assert_allclose(packed[~first], np.asarray(expected(name)[0][0])[~first], rtol=1e-10)


@pytest.mark.parametrize(("name", "reverse"), [("lstm", False), ("gru", True)])
def test_lengths_and_ids_are_taken_together(name, reverse):
    """Padding changes nothing, whatever its ids; the last real step is where a reversed row starts."""
    with jax.enable_x64(True):
        (x,), weights = arguments("gru, reverse, gates" if name == "gru" else name)
        lengths = np.array([7, 4])
        states = tuple(draw(30 + i, (BATCH, 2)) for i in range(2 if name == "lstm" else 1))
        start = states if name == "lstm" else states[0]
        run = getattr(layers, name)
        padded = np.where(np.arange(TIME)[:, None] < lengths[:, None, None], x, np.nan)
        ids = np.where(np.arange(TIME) < lengths[:, None], IDS, -1)
        y, carry = run(padded, *weights, initial_carry=start, seq_lengths=lengths, segment_ids=ids, reverse=reverse)
        for i, n in enumerate(lengths):
            one = lambda s, i=i: s[i : i + 1]
            cut, last = run(x[i : i + 1, :n], *weights, initial_carry=jax.tree.map(one, start), segment_ids=IDS[i : i + 1, :n], reverse=reverse)
            np.testing.assert_allclose(y[i : i + 1, :n], cut, rtol=1e-12)
            assert_trees_close(jax.tree.map(one, carry), last, rtol=1e-12)


@pytest.mark.parametrize("time_major", [False, True])
def test_modules_take_ids(time_major):
    x = draw(1, (BATCH, TIME, 4), jnp.float32)
    inputs, ids = (jnp.swapaxes(a, 0, 1) if time_major else jnp.asarray(a) for a in (x, IDS))
    options = {"time_major": time_major, "reverse": True}
    module = layers.RNN(nnx.GRUCell(4, 3, rngs=nnx.Rngs(0)))
    kernels = [module.cell.dense_i.kernel[...], module.cell.dense_h.kernel[...], module.cell.dense_i.bias[...]]
    expected = layers.gru(inputs, *kernels, segment_ids=ids, **options)[0]
    np.testing.assert_allclose(module(inputs, segment_ids=ids, keep_order=True, **options), expected, rtol=1e-6)
    twin = layers.linen.RNN(linen.GRUCell(3))
    variables = twin.init(jax.random.key(0), inputs, time_major=time_major)
    outputs = twin.apply(variables, inputs, segment_ids=ids, keep_order=True, **options)
    assert not np.allclose(outputs, twin.apply(variables, inputs, keep_order=True, **options))
    first = np.flatnonzero(IDS[0] == IDS[0, 0])[:5]
    alone = twin.apply(variables, x[:1, first], reverse=True, keep_order=True)
    np.testing.assert_allclose((jnp.swapaxes(outputs, 0, 1) if time_major else outputs)[:1, first], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", [layers.RNN(nnx.SimpleCell(4, 3, rngs=nnx.Rngs(0))), layers.linen.RNN(linen.SimpleCell(3))], ids=["nnx", "linen"])
def test_module_with_a_cell_of_its_own_refuses_ids(cell):
    call = cell if isinstance(cell, nnx.Module) else functools.partial(cell.init, jax.random.key(0))
    with pytest.raises(ValueError, match="RNN: segment_ids are given, but"):
        call(jnp.ones((BATCH, TIME, 4)), segment_ids=jnp.asarray(IDS))


@pytest.mark.parametrize("name", ["selective_scan", "gated_linear_attention", "lstm"])
def test_ids_take_no_memory_worth_a_state(name):
    """Beside the temporaries of the whole without ids, no more than a few bytes a step."""
    _, of_rows, of_weights = CASES[name]
    rows, weights = (tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in part) for part in ([(4, 512, *s) for s in of_rows], of_weights))
    ids = jnp.zeros((4, 512), jnp.int32)
    run = lambda given: lambda rows, weights, ids: loss(CASES[name][0](rows, weights, segment_ids=ids if given else None))
    without, packed = (temp_bytes(jax.grad(run(given), (0, 1)), rows, weights, ids) for given in (False, True))
    assert packed <= 1.1 * without + 16 * ids.size, (packed, without)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [(np.ones((BATCH, TIME)), TypeError, "dtype float"), (IDS[:, :-1], ValueError, "shape"), (IDS[:1], ValueError, "shape")],
)
def test_wrong_ids_are_errors(name, ids, error, message):
    with jax.enable_x64(True), pytest.raises(error, match=f"segment_ids.*{message}"):
        rows, weights = arguments(name)
        CASES[name][0](rows, weights, segment_ids=ids)
