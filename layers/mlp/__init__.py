"""Multilayer perceptrons as one layer: matmul, activation, matmul."""
