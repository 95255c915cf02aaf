"""The DLPack path: jax runs the call on torch's memory."""
