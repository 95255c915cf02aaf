"""Parts of the expert load recorder that need no jax, and the checks of its arguments."""
