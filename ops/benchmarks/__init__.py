"""Benchmarks: each prints a table with its machine; docs/performance.md keeps the figures."""
