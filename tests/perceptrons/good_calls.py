"""Good calls of the perceptrons, for `tests/test_bad_input.py`."""

import jax
import jax.numpy as jnp
from flax import nnx


def draw(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


OPTIONS = {"activation": "silu", "save": "inputs", "block_size": 2, "dtype": jnp.float32}
NORM = {"norm_scale": draw(3), "epsilon": 1e-5, "scale_offset": 1.0}
MODULE = {"in_features": 3, "hidden_features": 6, "out_features": 4, "use_bias": True, "param_dtype": jnp.float32, **OPTIONS}
X = draw(5, 3)
UP, DOWN = {"up_kernel": draw(3, 6), "up_bias": draw(6)}, {"down_kernel": draw(6, 4), "down_bias": draw(4)}
GATE = {"gate_kernel": draw(3, 6), "gate_bias": draw(6)}

DROPOUT = {"dropout_rate": 0.2, "dropout_key": jax.random.key(1)}


def module():
    return {**MODULE, "dropout_rate": 0.2, "deterministic": False, "rngs": nnx.Rngs(0)}


CALLS = {
    "mlp": lambda: {"x": X, **UP, **DOWN, **OPTIONS, **NORM, **DROPOUT},
    "gated_mlp": lambda: {"x": X, **GATE, **UP, **DOWN, **OPTIONS, **NORM, **DROPOUT},
    "MLP": (module, lambda: {"x": X, **NORM, "deterministic": False, "rngs": nnx.Rngs(1)}),
    "GatedMLP": (module, lambda: {"x": X, **NORM, "deterministic": False, "rngs": nnx.Rngs(1)}),
}
