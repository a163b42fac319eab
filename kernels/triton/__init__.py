"""Triton kernels and their launchers, one module per operation; installed as `pyfast.kernels`."""
