"""The direct path: our compiled kernels on torch's stream, without jax in the call."""
