"""Attention by cuDNN without a GPU: what the library does around the kernel, which calls it refuses, and the programs that it lowers to."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers.attention.dot_product_attention import DotProductAttentionFunction
from layers.attention.plan import Hidden, Options
from layers.core import compat
from layers.core.trees import replaced
from layers.kernels import cudnn_attention
from layers.kernels.attention import KERNELS, AttentionCall
from layers.kernels.place import Place
from tests.kernels.reference import FakeCudnn
from tests.support import assert_trees_close

H100, A100, CPU = Place("cuda", "9.0", "0.11"), Place("cuda", "8.0", "0.11"), Place("cpu", "cpu", "0.11")
TIME, HEADS, KV_HEADS, DIM = 6, 4, 2, 8


@pytest.fixture
def cudnn(monkeypatch):
    fake = FakeCudnn()
    monkeypatch.setattr(compat, "cudnn_attention_forward", fake.forward)
    monkeypatch.setattr(compat, "cudnn_attention_backward", fake.backward)
    return fake


def normal(*shape, seed, dtype=None):
    return jax.random.normal(jax.random.key(seed), shape, dtype or jnp.result_type(float))


def queries_keys_values(kv_time=TIME):
    return normal(2, TIME, HEADS, DIM, seed=0), normal(2, kv_time, KV_HEADS, DIM, seed=1), normal(2, kv_time, KV_HEADS, DIM, seed=2)


LENGTHS = {"query_lengths": jnp.array([6, 4]), "key_lengths": jnp.array([5, 2])}
CASES = {
    "plain": ({}, {}),
    "fewer keys": ({}, {"kv_time": 4}),
    "causal": ({"low": 0}, {}),
    "causal window": ({"low": 0, "high": 2}, {}),
    "lengths": (LENGTHS, {}),
    "no keys": ({"key_lengths": jnp.array([0, 3])}, {}),
    "causal window, lengths": (LENGTHS | {"low": 0, "high": 1}, {}),
    "bias": ({"low": 0}, {"bias": (1, HEADS, TIME, TIME)}),
    "sinks": ({"low": 0}, {"sinks": (HEADS,)}),
    "sinks, lengths, bias": (LENGTHS, {"sinks": (HEADS,), "bias": (1, HEADS, TIME, TIME)}),
}


def both_ways(case, uses_lse=True):
    """Functions of q, k, v, bias and sinks: by cuDNN and by XLA; and arguments."""
    options, arrays = CASES[case]
    hidden = Hidden(**{n: x for n, x in options.items() if n.endswith("lengths")})
    bounds = {n: x for n, x in options.items() if not n.endswith("lengths")}
    args = list(queries_keys_values(arrays.get("kv_time", TIME)))
    args += [normal(*arrays[n], seed=3) if n in arrays else None for n in ("bias", "sinks")]

    def way(implementation):
        def scalar(*args):
            out, lse = DotProductAttentionFunction.apply(*args, hidden, Options(0.4, **bounds, implementation=implementation))
            finite = jnp.where(lse == -jnp.inf, 0.0, lse)
            return jnp.sum(jnp.sin(out)) + (jnp.sum(jnp.cos(finite)) if uses_lse else 0)

        return scalar

    return way("cudnn"), way("xla"), args


def differentiated(args):
    return tuple(i for i, x in enumerate(args) if x is not None)


@pytest.mark.parametrize("uses_lse", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_xla(case, uses_lse, cudnn):
    with jax.enable_x64(True):
        by_cudnn, by_xla, args = both_ways(case, uses_lse)
        got, expected = (jax.value_and_grad(f, differentiated(args))(*args) for f in (by_cudnn, by_xla))
        assert_trees_close(got, expected, rtol=1e-9, atol=1e-10)
        assert cudnn.calls == ["forward", "backward"]


@pytest.mark.parametrize("case", ["causal window, lengths", "sinks, lengths, bias"])
def test_forward_mode_and_second_derivatives_are_those_of_xla(case, cudnn):
    with jax.enable_x64(True):
        by_cudnn, by_xla, args = both_ways(case)
        given = [args[i] for i in differentiated(args)]
        along = [jnp.cos(x) for x in given]

        def derivatives(f):
            of_moving = lambda *moved: f(*replaced(args, differentiated(args), moved))
            everywhere = tuple(range(len(given)))
            return jax.jvp(of_moving, given, along)[1], jax.jvp(jax.grad(of_moving, everywhere), given, along)[1]

        assert_trees_close(jax.jit(lambda: derivatives(by_cudnn))(), jax.jit(lambda: derivatives(by_xla))(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case, by_kernel", [("causal window, lengths", True), ("bias", False)])
def test_batch_of_batches_is_one_call_unless_there_is_a_bias(case, by_kernel, cudnn):
    with jax.enable_x64(True):
        by_cudnn, by_xla, (q, *rest) = both_ways(case)
        q = jnp.stack([q, jnp.sin(q)])
        got, expected = (jax.vmap(lambda q, f=f: jax.grad(f)(q, *rest))(q) for f in (by_cudnn, by_xla))
        assert_trees_close(got, expected, rtol=1e-9, atol=1e-10)
        assert (4 in cudnn.batches) is by_kernel


def test_remat_is_that_of_xla(cudnn):
    with jax.enable_x64(True):
        by_cudnn, by_xla, args = both_ways("causal")
        got, expected = (jax.jit(jax.grad(jax.checkpoint(f)))(*args) for f in (by_cudnn, by_xla))
        assert_trees_close(got, expected, rtol=1e-9, atol=1e-10)


def test_bias_that_cudnn_has_no_gradient_for_gets_that_of_xla(cudnn):
    with jax.enable_x64(True):
        by_cudnn, by_xla, args = both_ways("plain")
        args[3] = normal(2, 1, TIME, TIME, seed=5)
        got, expected = (jax.grad(f, (0, 3))(*args) for f in (by_cudnn, by_xla))
        assert_trees_close(got, expected, rtol=1e-9, atol=1e-10)
        assert cudnn.calls == ["forward"]


def test_what_lies_beyond_the_lengths_may_be_nan(cudnn):
    with jax.enable_x64(True):
        by_cudnn, _, args = both_ways("causal window, lengths")
        clean = jax.grad(by_cudnn, (0, 1, 2))(*args)
        spoiled = [x.at[1, n:].set(jnp.nan) for x, n in zip(args[:3], (4, 2, 2), strict=True)]
        assert_trees_close(jax.grad(by_cudnn, (0, 1, 2))(*spoiled, *args[3:]), clean, rtol=0)


def test_query_without_a_key_gives_zero_and_no_gradient(cudnn):
    q, k, v = (x.astype(jnp.bfloat16) for x in queries_keys_values())
    hidden = Hidden(key_lengths=jnp.array([0, 3]))
    out, pull = jax.vjp(lambda q: DotProductAttentionFunction.apply(q, k, v, None, None, hidden, Options(implementation="cudnn")), q)
    assert not out[0][0].any() and bool((out[1][0] == -jnp.inf).all())
    dq = pull(jax.tree.map(jnp.ones_like, out))[0]
    assert not dq[0].any() and bool(jnp.isfinite(dq).all()) and bool(dq[1].any())


def test_gradient_of_logsumexp_enters_with_less_error_than_rounding_it_would_make(cudnn):
    """In 16 bits, as two numbers."""
    q, k, v = (x.astype(jnp.bfloat16) for x in queries_keys_values())
    dlse = normal(2, TIME, HEADS, seed=4, dtype=jnp.float32)

    def dq(*args, implementation):
        _, pull = jax.vjp(
            lambda q: DotProductAttentionFunction.apply(q, *args[1:], None, None, Hidden(), Options(implementation=implementation))[1], args[0]
        )
        return pull(dlse.astype(jnp.float32))[0].astype(jnp.float32)

    exact = dq(*(x.astype(jnp.float32) for x in (q, k, v)), implementation="xla")
    error = jnp.linalg.norm(dq(q, k, v, implementation="cudnn") - exact) / jnp.linalg.norm(exact)
    assert error < 2 * float(jnp.finfo(jnp.bfloat16).eps)


CALL = AttentionCall((2, 64, 8, 64), (2, 64, 4, 64), (2, 64, 4, 64), "bfloat16")
LONGER = (2, 65, 4, 64)
FENCES = [
    ("NVIDIA GPUs, but this is compiled for cpu", CALL, CPU),
    ("NVIDIA GPUs, but this is compiled for tpu", CALL, Place("tpu", "TPU v5", "0.11")),
    ("compute capability 8.0 or later", CALL, Place("cuda", "7.5", "0.11")),
    ("but query is float32", replace(CALL, dtype="float32"), H100),
    ("but query is float64", replace(CALL, dtype="float64"), H100),
    ("explicit axes", replace(CALL, mesh="explicit"), H100),
    ("symbolic or 0", replace(CALL, query=(0, 64, 8, 64)), H100),
    ("head_dim is 60", replace(CALL, query=(2, 64, 8, 60), key=(2, 64, 4, 60), value=(2, 64, 4, 60)), H100),
    ("multiples of 8 up to 128", replace(CALL, query=(2, 64, 8, 136), key=(2, 64, 4, 136), value=(2, 64, 4, 136)), A100),
    ("multiples of 8 up to 256", replace(CALL, query=(2, 64, 8, 264), key=(2, 64, 4, 264), value=(2, 64, 4, 264)), H100),
    ("value has head_dim 32", replace(CALL, value=(2, 64, 4, 32)), H100),
    ("window that sees later keys", replace(CALL, high=3), H100),
    ("window that sees later keys", replace(CALL, low=-2, high=3), H100),
    ("window that sees later keys", replace(CALL, low=-1), H100),
    ("window of other keys than queries", replace(CALL, low=0, high=3, key=(2, 32, 4, 64), value=(2, 32, 4, 64)), H100),
    ("keys after the last query", replace(CALL, low=0, key=LONGER, value=LONGER), H100),
    ("no soft cap", replace(CALL, cap=30.0), H100),
    ("dropout", replace(CALL, dropout=True), H100),
    ("a mask as a bias", replace(CALL, mask=True), H100),
    ("packed sequences", replace(CALL, segments=True), H100),
    ("offsets", replace(CALL, offsets=True), H100),
    ("bias is float32 and would be rounded", replace(CALL, bias=(1, 8, 64, 64), bias_dtype="float32"), H100),
    ("even numbers", replace(CALL, bias=(1, 8, 64, 65), bias_dtype="bfloat16", key=LONGER, value=LONGER), H100),
]


@pytest.mark.parametrize("words, call, place", FENCES, ids=[f"{i} {words}" for i, (words, _, _) in enumerate(FENCES)])
def test_call_that_cudnn_would_get_wrong_is_refused(words, call, place):
    assert words in (cudnn_attention.refuse(call, place) or "")


@pytest.mark.parametrize(
    "call, place",
    [
        (CALL, H100),
        (CALL, A100),
        (replace(CALL, dtype="float16", low=0), H100),
        (replace(CALL, low=0, high=3, lengths=True, sinks=True), H100),
        (replace(CALL, bias=(2, 1, 64, 64), bias_dtype="bfloat16"), H100),
        (replace(CALL, query=(2, 64, 8, 256), key=(2, 64, 4, 256), value=(2, 64, 4, 256)), H100),
        (replace(CALL, key=(2, 32, 4, 64), value=(2, 32, 4, 64), low=0), H100),
        (replace(CALL, mesh="automatic"), H100),
    ],
)
def test_call_that_cudnn_has_is_taken(call, place):
    assert cudnn_attention.refuse(call, place) is None


@pytest.mark.parametrize(
    "call, wants, place, taken",
    [
        (CALL, {"wants_bias": False, "has_dlse": True}, H100, True),
        (replace(CALL, bias=(1, 8, 64, 64)), {"wants_bias": True, "has_dlse": False}, H100, True),
        (replace(CALL, bias=(2, 8, 64, 64)), {"wants_bias": True, "has_dlse": False}, H100, False),
        (replace(CALL, bias=(1, 1, 64, 64)), {"wants_bias": True, "has_dlse": False}, H100, False),
        (replace(CALL, bias=(2, 8, 64, 64)), {"wants_bias": False, "has_dlse": False}, H100, True),
        (replace(CALL, query=(2, 64, 8, 256)), {"wants_bias": False, "has_dlse": True}, H100, False),
        (replace(CALL, query=(2, 64, 8, 128)), {"wants_bias": False, "has_dlse": True}, A100, False),
    ],
)
def test_gradients_that_cudnn_does_not_have_are_left_to_xla(call, wants, place, taken):
    assert KERNELS["cudnn"].takes_backward(call, place, **wants) is taken


def lowered(fn, *shapes, architecture="9.0"):
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
    with layers.compiling_for("cuda", architecture):
        return jax.jit(fn).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def attend(*args, **options):
    return layers.dot_product_attention(*args, implementation="cudnn", **options)


OPTIONS = [
    {"is_causal": True},
    {"is_causal": True, "local_window_size": (16, 0), "sinks": jnp.ones(4)},
    {"key_value_seq_lengths": jnp.array([3, 64])},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["causal", "window and sinks", "lengths"])
@pytest.mark.parametrize("output", [0, 1], ids=["out", "lse"])
def test_program_for_a_gpu_calls_cudnn_forward_and_backward_and_holds_no_loop(options, output):
    shapes = (2, 64, 4, 64), (2, 64, 2, 64), (2, 64, 2, 64)

    def gradients(*args):
        return jax.grad(lambda *a: attend(*a, **options, return_logsumexp=True)[output].astype(jnp.float32).sum(), (0, 1, 2))(*args)

    text = lowered(gradients, *shapes)
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text and "while" not in text


def test_program_of_a_bias_gives_its_gradient():
    shapes = (2, 64, 4, 64), (2, 64, 2, 64), (2, 64, 2, 64), (1, 4, 64, 64)
    text = lowered(lambda *a: jax.grad(lambda *b: attend(*b).astype(jnp.float32).sum(), 3)(*a), *shapes)
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text and "while" not in text


@pytest.mark.devices(2)
def test_each_device_of_a_shard_map_calls_cudnn():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def gradients(*args):
        return jax.grad(lambda *a: attend(*a, is_causal=True).astype(jnp.float32).sum(), (0, 1, 2))(*args)

    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 3)
    text = lowered(sharded, (2, 64, 4, 64), (2, 64, 2, 64), (2, 64, 2, 64))
    assert "__cudnn$fmhaSoftmaxBackward(" in text


def test_cudnn_that_does_not_compile_says_why():
    """As on this machine, which has none."""
    cudnn_attention.fails.cache_clear()
    try:
        assert cudnn_attention.fails()
    finally:
        cudnn_attention.fails.cache_clear()


def test_lengths_of_numpy_are_as_good(cudnn):
    q, k, v = (x.astype(jnp.bfloat16) for x in queries_keys_values())
    with layers.compiling_for("cuda"):
        listed, given = (attend(q, k, v, key_value_seq_lengths=n) for n in ([3, 6], np.array([3, 6])))
    assert_trees_close(listed, given, rtol=0)
