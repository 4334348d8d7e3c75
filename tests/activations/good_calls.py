"""Good calls of the activations, for `tests/test_bad_input.py`."""

from tests.support import draw_normal

X, UP = draw_normal(0, (2, 3, 5))

CALLS = {
    "relu": lambda: {"x": X},
    "relu_squared": lambda: {"x": X},
    "silu": lambda: {"x": X},
    "softplus": lambda: {"x": X},
    "mish": lambda: {"x": X},
    "gelu": lambda: {"x": X, "approximate": True},
    "swiglu": lambda: {"gate": X, "up": UP},
    "geglu": lambda: {"gate": X, "up": UP, "approximate": True},
}
