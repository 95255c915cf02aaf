"""The small language that kernel bodies are written in, its MLIR side and its NumPy side."""
