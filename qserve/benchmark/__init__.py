"""Benchmarks of the kernels, run by `qserve bench`."""
