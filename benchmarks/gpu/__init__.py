"""What the GPU kernels and the executor on a device reach, beside the machine's own bounds: ``python -m benchmarks.gpu``."""
