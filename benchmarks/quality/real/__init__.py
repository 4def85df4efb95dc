"""Quality of a real model: ``python -m benchmarks.quality --model smollm2`` writes docs/report/smollm2."""
