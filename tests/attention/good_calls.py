"""Good calls of attention, for `tests/test_bad_input.py`."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.support import draw_normal


def normal(*shape, seed=0):
    return draw_normal(seed, shape)


def _attention():
    arrays = {"query": normal(2, 5, 4, 3), "key": normal(2, 6, 2, 3, seed=1), "value": normal(2, 6, 2, 3, seed=2)}
    masks = {"bias": normal(1, 4, 5, 6, seed=3), "mask": jnp.tri(5, 6, 2, dtype=bool)[None, None], "sinks": normal(4, seed=4)}
    lengths = {"query_seq_lengths": jnp.array([5, 4]), "key_value_seq_lengths": jnp.array([6, 3])}
    segments = {"segment_ids": (jnp.array([[0, 0, 0, 1, 1]] * 2), jnp.array([[0, 0, 0, 1, 1, 1]] * 2))}
    numbers = {"scale": 0.5, "logit_soft_cap": 2.0, "dropout_rate": 0.2, "dropout_key": jax.random.key(1)}
    flags = {"is_causal": True, "broadcast_dropout": False, "return_logsumexp": False, "implementation": "xla", "local_window_size": 4}
    return arrays | masks | lengths | segments | numbers | flags


def _rotary():
    return {
        "x": normal(2, 3, 2, 6),
        "positions": jnp.array([[0, 1, 5], [3, 0, 2]]),
        "rotated_features": 4,
        "interleaved": False,
        "heads_first": False,
    }


def _module():
    sizes = {"num_heads": 4, "in_features": 3, "qkv_features": 8, "out_features": 5, "num_kv_heads": 2, "in_kv_features": 6}
    flags = {"broadcast_dropout": False, "use_bias": True, "normalize_qk": True, "decode": False}
    return sizes | flags | {"dtype": jnp.float32, "param_dtype": jnp.float32, "dropout_rate": 0.2, "rngs": nnx.Rngs(0)}


def _inputs():
    arrays = {"inputs_q": normal(2, 5, 3), "inputs_k": normal(2, 7, 6, seed=1), "inputs_v": normal(2, 7, 6, seed=2)}
    return arrays | {"mask": jnp.tri(5, 7, 2, dtype=bool)[None, None], "deterministic": True, "decode": False, "is_causal": True}


CALLS = {
    "MultiHeadAttention": (_module, _inputs),
    "dot_product_attention": _attention,
    "rotary_embedding": [
        lambda: _rotary() | {"base": 100.0},
        lambda: _rotary() | {"frequencies": jnp.array([1.0, 0.3])},
    ],
}
