"""Residual networks whose backward pass computes the activations again from the output."""
