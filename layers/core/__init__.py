"""What rules are written with. Imports jax and nothing else."""
