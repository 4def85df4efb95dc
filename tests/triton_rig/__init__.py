"""NVIDIA's real Triton Inference Server on a machine without a GPU, for tests: see ``set_up.py``."""
