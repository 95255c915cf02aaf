"""Side-by-side timing of moe_align_block_size and its peers: verified first, then timed."""
