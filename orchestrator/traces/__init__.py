"""Workloads: rows of a trace, where they come from, when they arrive."""
