"""Layers that leave values alone and change what comes back: they act on the gradient only."""
