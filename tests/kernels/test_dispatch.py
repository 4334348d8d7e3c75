"""Which way a call goes: a function of its shapes, dtypes and options, of what is compiled for, and of what was verified for that."""

import json
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import layers
from layers.kernels import verified
from layers.kernels.attention import KERNELS, AttentionCall
from layers.kernels.dispatch import Kernel, decide
from layers.kernels.place import Place, here

H100 = Place("cuda", "9.0", "0.11")
CALL = AttentionCall((2, 2048, 8, 64), (2, 2048, 4, 64), (2, 2048, 4, 64), "bfloat16", low=0)
LAYER = "dot_product_attention"


def row(against="", call=CALL, place=H100):
    found = dict(zip(verified.KEY, verified.key_of(LAYER, "cudnn", call.dtype, call.shape_class, place), strict=True))
    return found | {"against": against}


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Makes the table of what was verified one of these rows."""

    def fill(*rows):
        path = tmp_path / "verified.json"
        path.unlink(missing_ok=True)
        monkeypatch.setattr(verified, "TABLE", path)
        verified.write(list(rows), path)

    yield fill
    verified.rows.cache_clear()


def test_call_that_was_verified_takes_the_kernel(table):
    table(row())
    decision = decide(LAYER, CALL, KERNELS, H100)
    assert decision.chosen == "cudnn" and decision.against["xla"] == "cudnn was verified to be faster"


@pytest.mark.parametrize(
    "change",
    [
        {"place": replace(H100, jax="0.12")},
        {"place": replace(H100, architecture="10.0")},
        {"place": replace(H100, architecture=None)},
        {"call": replace(CALL, dtype="float16")},
        {"call": replace(CALL, low=None)},
        {"call": replace(CALL, sinks=True)},
        {"call": replace(CALL, key=(2, 64, 4, 64), value=(2, 64, 4, 64))},
        {"call": replace(CALL, query=(2, 2048, 8, 128), key=(2, 2048, 4, 128), value=(2, 2048, 4, 128))},
    ],
    ids=str,
)
def test_what_was_not_verified_is_left_to_xla(change, table):
    table(row())
    decision = decide(LAYER, change.get("call", CALL), KERNELS, change.get("place", H100))
    assert decision.chosen == "xla" and "not verified" in decision.against["cudnn"] and "python -m layers verify" in decision.against["cudnn"]


def test_kernel_that_was_slower_is_left_with_the_figures(table):
    table(row("slower than XLA: 3 ms against 2"))
    decision = decide(LAYER, CALL, KERNELS, H100)
    assert decision.chosen == "xla" and decision.against["cudnn"] == "slower than XLA: 3 ms against 2"


def test_arrays_that_may_lie_on_several_devices_are_left_to_xla_unless_asked_for(table):
    table(row())
    call = replace(CALL, mesh="automatic")
    assert "shard_map" in decide(LAYER, call, KERNELS, H100).against["cudnn"]
    assert decide(LAYER, call, KERNELS, H100, "cudnn").chosen == "cudnn"


def test_kernel_that_is_asked_for_is_taken_whatever_was_verified(table):
    table()
    decision = decide(LAYER, CALL, KERNELS, H100, "cudnn")
    assert decision.chosen == "cudnn" and decision.against["xla"] == "cudnn is asked for"


def test_xla_that_is_asked_for_is_taken_though_a_kernel_was_verified(table):
    table(row())
    assert decide(LAYER, CALL, KERNELS, H100, "xla").chosen == "xla"


def test_kernel_that_cannot_do_the_call_is_an_error_with_the_reason():
    with pytest.raises(ValueError, match=r"implementation is 'cudnn', which cannot do this call: it has no soft cap\. Use implementation='xla'"):
        decide(LAYER, replace(CALL, cap=2.0), KERNELS, H100, "cudnn")


def test_kernel_that_does_not_load_is_warned_of_and_left_to_xla(table, monkeypatch):
    table(row(place=here()))
    q, k = jnp.zeros((1, 2048, 2, 64), jnp.bfloat16), jnp.zeros((1, 2048, 1, 64), jnp.bfloat16)
    monkeypatch.setitem(KERNELS, "cudnn", _kernel(fails=lambda: "no libcudnn"))
    with pytest.warns(RuntimeWarning, match="cudnn does not work on this machine, so XLA computes it: no libcudnn"):
        found = layers.implementations(LAYER, q, k, k, is_causal=True)
    assert found.chosen == "xla" and "no libcudnn" in found.decisions[0].against["cudnn"]
    with pytest.raises(ValueError, match="implementation is 'cudnn', which does not work on this machine: no libcudnn"):
        layers.dot_product_attention(q, k, k, is_causal=True, implementation="cudnn")


def test_kernel_for_another_machine_is_not_tried_on_this_one(table, monkeypatch):
    table()
    q = jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.bfloat16)
    monkeypatch.setitem(KERNELS, "cudnn", _kernel(fails=lambda: pytest.fail("tried")))
    with layers.compiling_for("cuda", "9.0"):
        assert layers.implementations(LAYER, q, q, q, implementation="cudnn").chosen == "cudnn"


def _kernel(fails):
    def forward(call, q, k, v, *_):
        return q, jnp.zeros(q.shape[:3], jnp.float32)

    return Kernel("cudnn", lambda call, place: None, forward, lambda *_, **__: None, lambda *_, **__: True, fails)


def test_written_rows_are_added_to_those_of_other_machines(table, tmp_path):
    table(row(), row("slower", place=replace(H100, jax="0.12")))
    path = tmp_path / "verified.json"
    verified.write([row("less exact")], path)
    assert [r["against"] for r in json.loads(path.read_text())] == ["less exact", "slower"]


def test_what_was_measured_on_a_gpu_takes_cudnn_there_and_for_nothing_else():
    llama = AttentionCall((4, 4096, 16, 128), (4, 4096, 8, 128), (4, 4096, 8, 128), "bfloat16", low=0)
    assert decide(LAYER, llama, KERNELS, H100).chosen == "cudnn"
    for call in (replace(llama, dtype="float16"), replace(llama, bias=(1, 16, 4096, 4096), bias_dtype="bfloat16"), replace(llama, lengths=True)):
        assert decide(LAYER, call, KERNELS, H100).chosen == "xla"


def test_committed_table_has_whole_rows():
    rows = json.loads(verified.TABLE.read_text())
    assert len({tuple(r[k] for k in verified.KEY) for r in rows}) == len(rows)
    assert all(r["source"] and isinstance(r["against"], str) for r in rows)


def test_on_a_cpu_attention_is_by_xla_and_the_table_says_why():
    q = jnp.zeros((1, 4, 2, 8))
    found = layers.implementations(LAYER, q, q, q, is_causal=True)
    assert found.chosen == "xla" and found.decisions[0].against["cudnn"] == "it runs on NVIDIA GPUs, but this is compiled for cpu"
    assert "cudnn" in str(found) and "compiled for cpu" in str(found) and "causal, head_dim 8, short" in found._repr_html_()


def test_layer_with_one_way_says_so():
    found = layers.implementations("gelu", jax.ShapeDtypeStruct((3,), jnp.float32))
    assert found.chosen == "xla" and "one way only" in str(found)


def test_every_call_of_a_model_is_listed_though_it_was_traced_before():
    module = layers.MultiHeadAttention(2, 16, rngs=nnx.Rngs(0), decode=False)
    model = jax.jit(lambda x: module(module(x)))
    x = jnp.ones((1, 3, 16))
    model(x)
    assert [d.layer for d in layers.implementations(model, x).decisions] == [LAYER, LAYER]


@pytest.mark.parametrize("layer, error", [("nothing", ValueError), ("MultiHeadAttention", ValueError), (3, TypeError), ("_util", ValueError)])
def test_what_is_no_layer_is_refused(layer, error):
    with pytest.raises(error, match="implementations: layer is"):
        layers.implementations(layer, jnp.ones(3))


def test_module_asks_for_an_implementation_as_an_argument_and_as_an_attribute():
    made = layers.MultiHeadAttention(2, 16, rngs=nnx.Rngs(0), decode=False, implementation="cudnn")
    swapped = layers.swap(nnx.MultiHeadAttention(2, 16, rngs=nnx.Rngs(0), decode=False)).model
    assert swapped.implementation is None
    swapped.implementation = "cudnn"
    for module in (made, swapped):
        with pytest.raises(ValueError, match="implementation is 'cudnn', which cannot do this call: it runs on NVIDIA GPUs"):
            module(jnp.ones((1, 3, 16)))
        module.implementation = "xla"
        assert module(jnp.ones((1, 3, 16))).shape == (1, 3, 16)


def test_linen_attention_asks_for_an_implementation():
    from layers import linen

    x = jnp.ones((1, 3, 2, 8))
    with pytest.raises(ValueError, match="implementation is 'cudnn'"):
        linen.dot_product_attention(x, x, x, implementation="cudnn")


def test_nothing_is_warned_of_where_nothing_was_asked_for():
    q = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers.dot_product_attention(q, q, q)


def test_tokamax_is_refused_with_the_reason():
    assert "gives no logsumexp" in decide(LAYER, CALL, KERNELS, H100).against["tokamax"]
    with pytest.raises(ValueError, match=r"implementation is 'tokamax', which cannot do this call: its public function gives no logsumexp"):
        decide(LAYER, CALL, KERNELS, H100, "tokamax")
