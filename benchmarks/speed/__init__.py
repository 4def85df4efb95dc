"""Time and memory of engines and of their parts on a CPU: ``python -m benchmarks``."""
