"""Functions with the signatures of other projects, so that a model of theirs changes one import.

`moe_align_jax.adapters.maxtext` has MaxText's `gmm` and `sparse_matmul`, `moe_align_jax.adapters.haliax`
haliax' `ragged_dot`. Neither project is imported, and nothing of theirs is patched.
"""
