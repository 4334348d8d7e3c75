"""Layers of experts: products of rows with the kernel of their group."""
