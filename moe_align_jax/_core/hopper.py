"""What an H100 and an H200 have, as the kernels' sizes are chosen for them."""

# Grids are made for as many; a GPU with other numbers runs the same grid in more or fewer rounds.
NUM_SMS = 132
MAX_SHARED_BYTES = 232_448  # that a CTA may have
