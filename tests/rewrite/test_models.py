"""Models of the same make as public ones, in nnx, Linen, Equinox and plain JAX: what is replaced, equal gradients, and never more memory."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from tests.support import planned_bytes

pytest.importorskip("optax")
pytest.importorskip("equinox")

from tests.rewrite.models import encoder, gemma, gpt2, hybrid, qwen, vision, whisper

ATTENTION, LOSS = "dot_product_attention", "linear_cross_entropy"
MODELS = {
    "gemma": (gemma.make, {}, {ATTENTION: 2, LOSS: 1, "rms_norm": 9, "gated_mlp": 2}),
    "qwen": (qwen.make, {}, {ATTENTION: 2, LOSS: 1, "rms_norm": 9, "gated_mlp": 2}),
    "gpt2": (gpt2.make, {}, {ATTENTION: 2, LOSS: 1, "layer_norm": 5, "mlp": 2}),
    "gpt2 with dropout": (gpt2.make, {"rate": 0.1}, {ATTENTION: 2, LOSS: 1, "layer_norm": 5, "mlp": 2}),
    "vit": (vision.make_vit, {}, {ATTENTION: 2, "layer_norm": 5, "mlp": 2}),
    "mixer": (vision.make_mixer, {}, {"layer_norm": 5, "mlp": 4}),
    "whisper": (whisper.make, {}, {ATTENTION: 6, LOSS: 1, "layer_norm": 11, "mlp": 4}),
    "hybrid": (hybrid.make, {}, {ATTENTION: 1, LOSS: 1, "rms_norm": 4, "gated_mlp": 1, "elementwise": 1}),
    "encoder": (encoder.make, {}, {ATTENTION: 2, LOSS: 1, "layer_norm": 5, "mlp": 2}),
    "encoder with dropout": (encoder.make, {"rate": 0.1}, {ATTENTION: 2, LOSS: 1, "layer_norm": 5}),
}
SIZE = {"batch": 2, "length": 64, "width": 32, "depth": 2, "vocab": 300}


def as_float64(x):
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


@pytest.mark.parametrize("name", MODELS)
def test_model_has_the_same_gradient_in_no_more_memory(name):
    make, options, expected = MODELS[name]
    with jax.enable_x64():
        loss, *arguments = make(jax.random.key(0), **SIZE, **options)
        arguments = jax.tree.map(as_float64, arguments)
        report = layers.rewrite(loss).report(*arguments)
        found = Counter(row.name for row in report.replaced)
        assert {n: found[n] for n in expected} == expected
        compiled = [jax.jit(jax.value_and_grad(f)).lower(*arguments).compile() for f in (loss, layers.rewrite(loss))]
        plain, new = map(planned_bytes, compiled)
        assert new <= plain
        for e, a in zip(*(jax.tree.leaves(c(*arguments)) for c in compiled), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6 * max(float(jnp.abs(e).max()), 1e-2))


def test_windows_and_caps_are_read_off():
    loss, params, tokens = gemma.make(jax.random.key(0), **SIZE)
    details = [r.detail for r in layers.rewrite(loss).report(params, tokens).replaced if r.name == ATTENTION]
    assert details == ["scale 1, causal, window (15, 0), cap 50", "scale 1, causal, cap 50"]
