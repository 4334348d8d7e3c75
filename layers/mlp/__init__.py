"""Multilayer perceptrons as one layer: matmul, activation, matmul."""

from layers.mlp.gated_mlp import GatedMLP as GatedMLP
from layers.mlp.gated_mlp import gated_mlp as gated_mlp
from layers.mlp.mlp import MLP as MLP
from layers.mlp.mlp import mlp as mlp
