"""Checkpoint to torch decoder to ONNX graphs to engine folder."""
