"""Dispatch and combine, the transports, and the kernels over NVLink."""
