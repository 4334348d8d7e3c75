"""Good calls of the normalisations, for `tests/test_bad_input.py`."""

import jax.numpy as jnp
from flax import nnx

from tests.support import draw_normal

X, RESIDUAL = draw_normal(0, (2, 2, 3, 6))
SCALE, BIAS = draw_normal(1, (2, 6))


def module(call=(), **options):
    """A constructor's arguments, and those of its call."""
    given = {"num_features": 6, "epsilon": 1e-5, "dtype": jnp.float32, "param_dtype": jnp.float32, "use_scale": True, "use_fast_variance": True}
    return lambda: {**given, **options, "rngs": nnx.Rngs(0)}, lambda: {"x": X, **dict(call)}


CALLS = {
    "rms_norm": lambda: {"x": X, "scale": SCALE, "epsilon": 1e-5, "scale_offset": 1.0},
    "layer_norm": lambda: {"x": X, "scale": SCALE, "bias": BIAS, "epsilon": 1e-5},
    "group_norm": lambda: {"x": X, "scale": SCALE, "bias": BIAS, "num_groups": 2, "epsilon": 1e-5},
    "batch_norm": lambda: {"x": X, "scale": SCALE, "bias": BIAS, "epsilon": 1e-5},
    "add_rms_norm": lambda: {"x": X, "residual": RESIDUAL, "scale": SCALE, "epsilon": 1e-5, "scale_offset": 1.0},
    "add_layer_norm": lambda: {"x": X, "residual": RESIDUAL, "scale": SCALE, "bias": BIAS, "epsilon": 1e-5},
    "RMSNorm": module({"mask": X > -1}, scale_offset=1.0),
    "LayerNorm": module({"mask": X > -1}, use_bias=True),
    "GroupNorm": module({"mask": X > -1}, use_bias=True, num_groups=2),
    "BatchNorm": module({"use_running_average": False, "mask": X > -1}, use_bias=True, momentum=0.9),
}
