"""Dropout that remembers its key."""
