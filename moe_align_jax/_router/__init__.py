"""The router, and the router with the alignment behind it: problem, sizes, reference, kernels, primitives."""
