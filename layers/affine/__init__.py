"""Affine maps."""

from layers.affine.linear import Linear as Linear
from layers.affine.linear import LinearFunction as LinearFunction
from layers.affine.linear import linear as linear
