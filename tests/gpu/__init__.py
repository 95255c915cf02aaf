"""What only a Hopper GPU can show: `make gpu-test`, and `python -m tests.gpu.sanitize`."""
