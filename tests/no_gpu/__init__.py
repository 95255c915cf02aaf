"""Takes every form of the kernels to machine code, and reads their launches, without a GPU."""
