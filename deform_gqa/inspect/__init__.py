"""Ahead-of-time compilation of the kernels and reports on it, for developers."""
