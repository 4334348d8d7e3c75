"""Activations and gates, which keep their inputs at most."""
