"""Good calls of `moe`, for `tests/test_bad_input.py`."""

import jax.numpy as jnp
from flax import nnx

from tests.support import draw_normal

X, KERNELS, UP, DOWN, GATE, LOGITS = (draw_normal(i, shape) for i, shape in enumerate([(9, 3), (4, 3, 2), (4, 3, 5), (4, 5, 3), (4, 3, 5), (9, 4)]))
INDICES = jnp.array([[0, 1], [1, 2], [2, 0], [3, 1], [0, 3], [1, 0], [2, 3], [3, 2], [0, 4]])


def _module():
    sizes = {"in_features": 3, "hidden_features": 5, "num_experts": 4, "k": 2, "out_features": 3}
    options = {"scores": "sigmoid", "normalize": True, "capacity_factor": 1.5, "use_balance_bias": True, "param_dtype": jnp.float32}
    return sizes | options | {"activation": "silu", "dtype": jnp.float32, "kernel_init": nnx.initializers.normal(), "rngs": nnx.Rngs(0)}


CALLS = {
    "grouped_matmul": lambda: {"x": X, "kernels": KERNELS, "group_sizes": jnp.array([3, 0, 4, 1]), "block_size": 2},
    "top_k_routing": lambda: {
        "logits": LOGITS,
        "k": 2,
        "scores": "sigmoid",
        "bias": jnp.array([0.1, 0.0, -0.1, 0.2]),
        "normalize": True,
        "capacity": 3,
        "mask": jnp.arange(9) < 7,
    },
    "moe": lambda: {
        "x": X,
        "weights": LOGITS[:, :2],
        "indices": INDICES,
        "up_kernels": UP,
        "down_kernels": DOWN,
        "gate_kernels": GATE,
        "activation": "silu",
        "dtype": jnp.float32,
    },
    "MoE": _module,
    "GatedMoE": _module,
}
