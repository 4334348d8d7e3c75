"""What is hidden from a query is not touched: keys, values, queries and gradients that are NaN or infinite, in values, gradients and tangents."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import dot_product_attention
from layers.attention import plan
from tests.support import assert_trees_close, draw_normal, jit_grad

TIME, HEADS, DIM = 7, 2, 3
KEPT = jnp.array([True, True, False, True, True, False, False])  # keys
LAST = {"key_value_seq_lengths": jnp.array([4, 4])}, jnp.arange(TIME) < 4
CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "key lengths": (LAST[0], LAST[1], None),
    "mask of keys": ({"mask": KEPT[None, None, None]}, KEPT, None),
    "mask of integers": ({"mask": KEPT.astype(int)[None, None, None], "logit_soft_cap": 2.0}, KEPT, None),
    "padding on both sides": (
        {"query_seq_lengths": jnp.array([4, 4]), "key_value_seq_lengths": jnp.array([4, 4]), "is_causal": True},
        LAST[1],
        LAST[1],
    ),
    "sinks": (
        {"query_seq_lengths": jnp.array([4, 4]), "key_value_seq_lengths": jnp.array([4, 4]), "sinks": jnp.array([0.3, -1.0])},
        LAST[1],
        LAST[1],
    ),
    "window": ({"local_window_size": (2, 1), "query_offset": -3}, jnp.arange(TIME) < 5, jnp.arange(TIME) > 1),
    "segments": ({"segment_ids": (jnp.array([[1] * 4 + [0] * 3] * 2), jnp.array([[1] * 4 + [7] * 3] * 2))}, LAST[1], LAST[1]),
    "dropout": (LAST[0] | {"dropout_rate": 0.3, "dropout_key": jax.random.key(5)}, LAST[1], None),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "choose_blocks", lambda *_: (4, 3))


def draw(seed: int, dtype: Any = jnp.float32) -> jax.Array:
    return draw_normal(seed, (2, TIME, HEADS, DIM), dtype)


def spoil(x: jax.Array, kept: Any, number: float) -> jax.Array:
    return x if kept is None else jnp.where(kept[:, None, None] if x.ndim == 4 else kept[:, None], x, jnp.asarray(number, x.dtype))


def everything(options: dict[str, Any], arrays: Any, tangents: Any, douts: Any) -> Any:
    attend = partial(dot_product_attention, return_logsumexp=True, **options)
    outs, pull = jax.vjp(attend, *arrays)
    return outs, pull(douts), jax.jvp(attend, arrays, tangents)[1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_what_is_hidden_from_all_is_not_touched(name: str, dtype: Any) -> None:
    options, keys, queries = CASES[name]
    arrays, tangents = [draw(i, dtype) for i in range(3)], [draw(i, dtype) for i in range(3, 6)]
    run = jax.jit(partial(everything, options))

    def found(number: float) -> Any:
        each = lambda q, k, v: (spoil(q, queries, number), spoil(k, keys, number), spoil(v, keys, number))
        dout, dlse = spoil(draw(6, dtype), queries, number), jnp.cos(jnp.arange(2.0 * TIME * HEADS)).reshape(2, TIME, HEADS)
        return run(each(*arrays), each(*tangents), (dout, dlse if "sinks" in options else spoil(dlse, queries, number)))

    expected = found(0.0)
    for number in (jnp.nan, jnp.inf, -jnp.inf):
        given = found(number)
        assert_trees_close(jax.tree.map(np.float32, given), jax.tree.map(np.float32, expected), rtol=1e-5, atol=1e-6)
    assert not any(jnp.isnan(x).any() for x in jax.tree.leaves(expected))


@pytest.mark.parametrize(
    ("options", "untouched"),
    [
        ({"is_causal": True}, np.arange(TIME) < 5),
        ({"mask": jnp.tri(TIME, dtype=bool)[None, None]}, np.arange(TIME) < 5),
        ({"local_window_size": (1, 1)}, np.abs(np.arange(TIME) - 5) > 1),
        ({"segment_ids": jnp.array([[1, 1, 1, 1, 2, 2, 2]] * 2)}, np.arange(TIME) < 4),
    ],
    ids=["causal", "mask", "window", "segments"],
)
@pytest.mark.parametrize("spoiled", ["key", "value"])
def test_key_that_is_nan_touches_only_queries_that_see_it(options: dict[str, Any], untouched: Any, spoiled: str) -> None:
    q, k, v = (draw(i) for i in range(3))
    attend = lambda q, k, v: dot_product_attention(q, k, v, **options)
    bad = (q, k.at[:, 5].set(jnp.nan), v) if spoiled == "key" else (q, k, v.at[:, 5, :, 0].set(jnp.nan))
    given, pull = jax.vjp(attend, *bad)
    expected, pull_expected = jax.vjp(attend, q, k, v)
    np.testing.assert_array_equal(jnp.isnan(given).any((0, 2, 3)), ~untouched)
    np.testing.assert_allclose(given[:, untouched], expected[:, untouched], rtol=1e-5)
    dout = jnp.where(untouched[:, None, None], draw(6), 0)
    np.testing.assert_allclose(pull(dout)[0][:, untouched], pull_expected(dout)[0][:, untouched], rtol=1e-4, atol=1e-6)


def test_keys_of_queries_that_are_not_nan_have_gradients_without_it() -> None:
    ids = jnp.array([[1, 1, 1, 1, 2, 2, 2]] * 2)
    q, k, v = (draw(i) for i in range(3))
    gradients = jit_grad(lambda *a: dot_product_attention(*a, segment_ids=ids).sum(), (0, 1, 2))
    given, expected = gradients(q.at[:, 5].set(jnp.nan), k, v), gradients(q, k, v)
    for g, e in zip(given, expected, strict=True):
        np.testing.assert_allclose(g[:, :4], e[:, :4], rtol=1e-4, atol=1e-6)


def test_bias_under_a_mask_may_be_nan() -> None:
    q, k, v = (draw(i) for i in range(3))
    bias, mask = draw_normal(9, (2, HEADS, TIME, TIME)), jnp.tri(TIME, dtype=bool)
    run = jax.jit(jax.value_and_grad(lambda q, k, v, b: jnp.sin(dot_product_attention(q, k, v, b, mask, logit_soft_cap=3.0)).sum(), (0, 1, 2, 3)))
    given, expected = run(q, k, v, jnp.where(mask, bias, jnp.nan)), run(q, k, v, jnp.where(mask, bias, 0))
    assert_trees_close(given, expected, rtol=1e-5, atol=1e-6)


def test_huge_scores_computed_twice_have_bounded_gradients() -> None:
    q, k, v = 3e5 * draw(0), 3e5 * draw(1), draw(2)
    gradients = jax.jit(jax.grad(lambda v: dot_product_attention(q, k, v, scale=0.3, logit_soft_cap=None).sum()))(v)
    assert bool(jnp.isfinite(gradients).all()) and float(gradients.max()) <= TIME * 1.001
