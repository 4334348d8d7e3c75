"""JAX's flash attention for TPUs in interpret mode, and the programs that calls lower to."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

import layers
from layers.attention.dot_product_attention import DotProductAttentionFunction
from layers.attention.plan import Hidden, Options
from layers.kernels import tpu_attention
from layers.kernels.attention import AttentionCall
from layers.kernels.place import Place
from tests.support import assert_trees_close

TIME, HEADS, DIM = 256, 2, 64
V5P = Place("tpu", "TPU v5", "0.11")
SEGMENTS = {"query_segments": jnp.arange(TIME)[None] // 100, "key_segments": (jnp.arange(TIME)[None] + 40) // 100 * 2}
CASES = {
    "plain": ({}, {}),
    "causal": ({"low": 0}, {}),
    "causal, fewer key heads, sinks": ({"low": 0}, {"kv_heads": 1, "sinks": True}),
    "lengths": ({"query_lengths": jnp.array([200]), "key_lengths": jnp.array([130]), "low": 0}, {}),
    "no keys": ({"key_lengths": jnp.array([0])}, {}),
    "segments": (SEGMENTS, {}),
    "segments, lengths": (SEGMENTS | {"query_lengths": jnp.array([200]), "key_lengths": jnp.array([130]), "low": 0}, {"kv_heads": 1}),
    "bias": ({"low": 0}, {"bias": True}),
}


def both_ways(case):
    """Functions of q, k, v, bias and sinks: by the kernel, and by XLA; and arguments."""
    options, arrays = CASES[case]
    hidden = Hidden(**{n: x for n, x in options.items() if n not in ("low", "high")})
    keys = jax.random.split(jax.random.key(0), 5)
    kv_heads = arrays.get("kv_heads", HEADS)
    shapes = (1, TIME, HEADS, DIM), (1, TIME, kv_heads, DIM), (1, TIME, kv_heads, DIM), (1, HEADS, TIME, TIME), (HEADS,)
    args = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    args = args[:3] + [x if arrays.get(n) else None for n, x in zip(("bias", "sinks"), args[3:], strict=True)]

    def way(implementation):
        def scalar(*args):
            out, lse = DotProductAttentionFunction.apply(*args, hidden, Options(0.1, low=options.get("low"), implementation=implementation))
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(jnp.where(lse == -jnp.inf, 0.0, lse)))

        return scalar

    return way("mosaic"), way("xla"), args


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_xla(case):
    by_kernel, by_xla, args = both_ways(case)
    differentiated = tuple(i for i, x in enumerate(args) if x is not None)
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(jax.value_and_grad(by_kernel, differentiated))(*args)
    assert_trees_close(got, jax.jit(jax.value_and_grad(by_xla, differentiated))(*args), rtol=1e-4, atol=1e-4)


def test_what_no_query_sees_may_be_nan():
    by_kernel, _, args = both_ways("segments, lengths")
    spoiled = [args[0].at[:, 200:].set(jnp.nan), args[1].at[:, 130:].set(jnp.nan), args[2].at[:, 130:].set(jnp.nan)]
    gradient = jax.jit(jax.grad(lambda q, k, v: by_kernel(q, k, v, None, None), (0, 1, 2)))
    with pltpu.force_tpu_interpret_mode():
        assert_trees_close(gradient(*spoiled), gradient(*args[:3]), rtol=0)


CALL = AttentionCall((2, 256, 8, 128), (2, 256, 4, 128), (2, 256, 4, 128), "bfloat16")


@pytest.mark.parametrize(
    "words, change, place",
    [
        ("on TPUs", {}, Place("cuda", "9.0", "0.11")),
        ("takes bfloat16", {"dtype": "float32"}, V5P),
        ("shard_map", {"mesh": "automatic"}, V5P),
        ("check_vma", {"varies": True}, V5P),
        ("multiples of 128 queries and keys", {"query": (2, 200, 8, 128)}, V5P),
        ("head_dim is 80", {"query": (2, 256, 8, 80)}, V5P),
        ("value has head_dim", {"value": (2, 256, 4, 64)}, V5P),
        ("symbolic or 0", {"value": (2, 256, 4, 0)}, V5P),
        ("window", {"low": 0, "high": 3}, V5P),
        ("moved", {"low": -3}, V5P),
        ("keys after the last query", {"low": 0, "query": (2, 128, 8, 128)}, V5P),
        ("soft cap", {"cap": 2.0}, V5P),
        ("dropout", {"dropout": True}, V5P),
        ("mask", {"mask": True}, V5P),
        ("offsets", {"offsets": True}, V5P),
        ("scale must not be 0", {"bias": (2, 8, 256, 256), "scale": 0.0}, V5P),
        ("bias has shape", {"bias": (1, 8, 256, 256)}, V5P),
    ],
)
def test_call_that_the_kernels_would_get_wrong_is_refused(words, change, place):
    assert words in (tpu_attention.refuse(replace(CALL, **change), place) or "")


@pytest.mark.parametrize("change", [{}, {"low": 0}, {"lengths": True, "segments": True, "sinks": True}, {"bias": (2, 8, 256, 256)}])
def test_call_that_the_kernels_have_is_taken(change):
    assert tpu_attention.refuse(replace(CALL, **change), V5P) is None


def test_program_for_a_tpu_calls_the_kernels_forward_and_backward():
    arrays = [jax.ShapeDtypeStruct((1, 256, heads, 128), jnp.bfloat16) for heads in (4, 2, 2)]

    def gradients(*args):
        attend = lambda *a: layers.dot_product_attention(*a, is_causal=True, implementation="mosaic")
        return jax.grad(lambda *a: attend(*a).astype(jnp.float32).sum(), (0, 1, 2))(*args)

    with layers.compiling_for("tpu", "TPU v5"):
        text = jax.jit(gradients).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 3 and "stablehlo.while" not in text
