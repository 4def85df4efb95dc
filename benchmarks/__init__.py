"""Measurements: ``python -m benchmarks`` for speed and memory, ``python -m benchmarks.quality`` for quality."""
