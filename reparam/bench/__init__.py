"""Benchmarks a user can run: ratios within one run, the machine described beside them."""
