"""Attention against the same mathematics written directly, over the whole matrix of scores."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import dot_product_attention
from layers.attention import plan
from layers.attention.dot_product_attention import DotProductAttentionFunction
from layers.attention.plan import Hidden, Options
from layers.attention.tiles import Grid, Tile
from tests.support import assert_trees_close, draw_normal, saved_bytes, temp_bytes

BATCH, TIME, KV_TIME, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 11, 9, 4, 2, 3, 5


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, with a ragged last block on both sides."""
    monkeypatch.setattr(plan, "choose_blocks", lambda *_: (4, 4))


def direct(q: Any, k: Any, v: Any, bias: Any = None, mask: Any = None, **o: Any) -> Any:
    """Softmax attention by its definition; a query without a key gives zeros. Returns the output and logsumexp."""
    group = q.shape[2] // k.shape[2]
    s = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, group, 2)) * (q.shape[-1] ** -0.5 if o.get("scale") is None else o["scale"])
    if o.get("logit_soft_cap"):
        s = o["logit_soft_cap"] * jnp.tanh(s / o["logit_soft_cap"])
    s = s if bias is None else s + bias
    t, u = jnp.arange(s.shape[2])[:, None], jnp.arange(s.shape[3])[None]
    seen = jnp.ones(s.shape, bool) if mask is None else jnp.broadcast_to(mask, s.shape)
    if o.get("query_offset") is not None:
        t = t + jnp.reshape(jnp.asarray(o["query_offset"]), (-1, 1, 1, 1))
    if o.get("is_causal"):
        seen &= u <= t
    if o.get("local_window_size") is not None:
        left, right = o["local_window_size"]
        seen &= (u >= t - left) & (u <= t + right)
    t = jnp.arange(s.shape[2])[:, None]
    if o.get("query_seq_lengths") is not None:
        seen &= (t < o["query_seq_lengths"][:, None, None])[:, None]
    if o.get("key_value_seq_lengths") is not None:
        seen &= (u < o["key_value_seq_lengths"][:, None, None])[:, None]
    if o.get("segment_ids") is not None:
        a, b = o["segment_ids"]
        seen &= (a[:, :, None] == b[:, None])[:, None]
    weight = jnp.where(seen, jnp.exp(jnp.where(seen, s, 0)), 0)
    total = weight.sum(-1)
    if o.get("sinks") is not None:
        total = total + jnp.exp(o["sinks"])[None, :, None]
    p = weight / jnp.where(total == 0, 1, total)[..., None]
    p = p if o.get("multiplier") is None else p * o["multiplier"]
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)))
    return jnp.einsum("bnts,bsnh->btnh", p, jnp.repeat(v, group, 2)), jnp.moveaxis(lse, 1, 2)


def arrays(dtype: Any = None, kv_heads: int = KV_HEADS, time: int = TIME, kv_time: int = KV_TIME) -> list[jax.Array]:
    shapes = (BATCH, time, HEADS, DIM), (BATCH, kv_time, kv_heads, DIM), (BATCH, kv_time, kv_heads, VALUE_DIM)
    return [draw_normal(i, shape, dtype) for i, shape in enumerate(shapes)]


def random_mask(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).random(shape) < 0.6)


def pulled(f: Any, *args: Any) -> Any:
    """Outputs and the gradients of their sum, as NumPy arrays."""

    def run(*args):
        out, pull = jax.vjp(f, *args)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    return jax.tree.map(np.asarray, jax.jit(run)(*args))


def finite(pair: Any) -> Any:
    """A scalar of both outputs whose gradient reaches every number; where logsumexp is -inf it is left out."""
    out, lse = pair
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse == -jnp.inf, 0, jnp.cos(jnp.where(lse == -jnp.inf, 0, lse))))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.7},
    "causal": {"is_causal": True},
    "causal to the last key": {"is_causal": True, "query_offset": KV_TIME - TIME},
    "causal, ahead of all keys": {"is_causal": True, "query_offset": -20},
    "causal from an array": {"is_causal": True, "query_offset": jnp.array(-2)},
    "window from an array": {"is_causal": True, "local_window_size": (3, 0), "query_offset": jnp.array([4, -3])},
    "window, moved": {"local_window_size": (2, 1), "query_offset": 3},
    "mask of integers": {"mask": random_mask(BATCH, 1, TIME, KV_TIME).astype(jnp.int8)},
    "window": {"local_window_size": (2, 1)},
    "causal window": {"is_causal": True, "local_window_size": (3, 2)},
    "window that leaves out queries": {"local_window_size": (0, 0)},
    "key lengths": {"key_value_seq_lengths": jnp.array([9, 4])},
    "query lengths": {"query_seq_lengths": jnp.array([5, 11])},
    "no keys at all": {"key_value_seq_lengths": jnp.array([0, 9])},
    "lengths, causal": {"query_seq_lengths": jnp.array([5, 11]), "key_value_seq_lengths": jnp.array([3, 8]), "is_causal": True},
    "soft cap": {"logit_soft_cap": 0.8},
    "segments": {"segment_ids": (jnp.array([[0] * 5 + [1] * 6, [0] * 2 + [1] * 9]), jnp.array([[0] * 5 + [1] * 4, [0] * 3 + [2] * 6]))},
    "mask": {"mask": random_mask(BATCH, HEADS, TIME, KV_TIME)},
    "shared mask": {"mask": random_mask(1, 1, TIME, KV_TIME)},
    "mask of keys": {"mask": random_mask(BATCH, 1, 1, KV_TIME)},
    "bias": {"bias": (BATCH, HEADS, TIME, KV_TIME)},
    "bias of heads": {"bias": (1, HEADS, TIME, KV_TIME)},
    "bias of keys": {"bias": (BATCH, 1, 1, KV_TIME)},
    "bias of queries": {"bias": (1, HEADS, TIME, 1)},
    "sinks": {"sinks": (HEADS,)},
    "sinks, no keys": {"sinks": (HEADS,), "key_value_seq_lengths": jnp.array([0, 5])},
    "all": {
        "bias": (1, HEADS, TIME, KV_TIME),
        "sinks": (HEADS,),
        "mask": random_mask(BATCH, 1, TIME, KV_TIME),
        "scale": 0.9,
        "is_causal": True,
        "local_window_size": (5, 3),
        "logit_soft_cap": 1.5,
        "key_value_seq_lengths": jnp.array([9, 7]),
        "query_seq_lengths": jnp.array([10, 6]),
    },
}


def with_moving(options: dict[str, Any]) -> tuple[list[str], list[jax.Array], dict[str, Any]]:
    """Names and values of the arrays among the options that are differentiated, and the other options."""
    names = [n for n in ("bias", "sinks") if n in options]
    differentiated = [draw_normal(7, options[n], jnp.float64) for n in names]
    return names, differentiated, {n: x for n, x in options.items() if n not in names}


@pytest.mark.parametrize("name, kv_heads", [*((name, KV_HEADS) for name in OPTIONS), ("plain", 1), ("all", 1), ("plain", 4), ("all", 4)])
def test_values_and_gradients_are_those_of_the_definition(name: str, kv_heads: int, small_blocks: None) -> None:
    with jax.enable_x64(True):
        names, differentiated, rest = with_moving(OPTIONS[name])
        args = [*arrays(jnp.float64, kv_heads), *differentiated]

        def ours(q, k, v, *moved):
            return dot_product_attention(q, k, v, **dict(zip(names, moved, strict=True)), **rest, return_logsumexp=True)

        def expected(q, k, v, *moved):
            return direct(q, k, v, **dict(zip(names, moved, strict=True)), **rest)

        def gradients(f):
            return jax.jit(jax.grad(lambda *a: (finite(out := f(*a)), out), tuple(range(len(args))), has_aux=True))(*args)

        assert_trees_close(gradients(ours), gradients(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["no keys at all", "all"])
def test_second_derivatives_and_forward_mode_are_those_of_the_definition(name: str, small_blocks: None) -> None:
    with jax.enable_x64(True):
        names, differentiated, rest = with_moving(OPTIONS[name])
        args = [*arrays(jnp.float64), *differentiated]
        along = [jnp.asarray(np.cos(x)) for x in args]

        def scalar(f, **extra):
            return lambda q, k, v, *moved: finite(f(q, k, v, **dict(zip(names, moved, strict=True)), **rest, **extra))

        def curvature(f):
            where = tuple(range(len(args)))
            slope = jax.jvp(f, args, along)[1]
            forward_over_reverse = jax.jvp(jax.grad(f, where), args, along)[1]
            reverse_over_reverse = jax.grad(lambda *a: sum(jnp.vdot(g, t) for g, t in zip(jax.grad(f, where)(*a), along, strict=True)), where)(*args)
            return slope, forward_over_reverse, reverse_over_reverse

        got = jax.jit(lambda: curvature(scalar(dot_product_attention, return_logsumexp=True)))()
        assert_trees_close(got, jax.jit(lambda: curvature(scalar(direct)))(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shared", [False, True])
def test_dropout_drops_the_same_weights_in_backward(shared: bool, small_blocks: None) -> None:
    with jax.enable_x64(True):
        args, key, rate = arrays(jnp.float64), jax.random.key(5), 0.3
        words = jax.random.key_data(key)
        grid = Grid(
            (TIME, KV_TIME), (TIME, KV_TIME), (BATCH, KV_HEADS, HEADS // KV_HEADS), Hidden(words=words), Options(rate=rate, shared_dropout=shared)
        )
        multiplier = jax.jit(lambda: Tile(grid, jnp.zeros(2, int)).multiplier(jnp.float64))()
        multiplier = np.broadcast_to(multiplier, (*grid.planes, TIME, KV_TIME)).reshape(BATCH, HEADS, TIME, KV_TIME)

        def ours(q, k, v):
            return dot_product_attention(q, k, v, dropout_rate=rate, dropout_key=key, broadcast_dropout=shared, return_logsumexp=True)

        def expected(q, k, v):
            return direct(q, k, v, multiplier=multiplier)

        got, want = (jax.jit(jax.value_and_grad(lambda *a, f=f: finite(f(*a)), (0, 1, 2)))(*args) for f in (ours, expected))
        assert_trees_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(BATCH, HEADS, TIME, KV_TIME), (TIME, KV_TIME)])
def test_weights_that_a_mask_drops_are_dropped(shape: tuple[int, ...], small_blocks: None) -> None:
    with jax.enable_x64(True):
        args, kept, rate = arrays(jnp.float64), np.random.default_rng(0).random(shape) > 0.3, 0.3

        def ours(q, k, v):
            return dot_product_attention(q, k, v, dropout_rate=rate, dropout_mask=kept, return_logsumexp=True)

        def expected(q, k, v):
            return direct(q, k, v, multiplier=np.broadcast_to(kept / (1 - rate), (BATCH, HEADS, TIME, KV_TIME)))

        run = lambda f: lambda *args: jax.jvp(jax.value_and_grad(lambda *a: finite(f(*a)), (0, 1, 2)), args, args)
        got, want = (jax.jit(run(f))(*args) for f in (ours, expected))
        assert_trees_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropped_weights_are_as_many_as_the_rate_says_and_independent(rate: float) -> None:
    n = 256
    grid = Grid((n, n), (n, n), (2, 2, 1), Hidden(words=jnp.array([0, 1], jnp.uint32)), Options(rate=rate))
    kept = np.asarray(jax.jit(lambda: Tile(grid, jnp.zeros(2, int)).multiplier(jnp.float32))()).reshape(4, n, n) > 0
    spread = (rate * (1 - rate)) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 5 * spread / kept.size**0.5
    centred = (kept - (1 - rate)) / spread
    neighbours = [(centred[:, 1:] * centred[:, :-1]), (centred[:, :, 1:] * centred[:, :, :-1]), (centred[1:] * centred[:-1])]
    assert all(abs(c.mean()) < 5 / c.size**0.5 for c in neighbours)
    rows, columns = centred.mean(2) * n**0.5, centred.mean(1) * n**0.5
    assert 0.8 < rows.std() < 1.2 and 0.8 < columns.std() < 1.2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"local_window_size": 4},
        {"scale": 0.3, "is_causal": True, "local_window_size": (5, 0)},
        {"key_value_seq_lengths": jnp.array([20, 7], jnp.int32), "query_seq_lengths": jnp.array([20, 12], jnp.int32)},
        {"bias": jnp.linspace(-1, 1, 400).reshape(1, 1, 20, 20), "mask": jnp.tri(20, dtype=bool)[None, None]},
    ],
)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_are_those_of_jax_nn(options: dict[str, Any], batched: bool, dtype: Any) -> None:
    if not batched and "key_value_seq_lengths" in options:
        options = {n: x[:1] for n, x in options.items()}
    shapes = ((2, 20, 4, 8), (2, 20, 2, 8), (2, 20, 2, 8)) if batched else ((20, 4, 8), (20, 2, 8), (20, 2, 8))
    args = [draw_normal(i, s, dtype) for i, s in enumerate(shapes)]
    got, expected = (jax.jit(partial(f, **options))(*args) for f in (dot_product_attention, jax.nn.dot_product_attention))
    assert got.dtype == expected.dtype
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("peak", [1, 3])
def test_bfloat16_errs_no_more_than_jax_nn(peak: float) -> None:
    """Output and gradients, also where weights are peaked and the terms of ds nearly cancel."""

    def run(f, *args):
        out, pull = jax.vjp(lambda *a: f(*a, is_causal=True), *args[:3])
        return out, *pull(args[3])

    ours, theirs, exactly = (jax.jit(partial(run, f)) for f in (dot_product_attention, jax.nn.dot_product_attention, jax.nn.dot_product_attention))
    with jax.enable_x64(True):
        for seed in range(4):
            args = [draw_normal(4 * seed + i, (1, 64, 2, 16), jnp.bfloat16) for i in range(4)]
            args[0] = jnp.asarray(np.asarray(args[0]) * args[0].dtype.type(peak))
            exact = exactly(*(np.asarray(x, np.float64) for x in args))
            errors = ([np.linalg.norm(np.asarray(g, np.float64) - e) for g, e in zip(f(*args), exact, strict=True)] for f in (ours, theirs))
            assert all(a <= b for a, b in zip(*errors, strict=True))


@pytest.mark.parametrize("time, kv_time", [(11, 9), (9, 22)])
def test_gradients_of_keys_in_16_bits_are_added_up_in_32(time: int, kv_time: int, small_blocks: None) -> None:
    """In a ragged last block, too, and are zero where no query sees the key: that of the values is rounded once, both err no more than jax.nn's."""
    q, k, v = arrays(jnp.bfloat16, time=time, kv_time=kv_time)
    args = q, k, v[..., :DIM]

    def grads(f, *args):
        found = jax.jit(jax.grad(lambda *a: jnp.sum(f(*a).astype(jnp.float32)), (1, 2)))(*args)
        return [np.float32(x) for x in found]

    ours, theirs = (grads(lambda *a, f=f: f(*a, is_causal=True), *args) for f in (dot_product_attention, jax.nn.dot_product_attention))
    expected = grads(lambda *a: direct(*a, is_causal=True)[0], *(np.float32(x) for x in args))
    np.testing.assert_allclose(ours[1], expected[1], rtol=2**-8)
    assert all(np.linalg.norm(a - e) <= np.linalg.norm(b - e) for a, b, e in zip(ours, theirs, expected, strict=True))
    assert not any(x[:, time:].any() for x in ours)


@pytest.mark.parametrize("time, kv_time", [(1, 1), (1, 6), (6, 1), (513, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_any_length(time: int, kv_time: int, causal: bool) -> None:
    with jax.enable_x64(True):
        args = arrays(jnp.float64, time=time, kv_time=kv_time)
        grads = [
            jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))(*args)
            for f in (lambda *a: dot_product_attention(*a, is_causal=causal), lambda *a: direct(*a, is_causal=causal)[0])
        ]
        assert_trees_close(grads[0], grads[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape, kv_shape", [((0, 5, 2, 3), (0, 5, 2, 3)), ((2, 0, 2, 3), (2, 5, 2, 3)), ((2, 5, 2, 3), (2, 0, 2, 3))])
def test_empty_axes_give_zeros(shape: tuple[int, ...], kv_shape: tuple[int, ...]) -> None:
    q, k = jnp.ones(shape), jnp.ones(kv_shape)
    out, pull = jax.vjp(dot_product_attention, q, k, k)
    assert out.shape == shape and not out.any()
    assert all(not g.any() for g in pull(jnp.ones_like(out)))


def test_query_that_sees_nothing_gives_zeros_and_no_gradient() -> None:
    q, k, v = arrays()
    mask = jnp.asarray(np.arange(TIME)[:, None] != 2)[None, None]
    out, grads = pulled(lambda q, k, v: dot_product_attention(q, k, v, mask=mask, return_logsumexp=True), q, k, v)
    assert not out[0][:, 2].any() and (out[1][:, 2] == -np.inf).all()
    assert all(np.isfinite(g).all() for g in grads) and not grads[0][:, 2].any()


@pytest.mark.parametrize("size", [1e4, 1e18])
def test_huge_scores_have_finite_gradients(size: float) -> None:
    q, k, v = arrays()
    out, grads = pulled(lambda q, v: dot_product_attention(q, k, v, is_causal=True), np.float32(q * np.float32(size)), v)
    assert all(np.isfinite(x).all() for x in (out, *grads))


@pytest.mark.parametrize("number", [jnp.inf, -jnp.inf])
def test_infinite_bias_has_finite_gradients(number: float) -> None:
    q, k, v = arrays()
    bias = np.broadcast_to(np.where(np.arange(KV_TIME) == 3, np.float32(number), 0), (1, 1, TIME, KV_TIME))
    out, grads = pulled(dot_product_attention, q, k, v, bias)
    assert all(np.isfinite(x).all() for x in (out, *grads))


@pytest.mark.parametrize("number", [jnp.inf, -jnp.inf])
def test_infinite_sink_has_finite_gradients(number: float) -> None:
    """An infinite sink takes all of the weight, one of -inf none."""
    q, k, v = arrays()
    sinks = jnp.full(HEADS, number)
    out, grads = pulled(lambda q, k, v: dot_product_attention(q, k, v, sinks=sinks), q, k, v)
    assert_trees_close(out, np.zeros_like(out) if number > 0 else dot_product_attention(q, k, v), rtol=1e-6)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("length, head_dim", [(4096, 64), (1024, 64), (512, 128), (128, 64), (1, 8), (16, 3)])
def test_tiles_are_smaller_than_the_queries_and_hide_little_where_they_are_not_for_several_cores(length: int, head_dim: int, narrow: bool) -> None:
    rows, columns = plan.choose_blocks(length, length, head_dim, narrow)
    several = rows * columns * head_dim >= plan.PARALLEL
    assert rows * columns <= max(length * head_dim // (1 if several and not narrow else 2), plan.SMALLEST**2)
    assert several or max(rows, columns) <= plan.EFFICIENT


@pytest.mark.parametrize("low, high", [(0, None), (0, 600), (-300, 300), (None, None), (None, -1000)])
@pytest.mark.parametrize("lengths", [(2048, 2048), (1000, 700)])
def test_tiles_are_those_in_which_something_is_seen(lengths: tuple[int, int], low: int | None, high: int | None) -> None:
    blocks = (256, 128)
    apart = np.arange(lengths[0])[:, None] - np.arange(lengths[1])
    seen = (apart >= (-np.inf if low is None else low)) & (apart <= (np.inf if high is None else high))
    expected = [
        (i, j)
        for i in range(-(-lengths[0] // 256))
        for j in range(-(-lengths[1] // 128))
        if seen[i * 256 : i * 256 + 256, j * 128 : j * 128 + 128].any()
    ]
    assert [tuple(t) for t in plan.list_tiles(lengths, blocks, low, high)] == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_training_memory_at_length_4096_is_a_fortieth_of_jax_nn(dtype: Any) -> None:
    args = [jax.ShapeDtypeStruct((1, 4096, 8, 64), dtype)] * 3
    ours, theirs = (temp_bytes(_training(f), *args) for f in (dot_product_attention, jax.nn.dot_product_attention))
    assert ours <= 0.025 * theirs


@pytest.mark.parametrize("time, dtype, times", [(64, jnp.float32, 7), (128, jnp.float32, 7), (1000, jnp.float32, 4), (4096, jnp.float32, 3)])
def test_training_memory_is_a_few_times_the_queries(time: int, dtype: Any, times: int) -> None:
    q = jax.ShapeDtypeStruct((2, time, 8, 64), dtype)
    assert temp_bytes(_training(dot_product_attention), q, q, q) <= times * q.size * q.dtype.itemsize


@pytest.mark.parametrize("time, times", [(64, 7), (128, 7), (512, 6.5), (1000, 6), (4096, 6)])
def test_training_memory_in_16_bits_is_a_few_times_the_queries(time: int, times: float) -> None:
    """Only the sum for dq is a whole array of float32, twice the queries; nothing that a loop slices is copied before it."""
    q = jax.ShapeDtypeStruct((2, time, 8, 64), jnp.bfloat16)
    assert temp_bytes(_training(dot_product_attention), q, q, q) <= times * q.size * q.dtype.itemsize


@pytest.mark.parametrize("dtype, kept", [(jnp.float32, 5.1), (jnp.bfloat16, 6.1)])
def test_layer_of_an_unrolled_stack_takes_no_memory_but_for_what_it_saves(dtype: Any, kept: float) -> None:
    """That is its input, q, k, v and the output, in 16 bits also what rounding took from it: the loops of backward share their memory."""
    x, w = jax.ShapeDtypeStruct((1, 512, 8, 64), dtype), jax.ShapeDtypeStruct((4, 3, 8, 64), dtype)

    def stack(x, w, layers):
        for weights in w[:layers]:
            q, k, v = (x * scale for scale in weights)
            x = x + dot_product_attention(q, k, v, is_causal=True)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    two, four = (temp_bytes(jax.grad(lambda x, w, n=n: stack(x, w, n), (0, 1)), x, w) for n in (2, 4))
    assert four - two <= 2 * kept * x.size * x.dtype.itemsize


@pytest.mark.parametrize("dtype, outputs", [(jnp.float32, 1), (jnp.bfloat16, 2)])
def test_only_output_and_logsumexp_are_saved(dtype: Any, outputs: int) -> None:
    """In 16 bits also what rounding took from the output."""
    q = jnp.zeros((2, 32, 4, 8), dtype)
    assert saved_bytes(lambda *a: dot_product_attention(*a, is_causal=True), q, q, q) <= outputs * q.nbytes + q.size // 8 * 4


def _training(attention: Any) -> Any:
    return jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, is_causal=True).astype(jnp.float32) ** 2), (0, 1, 2))


def test_vmap_is_a_loop(small_blocks: None) -> None:
    q, k, v = arrays()
    stack = [np.stack([x, np.sin(x)]) for x in (q, k, v)]

    @jax.jit
    def grad(*a):
        return jax.grad(lambda *b: dot_product_attention(*b, is_causal=True).sum(), (0, 1, 2))(*a)

    looped = jax.tree.map(lambda *x: np.stack(x), *(grad(*(x[i] for x in stack)) for i in (0, 1)))
    assert_trees_close(jax.vmap(grad)(*stack), looped, rtol=1e-4, atol=1e-5)


@pytest.mark.devices(2)
def test_batch_is_sharded_by_shard_map() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    args = arrays()

    @jax.jit
    def grad(*a):
        return jax.grad(lambda *b: dot_product_attention(*b, is_causal=True).sum(), (0, 1, 2))(*a)

    sharded = jax.jit(jax.shard_map(grad, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 3))(*args)
    assert_trees_close(sharded, grad(*args), rtol=1e-5, atol=1e-6)


def test_tiles_that_a_moved_causal_mask_hides_are_not_computed() -> None:
    q, k = jnp.zeros((1, 256, 1, 8)), jnp.zeros((1, 512, 1, 8))

    def tiles(offset: int) -> int:
        """The length of the loop."""
        text = str(jax.make_jaxpr(lambda q, k: dot_product_attention(q, k, k, is_causal=True, query_offset=offset))(q, k))
        return int(text.split("length=")[1].split("\n")[0])

    assert tiles(-255) == 1 < tiles(0) < tiles(256) < tiles(511)


def test_offset_may_be_traced_for_decoding() -> None:
    q, k, v = arrays()
    step = jax.jit(lambda t: dot_product_attention(q[:, :1], k, v, is_causal=True, query_offset=t))
    for t in (0, 3, KV_TIME - 1):
        assert_trees_close(step(t), direct(q[:, :1], k[:, : t + 1], v[:, : t + 1])[0], rtol=1e-5, atol=1e-6)


def test_segments_in_a_list_are_a_batch_and_no_pair() -> None:
    q, k, v = arrays(time=4, kv_time=4)
    ids = [[0, 0, 1, 1], [0, 1, 1, 1]]
    listed, given = (dot_product_attention(q, k, v, segment_ids=x) for x in (ids, jnp.array(ids)))
    assert_trees_close(listed, given, rtol=0)


@pytest.mark.parametrize("window", [np.int64(2), (np.int32(2), np.int32(2))], ids=["one", "pair"])
def test_window_may_be_of_numpy_integers(window: Any) -> None:
    q, k, v = arrays()
    ours, given = (dot_product_attention(q, k, v, local_window_size=w) for w in (window, 2))
    assert_trees_close(ours, given, rtol=0)


WRONG = [
    (ValueError, "cudnn.*compiled for cpu", {"implementation": "cudnn"}),
    (ValueError, "implementation", {"implementation": "fast"}),
    (ValueError, "heads", {"key": jnp.zeros((BATCH, KV_TIME, 3, DIM)), "value": jnp.zeros((BATCH, KV_TIME, 3, DIM))}),
    (ValueError, "head_dim", {"key": jnp.zeros((BATCH, KV_TIME, KV_HEADS, DIM + 1))}),
    (ValueError, "batch", {"key": jnp.zeros((1, KV_TIME, KV_HEADS, DIM))}),
    (ValueError, "without batch", {"key": jnp.zeros((KV_TIME, KV_HEADS, DIM))}),
    (TypeError, "dtype", {"key": jnp.zeros((BATCH, KV_TIME, KV_HEADS, DIM), jnp.bfloat16)}),
    (TypeError, "mask is of dtype float32.*mask != 0 of zeros and ones", {"mask": jnp.zeros((1, 1, TIME, KV_TIME))}),
    (
        ValueError,
        r"mask has shape \(2, 11, 9\), whose first axis may be batch or heads: mask\[:, None\]",
        {"mask": random_mask(BATCH, TIME, KV_TIME)},
    ),
    (ValueError, "query_offset has shape", {"query_offset": jnp.zeros(3, int), "is_causal": True}),
    (TypeError, "query_offset is of dtype float32", {"query_offset": jnp.array(1.0), "is_causal": True}),
    (ValueError, "bias", {"bias": jnp.zeros((1, 3, TIME, KV_TIME))}),
    (ValueError, "bias", {"bias": jnp.zeros((1, 1, 1, TIME, KV_TIME))}),
    (ValueError, "key_value_seq_lengths", {"key_value_seq_lengths": jnp.array([1])}),
    (TypeError, "query_seq_lengths", {"query_seq_lengths": jnp.array([1.0, 2.0])}),
    (ValueError, "sinks", {"sinks": jnp.zeros(3)}),
    (ValueError, "segment_ids", {"segment_ids": jnp.zeros((BATCH, TIME), int)}),
    (ValueError, "dropout_rate", {"dropout_rate": 1.0}),
    (ValueError, "dropout_key", {"dropout_rate": 0.5}),
    (ValueError, "both say which weights", {"dropout_rate": 0.5, "dropout_key": jax.random.key(0), "dropout_mask": jnp.ones((1, 1), bool)}),
    (TypeError, "dropout_mask is of dtype float32", {"dropout_rate": 0.5, "dropout_mask": jnp.ones((1, 1))}),
    (ValueError, "dropout_mask has shape", {"dropout_rate": 0.5, "dropout_mask": jnp.ones((17, 1), bool)}),
    (ValueError, "dropout_key has shape", {"dropout_rate": 0.5, "dropout_key": jax.random.split(jax.random.key(0), 3)}),
    (ValueError, "dropout_key has shape", {"dropout_rate": 0.5, "dropout_key": jnp.zeros((3, 2), jnp.uint32)}),
    (TypeError, "dropout_key is an array float32", {"dropout_rate": 0.5, "dropout_key": jnp.array([0.1, 0.2])}),
    (TypeError, "segment_ids is of dtype float32", {"segment_ids": (jnp.zeros((BATCH, TIME)), jnp.zeros((BATCH, KV_TIME)))}),
    (ValueError, "logit_soft_cap is 0.0", {"logit_soft_cap": 0.0}),
    (ValueError, "logit_soft_cap is -2", {"logit_soft_cap": -2.0}),
    (ValueError, "local_window_size is -1", {"local_window_size": -1}),
    (ValueError, "local_window_size is -1", {"local_window_size": (2, -1)}),
    (TypeError, "local_window_size is 1.5", {"local_window_size": (1.5, 1)}),
    (TypeError, "local_window_size is .*1, 2, 3", {"local_window_size": (1, 2, 3)}),
    (ValueError, "logit_soft_cap is inf", {"logit_soft_cap": jnp.inf}),
    (ValueError, "logit_soft_cap is nan", {"logit_soft_cap": jnp.nan}),
    (TypeError, "is_causal is 'False'", {"is_causal": "False"}),
    (ValueError, r"scale has shape \(4,\)", {"scale": jnp.ones(4)}),
    (TypeError, "sinks is of dtype complex64", {"sinks": 1j * jnp.ones(HEADS)}),
    (TypeError, "bias is of dtype complex64", {"bias": 1j * jnp.ones((1, 1, TIME, KV_TIME))}),
    (ValueError, "segment_ids has shape", {"segment_ids": (jnp.zeros((1, TIME), int), jnp.zeros((1, KV_TIME), int))}),
    (ValueError, "segment_ids has shape", {"segment_ids": (jnp.zeros((BATCH + 1, TIME), int), jnp.zeros((BATCH + 1, KV_TIME), int))}),
    (TypeError, "query is None", {"query": None}),
    (TypeError, "key is 'abc'", {"key": "abc"}),
    (TypeError, "dropout_key is 'abc'", {"dropout_key": "abc"}),
]


@pytest.mark.parametrize("error, words, options", WRONG)
def test_wrong_input_is_refused(error: type[Exception], words: str, options: dict[str, Any]) -> None:
    given = dict(zip(("query", "key", "value"), arrays(), strict=True)) | options
    with pytest.raises(error, match=f"dot_product_attention: .*{words}"):
        dot_product_attention(**given)


def test_example_runs() -> None:
    out, lse = DotProductAttentionFunction.apply(*DotProductAttentionFunction.example(jax.random.key(0), jnp.float32))
    assert bool(jnp.isfinite(out).all()) and lse.dtype == jnp.float32


def test_traced_rate_of_dropout_gives_what_a_known_one_does() -> None:
    q, k, v = jax.random.normal(jax.random.key(1), (3, 2, 9, 2, 4))
    run = lambda rate: jax.value_and_grad(lambda q: jnp.sin(dot_product_attention(q, k, v, dropout_rate=rate, dropout_key=jax.random.key(0))).sum())(
        q
    )
    for rate in (0.0, 0.25):
        assert_trees_close(jax.jit(run)(rate), run(rate), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="dot_product_attention: dropout_rate has no gradient"):
        jax.grad(lambda rate: dot_product_attention(q, k, v, dropout_rate=rate, dropout_key=jax.random.key(0)).sum())(0.5)
