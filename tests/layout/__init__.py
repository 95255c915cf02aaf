"""Masked and contiguous layouts, and the quantisation in the masked one."""
