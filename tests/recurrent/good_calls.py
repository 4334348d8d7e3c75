"""Good calls of the recurrent layers, for `tests/test_bad_input.py`."""

import jax
import jax.numpy as jnp
from flax import nnx


def draw(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape) / 2


IDS = jnp.array([[0, 0, 0, 2, 2], [1, 3, 3, 3, 3]])
CELL = {
    "x": draw(2, 5, 3),
    "bias": draw(8),
    "seq_lengths": jnp.array([5, 4]),
    "segment_ids": IDS,
    "reverse": True,
    "time_major": False,
    "dtype": jnp.float32,
    "save": "states",
}
SEQUENCES = {
    "inputs": draw(2, 5, 3),
    "seq_lengths": jnp.array([5, 4]),
    "segment_ids": IDS,
    "reverse": False,
    "keep_order": True,
    "return_carry": True,
}


def cell():
    return nnx.GRUCell(3, 2, rngs=nnx.Rngs(0))


def module():
    return {"in_features": 3, "hidden_features": 2, "time_major": False, "save": "gates", "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}


def step(carry, x):
    new = jnp.sin(carry) + 0.5 * x.sum()
    return new, new * 2


CALLS = {
    "checkpointed_scan": [
        lambda: {"f": step, "init": draw(2), "xs": draw(6, 3), "reverse": False, "budget": 5},
        lambda: {"f": lambda c, _: (jnp.sin(c), c), "init": draw(2), "length": 6, "budget": 6},
    ],
    "checkpointed_while": lambda: {
        "cond_fun": lambda x: x.sum() < 100,
        "body_fun": lambda x: x + 1,
        "init_val": draw(2),
        "max_steps": 5,
        "budget": 5,
    },
    "gated_delta_rule": lambda: {
        "q": draw(2, 5, 2, 3),
        "k": draw(2, 5, 2, 3),
        "v": draw(2, 5, 2, 4),
        "g": -jnp.abs(draw(2, 5, 2)),
        "beta": jnp.abs(draw(2, 5, 2)),
        "scale": 0.5,
        "initial_state": draw(2, 2, 3, 4),
        "return_state": True,
        "chunk_size": 2,
        "segment_ids": IDS,
    },
    "gated_linear_attention": lambda: {
        "q": draw(2, 5, 2, 3),
        "k": draw(2, 5, 2, 3),
        "v": draw(2, 5, 2, 4),
        "g": -jnp.abs(draw(2, 5, 2, 3)),
        "scale": 0.5,
        "initial_state": draw(2, 2, 3, 4),
        "return_state": True,
        "chunk_size": 2,
        "segment_ids": IDS,
    },
    "gru": lambda: {
        **CELL,
        "input_kernel": draw(3, 6),
        "recurrent_kernel": draw(2, 6),
        "bias": draw(6),
        "recurrent_bias": draw(6),
        "initial_carry": draw(2, 2),
    },
    "linear_recurrence": lambda: {"a": draw(2, 5, 3), "b": draw(2, 5, 3), "initial": draw(2, 3), "axis": 1, "reverse": True, "segment_ids": IDS},
    "lstm": lambda: {**CELL, "input_kernel": draw(3, 8), "recurrent_kernel": draw(2, 8), "initial_carry": (draw(2, 2), draw(2, 2))},
    "selective_scan": lambda: {
        "u": draw(2, 5, 3),
        "delta": draw(2, 5, 3),
        "A": -jnp.abs(draw(3, 4)),
        "B": draw(2, 5, 4),
        "C": draw(2, 5, 4),
        "D": draw(3),
        "z": draw(2, 5, 3),
        "delta_bias": draw(3),
        "delta_softplus": True,
        "initial_state": draw(2, 3, 4),
        "return_last_state": True,
        "segment_ids": IDS,
    },
    "short_convolution": lambda: {
        "x": draw(2, 5, 3),
        "kernel": draw(4, 3),
        "bias": draw(3),
        "activation": "silu",
        "initial_state": draw(2, 3, 3),
        "return_state": True,
        "segment_ids": IDS,
    },
    "state_space_dual": lambda: {
        "x": draw(2, 5, 4, 3),
        "dt": draw(2, 5, 4),
        "A": -jnp.abs(draw(4)),
        "B": draw(2, 5, 2, 5),
        "C": draw(2, 5, 2, 5),
        "D": draw(4),
        "z": draw(2, 5, 4, 3),
        "dt_bias": draw(4),
        "dt_softplus": True,
        "initial_state": draw(2, 4, 3, 5),
        "return_last_state": True,
        "chunk_size": 2,
        "segment_ids": IDS,
    },
    "LSTM": (module, lambda: SEQUENCES),
    "GRU": (module, lambda: SEQUENCES),
    "RNN": (lambda: {"cell": cell(), "reverse": True, "keep_order": False, "return_carry": True}, lambda: {**SEQUENCES, "initial_carry": draw(2, 2)}),
    "Mamba": (
        lambda: {
            "d_model": 3,
            "d_state": 2,
            "d_conv": 3,
            "expand": 2,
            "dt_rank": 2,
            "dt_min": 0.01,
            "dt_max": 0.1,
            "dt_init": "random",
            "dt_scale": 0.5,
            "dt_init_floor": 0.001,
            "conv_bias": True,
            "use_bias": True,
            "param_dtype": jnp.float32,
            "rngs": nnx.Rngs(0),
        },
        lambda: {"inputs": draw(2, 5, 3), "return_state": True, "segment_ids": IDS},
    ),
}
