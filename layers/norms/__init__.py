"""Normalisation: by the row, by groups of features, by the batch, and joined with a residual sum."""
