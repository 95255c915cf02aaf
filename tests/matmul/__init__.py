"""Grouped matrix multiplication: contract, kernel forms."""
