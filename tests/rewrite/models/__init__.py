"""Models of the same make as public ones, each a function of a key and sizes that gives (loss, params, batch)."""
