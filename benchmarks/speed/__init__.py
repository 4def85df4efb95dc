"""What engines cost in time and memory, and what their parts do: ``python -m benchmarks``."""
