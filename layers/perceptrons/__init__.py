"""Multilayer perceptrons as one layer: matmul, activation, matmul."""

from layers.perceptrons.gated_mlp import GatedMLP as GatedMLP
from layers.perceptrons.gated_mlp import gated_mlp as gated_mlp
from layers.perceptrons.mlp import MLP as MLP
from layers.perceptrons.mlp import mlp as mlp
