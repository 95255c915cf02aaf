"""What an H100 and an H200 have, as the kernels' sizes are chosen for them."""

# Grids have a CTA, or a few, for each of these SMs; a GPU with another number of SMs runs the same grid.
NUM_SMS = 132
MAX_SHARED_BYTES = 232_448  # that a CTA may have
