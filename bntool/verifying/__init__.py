"""Comparison: the noise floor, the reference, the checks, and where a fault is."""
