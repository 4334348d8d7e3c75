"""What a Function is: how `apply` binds arguments, runs the rule, and tells JAX its derivative. Imports jax and `layers.core`."""
