"""The parts of expert placement: NumPy on the host, over all layers at once."""
