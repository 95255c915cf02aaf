"""Grouped matrix multiplication: one static description, a reference by XLA, and a kernel for Hopper GPUs."""
