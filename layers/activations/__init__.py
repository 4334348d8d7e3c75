"""Activations and gates, which keep their inputs at most."""

from layers.activations.geglu import geglu as geglu
from layers.activations.gelu import gelu as gelu
from layers.activations.mish import mish as mish
from layers.activations.relu import relu as relu
from layers.activations.relu_squared import relu_squared as relu_squared
from layers.activations.silu import silu as silu
from layers.activations.softplus import softplus as softplus
from layers.activations.swiglu import swiglu as swiglu
