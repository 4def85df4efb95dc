"""Recall driven by the GPU: the cache in pinned memory of the host, working sets on the device."""
