"""TensorRT's real parser and builder on a machine without a GPU, for tests only: see ``set_up.py``."""
