"""Accelerator kernels, one file each: plain functions, arrays in, arrays out; and which of them a call takes."""
