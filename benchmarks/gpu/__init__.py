"""Speed of the GPU kernels and the device executor relative to the machine's bandwidths: ``python -m benchmarks.gpu``."""
