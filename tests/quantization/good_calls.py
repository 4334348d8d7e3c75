"""Good calls of `quantization`, for `tests/test_bad_input.py`."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.support import draw_normal

X, BOOK, KERNEL = (draw_normal(i, shape) for i, shape in enumerate([(2, 4, 3), (6, 3), (3, 5)]))
MASK = jnp.array([[True, True, False, True], [True, False, True, True]])


def linear():
    return {"in_features": 3, "out_features": 5, "use_bias": True, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}


CALLS = {
    "binarize": lambda: {"x": X},
    "fake_quantize": [
        lambda: {"x": X, "bits": 4, "axis": 1, "signed": True},
        lambda: {"x": X, "step": jnp.array([0.1, 0.2, 0.3]), "bits": 4, "axis": -1},
    ],
    "finite_scalar_codes": lambda: {"indices": jnp.array([[0, 7], [30, 119]]), "levels": (8, 5, 3), "dtype": jnp.float32},
    "finite_scalar_indices": lambda: {"codes": jnp.round(X), "levels": (8, 5, 3)},
    "finite_scalar_quantize": lambda: {"x": X, "levels": (8, 5, 3)},
    "int8_linear": [
        lambda: {"x": X, "kernel": KERNEL, "bias": KERNEL[0], "gradient_rounding": "nearest"},
        lambda: {"x": X, "kernel": KERNEL, "gradient_rounding": "stochastic", "key": jax.random.key(1)},
    ],
    "fp8_linear": lambda: {"x": X, "kernel": KERNEL, "bias": KERNEL[0], "scaling": "channel", "gradient_rounding": "nearest"},
    "Fp8Linear": (lambda: {**linear(), "scaling": "tensor", "gradient_rounding": "none"}, lambda: {"inputs": X}),
    "Int8Linear": (lambda: {**linear(), "gradient_rounding": "nearest"}, lambda: {"inputs": X}),
    "residual_vector_quantize": lambda: {"x": X, "codebooks": jnp.stack([BOOK, BOOK / 2]), "mask": MASK, "gradient": "rotation"},
    "round_ste": lambda: {"x": X},
    "ternarize": lambda: {"x": X, "threshold": 0.7, "axis": 1},
    "vector_quantize": lambda: {"x": X, "codebook": BOOK, "mask": MASK, "gradient": "rotation"},
    "VectorQuantizer": (
        lambda: {
            "num_embeddings": 6,
            "features": 3,
            "commitment_weight": 0.5,
            "gradient": "rotation",
            "ema": True,
            "decay": 0.9,
            "epsilon": 1e-3,
            "threshold_ema_dead_code": 1.0,
            "deterministic": False,
            "param_dtype": jnp.float32,
            "embedding_init": nnx.initializers.normal(),
            "rngs": nnx.Rngs(0),
        },
        lambda: {"x": X, "mask": MASK, "deterministic": False},
    ),
}
