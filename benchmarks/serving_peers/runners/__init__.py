"""One module per engine: ``python -m benchmarks.serving_peers.runners.NAME`` in that engine's virtual environment."""
