"""What every layer is written against. Imports jax and nothing else."""
