"""The alignment: configuration, tuning tables, reference and kernels."""
