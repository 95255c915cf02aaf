"""The kernels of vLLM's two other aligned ops, which torch_bridge launches: around those of the alignment."""
