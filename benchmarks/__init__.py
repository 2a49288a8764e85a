"""Benchmarks: one module a measurement, run from the root as `python -m benchmarks.NAME`."""
