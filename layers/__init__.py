"""Layers for JAX whose gradient is written by hand."""

from layers.core.function import Function as Function
from layers.core.function import forward_mode as forward_mode
from layers.core.function import once_differentiable as once_differentiable
