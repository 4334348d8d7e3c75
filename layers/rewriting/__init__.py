"""Finds in a traced function what this library has a better rule for, one file a pattern; `rewrite.py` is where to begin."""
