"""Tests of moe_align_jax. A package, so that tests share `tests.oracle` and `python -m tests.cover` runs."""
