"""What an accelerator computes at once keeps to its budget of memory, whatever the length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers.recurrent import chunks
from layers.recurrent.chunks import Chunks
from tests.support import temp_bytes

TIME = 1024
HEADS, BY_HEAD = (1, TIME, 2, 32), (1, TIME, 2)
LAYERS = {
    "gated_linear_attention": (layers.gated_linear_attention, [HEADS] * 4),
    "gated_delta_rule": (layers.gated_delta_rule, [HEADS] * 3 + [BY_HEAD] * 2),
    "state_space_dual": (layers.state_space_dual, [HEADS, BY_HEAD, (2,), (1, TIME, 1, 32), (1, TIME, 1, 32)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_memory_is_bounded_by_the_budget_of_a_span(name, monkeypatch):
    monkeypatch.setattr(chunks, "SPAN_BYTES", 1 << 22)
    layer, shapes = LAYERS[name]
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    with layers.compiling_for("cuda"):
        taken = temp_bytes(jax.grad(lambda *args: jnp.sum(jnp.sin(layer(*args))), tuple(range(len(args)))), *args)
    assert taken <= chunks.SPAN_BYTES


def test_spans_are_as_few_as_the_budget_allows_and_about_equal(monkeypatch):
    monkeypatch.setattr(chunks, "SPAN_BYTES", 1 << 20)
    with layers.compiling_for("cuda"):
        assert Chunks.of(16, 1000, step_bytes=1 << 12) == Chunks(16, 256)
        assert Chunks.of(16, 1025, step_bytes=1 << 12) == Chunks(16, 208)
        assert Chunks.of(16, 1000, step_bytes=1 << 30) == Chunks(16, 16)
        assert Chunks.of(16, 0, step_bytes=1 << 12) == Chunks(16, 16)
    with layers.compiling_for("cpu"):
        assert Chunks.of(16, 1000, step_bytes=1) == Chunks(16, 16)


EMPTY = {
    "gated_linear_attention": (layers.gated_linear_attention, ((1, 0, 1, 2), (1, 0, 1, 2), (1, 0, 1, 3), (1, 0, 1, 2))),
    "gated_delta_rule": (layers.gated_delta_rule, ((1, 0, 1, 2), (1, 0, 1, 2), (1, 0, 1, 3), (1, 0, 1), (1, 0, 1))),
    "state_space_dual": (layers.state_space_dual, ((1, 0, 2, 3), (1, 0, 2), (2,), (1, 0, 1, 2), (1, 0, 1, 2))),
}


@pytest.mark.parametrize("name", EMPTY)
def test_sequence_without_steps_gives_no_output_and_zeros_for_what_all_steps_share(name):
    fn, shapes = EMPTY[name]
    grads = jax.jit(jax.grad(lambda *x: fn(*x).sum(), tuple(range(len(shapes)))))(*[-np.ones(s, np.float32) for s in shapes])
    assert [g.shape for g in grads] == list(shapes)
    assert all((np.asarray(g) == 0).all() for g in grads)
