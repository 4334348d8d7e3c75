"""Affine maps."""

from layers.linear.linear import Linear as Linear
from layers.linear.linear import LinearFunction as LinearFunction
from layers.linear.linear import linear as linear
