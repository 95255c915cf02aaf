"""silu_and_mul_masked_quant: problem, configuration, reference, kernel."""
