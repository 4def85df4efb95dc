"""Quality against the kept share, every policy on the bundled model: ``python -m benchmarks.quality`` writes docs/report."""
