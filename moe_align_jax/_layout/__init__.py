"""Moves of rows into the masked and contiguous layouts, and back."""
