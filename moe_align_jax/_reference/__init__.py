"""The specification in plain jax.numpy; also `implementation="xla"`."""
