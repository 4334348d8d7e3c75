"""Quantisers, whose forward is a staircase and whose backward is a slope chosen by hand."""
