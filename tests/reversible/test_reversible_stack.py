"""Gradients, randomness, state, memory, precision and errors of reversible stacks of Flax modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from layers.regularization.dropout import Dropout
from layers.reversible.reversible_stack import ReversibleStack
from tests.reversible.networks import Block, Plain, by_coupling, loss, maker, program, stack_of, value_and_grads
from tests.support import assert_trees_close, planned_bytes, saved_bytes, temp_bytes

pytestmark = pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
"""Flax writes float64 statistics to float32 ones."""

SCAN = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
WAYS = pytest.mark.parametrize(("scan", "exact"), [(False, False), (True, False), (True, True)], ids=["unrolled", "scan", "scan-exact"])
FEWER_WAYS = pytest.mark.parametrize(("scan", "exact"), [(False, False), (True, True)], ids=["unrolled", "scan-exact"])
EXACT = pytest.mark.parametrize("exact", [False, True], ids=["float", "exact"])


def draw(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# Values and gradients


@WAYS
def test_values_and_gradients_are_those_of_autodiff_in_float64(scan, exact):
    with jax.enable_x64(True):
        make, x, scale = maker(param_dtype=jnp.float64), draw(0, (4, 6), jnp.float64), draw(1, (5,), jnp.float64)
        value, grads, others = value_and_grads(stack_of(make, 3, scan=scan, exact=exact), x, scale)
        expected_value, expected, expected_others = value_and_grads(Plain(make, 3), x, scale)
        np.testing.assert_allclose(value, expected_value, rtol=1e-12)
        assert_trees_close(by_coupling(grads, scan), by_coupling(expected, False), rtol=1e-10, atol=1e-12)
        assert_trees_close(others, expected_others, rtol=1e-10, atol=1e-12)


@FEWER_WAYS
def test_gradients_in_float32_are_as_near_to_float64_as_those_of_autodiff(scan, exact):
    make, x = maker(16, 32), draw(0, (8, 32))
    ours, theirs = (value_and_grads(m, x)[2][0] for m in (stack_of(make, 4, scan=scan, exact=exact, headroom=16), Plain(make, 4)))
    truth = truth_of(make, 4, x)
    assert error(ours, truth) < 1e-6
    assert error(ours, truth) < 2 * error(theirs, truth)


def truth_of(make, depth, x):
    """The gradient of x in float64, from the float32 parameters."""
    model = Plain(make, depth)
    with jax.enable_x64(True):
        nnx.update(model, jax.tree.map(lambda a: a.astype(jnp.float64), nnx.state(model, nnx.Param)))
        return np.asarray(value_and_grads(model, jnp.asarray(x, jnp.float64))[2][0])


def error(x, truth):
    return np.linalg.norm(np.asarray(x, np.float64) - truth) / np.linalg.norm(truth)


@FEWER_WAYS
def test_forward_mode_and_second_derivatives_are_those_of_autodiff(scan, exact):
    with jax.enable_x64(True):
        make, x, v = maker(2, 3, param_dtype=jnp.float64), draw(1, (2, 4), jnp.float64), draw(2, (2, 4), jnp.float64)

        def derivatives(model):
            graph, state = nnx.split(model)
            f = lambda x: loss(nnx.merge(graph, state, copy=True)(x))
            return jax.jit(
                lambda x, v: (jax.jvp(f, (x,), (v,)), jax.jvp(jax.grad(f), (x,), (v,))[1], jax.grad(lambda x: jax.grad(f)(x)[0].sum())(x))
            )(x, v)

        assert_trees_close(derivatives(stack_of(make, 2, scan=scan, exact=exact)), derivatives(Plain(make, 2)), rtol=1e-9, atol=1e-10)


def test_tangents_of_parameters_are_pushed_forward():
    with jax.enable_x64(True):
        make, x = maker(2, 3, param_dtype=jnp.float64), draw(1, (2, 4), jnp.float64)

        def slope(model):
            graph, state = nnx.split(model)
            return jax.jvp(lambda s: nnx.merge(graph, s, copy=True)(x), (state,), (jax.tree.map(jnp.cos, state),))

        assert_trees_close(slope(stack_of(make, 2)), slope(Plain(make, 2)), rtol=1e-12)


def test_blocks_that_share_their_weights_get_the_sum_of_the_gradients():
    with jax.enable_x64(True):
        pair, x = maker(param_dtype=jnp.float64)(nnx.Rngs(0)), draw(0, (4, 6), jnp.float64)
        shared = Plain(lambda _: pair, 3)
        _, (df, dg), _ = value_and_grads(ReversibleStack([pair] * 3), x)
        _, (ef, eg), _ = value_and_grads(shared, x)
        assert_trees_close(nnx.to_pure_dict(df), nnx.to_pure_dict(ef), rtol=1e-10, atol=1e-12)
        assert_trees_close(nnx.to_pure_dict(dg), nnx.to_pure_dict(eg), rtol=1e-10, atol=1e-12)


def test_blocks_may_differ_when_unrolled():
    with jax.enable_x64(True):
        kinds = iter(
            [maker(3, 5, param_dtype=jnp.float64), maker(3, 2, param_dtype=jnp.float64), maker(3, 4, norm=nnx.LayerNorm, param_dtype=jnp.float64)] * 2
        )
        make, x = (lambda rngs: next(kinds)(rngs)), draw(0, (4, 6), jnp.float64)
        ours, theirs = value_and_grads(stack_of(make, 3), x), value_and_grads(Plain(make, 3), x)
        assert_trees_close(jax.tree.leaves(ours), jax.tree.leaves(theirs), rtol=1e-10, atol=1e-12)


# Randomness and state


@pytest.mark.parametrize(("scan", "dropout"), [(False, nnx.Dropout), (True, Dropout)], ids=["unrolled-flax", "scan-ours"])
def test_masks_are_drawn_again_in_backward_and_anew_in_the_next_call(scan, dropout):
    with jax.enable_x64(True):
        make, x = maker(dropout=dropout, param_dtype=jnp.float64), draw(0, (4, 6), jnp.float64)
        ours, theirs = stack_of(make, 3, scan=scan), Plain(make, 3)
        values = []
        for _ in range(2):
            value, grads, (dx,) = value_and_grads(ours, x)
            expected_value, expected, (expected_dx,) = value_and_grads(theirs, x)
            values.append(value)
            np.testing.assert_allclose(value, expected_value, rtol=1e-12)
            np.testing.assert_allclose(dx, expected_dx, rtol=1e-10, atol=1e-12)
            assert_trees_close(by_coupling(grads, scan), by_coupling(expected, False), rtol=1e-10, atol=1e-12)
        assert values[0] != values[1]
        assert all((c == 2).all() for c in jax.tree.leaves(nnx.state(ours, nnx.RngCount)))


class Drawing(nnx.Module):
    """Draws from a stream of random numbers that every block holds."""

    def __init__(self, rngs):
        self.rngs = rngs

    def __call__(self, x):
        return jnp.tanh(x) * jax.random.normal(self.rngs.noise(), x.shape, x.dtype)


def test_blocks_that_share_a_random_stream_draw_from_it_in_turn():
    with jax.enable_x64(True):
        x = draw(0, (4, 6), jnp.float64)
        models = []
        for kind in (ReversibleStack, lambda pairs: Plain(lambda _: pairs.pop(0), len(pairs))):
            rngs = nnx.Rngs(noise=3)
            models.append(kind([(Drawing(rngs), Drawing(rngs)) for _ in range(2)]))
        for _ in range(2):
            ours, theirs = (_value_and_slope(m, x) for m in models)
            assert_trees_close(ours, theirs, rtol=1e-12)
        assert models[0].f[0].rngs.noise.count[...] == 8


@nnx.jit
def _value_and_slope(model, x):
    return nnx.value_and_grad(lambda m, x: loss(m(x)), argnums=1)(model, x)


def test_stacked_blocks_that_shared_a_random_stream_draw_differently():
    rngs = nnx.Rngs(noise=3)
    stack = ReversibleStack([(Drawing(rngs), Drawing(rngs)) for _ in range(3)], scan=True)
    keys = jax.random.key_data(stack.f.rngs.noise.key[...])
    assert len({tuple(k) for k in np.asarray(keys).tolist()}) == 3


@SCAN
def test_running_statistics_are_those_of_the_plain_stack(scan):
    with jax.enable_x64(True):
        make, x = maker(norm=nnx.BatchNorm, param_dtype=jnp.float64), draw(0, (7, 6), jnp.float64)
        ours, theirs = stack_of(make, 3, scan=scan), Plain(make, 3)
        for _ in range(2):
            (_, grads, (dx,)), (_, expected, (expected_dx,)) = value_and_grads(ours, x), value_and_grads(theirs, x)
        np.testing.assert_allclose(dx, expected_dx, rtol=1e-9, atol=1e-11)
        assert_trees_close(by_coupling(grads, scan), by_coupling(expected, False), rtol=1e-9, atol=1e-11)
        mean = ours.f.norm.mean[...] if scan else jnp.stack([f.norm.mean[...] for f in ours.f])
        np.testing.assert_allclose(mean, jnp.stack([f.norm.mean[...] for f in theirs.f]), rtol=1e-6)


class Penalty(nnx.Variable):
    """Of a block, for the loss."""


class Penalised(Block):
    """Leaves a penalty on what goes through it, as the balance of a mixture of experts; `stop` takes its gradient away."""

    def __init__(self, *args, stop=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.penalty, self.stop = Penalty(jnp.zeros((), self.up.kernel.dtype)), stop

    def __call__(self, x):
        penalty = jnp.mean(self.up(x) ** 2) + self.penalty[...] / 2
        self.penalty[...] = jax.lax.stop_gradient(penalty) if self.stop else penalty
        return super().__call__(x)


def penalised(stop=False, dtype=jnp.float64):
    block = lambda rngs: Penalised(3, 5, rngs, stop=stop, param_dtype=dtype)
    return lambda rngs: (block(rngs), block(rngs))


def loss_with_penalties(model, x):
    y = model(x)
    return loss(y) + sum(jnp.sum(jnp.sin(p)) for p in jax.tree.leaves(nnx.state(model, Penalty)))


@WAYS
def test_gradient_goes_through_state_that_a_block_leaves(scan, exact):
    with jax.enable_x64(True):
        x = draw(0, (4, 6), jnp.float64)
        run = nnx.jit(nnx.value_and_grad(loss_with_penalties, argnums=(nnx.DiffState(0, (nnx.Param, Penalty)), 1)))
        (value, (grads, dx)), (expected, (expected_grads, expected_dx)) = (
            run(m, x) for m in (stack_of(penalised(), 2, scan=scan, exact=exact), Plain(penalised(), 2))
        )
        ours, theirs = by_coupling((grads["f"], grads["g"]), scan), by_coupling((expected_grads["f"], expected_grads["g"]), False)
        assert_trees_close((value, dx, ours), (expected, expected_dx, theirs), rtol=1e-10, atol=1e-12)


def test_gradient_of_such_state_alone_is_that_of_autodiff():
    with jax.enable_x64(True):
        x = draw(0, (4, 6), jnp.float64)

        def last_penalty(model, x):
            model(x)
            return model.g[1].penalty[...]

        ours, theirs = (nnx.grad(last_penalty, argnums=1)(m, x) for m in (stack_of(penalised(), 2), Plain(penalised(), 2)))
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@SCAN
def test_tangents_of_such_state_are_pushed_forward(scan):
    with jax.enable_x64(True):
        x = draw(0, (4, 6), jnp.float64)

        def slope(model):
            graph, state = nnx.split(model)
            return jax.jvp(lambda s, x: loss_with_penalties(nnx.merge(graph, s, copy=True), x), (state, x), (jax.tree.map(jnp.ones_like, state), x))

        assert_trees_close(slope(stack_of(penalised(), 2, scan=scan)), slope(Plain(penalised(), 2)), rtol=1e-11)


class Shared(nnx.Module):
    """Leaves a penalty that is one number for all devices."""

    def __init__(self, w):
        self.w, self.penalty = nnx.Param(jnp.float32(w)), Penalty(jnp.float32(0))

    def __call__(self, x):
        self.penalty[...] = self.w[...] ** 2 * jax.lax.pmean(jnp.mean(x**2), "d")
        return jnp.sin(self.w[...] * x)


@pytest.mark.devices(4)
@SCAN
def test_gradient_goes_through_state_that_devices_share(scan):
    pairs = lambda: [(Shared(0.3), Shared(0.5)), (Shared(0.7), Shared(0.9))]
    mesh, x = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)), draw(0, (8, 4))

    def run(model):
        graph, state = nnx.split(model)

        def value(state, x):
            model = nnx.merge(graph, state, copy=True)
            y = jax.lax.psum(jnp.sin(model(x)).sum(), "d")
            return y + sum(jnp.sum(p**2) for p in jax.tree.leaves(nnx.state(model, Penalty)))

        value_and_grad = jax.shard_map(jax.value_and_grad(value, (0, 1)), mesh=mesh, in_specs=(P(), P("d")), out_specs=(P(), (P(), P("d"))))
        value, (grads, dx) = jax.jit(value_and_grad)(state, x)
        return value, dx, by_coupling((grads["f"], grads["g"]), getattr(model, "scan", False))

    left = iter(pairs())
    plain = Plain(lambda _: next(left), 2)
    assert_trees_close(run(ReversibleStack(pairs(), scan=scan)), run(plain), rtol=1e-5, atol=1e-6)


@SCAN
def test_state_that_nothing_reads_costs_nothing_in_backward(scan):
    def costs(stop):
        run, state = program(stack_of(penalised(stop, jnp.float32), 2, scan=scan))
        compiled = jax.jit(run).lower(state, draw(0, (4, 6))).compile()
        return compiled.cost_analysis()["flops"], planned_bytes(compiled)

    assert costs(False) == costs(True)


@SCAN
def test_eval_mode_switches_dropout_off(scan):
    stack, x = stack_of(maker(dropout=Dropout), 2, scan=scan), draw(0, (4, 6))
    stack.eval()
    np.testing.assert_allclose(stack(x), Plain(maker(), 2)(x), rtol=1e-6)


def test_shared_statistics_that_change_are_refused():
    pair = maker(norm=nnx.BatchNorm)(nnx.Rngs(0))
    with pytest.raises(TypeError, match="f of coupling 1 reads floating-point state that an earlier block has changed"):
        ReversibleStack([pair, pair])(draw(0, (4, 6)))


def test_stack_runs_under_vmap_and_checks_for_leaks():
    graph, state = nnx.split(stack_of(maker(dropout=Dropout), 2))
    f = lambda state, x: loss(nnx.merge(graph, state, copy=True)(x))
    x = draw(0, (2, 4, 6))
    with jax.checking_leaks():
        together = jax.jit(jax.vmap(jax.grad(f, 1), (None, 0)))(state, x)
    np.testing.assert_allclose(together[1], jax.jit(jax.grad(f, 1))(state, x[1]), rtol=1e-5, atol=1e-6)


# Memory


def temp_of(build):
    """Of the gradients for 256 rows, of a model that is never made."""
    fn, state = program(nnx.eval_shape(build))
    return temp_bytes(fn, state, jax.ShapeDtypeStruct((256, 32), jnp.float32))


@EXACT
@SCAN
def test_ten_times_deeper_in_the_same_memory(scan, exact):
    few, many = (temp_of(lambda depth=depth: stack_of(maker(16, 64), depth, scan=scan, exact=exact)) for depth in (2, 20))
    assert many <= few + 20 * 1024  # scalars, and where arrays start; one activation of one coupling is 32768 bytes
    assert many < 1.05 * few


def test_memory_is_below_that_of_checkpoint_at_depth_12():
    make = maker(16, 64)
    ours = temp_of(lambda: stack_of(make, 12))
    assert ours < temp_of(lambda: Plain(make, 12, remat=True)) / 2
    assert ours < 0.2 * temp_of(lambda: Plain(make, 12))


@SCAN
def test_nothing_is_kept_but_the_output(scan):
    graph, state = nnx.split(nnx.eval_shape(lambda: stack_of(maker(16, 64), 6, scan=scan)))
    x = jax.ShapeDtypeStruct((256, 32), jnp.float32)
    assert saved_bytes(lambda s, x: nnx.merge(graph, s, copy=True)(x), state, x) <= x.size * 4


# Precision


@SCAN
def test_input_is_rebuilt_bit_for_bit_in_fixed_point(scan):
    depth = 60 if scan else 6
    make, x = maker(8, 16), draw(0, (16, 16))
    assert stack_of(make, depth, scan=scan, exact=True).reconstruction_error(x).absolute == 0
    assert 0 < stack_of(make, depth, scan=scan).reconstruction_error(x).relative < 1e-2


def test_stream_of_bfloat16_modules_is_float32_unless_told_otherwise():
    make, x = maker(8, 16, dtype=jnp.bfloat16), draw(0, (16, 16), jnp.bfloat16)
    wide = stack_of(make, 12, scan=True).reconstruction_error(x)
    narrow = stack_of(make, 12, scan=True, stream_dtype=jnp.bfloat16).reconstruction_error(x)
    assert wide.relative < 1e-2 * narrow.relative
    assert stack_of(make, 12, scan=True, exact=True).reconstruction_error(x).absolute == 0
    assert stack_of(make, 2)(x).dtype == jnp.bfloat16


@EXACT
def test_gradients_in_bfloat16_are_nearer_to_float64_than_those_of_autodiff(exact):
    make, x = maker(16, 32, dtype=jnp.bfloat16), draw(0, (64, 32), jnp.bfloat16)
    ours, theirs = (value_and_grads(m, x)[2][0] for m in (stack_of(make, 4, scan=True, exact=exact), Plain(make, 4)))
    truth = truth_of(maker(16, 32), 4, x)
    assert ours.dtype == jnp.bfloat16
    assert error(ours, truth) <= error(theirs, truth)


# Edge cases


@SCAN
def test_no_couplings_are_the_identity(scan):
    x = draw(0, (4, 6))
    stack = stack_of(maker(), 0, scan=scan)
    np.testing.assert_array_equal(stack(x), x)
    np.testing.assert_array_equal(jax.grad(lambda x: stack(x).sum())(x), jnp.ones_like(x))


@SCAN
def test_empty_batch_has_gradients_of_zero(scan):
    for exact in (False, True):
        _, grads, (dx,) = value_and_grads(stack_of(maker(), 2, scan=scan, exact=exact), jnp.zeros((0, 6)))
        assert dx.shape == (0, 6)
        assert all((g == 0).all() for g in jax.tree.leaves(grads))


def test_halves_are_taken_along_the_axis_or_given_apart():
    stack, x = stack_of(maker(6, 5), 2), draw(0, (4, 6))
    apart = stack((x[:2], x[2:]))
    stack.axis = 0
    np.testing.assert_array_equal(stack(x), jnp.concatenate(apart))


WRONG_STACKS = {
    "no pair": (lambda: ReversibleStack([Block(3, 5, nnx.Rngs(0))]), TypeError, "block 0 is Block, but must be a pair"),
    "no depth": (lambda: ReversibleStack(maker(), rngs=nnx.Rngs(0)), ValueError, "give depth"),
    "another depth": (lambda: ReversibleStack([maker()(nnx.Rngs(0))], depth=2), ValueError, "depth is 2, but there are 1 blocks"),
    "cannot be stacked": (lambda: ReversibleStack([maker(3, h)(nnx.Rngs(0)) for h in (4, 5)], scan=True), ValueError, "block 1 is built otherwise"),
    "share weights": (lambda: ReversibleStack([maker()(nnx.Rngs(0))] * 2, scan=True), ValueError, "share the variable down.bias"),
    "narrow exact": (lambda: stack_of(maker(), 1, exact=True, stream_dtype=jnp.bfloat16), ValueError, "stream_dtype is bfloat16"),
    "headroom": (lambda: stack_of(maker(), 1, exact=True, headroom=0.5), ValueError, "headroom is 0.5"),
}


@pytest.mark.parametrize("name", WRONG_STACKS)
def test_wrong_stack_is_an_error(name):
    build, kind, message = WRONG_STACKS[name]
    with pytest.raises(kind, match=message):
        build()


class Remembering(nnx.Module):
    def __call__(self, x):
        self.seen = nnx.Intermediate(x)
        return x


class Narrow(nnx.Module):
    def __call__(self, x):
        return x[..., :1]


WRONG_CALLS = {
    "odd": (lambda: stack_of(maker(), 1)(jnp.ones((4, 5))), ValueError, r"shape \(4, 5\), which has no two halves"),
    "integers": (lambda: stack_of(maker(), 1)(jnp.ones((4, 6), int)), TypeError, "x is of dtype int32"),
    "dict": (lambda: stack_of(maker(), 1)({"a": jnp.ones((4, 6))}), TypeError, "x is a dict, but must be one array"),
    "tuple of dicts": (lambda: stack_of(maker(), 1)(({}, {})), TypeError, "x is a dict, but must be one array"),
    "streams of keys": (lambda: stack_of(maker(), 1)(jnp.ones((4, 6)), rngs=nnx.Rngs(0)), TypeError, "give them to the modules when these are made"),
    "new variables": (
        lambda: ReversibleStack([(Remembering(), Remembering())])(jnp.ones((4, 6))),
        TypeError,
        "f of coupling 0 adds to its variables",
    ),
    "shape": (lambda: ReversibleStack([(Narrow(), Narrow())])(jnp.ones((4, 6))), ValueError, r"returned float32\(4, 1\)"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_call_is_an_error(name):
    call, kind, message = WRONG_CALLS[name]
    with pytest.raises(kind, match=message):
        call()
