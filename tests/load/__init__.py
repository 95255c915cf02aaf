"""Expert load, its recorder, placements and weights."""
