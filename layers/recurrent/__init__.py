"""Layers that run along time, with their backward pass as a loop of its own."""
