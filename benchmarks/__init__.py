"""Measurements behind the figures in benchmarks/README.md; run one with ``python -m benchmarks.NAME``."""
