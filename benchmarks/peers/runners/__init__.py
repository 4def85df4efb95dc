"""One module per engine: ``python -m benchmarks.peers.runners.NAME`` in that engine's virtual environment."""
