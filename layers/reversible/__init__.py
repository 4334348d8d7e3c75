"""Residual networks whose backward pass computes the activations again from the output."""

from layers.reversible.reversible_coupling import reversible_coupling as reversible_coupling
from layers.reversible.reversible_stack import ReversibleStack as ReversibleStack
