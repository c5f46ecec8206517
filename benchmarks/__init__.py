"""Benchmarks: each prints what it measured, with its command and machine class."""
